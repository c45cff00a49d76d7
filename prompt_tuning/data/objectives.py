"""The objectives of pre-training, as numpy functions of a window of ids.

T5's span corruption (Raffel et al. 2020, section 3.1.4) and prefix language
modelling, T5's LM adaptation (Lester et al. 2021, section 3.1). Both give
inputs and targets, each with EOS.
"""

from jaxtyping import Int
import numpy as np

from prompt_tuning.data.vocabularies import EOS_ID
from prompt_tuning.errors import UserError


def span_corruption_lengths(
  window: int, noise_density: float = 0.15, mean_noise_span_length: float = 3.0
) -> tuple[int, int]:
  """Lengths of inputs and targets made of a window, sentinels and EOS included.

  Each noise span costs one sentinel in the inputs and one in the targets.
  """
  noise, spans = noise_counts(window, noise_density, mean_noise_span_length)
  return window - noise + spans + 1, noise + spans + 1


def noise_counts(
  window: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Numbers of noise tokens and of noise spans in a window of 2 or more."""
  noise = min(max(round(window * noise_density), 1), window - 1)
  spans = max(round(noise / mean_noise_span_length), 1)
  # Spans are divided by at least one token that is kept.
  return noise, min(spans, noise, window - noise)


def span_corruption_window(
  inputs_length: int,
  targets_length: int,
  noise_density: float = 0.15,
  mean_noise_span_length: float = 3.0,
) -> int:
  """The longest window whose inputs and targets fit, T5's rule for the first.

  T5's `random_spans_helper` gives 568 for inputs of 512 (targets need 114).
  """
  for window in range(1, inputs_length + targets_length):
    inputs, targets = span_corruption_lengths(
      window + 1, noise_density, mean_noise_span_length
    )
    if inputs > inputs_length or targets > targets_length:
      break
  if window < 2:
    raise UserError(
      'span corruption needs inputs and targets of 3 or more, '
      f'TASK_FEATURE_LENGTHS has {inputs_length} and {targets_length}'
    )
  return window


def random_segmentation(
  rng: np.random.Generator, items: int, segments: int
) -> Int[np.ndarray, 'segments']:
  """Lengths of `segments` non-empty runs of `items`, all divisions alike."""
  cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
  return np.diff(cuts, prepend=0, append=items)


def span_corruption(
  rng: np.random.Generator,
  window: Int[np.ndarray, 'w'],
  first_sentinel: int,
  *,
  noise_density: float = 0.15,
  mean_noise_span_length: float = 3.0,
  sentinels: bool = True,
) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
  """T5's span corruption of a window of 2 or more ids, both sides with EOS.

  Inputs are the window with each noise span replaced by a sentinel, targets
  the noise spans, each behind its sentinel. Kept and noise runs alternate,
  starting with a kept one.

  Args:
    rng: numpy's generator.
    window: ids without EOS.
    first_sentinel: id of <extra_id_0>; the following count down.
    noise_density: share of the window that is noise.
    mean_noise_span_length: in tokens.
    sentinels: False drops noise from the inputs without a trace and
      concatenates it in the targets.
  """
  noise, spans = noise_counts(
    len(window), noise_density, mean_noise_span_length
  )
  noise_lengths = random_segmentation(rng, noise, spans)
  kept_lengths = random_segmentation(rng, len(window) - noise, spans)
  lengths = np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1)
  is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
  inputs, targets = window[~is_noise], window[is_noise]
  if sentinels:
    names = first_sentinel - np.arange(spans)
    inputs = np.insert(inputs, np.cumsum(kept_lengths), names)
    starts = np.cumsum(noise_lengths) - noise_lengths
    targets = np.insert(targets, starts, names)
  return closed(inputs), closed(targets)


def closed(ids: Int[np.ndarray, 'w']) -> Int[np.ndarray, 'ids']:
  """int32 ids with EOS at their end."""
  return np.append(ids, EOS_ID).astype(np.int32)


def prefix_lm(
  rng: np.random.Generator,
  window: Int[np.ndarray, 'w'],
  inputs_length: int,
  targets_length: int,
) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
  """Splits a window at a random point: encoder reads on, decoder continues.

  The point is uniform among those that leave both sides non-empty and within
  their lengths. Both sides end with EOS, as T5's do: a model that never saw
  one after a few tokens has to be taught by every prompt to stop.
  """
  first = max(1, len(window) - (targets_length - 1))
  last = min(inputs_length - 1, len(window) - 1)
  point = int(rng.integers(first, last + 1))
  return closed(window[:point]), closed(window[point:])
