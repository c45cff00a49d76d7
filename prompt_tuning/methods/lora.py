"""LoRA: a low-rank update beside frozen kernels (Hu et al. 2021, section 4.1).

x W becomes x W + (alpha / rank) x A B with A [I, r] and B [r, O]; B starts at
zero, so that training starts from the frozen model.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import parameters


@dataclasses.dataclass(frozen=True)
class Lora(Method):
  """Which kernels get an update, and of which rank.

  Attributes:
    rank: r.
    alpha: the update is scaled by alpha / rank.
    targets: names of projections: 'query', 'key', 'value', 'out', 'wi_0',
      'wi_1', 'wi', 'wo' (the paper's choice: query and value).
  """

  collection: ClassVar[str] = 'lora'

  rank: int = 8
  alpha: float = 16.0
  targets: Sequence[str] = ('query', 'value')

  @property
  def acts_on_keys(self) -> bool:
    return not {'key', 'value'}.isdisjoint(self.targets)

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    parameters.require_projections('Lora.targets', self.targets)
    arrays = {}
    for path, kernel in sorted(parameters.flatten(params).items()):
      *place, name, kind = path.split('/')
      if kind != 'kernel' or name not in self.targets:
        continue
      stacked = parameters.is_scanned(path)
      shape = list(kernel.shape)
      layers = (shape.pop(parameters.LAYERS_AXIS),) if stacked else ()
      inputs, outputs = shape
      key = jax.random.fold_in(rng, len(arrays))
      a = jax.random.normal(key, (*layers, inputs, self.rank), jnp.float32)
      at = '/'.join([*place, name])
      arrays[f'{at}/a'] = a * np.float32(inputs**-0.5)
      arrays[f'{at}/b'] = jnp.zeros((*layers, self.rank, outputs), jnp.float32)
    if not arrays:
      raise UserError(f'Lora.targets {list(self.targets)} name no projection')
    return parameters.nest(arrays)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def update(next_fun, args, kwargs, context):
      y = next_fun(*args, **kwargs)
      module = context.module
      if context.method_name != '__call__' or not module.has_variable(
        self.collection, 'a'
      ):
        return y
      a = module.get_variable(self.collection, 'a').astype(y.dtype)
      b = module.get_variable(self.collection, 'b').astype(y.dtype)
      scale = jnp.asarray(self.alpha / self.rank, y.dtype)
      return y + scale * ((args[0].astype(y.dtype) @ a) @ b)

    return update

  def fold(
    self, params: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict[str, Any]:
    folded = dict(params)
    for path in arrays:
      if path.endswith('/a'):
        place = path.removesuffix('/a')
        a, b = (np.asarray(arrays[f'{place}/{name}']) for name in 'ab')
        kernel = np.asarray(params[f'{place}/kernel'], np.float32)
        folded[f'{place}/kernel'] = kernel + self.alpha / self.rank * (a @ b)
    return folded
