"""Prompts whose table is computed from other arrays: what they share.

Length, number, start and placement are those of a `Prompt`, which the method
is given, so that whatever starts or places a prompt does so here.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import embed_virtual
from prompt_tuning.models import parameters
from prompt_tuning.models.network import T5Config


@dataclasses.dataclass(frozen=True)
class ComputedPrompt(Method):
  """Virtual tokens look up `table(arrays)`.

  Attributes:
    prompt: its length, number, start and placement.
    stacked: names of arrays with an entry for each prompt on axis 0.
  """

  stacked: ClassVar[Sequence[str]] = ('table',)
  acts_on_keys: ClassVar[bool] = False

  prompt: Prompt = dataclasses.field(default_factory=Prompt)

  def __post_init__(self):
    if self.prompt != dataclasses.replace(
      self.prompt, reparametrization=None, learning_rate_scale=1.0
    ):
      raise UserError(
        f'{type(self).__name__} takes length, number, start and placement of'
        ' its prompt: leave Prompt.reparametrization and'
        ' Prompt.learning_rate_scale away'
      )

  def table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    """The rows that virtual tokens look up, of arrays by name."""
    raise NotImplementedError

  def start(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> Float[Array, 'K P E']:
    """The table that its prompt starts with."""
    return self.prompt.init(rng, params, text)['table']

  def axes(self, arrays: Any) -> dict[str, tuple[str | None, ...]]:
    return {
      name: ('prompts' if name in self.stacked else None,)
      + (None,) * (len(array.shape) - 1)
      for name, array in arrays.items()
    }

  def virtual_tokens(self, config: T5Config) -> VirtualTokens:
    return self.prompt.virtual_tokens(config)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def look_up(next_fun, args, kwargs, context):
      if context.method_name != 'embed':
        return next_fun(*args, **kwargs)
      table = self.table(context.module.variables[self.collection])
      first_id = context.module.config.vocab_size
      rows = table.reshape(-1, table.shape[-1])  # [K * P, E]
      return embed_virtual(next_fun, *args, first_id, rows)

    return look_up

  def as_prompt(
    self, arrays: Mapping[str, Any]
  ) -> tuple[Prompt, dict[str, Any]] | None:
    arrays = {name: jnp.asarray(a[...]) for name, a in arrays.items()}
    return self.prompt, {'table': np.asarray(self.table(arrays))}

  def settings(self) -> dict[str, Any]:
    return {**self.prompt.settings(), **super().settings()}

  @classmethod
  def with_settings(cls, settings: Mapping[str, Any]) -> 'Method':
    found = super().with_settings(settings)
    prompt = Prompt.with_settings(settings)
    return dataclasses.replace(found, prompt=prompt)


def embedding_of(params: Mapping[str, Any]) -> Float[Array, 'V E']:
  """T5's table of embeddings, float32, of its parameters."""
  table = parameters.flatten(params)['token_embedder/embedding']
  return jnp.asarray(table).astype(jnp.float32)
