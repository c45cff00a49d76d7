"""ATTEMPT: source prompts mixed for each example (Asai et al. 2022, section 3).

Frozen prompts of source tasks S_1..S_n and a trained one T are weighted by how
much the example's text attends to them, and T is added once more: with x the
largest entries of the text's embeddings and p those of a prompt's rows, and
LN a layer norm,

  q = LN(up silu(down x)),  a = softmax(p_j . q / temperature),
  rows = sum_j a_j S_j + (1 + a_T) T.

The authors' code lets padding into x where a batch has some; here an example's
rows are the same in any batch. It can also begin with an attention (down, up
and LN) that was trained on the sources' tasks, as its multi-task runs do.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.methods.computed_prompt import ComputedPrompt
from prompt_tuning.methods.computed_prompt import embedding_of
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Initializer
from prompt_tuning.methods.prompt import sampled_vocabulary

_EPSILON = 1e-5  # of the layer norm, torch's


@dataclasses.dataclass(frozen=True)
class Attempt(ComputedPrompt):
  """Its arrays.

  'table' [K, P, E] holds the trained prompts and 'sources' [S, P, E] those that
  are not; 'down' [E, r], 'up' [r, E], 'norm_scale' and 'norm_bias' [E] are the
  attention's.

  Attributes:
    prompt: length, number, start and placement of the trained ones. (The
      authors' start as the first source.)
    num_sources: S.
    sources: an initialiser that gives [S, P, E]; `source_prompts` reads files.
    size: r, the authors' 100.
    temperature: None: e * E (the authors' 2087 of T5 base).
    attention: gives the arrays of a trained one, of which another takes the
      attention's; None: it is drawn.
    attention_rate: the learning rate of the attention is the prompt's times
      this. (The authors' code has an option for it, which none of their
      configurations sets.)
  """

  collection: ClassVar[str] = 'attempt'
  stacked: ClassVar[Sequence[str]] = ('table', 'sources')

  num_sources: int = 1
  sources: Initializer = dataclasses.field(default_factory=sampled_vocabulary)
  size: int = 100
  temperature: float | None = None
  attention: Callable[[], Mapping[str, Float[np.ndarray, '...']]] | None = None
  attention_rate: float = 1.0

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Array]:
    table = self.start(rng, params, text)
    embedding = embedding_of(params)
    embed, r = embedding.shape[1], self.size
    keys = jax.random.split(jax.random.fold_in(rng, 1), 3)
    shape = (self.num_sources, *table.shape[1:])
    sources = self.sources(keys[0], shape, embedding, text)

    def uniform(key, shape):
      bound = shape[0] ** -0.5
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    attention = {
      'down': uniform(keys[1], (embed, r)),
      'up': uniform(keys[2], (r, embed)),
      'norm_scale': jnp.ones(embed, jnp.float32),
      'norm_bias': jnp.zeros(embed, jnp.float32),
    }
    if self.attention is not None:
      attention = self._trained_attention(attention)
    sources = jnp.asarray(sources, jnp.float32)
    return {'table': table, 'sources': sources, **attention}

  def _trained_attention(self, needed: Mapping[str, Array]) -> dict[str, Array]:
    given = self.attention()
    for name, array in needed.items():
      if given[name].shape != array.shape:
        raise UserError(
          f'Attempt.attention has {name} {list(given[name].shape)}, this one'
          f' needs {list(array.shape)}: bind its size, on the same model'
        )
    return {name: jnp.asarray(given[name], jnp.float32) for name in needed}

  def rate(self, path: str) -> float:
    of_arrays = {'table': 1.0, 'sources': 0.0}
    return self.learning_rate_scale * of_arrays.get(path, self.attention_rate)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    if 'encoder_segment_ids' in batch:
      raise UserError(
        'attempt weighs prompts by an example alone in its row: bind'
        ' TaskData.pack = False'
      )

    def mix(next_fun, args, kwargs, context):
      if context.method_name != 'embed':
        return next_fun(*args, **kwargs)
      (ids,) = args
      number = ids - context.module.config.vocab_size  # of a virtual token
      is_virtual = number >= 0
      tokens = next_fun(jnp.where(is_virtual, 0, ids))
      rows = self.rows(
        context.module.variables[self.collection],
        tokens.astype(jnp.float32),
        (ids > 0) & ~is_virtual,
        jnp.maximum(number.max(axis=1), 0) // self.prompt.length,
      )
      place = jax.nn.one_hot(
        jnp.where(is_virtual, number % self.prompt.length, -1),
        self.prompt.length,
        dtype=rows.dtype,
      )  # [B, T, P]
      virtual = (place @ rows).astype(tokens.dtype)
      return jnp.where(is_virtual[..., None], virtual, tokens)

    return mix

  def rows(
    self,
    arrays: Mapping[str, Array],
    tokens: Float[Array, 'B T E'],
    is_text: Bool[Array, 'B T'],
    number: Int[Array, 'B'],
  ) -> Float[Array, 'B P E']:
    """The mixed prompt of each example.

    Args:
      arrays: its own.
      tokens: embeddings.
      is_text: where they are the example's text.
      number: which of the trained prompts the example has.
    """
    sources = jax.lax.stop_gradient(arrays['sources'])
    chosen = jax.nn.one_hot(number, len(arrays['table']), dtype=jnp.float32)
    target = jnp.einsum('bk,kpe->bpe', chosen, arrays['table'])

    x = jnp.where(is_text[..., None], tokens, -jnp.inf).max(axis=1)
    x = jnp.where(is_text.any(axis=1)[:, None], x, 0.0)
    query = jax.nn.silu(x @ arrays['down']) @ arrays['up']
    query -= query.mean(axis=-1, keepdims=True)
    variance = jnp.square(query).mean(axis=-1, keepdims=True)
    query *= jax.lax.rsqrt(variance + _EPSILON)
    query = query * arrays['norm_scale'][None] + arrays['norm_bias'][None]

    of_sources = query @ sources.max(axis=1).T  # [B, S]
    of_target = jnp.sum(query * target.max(axis=1), axis=-1, keepdims=True)
    scores = jnp.concatenate([of_sources, of_target], axis=-1)
    weights = jax.nn.softmax(scores / self._temperature(sources.shape[-1]))
    mixed = jnp.einsum('bs,spe->bpe', weights[:, :-1], sources)
    return mixed + (1.0 + weights[:, -1])[:, None, None] * target

  def _temperature(self, embed: int) -> float:
    return self.temperature or math.e * embed

  def as_prompt(self, arrays: Mapping[str, Any]) -> None:
    """None: each example has rows of its own."""
