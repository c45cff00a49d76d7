"""Model tuning and pre-training: all of T5's own parameters are trained."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax

from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import parameters


@dataclasses.dataclass(frozen=True)
class ModelTuning(Method):
  """The collection of T5 itself, in place of a frozen one."""

  collection: ClassVar[str] = parameters.PARAMS
  acts_on_keys: ClassVar[bool] = False

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> Any:
    return params

  def axes(self, arrays: Any) -> Any:
    return parameters.nest(
      {
        path: parameters.logical_axes(path)
        for path in parameters.flatten(arrays)
      }
    )

  def fold(
    self, params: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict[str, Any]:
    return dict(arrays)
