"""Adapters: a bottleneck behind sublayers (Houlsby et al. 2019, section 2.1).

What a sublayer gives to the residual stream, y, becomes y + up(f(down(y))),
with biases, before it is added there. Houlsby et al. put one behind attention
and one behind the feed-forward block of each layer and train the norms too
(`NormScales`); Pfeiffer et al. (2021, section 3.2.3 and appendix) keep the
second alone. There is a nonlinearity in it: no plain T5 acts like it, and it
does not fold.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import layers
from prompt_tuning.models import parameters

# The last projection of each sublayer, whose outputs are of size E.
_LAST = {
  'attention': 'out',
  'self_attention': 'out',
  'encoder_decoder_attention': 'out',
  'mlp': 'wo',
}


@dataclasses.dataclass(frozen=True)
class Adapters(Method):
  """Its arrays are 'down' [E, r], 'up' [r, E] and their biases, of sublayers.

  Attributes:
    size: r, of the bottleneck.
    behind: sublayers: 'attention' (the encoder's), 'self_attention',
      'encoder_decoder_attention', 'mlp'. Those of Houlsby et al., whose model
      is an encoder, are the first, second and last; ('mlp',) is Pfeiffer's.
    activation: f, one of `models.layers.ACTIVATIONS`.
  """

  collection: ClassVar[str] = 'adapters'
  acts_on_keys: ClassVar[bool] = False

  size: int = 16
  behind: Sequence[str] = ('attention', 'self_attention', 'mlp')
  activation: str = 'gelu'

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    if self.activation not in layers.ACTIVATIONS:
      raise UserError(
        f'Adapters.activation is {self.activation!r}; known are'
        f' {sorted(layers.ACTIVATIONS)}'
      )
    if unknown := set(self.behind) - set(_LAST):
      raise UserError(
        f'Adapters.behind names {min(unknown)!r}; sublayers are'
        f' {", ".join(_LAST)}'
      )
    arrays = {}
    for path, kernel in sorted(parameters.flatten(params).items()):
      *place, sublayer, name, _ = ('', '', *path.split('/'))
      if sublayer not in self.behind or name != _LAST[sublayer]:
        continue
      stacked = parameters.is_scanned(path)
      leading = (kernel.shape[parameters.LAYERS_AXIS],) if stacked else ()
      embed, r = kernel.shape[-1], self.size
      key = jax.random.fold_in(rng, len(arrays))
      down = jax.random.normal(key, (*leading, embed, r), jnp.float32)
      at = '/'.join([*place, sublayer]).lstrip('/')
      arrays[f'{at}/down'] = down * jnp.float32(embed**-0.5)
      arrays[f'{at}/down_bias'] = jnp.zeros((*leading, r), jnp.float32)
      # Zeros: training starts from the frozen model.
      arrays[f'{at}/up'] = jnp.zeros((*leading, r, embed), jnp.float32)
      arrays[f'{at}/up_bias'] = jnp.zeros((*leading, embed), jnp.float32)
    if not arrays:
      raise UserError(f'Adapters.behind {list(self.behind)} name no sublayer')
    return parameters.nest(arrays)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    activation = layers.ACTIVATIONS[self.activation]

    def adapt(next_fun, args, kwargs, context):
      y = next_fun(*args, **kwargs)
      module = context.module
      if context.method_name != '__call__' or not module.has_variable(
        self.collection, 'down'
      ):
        return y

      def project(name, x):
        kernel = module.get_variable(self.collection, name)
        bias = module.get_variable(self.collection, f'{name}_bias')
        bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)

      return y + project('up', activation(project('down', y)))

    return adapt
