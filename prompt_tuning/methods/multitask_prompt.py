"""Multitask prompt tuning, MPT (Wang et al. 2023, section 3.1).

The prompt of task k is a shared one times a matrix of low rank of its own,
entry by entry: P_k = P * (U_k V_k), with U_k [P, r] and V_k [r, E], r = 1 in
the paper. An example chooses its task's prompt by its ids (`Prompt.num_prompts`
and `Task.prompt_indices`), so that all tasks train in one mixed batch. The
paper's distillation from prompts of single tasks is not here.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.methods.computed_prompt import ComputedPrompt
from prompt_tuning.methods.method import TaskText


@dataclasses.dataclass(frozen=True)
class MultitaskPrompt(ComputedPrompt):
  """Its arrays are 'shared' [P, E], 'columns' [K, P, r] and 'rows' [K, r, E].

  Attributes:
    prompt: length, number of tasks and placement; the shared prompt starts as
      its first.
    rank: r.
    factor: entries of U_k V_k start near it; 1: all tasks start near the shared
      prompt. 0 is PEFT's: they start near nothing.
    noise: deviation of the entries of U_k and V_k from their start.
    source: gives the arrays of a trained one, from which another begins: its
      shared prompt, and for each new task the mean of its tasks' factors.
  """

  collection: ClassVar[str] = 'multitask_prompt'
  stacked: ClassVar[Sequence[str]] = ('columns', 'rows')

  rank: int = 1
  factor: float = 1.0
  noise: float = 0.02
  source: Callable[[], Mapping[str, Float[np.ndarray, '...']]] | None = None

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Array]:
    shared = self.start(rng, params, text)[0]
    tasks, (length, embed) = self.prompt.num_prompts, shared.shape
    shapes = {
      'columns': (tasks, length, self.rank),
      'rows': (tasks, self.rank, embed),
    }
    if self.source is not None:
      return self._from_source(shapes, shared.shape)
    # Of r products each is a share of the factor.
    middle = (self.factor / self.rank) ** 0.5
    keys = jax.random.split(jax.random.fold_in(rng, 1))
    factors = {
      name: middle + self.noise * jax.random.normal(key, shape, jnp.float32)
      for key, (name, shape) in zip(keys, shapes.items())
    }
    return {'shared': shared, **factors}

  def _from_source(
    self, shapes: Mapping[str, tuple[int, ...]], shared: tuple[int, int]
  ) -> dict[str, Array]:
    found = {k: np.asarray(v, np.float32) for k, v in self.source().items()}
    arrays = {'shared': found['shared']}
    for name, shape in shapes.items():
      mean = found[name].mean(axis=0, keepdims=True)
      arrays[name] = np.repeat(mean, shape[0], axis=0)
    for name, shape in {'shared': shared, **shapes}.items():
      if arrays[name].shape != shape:
        raise UserError(
          f'MultitaskPrompt.source has {name} {list(arrays[name].shape)}, this'
          f' one needs {list(shape)}: bind its length and rank'
        )
    return {name: jnp.asarray(array) for name, array in arrays.items()}

  def table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    return arrays['shared'][None] * (arrays['columns'] @ arrays['rows'])
