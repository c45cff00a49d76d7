"""Hard prompts found by gradients: PEZ (Wen et al. 2023, algorithm 1).

A continuous prompt is projected onto the vocabulary's rows: each of its rows
gives the nearest piece. The network sees the projection, whose gradient moves
the continuous prompt: x <- x - rate * grad L(project(x)). What a run returns
is the projection of its best step by the score that it selects by.
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
from prompt_tuning.methods.computed_prompt import ComputedPrompt
from prompt_tuning.methods.computed_prompt import embedding_of
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.nearest_pieces import Measure
from prompt_tuning.methods.nearest_pieces import Pieces
from prompt_tuning.methods.nearest_pieces import Reading
from prompt_tuning.methods.nearest_pieces import nearest_ids


@dataclasses.dataclass(frozen=True)
class HardPrompt(ComputedPrompt):
  """A prompt of the vocabulary's own pieces.

  Its arrays are 'table' [K, P, E], the continuous prompt; 'ids' [K, P], its
  nearest pieces, whole numbers as float32 (what is differentiated is float);
  and 'rows' [K, P, E], their embeddings.

  Attributes:
    prompt: length, number, start and placement.
    measure: 'cosine' (as the authors' code) or 'euclidean'.
    pieces: which pieces may be chosen (see `nearest_pieces`); None: all but
      padding, EOS and unknown.
  """

  collection: ClassVar[str] = 'hard_prompt'
  stacked: ClassVar[Sequence[str]] = ('table', 'ids', 'rows')

  measure: Measure = 'cosine'
  pieces: Pieces | None = None

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Array]:
    table = self.start(rng, params, text)
    return {'table': table, **self.refreshed({'table': table}, params)}

  def refreshed(
    self, arrays: Mapping[str, Any], params: Mapping[str, Any]
  ) -> dict[str, Array]:
    """The nearest pieces of the continuous prompt."""
    embedding = embedding_of(params)
    allowed = None if self.pieces is None else self.pieces(len(embedding))
    ids = nearest_ids(arrays['table'], embedding, allowed, self.measure)
    return {
      'ids': ids.astype(jnp.float32),
      'rows': jnp.take(embedding, ids, axis=0),
    }

  def rate(self, path: str) -> float:
    return self.learning_rate_scale if path == 'table' else 0.0

  def table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    """The projection, whose gradient is the continuous prompt's."""
    continuous = arrays['table']
    # Exactly the rows: what is added is zero.
    nothing = continuous - jax.lax.stop_gradient(continuous)
    return jax.lax.stop_gradient(arrays['rows']) + nothing

  def in_words(
    self, arrays: Mapping[str, Any], vocabulary: Vocabulary | ByteVocabulary
  ) -> dict[str, str]:
    """Its ids and text, and how many texts give their ids back."""
    ids = np.asarray(arrays['ids']).astype(int)
    readings = [Reading.of(of_prompt, vocabulary) for of_prompt in ids]
    back = sum(reading.comes_back for reading in readings)
    return {
      'ids': str([reading.ids for reading in readings]),
      'text': '\n'.join(reading.text for reading in readings),
      'texts_that_give_their_ids_back': f'{back} of {len(readings)}',
    }
