"""Batches for pre-training out of token arrays, in numpy.

Training cuts windows from a stream of text. An epoch is a seeded permutation of
its windows, whose borders move by a seeded offset from epoch to epoch, so batch
i is a function of (seed, i) alone: resuming at any batch costs nothing. The
same holds for pairs, whose windows are the pairs.

Objectives: span corruption and prefix language modelling (see `objectives`),
and text to text, over pairs, as in T5's supervised pre-training (Raffel et al.
2020, section 3.5).
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools

from jaxtyping import Int
import numpy as np

from prompt_tuning.data import objectives
from prompt_tuning.data.token_arrays import TokenArrays
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import EOS_ID
from prompt_tuning.errors import UserError

OBJECTIVES = ('span_corruption', 'prefix_lm', 'text_to_text')
SPLITS = ('train', 'validation')

# Distinguishes the random streams that one seed feeds.
_EPOCH_STREAM, _WINDOW_STREAM = 0, 1


@dataclasses.dataclass(frozen=True)
class TokenArrayData:
  """Endless training batches from token arrays, for pre-training.

  Attributes:
    folder: token arrays, as `write_token_arrays` leaves them.
    objective: 'span_corruption' or 'prefix_lm' of text, 'text_to_text' of
      pairs, whose sides are cut to their lengths.
    batch_size: examples in a batch, B.
    feature_lengths: {'inputs': ..., 'targets': ...}, in tokens; inputs without
      the virtual tokens.
    split: 'train', or 'validation' for the documents held out.
    validation_fraction: share of the tokens, at the end of the stream, that
      is held out.
    noise_density: of span corruption.
    mean_noise_span_length: of span corruption, in tokens.
    sentinels: False leaves span corruption's sentinels out.
    window: tokens cut from the stream for an example. None takes the longest
      that fits for span corruption (568 for inputs 512 and targets 114) and
      the longer of inputs and targets, less EOS, for prefix LM. Pairs have no
      windows.
  """

  folder: str
  objective: str = 'span_corruption'
  batch_size: int = 32
  feature_lengths: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {'inputs': 512, 'targets': 114}
  )
  split: str = 'train'
  validation_fraction: float = 0.005
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  sentinels: bool = True
  window: int | None = None

  def __post_init__(self):
    for name, allowed in (('objective', OBJECTIVES), ('split', SPLITS)):
      if getattr(self, name) not in allowed:
        raise UserError(
          f'{name} must be one of {", ".join(allowed)}, got '
          f'{getattr(self, name)!r}'
        )
    lengths = self.feature_lengths
    if set(lengths) != {'inputs', 'targets'} or min(lengths.values()) < 1:
      raise UserError(
        'TASK_FEATURE_LENGTHS must give positive inputs and targets, got '
        f'{dict(lengths)}'
      )
    if self.batch_size < 1:
      raise UserError(f'batch_size must be 1 or more, got {self.batch_size}')
    if not 0.0 <= self.validation_fraction < 1.0:
      raise UserError(
        f'validation_fraction must be in [0, 1), got {self.validation_fraction}'
      )
    if not 0.0 < self.noise_density < 1.0 or self.mean_noise_span_length < 1:
      raise UserError(
        'noise_density must be in (0, 1) and mean_noise_span_length 1 or '
        f'more, got {self.noise_density} and {self.mean_noise_span_length}'
      )
    layout = 'pairs' if self.objective == 'text_to_text' else 'text'
    if self.arrays.layout != layout:
      raise UserError(
        f'objective {self.objective} needs token arrays of {layout}, '
        f'{self.folder} holds {self.arrays.layout}; write them with '
        'scripts/prepare_corpus.py --'
        f'{"pairs" if layout == "pairs" else "texts"}'
      )
    if layout == 'text':
      self._check_window()

  @functools.cached_property
  def arrays(self) -> TokenArrays:
    """The opened folder."""
    return TokenArrays.open(self.folder)

  @property
  def vocabulary(self) -> str:
    """Path of the vocabulary that made the ids."""
    return self.arrays.vocabulary.path

  @property
  def name(self) -> None:
    """No task has a name here."""

  @property
  def num_shards(self) -> None:
    """As many parts as the run likes: every row is read by itself."""

  def class_labels(self) -> None:
    """Running text has no classes."""

  def facts(self) -> dict[str, object]:
    """Nothing: no text of a template, no labels."""
    return {}

  def digest(self) -> str:
    """Of the tokens, as they were written."""
    return str(self.arrays.meta['tokens_sha256'])[:16]

  @functools.cached_property
  def window_length(self) -> int:
    """Tokens cut from the stream for an example."""
    if self.window is not None:
      return self.window
    if self.objective == 'prefix_lm':
      return max(*self._lengths, 3) - 1
    return objectives.span_corruption_window(*self._lengths, *self._noise)

  @property
  def _lengths(self) -> tuple[int, int]:
    return self.feature_lengths['inputs'], self.feature_lengths['targets']

  @property
  def _noise(self) -> tuple[float, float]:
    return self.noise_density, self.mean_noise_span_length

  def _check_window(self) -> None:
    inputs, targets = self._lengths
    window = self.window_length
    if window < 2:
      raise UserError(f'window must be 2 or more, got {window}')
    if self.objective == 'prefix_lm':
      needed = (inputs, targets)
      fits = window <= inputs + targets - 2 and min(needed) > 1
    else:
      needed = objectives.span_corruption_lengths(window, *self._noise)
      fits = needed[0] <= inputs and needed[1] <= targets
    if not fits:
      raise UserError(
        f'a window of {window} tokens does not fit inputs {inputs} and targets '
        f'{targets} of TASK_FEATURE_LENGTHS (needs {needed[0]} and '
        f'{needed[1]}); give a shorter window or none'
      )
    if self.objective == 'span_corruption' and self.sentinels:
      spans = objectives.noise_counts(window, *self._noise)[1]
      extra_ids = int(self.arrays.meta['extra_ids'])
      if spans > extra_ids:
        raise UserError(
          f'a window of {window} tokens has {spans} noise spans, the vocabulary'
          f' has {extra_ids} sentinels; give shorter TASK_FEATURE_LENGTHS'
        )

  @functools.cached_property
  def _documents(self) -> Int[np.ndarray, 'documents']:
    documents = self.arrays.split(self.split, self.validation_fraction)
    tokens = int(documents[-1] - documents[0])
    needed = 2 if self.objective == 'text_to_text' else self.window_length
    if tokens < needed:
      raise UserError(
        f'split {self.split} of {self.folder} has {tokens} tokens, an '
        f'example needs {needed}; give more text, shorter '
        'TASK_FEATURE_LENGTHS or another validation_fraction'
      )
    return documents

  @functools.cached_property
  def _stream(self) -> Int[np.ndarray, 'tokens']:
    return self.arrays.tokens[self._documents[0] : self._documents[-1]]

  @functools.cached_property
  def examples_per_epoch(self) -> int:
    """Windows or pairs in one pass over the split."""
    if self.objective == 'text_to_text':
      return len(self._documents) // 2
    # A window less than would fit, so that the borders can move.
    length = self.window_length
    return max((len(self._stream) - length + 1) // length, 1)

  def _epoch(
    self, seed: int, epoch: int
  ) -> tuple[int, Int[np.ndarray, 'windows']]:
    """An epoch's offset in the stream and its order of windows or pairs."""
    rng = np.random.default_rng((_EPOCH_STREAM, seed, epoch))
    windows, offset = self.examples_per_epoch, 0
    if self.objective != 'text_to_text':
      spare = len(self._stream) - windows * self.window_length
      offset = int(rng.integers(min(spare + 1, self.window_length)))
    return offset, rng.permutation(windows)

  def _pair(
    self, number: int
  ) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
    """Input and target of a pair of the split, cut to their lengths."""
    sides = []
    for which, length in enumerate(self._lengths):
      begin, end = self._documents[2 * number + which :][:2]
      sides.append(
        objectives.closed(self.arrays.tokens[begin : end - 1][: length - 1])
      )
    return sides[0], sides[1]

  def example(
    self, window: Int[np.ndarray, 'w'], rng: np.random.Generator
  ) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
    """Encoder ids and decoder targets made of a window, unpadded."""
    if self.objective == 'prefix_lm':
      return objectives.prefix_lm(rng, window, *self._lengths)
    # A target holds one EOS, its last: borders of documents leave no mark, as
    # in T5's pre-training.
    text = window[window != EOS_ID]
    if len(text) < 2:
      return np.array([EOS_ID], np.int32), np.array([EOS_ID], np.int32)
    return objectives.span_corruption(
      rng,
      text,
      int(self.arrays.meta['vocabulary_size']) - 1,
      noise_density=self.noise_density,
      mean_noise_span_length=self.mean_noise_span_length,
      sentinels=self.sentinels,
    )

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None = None,
    seed: int = 0,
    start: int = 0,
    rows: Int[np.ndarray, 'r'] | None = None,
    num_shards: int = 1,
  ) -> Iterator[dict[str, Int[np.ndarray, 'r length']]]:
    """Batches from number `start` on, without end.

    Args:
      virtual_tokens: placed in each row; T is P + inputs length then.
      seed: of the order and of the noise.
      start: number of batches that were consumed already.
      rows: numbers of the rows of each batch to make; None: all B.
      num_shards: changes nothing, since every row is read by itself.

    Yields:
      T5X's features, int32: encoder_input_tokens [r, T], and
      decoder_input_tokens, decoder_target_tokens and decoder_loss_weights
      [r, L]. Row j of batch i depends on (seed, i, j) alone.
    """
    del num_shards
    rows = np.arange(self.batch_size) if rows is None else rows
    inputs_length, targets_length = self._lengths
    if virtual_tokens is not None:
      inputs_length += virtual_tokens.length

    @functools.lru_cache(maxsize=2)
    def epoch(number):
      return self._epoch(seed, number)

    for first in range(start * self.batch_size, 2**62, self.batch_size):
      encoder = np.zeros((len(rows), inputs_length), np.int32)
      targets = np.zeros((len(rows), targets_length), np.int32)
      weights = np.zeros_like(targets)
      for row, number in enumerate((first + rows).tolist()):
        which, position = divmod(number, self.examples_per_epoch)
        offset, order = epoch(which)
        if self.objective == 'text_to_text':
          source, target = self._pair(int(order[position]))
        else:
          begin = offset + int(order[position]) * self.window_length
          source, target = self.example(
            self._stream[begin : begin + self.window_length],
            np.random.default_rng((_WINDOW_STREAM, seed, number)),
          )
        if virtual_tokens is not None:
          source = virtual_tokens.place(source, virtual_tokens.ids())
        encoder[row, : len(source)] = source
        targets[row, : len(target)] = target
        weights[row, : len(target)] = 1
      # Padding's id 0 also starts the decoder, as in T5.
      decoder_inputs = np.zeros_like(targets)
      decoder_inputs[:, 1:] = targets[:, :-1]
      yield {
        'encoder_input_tokens': encoder,
        'decoder_input_tokens': decoder_inputs,
        'decoder_target_tokens': targets,
        'decoder_loss_weights': weights,
      }
