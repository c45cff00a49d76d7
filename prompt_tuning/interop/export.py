"""A prompt out of a run's checkpoints, and a prompt file into a new run."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.interop import prompts
from prompt_tuning.models.prompt import Initializer
from prompt_tuning.training.checkpoints import Checkpoints

# What a checkpoint remembers of its run that a prompt file repeats.
_FACTS = ('base', 'base_fingerprint', 'task', 'placement', 'seed')


def export(
  model_dir: str | os.PathLike,
  output_dir: str | os.PathLike,
  step: int | None = None,
) -> dict[str, Any]:
  """Writes the prompt of a run as `prompt.npy` and `prompt.safetensors`.

  Args:
    model_dir: of a run that trained a prompt; it may still be running.
    output_dir: gets the files.
    step: the checkpoint to take, base steps included; None takes the best one
      by the run's metric, else the newest.

  Returns:
    {'step', 'shape': [K, P, E], 'files'}.

  Raises:
    UserError: no such run or checkpoint, or the run did not train a prompt.
  """
  folder = pathlib.Path(model_dir).expanduser() / 'checkpoints'
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
  table = _trained(checkpoints, step).get('prompt', {}).get('table')
  if table is None:
    raise UserError(
      f'the run in {model_dir} did not train a prompt; it is a base '
      'checkpoint itself: give it as INITIAL_CHECKPOINT_PATH'
    )
  facts = {name: extra.get(name) for name in _FACTS}
  files = prompts.save_prompt(
    output_dir,
    table,
    facts | {'step': step} | _metric(checkpoints.metrics(step), extra),
  )
  return {
    'step': step,
    'shape': list(table.shape),
    'files': [str(file) for file in files],
  }


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


def _trained(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
  """The trained collections of a checkpoint, whatever optimiser made it."""
  manifest = checkpoints.directory / str(step) / 'manifest.json'
  like: dict[str, Any] = {}
  for path, array in json.loads(manifest.read_text())['arrays'].items():
    *parents, last = path.split('/')
    node = like
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = jax.ShapeDtypeStruct(array['shape'], array['dtype'])
  if 'prompt' not in like.get('trainable', {}):
    return {}
  state, _ = checkpoints.restore(step, like)
  return state['trainable']


def _metric(metrics: dict[str, float], extra: dict[str, Any]) -> dict[str, Any]:
  """The metric that chose the checkpoint, else the first one."""
  name = extra.get('best_metric') or next(iter(sorted(metrics)), None)
  if name not in metrics:
    return {}
  return {'metric': name, 'metric_value': metrics[name]}
