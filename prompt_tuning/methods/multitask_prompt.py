"""Multitask prompt tuning, MPT (Wang et al. 2023, arXiv 2303.02861, section 3).

The prompt of task k is a shared one times a matrix of low rank of its own,
entry by entry (section 3.1): P_k = P * (U_k V_k), with U_k [P, r] and V_k
[r, E], r = 1 in the paper. An example chooses its task's prompt by its ids
(`Prompt.num_prompts` and `Task.prompt_indices`), so that all tasks train in one
mixed batch.

Prompts that were trained for each task alone may teach them (section 3.2):
to the loss is added

  lambda (KL[p_teacher || p] + |H - H_teacher|^2),

where p are the softmax of logits over a temperature, and H hidden states. Of
those the paper names no layer: here they are the decoder's last, behind its
norm, and their squared distance is a mean over E. The divergence is not
multiplied by the temperature's square, as Hinton et al. 2015 do to keep its
gradient's size: at another temperature than 1, `distillation` has to make up
for it. Each token's divergence and distance are weighed as its loss is.
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
from prompt_tuning.methods.computed_prompt import embedding_of
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.method import TokenPenalty
from prompt_tuning.methods.prompt import Initializer


@dataclasses.dataclass(frozen=True)
class MultitaskPrompt(ComputedPrompt):
  """Its arrays are 'shared' [P, E], 'columns' [K, P, r] and 'rows' [K, r, E].

  With teachers there are 'teachers' [K, P, E], which are not trained and in no
  file.

  Attributes:
    prompt: length, number of tasks and placement; the shared prompt starts as
      its first.
    rank: r.
    factor: entries of U_k V_k start near it; 1: all tasks start near the shared
      prompt. 0 is PEFT's: they start near nothing.
    noise: deviation of the entries of U_k and V_k from their start.
    source: gives the arrays of a trained one, from which another begins: its
      shared prompt, and for each new task the mean of its tasks' factors.
    factor_rate: the learning rate of U_k and V_k is the shared prompt's times
      this. The source's choice while a new task is learnt is 0.4 beside 0.3;
      while the source tasks are, one rate for both: 1.
    teachers: an initialiser that gives the prompt of each task alone [K, P, E],
      as `source_prompts` does of files; None: there are no teachers.
    distillation: lambda.
    temperature: that logits are divided by, the teachers' too.
  """

  collection: ClassVar[str] = 'multitask_prompt'
  stacked: ClassVar[Sequence[str]] = ('columns', 'rows', 'teachers')

  rank: int = 1
  factor: float = 1.0
  noise: float = 0.02
  source: Callable[[], Mapping[str, Float[np.ndarray, '...']]] | None = None
  factor_rate: float = 0.4 / 0.3
  teachers: Initializer | None = None
  distillation: float = 1.0
  temperature: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if self.distillation < 0 or self.temperature <= 0:
      raise UserError(
        'MultitaskPrompt.distillation must be 0 or more and its temperature'
        f' above 0, got {self.distillation} and {self.temperature}'
      )

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Array]:
    arrays = self._start(rng, params, text)
    if self.teachers is not None:
      shape = self.table(arrays).shape
      key = jax.random.fold_in(rng, 2)
      teachers = self.teachers(key, shape, embedding_of(params), text)
      arrays['teachers'] = jnp.asarray(teachers, jnp.float32)
    return arrays

  def _start(
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

  def rate(self, path: str) -> float:
    of_arrays = {'shared': 1.0, 'teachers': 0.0}
    return self.learning_rate_scale * of_arrays.get(path, self.factor_rate)

  def table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    return arrays['shared'][None] * (arrays['columns'] @ arrays['rows'])

  def token_penalty(self) -> TokenPenalty | None:
    if self.teachers is None or not self.distillation:
      return None

    def distil(arrays, student, alone):
      teacher = alone(self.prompt, {'table': arrays['teachers']})
      log_p, wanted = (
        jax.nn.log_softmax(x.logits / self.temperature)
        for x in (student, teacher)
      )
      divergence = jnp.sum(jnp.exp(wanted) * (wanted - log_p), axis=-1)
      states, wanted = (
        x.states.astype(jnp.float32) for x in (student, teacher)
      )
      distance = jnp.mean(jnp.square(states - wanted), axis=-1)
      return self.distillation * (divergence + distance)

    return distil

  def plain(
    self, arrays: Mapping[str, Any]
  ) -> tuple['MultitaskPrompt', dict[str, Any]]:
    method = dataclasses.replace(self, teachers=None)
    return method, {k: x for k, x in arrays.items() if k != 'teachers'}
