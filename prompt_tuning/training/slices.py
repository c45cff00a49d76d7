"""Batches without padding: rows by length, cut into slices of a few shapes.

The rows of a batch are taken from the longest to the shortest. A slice gets as
many as its shape has, padded to the smallest of a few lengths that holds the
first of them; what comes out of slices is added up, or put back in the order of
the rows. So the batch, its place in the order of the data, its loss and its
gradient are those of padded rows, and what is computed is little more than
what the rows hold.

The lengths are chosen from those of a sample, so that the least is computed:
for each number of lengths the best ones are found exactly, and one more is
taken as long as it saves enough to be worth compiling.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Int, Shaped
import numpy as np

from prompt_tuning.errors import UserError

# Lengths are multiples of this, but for the full one.
MULTIPLE = 8
# So many are chosen at most, the full length not counted, and a further one
# has to save this share of what is computed: it is one more shape to compile.
MOST = 6
WORTH = 0.01
# A slice costs, beside its rows, about what so many tokens cost: weights are
# read again, memory is asked for (T5 1.1 small on two cores of a Xeon: 57 more
# in a loop over slices, 115 more in calls of their own).
OVERHEAD = 64
# Batches of so few tokens are computed as they are.
SMALL = 256


def row_lengths(ids: Int[np.ndarray, 'N T']) -> Int[np.ndarray, 'N']:
  """How long rows are without the padding at their end; 1 or more."""
  used = ids != 0
  length = ids.shape[1] - np.argmax(used[:, ::-1], axis=1)
  return np.where(used.any(axis=1), length, 1)


def target_lengths(
  batch: Mapping[str, Shaped[np.ndarray, 'B _']],
) -> Int[np.ndarray, 'N']:
  """How much of the decoder's rows the loss looks at; 1 or more.

  Without weights in the batch every position counts.
  """
  targets = batch['decoder_target_tokens']
  if 'decoder_loss_weights' not in batch:
    return np.full(len(targets), targets.shape[1])
  weighted = (batch['decoder_loss_weights'] != 0).astype(np.int32)
  return np.maximum(row_lengths(targets), row_lengths(weighted))


class Slice(NamedTuple):
  """Some rows of a batch, and what they are padded to.

  Attributes:
    rows: their numbers; the first is repeated where there are too few.
    filled: how many of them count.
    inputs: the encoder's length.
    targets: the decoder's; None: as long as they are.
  """

  rows: Int[np.ndarray, 'r']
  filled: int
  inputs: int
  targets: int | None

  def of(
    self, batch: Mapping[str, Shaped[np.ndarray, 'B _']]
  ) -> dict[str, Shaped[np.ndarray, 'r _']]:
    """The rows of a batch's features, cut to the lengths."""
    return {
      name: values[
        self.rows,
        : self.inputs if name.startswith('encoder') else self.targets,
      ]
      for name, values in batch.items()
    }


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The shapes that slices have.

  Attributes:
    lengths: of encoder rows, virtual tokens included, shortest first; the last
      is the full one.
    rows: of a slice of each length.
    targets: lengths of the decoder's rows; the last is the full one, or None.
  """

  lengths: tuple[int, ...]
  rows: tuple[int, ...]
  targets: tuple[int | None, ...]

  def slices(
    self,
    inputs: Int[np.ndarray, 'N'],
    targets: Int[np.ndarray, 'N'] | None = None,
  ) -> list[Slice]:
    """Rows of these lengths, each in one slice, the longest first.

    Args:
      inputs: length of each row (see `row_lengths`).
      targets: likewise; None: the decoder's rows are not cut.
    """
    found = []
    order = np.argsort(-inputs, kind='stable')
    while len(order):
      which = int(np.searchsorted(self.lengths, inputs[order[0]]))
      rows, order = np.split(order, [self.rows[which]])
      decoder = self.targets[-1]
      if targets is not None:
        longest = targets[rows].max()
        decoder = self.targets[int(np.searchsorted(self.targets, longest))]
      padded = np.full(self.rows[which], rows[0])
      padded[: len(rows)] = rows
      found.append(Slice(padded, len(rows), self.lengths[which], decoder))
    return found

  def __str__(self) -> str:
    lengths = ', '.join(map(str, self.lengths[:-1]))
    lengths += f' or {self.lengths[-1]}' if lengths else str(self.lengths[-1])
    return (
      f'rows are padded to {lengths} tokens, virtual ones included, in slices'
      f' of {", ".join(map(str, self.rows))}'
    )


def ladder(shortest: int, longest: int) -> tuple[int, ...]:
  """Lengths for rows that nobody has seen yet: x, 1.5 x, 2 x, 3 x, 4 x, ..."""
  found, step = [], shortest
  while step < longest:
    found += [step, step * 3 // 2]
    step *= 2
  return (*(length for length in found if length < longest), longest)


def run(
  shapes: Shapes,
  features: Mapping[str, Shaped[np.ndarray, 'N _']],
  call: Callable[[dict[str, np.ndarray], int], Any],
  targets: Int[np.ndarray, 'N'] | None = None,
  members: int = 1,
) -> Any:
  """What a function gives for all rows, a slice at a time, in the rows' order.

  No slice waits for the one before it.

  Args:
    shapes: of the slices.
    features: of the rows, padded.
    call: (features of a slice, its number) -> a tree of device arrays
      [K * r, ...].
    targets: lengths of the decoder's rows; None: they are not cut.
    members: K, results of each row.

  Returns:
    The tree as numpy arrays [K, N, ...].
  """
  taken = shapes.slices(row_lengths(features['encoder_input_tokens']), targets)
  results = [call(one.of(features), n) for n, one in enumerate(taken)]
  order = np.argsort(np.concatenate([one.rows[: one.filled] for one in taken]))

  def joined(*parts):
    by_member = [
      part.reshape(members, -1, *part.shape[1:])[:, : one.filled]
      for part, one in zip(parts, taken, strict=True)
    ]
    return np.concatenate(by_member, axis=1)[:, order]

  return jax.tree.map(joined, *jax.device_get(results))


def evened(rows: int, total: int) -> int:
  """At most `rows`, so that slices of that many hold `total` evenly."""
  return -(-total // max(-(-total // rows), 1))


def histogram(
  inputs: Int[np.ndarray, 'N T'], targets: Int[np.ndarray, 'N L']
) -> dict[str, Any]:
  """What `drawn` and `of_targets` need of a sample, small and plain.

  Returns:
    {'inputs': {length, up to the next multiple: rows}, 'targets': the longest}.
  """
  lengths = -(-row_lengths(inputs) // MULTIPLE) * MULTIPLE
  values, counts = np.unique(lengths, return_counts=True)
  return {
    'inputs': {str(v): int(c) for v, c in zip(values, counts, strict=True)},
    'targets': int(row_lengths(targets).max()),
  }


def drawn(
  sample: Mapping[str, Any], batch_size: int
) -> list[Int[np.ndarray, 'B']]:
  """Lengths of the rows of some batches, at random but always the same."""
  inputs = sample['inputs']
  lengths = np.repeat([int(v) for v in inputs], list(inputs.values()))
  rng, count = np.random.default_rng(0), max(1024 // batch_size, 1)
  return [rng.choice(lengths, batch_size) for _ in range(count)]


def of_targets(sample: Mapping[str, Any], full: int) -> tuple[int, ...]:
  """The sample's longest, up to the next multiple, and the full length."""
  short = -(-sample['targets'] // MULTIPLE) * MULTIPLE
  return (short, full) if short < full else (full,)


def best_lengths(lengths: Int[np.ndarray, 'N'], number: int) -> tuple[int, ...]:
  """So many lengths, all out of `lengths`, that pad these rows the least.

  Exact, by dynamic programming over the different lengths: `least[j]` is the
  number of tokens if the longest of the lengths chosen is the j-th.

  Returns:
    Shortest first; the last is the longest of `lengths`. Fewer where there are
    not so many different ones.
  """
  values, counts = np.unique(lengths, return_counts=True)
  upto = np.concatenate([[0], np.cumsum(counts)])
  least = np.where(np.arange(len(values) + 1) == 0, 0.0, np.inf)
  before = []
  for _ in range(min(number, len(values))):
    # From the lengths up to the i-th to those up to the j-th: rows in between
    # are padded to the j-th.
    tokens = least[:, None] + values[None] * (upto[None, 1:] - upto[:, None])
    tokens[np.arange(len(least))[:, None] > np.arange(len(values))] = np.inf
    before.append(np.argmin(tokens, axis=0))
    least = np.concatenate([[np.inf], tokens.min(axis=0)])
  chosen, last = [], len(values)
  for step in reversed(before):
    chosen.append(int(values[last - 1]))
    last = int(step[last - 1])
  return tuple(reversed(chosen))


def computed(
  shapes: Shapes, batches: Sequence[Int[np.ndarray, 'N']]
) -> tuple[int, int]:
  """(tokens, slices) that batches of rows of these lengths take."""
  tokens = slices = 0
  for lengths in batches:
    lengths = np.sort(lengths)[::-1]
    which = np.searchsorted(shapes.lengths, lengths)
    row = 0
    while row < len(lengths):
      shape = which[row]
      tokens += shapes.rows[shape] * shapes.lengths[shape]
      slices += 1
      row += shapes.rows[shape]
  return tokens, slices


def _cost(shapes: Shapes, batches: Sequence[Int[np.ndarray, 'N']]) -> int:
  tokens, slices = computed(shapes, batches)
  return tokens + OVERHEAD * slices


def choose(
  batches: Sequence[Int[np.ndarray, 'N']],
  longest: int,
  *,
  rows: int,
  tokens: int | None = None,
  multiple: int = 1,
  targets: Sequence[int | None] = (None,),
  lengths: Sequence[int] | None = None,
) -> Shapes:
  """The shapes that batches of such lengths are best computed in.

  Args:
    batches: lengths of the rows of each, as many as are typical.
    longest: the full length, which is always among them.
    rows: of a slice, at most.
    tokens: of a slice, at most, though a slice has `multiple` rows at least;
      then the number of rows is chosen for each length, from a quarter of what
      fits on. None: all slices have `rows` rows.
    multiple: of which the numbers of rows are multiples.
    targets: of the result; (None,) leaves the decoder's rows as they are.
    lengths: takes these, and chooses nothing but the rows.

  Raises:
    UserError: `lengths` are none.
  """

  batches = [np.minimum(one, longest) for one in batches]

  def fitted(lengths: Sequence[int]) -> Shapes:
    lengths = tuple(sorted({*lengths, longest}))
    if tokens is None:
      most = [rows] * len(lengths)
    else:
      most = [
        min(rows, max(tokens // length // multiple, 1) * multiple)
        for length in lengths
      ]
    shapes = Shapes(lengths, tuple(most), tuple(targets))
    return shapes if tokens is None else _with_best_rows(shapes)

  def _with_best_rows(shapes: Shapes) -> Shapes:
    """Of fewer rows, where slices that are not full would cost more.

    One length after the other takes its best number of rows, until none has a
    better one; from few rows and from many.
    """
    found = []
    for share in (1, 2, 4):
      start = [max(r // share // multiple, 1) * multiple for r in shapes.rows]
      best = dataclasses.replace(shapes, rows=tuple(start))
      least, before = _cost(best, batches), None
      while least != before:
        before = least
        for number, most in enumerate(shapes.rows):
          quarter = max(most // 4 // multiple, 1) * multiple
          for other in range(quarter, most + 1, multiple):
            tried = list(best.rows)
            tried[number] = other
            tried = dataclasses.replace(best, rows=tuple(tried))
            if (cost := _cost(tried, batches)) < least:
              best, least = tried, cost
      found.append((least, best))
    return min(found, key=lambda pair: pair[0])[1]

  if lengths is not None:
    if any(not 0 < length <= longest for length in lengths):
      raise UserError(
        f'train.row_lengths must be from 1 to {longest}, the full length with'
        f' virtual tokens, got {tuple(lengths)}'
      )
    return fitted(lengths)
  all_rows = np.concatenate(batches)
  all_rows = np.minimum(-(-all_rows // MULTIPLE) * MULTIPLE, longest)
  best = fitted(())
  least = _cost(best, batches)
  for number in range(1, MOST + 1):
    tried = fitted(best_lengths(all_rows, number))
    further = len(tried.lengths) - len(best.lengths)
    if (cost := _cost(tried, batches)) <= (1 - WORTH * further) * least:
      best, least = tried, cost
  return best
