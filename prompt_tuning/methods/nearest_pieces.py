"""A prompt read as text: the vocabulary's pieces nearest to its rows.

Text that such pieces make may be read back as other pieces, since a tokenizer
has its own way to split a text; a `Reading` says what it gives back.
"""

from collections.abc import Callable, Sequence
import dataclasses
import difflib
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError

Measure = Literal['cosine', 'euclidean']
# Says which rows of an embedding of V rows may be chosen: a mask [V].
Pieces = Callable[[int], Bool[np.ndarray, 'V']]


def written_pieces(vocabulary: str) -> Pieces:
  """All pieces that stand for text: no padding, EOS, unknown or sentinels.

  Args:
    vocabulary: path or name.
  """
  return _of_vocabulary(vocabulary, lambda piece: True, 'stands for text')


def word_pieces(
  vocabulary: str, ascii: bool = True, shortest: int = 2
) -> Pieces:
  """Whole words: a space and letters, nothing else.

  Words alone are what a text is read back as, but for rare cases.

  Args:
    vocabulary: path or name.
    ascii: of ASCII letters alone.
    shortest: letters of the shortest word.
  """

  def is_word(piece: str) -> bool:
    word = piece.removeprefix('▁')
    starts = piece != word
    written = word.isalpha() and (word.isascii() or not ascii)
    return starts and written and len(word) >= shortest

  return _of_vocabulary(vocabulary, is_word, 'is a whole word')


def _of_vocabulary(
  vocabulary: str, rule: Callable[[str], bool], rule_in_words: str
) -> Pieces:
  def allowed(rows: int) -> Bool[np.ndarray, 'V']:
    known = load_vocabulary(vocabulary)
    mask = np.zeros(rows, bool)
    # 0, 1 and 2 are padding, EOS and unknown; sentinels are on top.
    for token in range(3, min(rows, known.size - known.extra_ids)):
      mask[token] = rule(known.piece(token))
    if not mask.any():
      raise UserError(
        f'no piece of the vocabulary {vocabulary} {rule_in_words}'
      )
    return mask

  return allowed


def nearest_ids(
  rows: Float[Array, '*N E'],
  embedding: Float[Array, 'V E'],
  allowed: Bool[np.ndarray, 'V'] | None = None,
  measure: str = 'cosine',
) -> Int[Array, '*N']:
  """The ids whose embeddings are nearest to rows; the first of equals.

  Args:
    rows: of prompts.
    embedding: of the vocabulary, float32.
    allowed: what may be chosen; None: all but padding, EOS and unknown.
    measure: 'cosine', by the largest; 'euclidean', by the smallest distance.
  """
  if measure not in ('cosine', 'euclidean'):
    raise UserError(
      f"pieces are near by 'cosine' or 'euclidean', got {measure!r}"
    )
  if allowed is None:
    allowed = np.arange(len(embedding)) > 2
  if measure == 'cosine':
    # The rows' own length changes no order.
    nearness = rows @ _unit(embedding).T
  else:  # |r - e|^2 = |r|^2 - 2 r e + |e|^2
    half = jnp.sum(jnp.square(embedding), axis=-1) / 2
    nearness = rows @ embedding.T
    nearness -= half.reshape((1,) * (nearness.ndim - 1) + (-1,))
  mask = jnp.asarray(allowed).reshape((1,) * (nearness.ndim - 1) + (-1,))
  return jnp.argmax(jnp.where(mask, nearness, -jnp.inf), axis=-1)


def _unit(x: Float[Array, '*N E']) -> Float[Array, '*N E']:
  norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norms, 1e-12)


@dataclasses.dataclass(frozen=True)
class Reading:
  """One prompt as text.

  Attributes:
    ids: of its pieces.
    text: what they make.
    again: the ids that the text is read as.
  """

  ids: Sequence[int]
  text: str
  again: Sequence[int]

  @classmethod
  def of(
    cls, ids: Int[np.ndarray, 'P'], vocabulary: Vocabulary | ByteVocabulary
  ) -> 'Reading':
    """Of the ids of one prompt."""
    ids = ids.tolist()
    text = vocabulary.decode(ids)
    return cls(ids, text, vocabulary.encode(text))

  @property
  def kept(self) -> int:
    """How many pieces come back in their order."""
    match = difflib.SequenceMatcher(None, self.ids, self.again, False)
    return sum(block.size for block in match.get_matching_blocks())

  @property
  def comes_back(self) -> bool:
    """Whether the text gives just these pieces."""
    return list(self.ids) == list(self.again)

  def __str__(self) -> str:
    said = f'all {len(self.ids)} pieces come back'
    if not self.comes_back:
      said = (
        f'read again it has {len(self.again)} pieces, {self.kept} of these'
        f' {len(self.ids)}'
      )
    return f'{self.text!r} ({said})'


def read_as_text(
  table: Float[np.ndarray, 'K P E'],
  embedding: Float[np.ndarray, 'V E'],
  vocabulary: Vocabulary | ByteVocabulary,
  pieces: Pieces | None = None,
  measure: str = 'cosine',
) -> list[Reading]:
  """The nearest text of each prompt of a table.

  Args:
    table: of a prompt.
    embedding: of its model.
    vocabulary: likewise.
    pieces: what the text is made of; None: all pieces that stand for text.
    measure: see `nearest_ids`.
  """
  pieces = pieces or written_pieces(vocabulary.path)
  rows = jnp.asarray(table, jnp.float32)
  embedding = jnp.asarray(embedding, jnp.float32)
  ids = jax.device_get(
    nearest_ids(rows, embedding, pieces(len(embedding)), measure)
  )
  return [Reading.of(of_prompt, vocabulary) for of_prompt in ids]
