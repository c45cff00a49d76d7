"""Prefix tuning: keys and values in front of those of every layer.

Each attention that is named looks at P trained keys and values of its own
before it looks at the sequence (Li and Liang 2021, section 4.2); T5's weights
do not make them, nor do its norms. They stand at the positions -P to -1 of the
sequence, so that T5's relative position bias tells them apart, and a query near
to them from one far away. That is what transformers makes of a T5 decoder's
past keys, which is how PEFT's prefix tuning acts; it reaches no encoder (peft
issue 2989) and no cross-attention, ours reaches what `Prefix.attentions` says.
A packed row is one sequence: its examples share the prefix and lie at their
distances in the row from it. T5's cross-attention has no bias, here neither.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import parameters
from prompt_tuning.models.attention import see_keys_in_front

# The modules' names of the attentions that there are.
ATTENTIONS = {
  'encoder': 'attention',
  'decoder': 'self_attention',
  'cross': 'encoder_decoder_attention',
}


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
  """Its arrays are 'keys' and 'values' [P, N*D] of each attention.

  With a reparametrisation (section 4.3 there) they are `tanh(R D + d) U + u`,
  keys and then values: 'rows' R [P, E] and 'down' D [E, hidden] of all layers
  of one kind of attention, 'up' U [hidden, 2*N*D] of each. Files have the keys
  and values that come of it.

  Attributes:
    length: P.
    attentions: which have a prefix, of 'encoder' and 'decoder' (the stacks'
      self-attention) and 'cross' (the decoder's attention over the encoder).
    hidden: width of the reparametrisation; 0: none.
    scale: standard deviation of what keys, values and R start as; 1 is PEFT's.
  """

  collection: ClassVar[str] = 'prefix'

  length: int = 20
  attentions: Sequence[str] = ('encoder', 'decoder')
  hidden: int = 0
  scale: float = 1.0

  def __post_init__(self):
    unknown = [name for name in self.attentions if name not in ATTENTIONS]
    if unknown or not self.attentions:
      raise UserError(
        f'Prefix.attentions must be some of {", ".join(ATTENTIONS)}, got'
        f' {list(self.attentions)}'
      )
    if self.length < 1 or self.hidden < 0:
      raise UserError(
        'Prefix.length must be 1 or more and Prefix.hidden 0 or more, got'
        f' {self.length} and {self.hidden}'
      )

  @property
  def acts_on_keys(self) -> bool:
    return 'cross' in self.attentions

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    arrays: dict[str, jax.Array] = {}

    def draw(path, shape, limit=None):
      """Normal numbers, or uniform ones within a limit."""
      key = jax.random.fold_in(rng, len(arrays))
      if limit is None:
        drawn = self.scale * jax.random.normal(key, shape, jnp.float32)
      else:  # torch's start of linear layers, which is PEFT's
        drawn = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
      arrays[path] = drawn

    for path, kernel in sorted(parameters.flatten(params).items()):
      place = path.removesuffix('/key/kernel')
      name = place.rpartition('/')[2]
      if place == path or name not in self._names():
        continue
      embed, *layers, size = kernel.shape  # layers of a scanned stack
      if not self.hidden:
        draw(f'{place}/keys', (*layers, self.length, size))
        draw(f'{place}/values', (*layers, self.length, size))
        continue
      shared = f'{path.partition("/")[0]}/{name}'
      if f'{shared}/rows' not in arrays:
        draw(f'{shared}/rows', (self.length, embed))
        draw(f'{shared}/down', (embed, self.hidden), embed**-0.5)
        draw(f'{shared}/down_bias', (self.hidden,), embed**-0.5)
      limit = self.hidden**-0.5
      draw(f'{place}/up', (*layers, self.hidden, 2 * size), limit)
      draw(f'{place}/up_bias', (*layers, 2 * size), limit)
    return parameters.nest(arrays)

  def _names(self) -> list[str]:
    return [ATTENTIONS[name] for name in self.attentions]

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    # By the attention's name; stands outside of a stack that may be scanned.
    hidden: dict[str, Float[Array, 'P H']] = {}

    def act(next_fun, args, kwargs, context):
      module, method = context.module, context.method_name
      kind = type(module).__name__
      if method == '__call__' and kind in ('Encoder', 'Decoder'):
        shared = module.variables.get(self.collection, {})
        for name in self._names():
          if 'rows' in shared.get(name, {}):
            hidden[name] = _hidden(shared[name])
      if method == '__call__' and kind == 'RelativePositionBias':
        stack = 'decoder' if 'decoder' in module.path else 'encoder'
        if stack in self.attentions:
          before = jnp.arange(-self.length, 0, dtype=args[1].dtype)
          return next_fun(args[0], jnp.concatenate([before, args[1]]))
      if method == 'attend' and module.name in self._names():
        own = module.variables[self.collection]
        if self.hidden:
          own = _keys_and_values(hidden[module.name], own)
        return _attend_with(own, next_fun, *args, **kwargs)
      return next_fun(*args, **kwargs)

    return act

  def plain(
    self, arrays: Mapping[str, Any]
  ) -> tuple['Prefix', Mapping[str, Any]]:
    if not self.hidden:
      return self, arrays
    arrays = {path: np.asarray(array) for path, array in arrays.items()}
    tree = parameters.nest(arrays)
    made = {}
    for path in arrays:
      place = path.removesuffix('/up')
      if place == path:
        continue
      stack, *_, name = place.split('/')
      own = {'up': arrays[path], 'up_bias': arrays[f'{place}/up_bias']}
      found = jax.jit(
        lambda shared, own: _keys_and_values(_hidden(shared), own)
      )(tree[stack][name], own)
      made |= {f'{place}/{kind}': np.asarray(x) for kind, x in found.items()}
    return dataclasses.replace(self, hidden=0), made


def _matmul(x: Float[Array, 'P I'], kernel: Float[Array, 'I O']):
  # As exact while training as where files are made of it.
  return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _hidden(shared: Mapping[str, jax.Array]) -> Float[Array, 'P H']:
  x = _matmul(shared['rows'], shared['down'])
  return jnp.tanh(x + shared['down_bias'][None])


def _keys_and_values(
  hidden: Float[Array, 'P H'], own: Mapping[str, jax.Array]
) -> dict[str, Float[Array, 'P _']]:
  x = _matmul(hidden, own['up']) + own['up_bias'][None]
  return dict(zip(('keys', 'values'), jnp.split(x, 2, axis=-1)))


def _attend_with(own, attend, query, key, value, mask, bias, **kwargs):
  """Attention with a layer's own keys and values in front."""

  def in_front(name, x):  # x [B, S, N, D]
    rows = own[name].reshape(1, -1, *x.shape[2:])
    # For each example in float32, since their gradients are summed.
    rows = jnp.repeat(rows, len(x), axis=0).astype(x.dtype)
    return jnp.concatenate([rows, x], axis=1)

  mask = see_keys_in_front(mask, len(own['keys']))
  key, value = in_front('keys', key), in_front('values', value)
  return attend(query, key, value, mask, bias, **kwargs)
