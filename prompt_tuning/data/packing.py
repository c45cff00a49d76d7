"""Several examples in a row, first-fit: attention stays within each of them.

Rows are open until too many are; an example goes into the first one that has
room for its inputs and for its targets, else into a new one, for which the row
that has been open longest is handed on. So the order of rows is a function of
that of the examples alone, and an example stays near its place in it.
"""

from collections.abc import Iterator, Mapping
import itertools

from jaxtyping import Int
import numpy as np

# Rows that are open at once.
OPEN = 32
_MULTIPLE = 8

Features = dict[str, Int[np.ndarray, 'length']]


def targets_length(
  inputs: Int[np.ndarray, 'N'],
  targets: Int[np.ndarray, 'N'],
  limits: Mapping[str, int],
  virtual: int,
) -> int:
  """Ids of a packed row's targets, so that it is inputs that fill it.

  A quarter more than the targets of the examples whose inputs fill a row have
  in the mean.

  Args:
    inputs: lengths of a sample's inputs, EOS included, virtual tokens not.
    targets: of its targets.
    limits: what both are cut to.
    virtual: virtual tokens of an example.
  """
  if not len(inputs):
    return limits['targets']
  mean = np.minimum(inputs, limits['inputs']).mean() + virtual
  examples = (limits['inputs'] + virtual) / mean
  needed = 1.25 * examples * np.minimum(targets, limits['targets']).mean()
  return max(-(-int(needed) // _MULTIPLE) * _MULTIPLE, limits['targets'])


def rows(
  examples: Iterator[Mapping[str, np.ndarray]], targets_length: int
) -> Iterator[Features]:
  """Packed rows, as seqio's packing lays them out.

  Args:
    examples: the model's features of one example each, padded.
    targets_length: of the decoder's rows; the encoder's are as long as those of
      the examples.

  Yields:
    The features with segment ids, from 1 on, and positions, from 0 on.
  """
  waiting: list[_Row] = []
  for example in examples:
    inputs = len(np.trim_zeros(example['encoder_input_tokens'], 'b'))
    targets = len(np.trim_zeros(example['decoder_target_tokens'], 'b'))
    sizes = len(example['encoder_input_tokens']), targets_length
    for row in waiting:
      if row.inputs + inputs <= sizes[0] and row.targets + targets <= sizes[1]:
        break
    else:
      if len(waiting) == OPEN:
        yield waiting.pop(0).features
      row = _Row(*sizes)
      waiting.append(row)
    row.add(example, inputs, targets)


class _Row:
  """A row that examples are put into."""

  def __init__(self, inputs_length: int, targets_length: int):
    self.inputs = self.targets = self._examples = 0
    self.features: Features = {
      f'{part}_{name}': np.zeros(length, np.int32)
      for part, length, tokens in (
        ('encoder', inputs_length, ('input_tokens',)),
        (
          *('decoder', targets_length),
          ('input_tokens', 'target_tokens', 'loss_weights'),
        ),
      )
      for name in (*tokens, 'segment_ids', 'positions')
    }

  def add(
    self, example: Mapping[str, np.ndarray], inputs: int, targets: int
  ) -> None:
    """Puts an example of such lengths behind those that are there."""
    self._examples += 1
    for part, begin, count in (
      ('encoder', self.inputs, inputs),
      ('decoder', self.targets, targets),
    ):
      place = slice(begin, begin + count)
      for name, values in self.features.items():
        if name == f'{part}_segment_ids':
          values[place] = self._examples
        elif name == f'{part}_positions':
          values[place] = np.arange(count)
        elif name.startswith(part):
          values[place] = example[name][:count]
    self.inputs += inputs
    self.targets += targets


def batches(
  packed: Iterator[Features], size: int, start: int
) -> Iterator[dict[str, Int[np.ndarray, 'size length']]]:
  """Batches of so many rows, from number `start` on."""
  number = 0
  while True:
    taken = list(itertools.islice(packed, size))
    if len(taken) < size:
      return
    if number >= start:
      yield {name: np.stack([row[name] for row in taken]) for name in taken[0]}
    number += 1
