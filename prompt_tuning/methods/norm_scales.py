"""Norm scales: what BitFit leaves of a T5, which has no biases.

BitFit (Ben Zaken et al. 2022) trains bias terms alone. T5's layers have none;
its smallest vectors are the scales of its RMS norms. An offset beside each is
trained, from zero on: its gradient is the scale's own, and it folds into it.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import layers
from prompt_tuning.models import parameters


@dataclasses.dataclass(frozen=True)
class NormScales(Method):
  """Its arrays are 'offset' [E] of each norm."""

  collection: ClassVar[str] = 'norm_scales'
  acts_on_keys: ClassVar[bool] = False

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    arrays = {}
    for path, scale in parameters.flatten(params).items():
      if path.endswith('norm/scale'):
        shape = scale.shape  # [E], of scanned layers [E, layers]
        at = path.removesuffix('scale') + 'offset'
        arrays[at] = jnp.zeros(shape[::-1], jnp.float32)
    return parameters.nest(arrays)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def add(next_fun, args, kwargs, context):
      y = next_fun(*args, **kwargs)
      module = context.module
      if context.method_name != '__call__' or not module.has_variable(
        self.collection, 'offset'
      ):
        return y
      offset = module.get_variable(self.collection, 'offset')
      # unit(x) * (scale + offset) = norm(x) + unit(x) * offset
      return y + layers.rms_norm(args[0], offset, module.dtype)

    return add

  def fold(
    self, params: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict[str, Any]:
    folded = dict(params)
    for path, offset in arrays.items():
      at = path.removesuffix('offset') + 'scale'
      folded[at] = np.asarray(params[at], np.float32) + np.asarray(offset)
    return folded
