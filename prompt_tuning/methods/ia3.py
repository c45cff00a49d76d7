"""IA3: learnt scales of keys, values and hidden units (Liu et al. 2022, 3.3).

Keys and values of every attention are multiplied by a vector each, as is what
enters the last product of each feed-forward block. All start at one.
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
class IA3(Method):
  """Which projections are scaled.

  Attributes:
    outputs: projections whose outputs are scaled.
    inputs: projections whose inputs are scaled.
  """

  collection: ClassVar[str] = 'ia3'

  outputs: Sequence[str] = ('key', 'value')
  inputs: Sequence[str] = ('wo',)

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    parameters.require_projections('IA3.outputs', self.outputs)
    parameters.require_projections('IA3.inputs', self.inputs)
    if both := {*self.outputs} & {*self.inputs}:
      raise UserError(
        f'IA3 scales the inputs or the outputs of a projection: {min(both)!r}'
        ' is in both lists'
      )
    arrays = {}
    for path, kernel in parameters.flatten(params).items():
      name, kind = path.split('/')[-2:]
      if kind != 'kernel' or name not in (*self.outputs, *self.inputs):
        continue
      shape = list(kernel.shape)
      stacked = parameters.is_scanned(path)
      layers = (shape.pop(parameters.LAYERS_AXIS),) if stacked else ()
      size = shape[1] if name in self.outputs else shape[0]
      at = path.removesuffix('kernel') + 'scale'
      arrays[at] = jnp.ones((*layers, size), jnp.float32)
    if not arrays:
      raise UserError('IA3.outputs and IA3.inputs name no projection')
    return parameters.nest(arrays)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def scale(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name != '__call__' or not module.has_variable(
        self.collection, 'scale'
      ):
        return next_fun(*args, **kwargs)
      by = module.get_variable(self.collection, 'scale')
      by = by.reshape((1,) * (args[0].ndim - 1) + (-1,))
      if module.name in self.inputs:
        x = args[0]
        return next_fun(x * by.astype(x.dtype), *args[1:], **kwargs)
      y = next_fun(*args, **kwargs)
      return y * by.astype(y.dtype)

    return scale

  def fold(
    self, params: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict[str, Any]:
    folded = dict(params)
    for path in arrays:
      at = path.removesuffix('scale') + 'kernel'
      by = np.asarray(arrays[path])
      if path.split('/')[-2] in self.inputs:
        by = by[:, None]
      folded[at] = np.asarray(params[at], np.float32) * by
    return folded
