"""DePT and ADePT: a short prompt, and an update of the inputs' embeddings.

The embeddings of the encoder's text are updated, those of virtual tokens and of
the decoder's tokens are not. Both sources train the update at a learning rate
of its own, `update_rate` times the prompt's.

What a file can carry: one file holds prompt and update, since the prompt alone
is another method. DePT's update depends on a token's position and not on the
token: it is a learnt table of positions, and no table of a vocabulary acts like
it. ADePT's depends on the token alone, so that it is another table for the
encoder's lookup (`ADePT.table`); but T5 has one table for encoder, decoder and,
where they are tied, logits, so that no plain T5 acts like it either.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Initializer
from prompt_tuning.methods.prompt import embed_virtual
from prompt_tuning.methods.prompt import put_rows
from prompt_tuning.methods.prompt import sampled_vocabulary
from prompt_tuning.models.network import T5Config


@dataclasses.dataclass(frozen=True)
class _Decomposed(Method):
  """A prompt in front of the text; subclasses say how the text is updated."""

  length: int
  rank: int
  update_rate: float
  initializer: Initializer = dataclasses.field(
    default_factory=sampled_vocabulary
  )

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(
        f'{type(self).__name__}.rank must be 1 or more, got {self.rank}'
      )

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Float[Array, '*_']]:
    embedding = params['token_embedder']['embedding']
    shape = (1, self.length, embedding.shape[1])
    table = self.initializer(rng, shape, embedding, text)
    key = jax.random.fold_in(rng, 1)
    return {
      'table': jnp.asarray(table[0], jnp.float32),
      **self._init_update(key, embedding.shape[1]),
    }

  def _init_update(self, rng: jax.Array, embed: int) -> dict[str, jax.Array]:
    raise NotImplementedError

  def _update(
    self,
    x: Float[Array, 'B T E'],
    ids: Int[Array, 'B T'],
    first_id: int,
    arrays: Mapping[str, jax.Array],
  ) -> Float[Array, 'B T E']:
    """What is added to the embeddings x, all in float32.

    Args:
      x: embeddings.
      ids: theirs.
      first_id: of virtual tokens, for which the outcome does not matter.
      arrays: of the method.
    """
    raise NotImplementedError

  def _first_matrix(self, rng: jax.Array, inputs: int) -> jax.Array:
    # torch's kaiming_uniform as the references call it, by the rank.
    bound = self.rank**-0.5
    return jax.random.uniform(
      rng, (inputs, self.rank), jnp.float32, -bound, bound
    )

  def rate(self, path: str) -> float:
    of_prompt = 1.0 if path == 'table' else self.update_rate
    return self.learning_rate_scale * of_prompt

  def virtual_tokens(self, config: T5Config) -> VirtualTokens:
    return VirtualTokens(config.vocab_size, self.length)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def embed(next_fun, args, kwargs, context):
      if context.method_name != 'embed':
        return next_fun(*args, **kwargs)
      (ids,), first_id = args, context.module.config.vocab_size
      arrays = context.module.variables[self.collection]
      x = embed_virtual(next_fun, ids, first_id)
      exact = x.astype(jnp.float32)
      exact += self._update(exact, ids, first_id, arrays)
      return put_rows(exact.astype(x.dtype), ids, first_id, arrays['table'])

    return embed


@dataclasses.dataclass(frozen=True)
class DePT(_Decomposed):
  """The embedding at position i of the text gets row i of `scale A B` added.

  Its arrays are 'table' [P, E], 'a' [S, r] and 'b' [r, E], of which the update
  is alpha / sqrt(r) A B (Shi and Lipani 2024, section 2.2; the factor is the
  reference's). In a packed row positions begin anew behind each prompt.

  Attributes:
    length: P.
    inputs_length: S, positions of a text, EOS included.
    rank: r; the source's choice beside 40 tokens, for 100 tokens' parameters.
    alpha: see above.
    update_rate: the learning rate of A and B is the prompt's times this; the
      source's choice, 5e-4 beside 0.3.
    initializer: how the prompt starts; B starts at zero.
  """

  collection: ClassVar[str] = 'dept'
  acts_on_keys: ClassVar[bool] = False

  length: int = 40
  rank: int = 45
  update_rate: float = 5e-4 / 0.3
  inputs_length: int = 256
  alpha: float = 8.0

  def _init_update(self, rng: jax.Array, embed: int) -> dict[str, jax.Array]:
    return {
      'a': self._first_matrix(rng, self.inputs_length),
      'b': jnp.zeros((self.rank, embed), jnp.float32),
    }

  def _update(
    self,
    x: Float[Array, 'B T E'],
    ids: Int[Array, 'B T'],
    first_id: int,
    arrays: Mapping[str, jax.Array],
  ) -> Float[Array, 'B T E']:
    longest = ids.shape[1] - self.length
    if longest > self.inputs_length:
      raise UserError(
        f'DePT.inputs_length is {self.inputs_length}, the inputs have up to'
        f' {longest} tokens: give that, as TASK_FEATURE_LENGTHS has it'
      )
    index = jax.lax.broadcasted_iota(ids.dtype, ids.shape, 1)
    before = jax.lax.cummax(jnp.where(ids >= first_id, index, -1), axis=1)
    position = jax.nn.one_hot(index - before - 1, self.inputs_length)
    update = position @ arrays['a'] @ arrays['b']
    return np.float32(self.alpha * self.rank**-0.5) * update


@dataclasses.dataclass(frozen=True)
class ADePT(_Decomposed):
  """The embedding x of each text token gets relu(x A + a) B + b added.

  Its arrays are 'table' [P, E], 'down' A [E, r], 'down_bias' a [r], 'up' B
  [r, E] and 'up_bias' b [E] (Tang et al. 2025, section 3.2; the reference's
  LoRAX, without its dropout of 0.1 while training).

  Attributes:
    length: P.
    rank: r; the reference's choice beside 60 tokens.
    update_rate: the learning rate of the update is the prompt's times this; the
      reference's choice, 1e-4 beside 0.3.
    initializer: how the prompt starts; B and the biases start at zero.
  """

  collection: ClassVar[str] = 'adept'
  acts_on_keys: ClassVar[bool] = False

  length: int = 60
  rank: int = 19
  update_rate: float = 1e-4 / 0.3

  def _init_update(self, rng: jax.Array, embed: int) -> dict[str, jax.Array]:
    return {
      'down': self._first_matrix(rng, embed),
      'down_bias': jnp.zeros((self.rank,), jnp.float32),
      'up': jnp.zeros((self.rank, embed), jnp.float32),
      'up_bias': jnp.zeros((embed,), jnp.float32),
    }

  def _update(
    self,
    x: Float[Array, 'B T E'],
    ids: Int[Array, 'B T'],
    first_id: int,
    arrays: Mapping[str, jax.Array],
  ) -> Float[Array, 'B T E']:
    hidden = x @ arrays['down'] + arrays['down_bias'][None, None]
    return jax.nn.relu(hidden) @ arrays['up'] + arrays['up_bias'][None, None]

  @staticmethod
  def table(
    embedding: Float[np.ndarray, 'V E'], arrays: Mapping[str, Any]
  ) -> Float[np.ndarray, 'V E']:
    """The embeddings that the encoder of a T5 with this update looks up."""
    down, down_bias, up, up_bias = (
      np.asarray(arrays[name], np.float32)
      for name in ('down', 'down_bias', 'up', 'up_bias')
    )
    hidden = np.maximum(np.asarray(embedding) @ down + down_bias, 0)
    return embedding + hidden @ up + up_bias
