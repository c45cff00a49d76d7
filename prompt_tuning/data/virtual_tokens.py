"""Virtual tokens: ids past the vocabulary that stand for rows of the prompt.

Row i of prompt k has the id `first_id + k * length + i`, where `first_id` is V,
the number of rows of the embedding table. Where the prompt stands in the text
and which prompt an example gets are decided here, as ids; the model sees
ordinary tokens (DESIGN.md, "The idea in four sentences").

Nothing here needs TensorFlow: inference on plain text builds its rows with
`encoder_row`, the seqio pipeline places the same ids through
`data/feature_converter.py`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from jaxtyping import Int
import numpy as np

from prompt_tuning.errors import UserError

PLACEMENTS = ('prefix', 'after_bos', 'suffix', 'around')

EOS_ID = 1
PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
  """The ids of a prompt table [K, P, E] and their place among the text's ids.

  Attributes:
    first_id: V, the id of row 0 of prompt 0.
    length: P, the number of virtual tokens an example gets.
    num_prompts: K, the number of prompts in the table.
    placement: 'prefix' (before the text), 'after_bos' (after the text's first
      id), 'suffix' (after the text, before its final EOS) or 'around' (the
      first half, rounded down, before the text, the rest before its EOS).
  """

  first_id: int
  length: int
  num_prompts: int = 1
  placement: str = 'prefix'

  def __post_init__(self):
    if self.placement not in PLACEMENTS:
      raise UserError(
        f'placement must be one of {", ".join(PLACEMENTS)}, '
        f'got {self.placement!r}'
      )
    for name in ('first_id', 'length', 'num_prompts'):
      if getattr(self, name) < 1:
        raise UserError(
          f'virtual tokens need {name} of 1 or more, got {getattr(self, name)}'
        )

  def table(self) -> Int[np.ndarray, 'K P']:
    """The ids of all prompts."""
    ids = np.arange(self.num_prompts * self.length, dtype=np.int32)
    return self.first_id + ids.reshape(self.num_prompts, self.length)

  def ids(self, prompt_index: int = 0) -> Int[np.ndarray, 'P']:
    """The ids of one prompt; UserError where there is no such prompt."""
    if not 0 <= prompt_index < self.num_prompts:
      raise UserError(
        f'the prompt table has {self.num_prompts} prompt(s), numbered from 0; '
        f'an example asks for prompt {prompt_index}'
      )
    return self.table()[prompt_index]

  def place(
    self,
    ids: Any,
    virtual: Any,
    concat: Callable[..., Any] = np.concatenate,
    eos_position: Any = None,
  ) -> Any:
    """Puts the virtual ids among the ids of one unpadded text.

    Arrays of any library do that slice like numpy's; the seqio pipeline passes
    tensors, `concat=tf.concat` and `eos_position`.

    Args:
      ids: [n], the text's ids without padding.
      virtual: [P], what `ids()` gave.
      concat: joins a list of arrays along axis 0.
      eos_position: n - 1 if the last id is EOS, n if it is not (the task adds
        no EOS); found here when None.

    Returns:
      [P + n].
    """
    if eos_position is None:
      eos_position = len(ids) - int(len(ids) > 0 and ids[-1] == EOS_ID)
    half = self.length // 2
    parts = {
      'prefix': lambda: (virtual, ids),
      'after_bos': lambda: (ids[:1], virtual, ids[1:]),
      'suffix': lambda: (ids[:eos_position], virtual, ids[eos_position:]),
      'around': lambda: (
        virtual[:half],
        ids[:eos_position],
        virtual[half:],
        ids[eos_position:],
      ),
    }
    return concat(parts[self.placement](), axis=0)


def encoder_length(
  inputs_length: int, virtual_tokens: VirtualTokens | None
) -> int:
  """T: the length of encoder rows, P + inputs_length."""
  return inputs_length + (virtual_tokens.length if virtual_tokens else 0)


def encoder_row(
  text_ids: Sequence[int],
  inputs_length: int,
  virtual_tokens: VirtualTokens | None = None,
  prompt_index: int = 0,
) -> Int[np.ndarray, 'T']:
  """The encoder's row for one text: trimmed, EOS added, placed and padded.

  The text keeps its first inputs_length - 1 ids so that EOS always fits, as
  seqio's `append_eos_after_trim` does.

  Args:
    text_ids: the text's ids without EOS.
    inputs_length: length of the row without virtual tokens, EOS included.
    virtual_tokens: None for a model without a prompt.
    prompt_index: which prompt of the table this text gets.
  """
  ids = np.append(
    np.asarray(text_ids, np.int32)[: inputs_length - 1], np.int32(EOS_ID)
  )
  if virtual_tokens is not None:
    ids = virtual_tokens.place(ids, virtual_tokens.ids(prompt_index))
  row = np.full(encoder_length(inputs_length, virtual_tokens), PAD_ID, np.int32)
  row[: len(ids)] = ids
  return row


def target_rows(
  texts: Sequence[Sequence[int]], eos_id: int = EOS_ID
) -> Int[np.ndarray, 'C L']:
  """The decoder's targets for texts without EOS: EOS added, padded."""
  rows = np.full((len(texts), 1 + max(map(len, texts))), PAD_ID, np.int32)
  for row, ids in zip(rows, texts, strict=True):
    row[: len(ids) + 1] = [*ids, eos_id]
  return rows
