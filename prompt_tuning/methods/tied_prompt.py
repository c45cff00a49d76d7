"""Wayward prompts: a soft prompt tied to a text (Khashabi et al. 2021).

A prompt p is trained by L(p) + weight * |p - d|^2 / P, where d are the
embeddings of the P pieces of a chosen text (section 3.2). The paper asks how
well a prompt does that lies next to a text of any meaning.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods.computed_prompt import ComputedPrompt
from prompt_tuning.methods.computed_prompt import embedding_of
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.nearest_pieces import Reading


@dataclasses.dataclass(frozen=True)
class TiedPrompt(ComputedPrompt):
  """Its arrays.

  'table' [K, P, E] is trained; 'ids' [P] are the text's, as float32, and
  'text_rows' [P, E] their embeddings.

  Attributes:
    prompt: length, number, start and placement; its length is the text's.
    text: that the prompt is tied to.
    weight: gamma, of the squared distance to the text, a mean over rows; the
      paper's is 0.01 against a mean over examples.
  """

  collection: ClassVar[str] = 'tied_prompt'

  text: str = ''
  weight: float = 0.01

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Array]:
    ids = jnp.asarray(self._ids(text))
    return {
      'table': self.start(rng, params, text),
      'ids': ids.astype(jnp.float32),
      'text_rows': jnp.take(embedding_of(params), ids, axis=0),
    }

  def _ids(self, text: TaskText) -> Sequence[int]:
    length = self.prompt.length
    if text is ANY_TEXT:
      return [0] * length
    if text.encode is None:
      raise UserError('TiedPrompt needs a vocabulary to encode its text')
    ids = text.encode(self.text)
    if len(ids) != length:
      raise UserError(
        f'TiedPrompt.text has {len(ids)} pieces, the prompt {length}: bind'
        f' PROMPT_LENGTH = {len(ids)}'
      )
    return ids

  def rate(self, path: str) -> float:
    return self.learning_rate_scale if path == 'table' else 0.0

  def table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    return arrays['table']

  def penalty(
    self, arrays: Mapping[str, Any], params: Mapping[str, Any]
  ) -> Float[jax.Array, '']:
    """The weighted squared distance of each row to its piece, on average."""
    del params
    # Of several prompts the sum: each is trained as it would be alone.
    return self.weight * jnp.sum(_distances(arrays))

  def in_words(
    self, arrays: Mapping[str, Any], vocabulary: Vocabulary | ByteVocabulary
  ) -> dict[str, str]:
    """The text, and how far from it each prompt is.

    What a prompt itself reads as, `prompt-tuning inspect --text` says.
    """
    ids = np.asarray(arrays['ids']).astype(int)
    arrays = {name: jnp.asarray(a[...]) for name, a in arrays.items()}
    distances = _distances(arrays).tolist()
    return {
      'tied_to': Reading.of(ids, vocabulary).text,
      'squared_distance': ', '.join(f'{x:.6g}' for x in distances),
    }


def _distances(arrays: Mapping[str, Any]) -> Float[Array, 'K']:
  """The mean squared distance of a prompt's rows to its text's."""
  rows = jax.lax.stop_gradient(arrays['text_rows'])[None]
  squares = jnp.sum(jnp.square(arrays['table'] - rows), axis=-1)  # [K, P]
  return jnp.mean(squares, axis=1)
