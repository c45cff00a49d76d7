"""What a run trained, as files, and a prompt file into a new run."""

import os
from typing import Any

from etils import epath
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import prompts
from prompt_tuning.models.prompt import Initializer
from prompt_tuning.training import hosts
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.checkpoints import fingerprint

# What a checkpoint remembers of its run that a prompt file repeats.
_FACTS = ('base', 'base_fingerprint', 'task', 'placement', 'seed')


def export(
  model_dir: str | os.PathLike,
  output_dir: str | os.PathLike,
  step: int | None = None,
  dtype: str = 'float32',
) -> dict[str, Any]:
  """Writes what a run trained: its prompt, its model, or both.

  A prompt becomes `prompt.npy` and `prompt.safetensors`, a model
  `model.safetensors`, which INITIAL_CHECKPOINT_PATH takes.

  Args:
    model_dir: of a run; it may still be running.
    output_dir: gets the files.
    step: the checkpoint to take, base steps included; None takes the best one
      by the run's metric, else the newest.
    dtype: of the model's file, 'float32' or 'bfloat16'. A prompt is float32.

  Returns:
    {'step', 'files'}, and of a prompt 'shape': [K, P, E].

  Raises:
    UserError: no such run or checkpoint.
  """
  folder = epath.Path(model_dir).expanduser() / 'checkpoints'
  checkpoints = Checkpoints(folder, read_only=True)
  newest = checkpoints.latest_step()
  if newest is None:
    raise UserError(
      f'MODEL_DIR {model_dir} holds no complete checkpoint; give the MODEL_DIR '
      'of a run that has saved one'
    )
  if step is None:
    step = checkpoints.extra(newest).get('best_step') or newest
    if step not in checkpoints.steps():
      step = newest
  extra = checkpoints.extra(step)
  facts = {name: extra.get(name) for name in _FACTS}
  lengths = extra.get('task_feature_lengths') or {}
  facts |= {f'{name}_length': length for name, length in lengths.items()}
  facts |= _metric(checkpoints.metrics(step), extra)
  written: dict[str, Any] = {'step': step, 'files': []}
  trained = checkpoints.trained(step)
  if not hosts.is_primary():  # of a job: it read along, as all must
    return written
  if 'params' in trained:
    # The prompt belongs to the model it was trained with, not to its start.
    facts |= {
      'base': str(output_dir),
      'base_fingerprint': fingerprint(trained['params']),
    }
  if 'prompt' in trained:
    table = trained['prompt']['table']
    written['shape'] = list(table.shape)
    written['files'] += prompts.save_prompt(
      output_dir, table, facts | {'step': step}
    )
  if 'params' in trained:
    file = base_checkpoints.save_base(
      output_dir, trained['params'], step, facts, dtype
    )
    written['files'].append(file)
  written['files'] = [str(file) for file in written['files']]
  return written


def from_file(path: str | os.PathLike) -> Initializer:
  """A prompt starts as the one in a file that `export` or others wrote.

  Args:
    path: a .npy or .safetensors file, or a folder with one.

  Returns:
    An initialiser (see `models.prompt`). It raises UserError where the file's
    shape is not the prompt's.
  """
  table, _ = prompts.load_prompt(path)

  def init(rng, shape, embedding, *, encode=None, labels=()):
    del rng, embedding, encode, labels
    names = ('prompts', 'length', 'embed')
    fixes = (
      'bind Prompt.num_prompts',
      f'bind PROMPT_LENGTH = {table.shape[1]}',
      'give a prompt of this model',
    )
    for name, got, wanted, fix in zip(names, table.shape, shape, fixes):
      if got != wanted:
        raise UserError(
          f'PROMPT_FILE {path} has {name} {got}, the model needs {wanted}: '
          f'{fix}'
        )
    return jnp.asarray(table, jnp.float32)

  return init


def _metric(metrics: dict[str, float], extra: dict[str, Any]) -> dict[str, Any]:
  """The metric that chose the checkpoint, else the first one."""
  name = extra.get('best_metric') or next(iter(sorted(metrics)), None)
  if name not in metrics:
    return {}
  return {'metric': name, 'metric_value': metrics[name]}
