"""What is known to go wrong before anything is read, and is said so."""

from collections.abc import Mapping, Sequence
import math
import os
import shutil
from typing import Any

from etils import epath
import jax

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.models import attention
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import batches as batches_lib
from prompt_tuning.training import best as best_lib
from prompt_tuning.training import optimizers
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import check_vocabulary
from prompt_tuning.training.evaluator import Evaluator
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.validation import Validation


def positive(**settings: int) -> None:
  """Raises UserError for the first setting below 1."""
  for name, value in settings.items():
    if value < 1:
      raise UserError(f'{name} must be 1 or more, got {value}')


def seed_in_range(seed: int) -> None:
  """Raises UserError for a seed of which JAX would take the last bits."""
  if not 0 <= seed < 2**32:
    raise UserError(f'seed must be from 0 to {2**32 - 1}, got {seed}')


def settings(
  model: EncoderDecoderModel,
  data: batches_lib.TrainData,
  base: BaseCheckpoint | None,
  methods: Sequence[Method],
  learning_rate: float | optimizers.Schedule,
) -> None:
  """Contradictions that would only show after minutes."""
  if data.batch_size < 1:
    raise UserError(f'BATCH_SIZE must be 1 or more, got {data.batch_size}')
  if not callable(learning_rate) and not 0 <= learning_rate < math.inf:
    raise UserError(
      f'learning_rate must be 0 or more, and finite, got {learning_rate}'
    )
  if not methods:
    raise UserError('methods is empty; give what to train, such as Prompt()')
  trains_base = any(m.collection == parameters.PARAMS for m in methods)
  if base is None and not trains_base:
    raise UserError(
      'a frozen model needs trained parameters: give INITIAL_CHECKPOINT_PATH'
    )
  if trains_base:
    attention.require_trainable_biases(model.config.attention)
  if data.vocabulary is not None:
    vocabulary = load_vocabulary(data.vocabulary)
    if vocabulary.size > model.config.vocab_size:
      raise UserError(
        f'vocabulary {data.vocabulary} has {vocabulary.size} pieces, the model'
        f' has vocab_size {model.config.vocab_size}; give the vocabulary that'
        ' the base was trained with'
      )
    if base is not None:
      check_vocabulary(vocabulary, base)


def metric_is_measured(
  selection: best_lib.Selection, evaluators: Mapping[str, Any]
) -> None:
  """Raises UserError where no evaluation will have the metric to select by."""
  names: set[str] = set()
  for evaluator in evaluators.values():
    if not isinstance(evaluator, Evaluator | Validation):
      return  # one of the caller's own, who knows
    names |= evaluator.metric_names()
  best_lib.Best(selection.metric).require_among(names)


def disk_has_room(model_dir: epath.Path, state: TrainState) -> None:
  """Raises UserError where the disk has no room for two checkpoints.

  One is kept until the next is complete.
  """
  if '://' in os.fspath(model_dir):
    return
  needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(model_dir).free
  if free < needed:
    raise UserError(
      f'MODEL_DIR {model_dir} has {free / 2**30:.2f} GiB free, two checkpoints'
      f' of this run take {needed / 2**30:.2f}: free the disk or choose another'
      ' MODEL_DIR'
    )


def last_step(
  first_step: int, relative: int | None, absolute: int | None
) -> int:
  """The step to end at, by T5X's TRAIN_STEPS or by the run's own count."""
  if (relative is None) == (absolute is None):
    raise UserError(
      'give either TRAIN_STEPS_RELATIVE (updates of this run) or TRAIN_STEPS'
      " (the base checkpoint's steps included)"
    )
  last = first_step + relative if absolute is None else absolute
  if last <= first_step:
    raise UserError(
      f"TRAIN_STEPS {last} is not beyond the base checkpoint's step"
      f" {first_step}; it counts the base's steps too, TRAIN_STEPS_RELATIVE"
      " counts this run's alone"
    )
  return last
