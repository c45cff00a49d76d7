"""Base models by name or path: bundled, safetensors, or a run of our own.

Our safetensors files hold T5X paths ('encoder/layers_0/mlp/wo/kernel') in
float32 or bfloat16 and say in their metadata to which step they were trained.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import json
import os
import pathlib
from typing import Any

import prompt_tuning
from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop import t5x
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.models import parameters
from prompt_tuning.training import tensor_files
from prompt_tuning.training import trained as trained_lib
from prompt_tuning.training.base import STATED
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import UnknownStepError
from prompt_tuning.training.base import read_stated

SAFETENSORS = 'model.safetensors'


def bundled_folder() -> pathlib.Path:
  """Where the models that come with the package lie, a folder each."""
  return pathlib.Path(prompt_tuning.__file__).parent / 'bundled'


def bundled_names() -> list[str]:
  """Names of the models that come with the package."""
  return sorted(
    file.parent.name for file in bundled_folder().glob(f'*/{SAFETENSORS}')
  )


def load_checkpoint(
  path: str | os.PathLike, step: int | None = None
) -> BaseCheckpoint:
  """A base checkpoint; its arrays are read when asked for.

  Args:
    path: the name of a bundled model ('t5_1_1_mini'), a .safetensors file of
      ours, a folder with one, a run of ours that trained `params` (its
      MODEL_DIR or one of its checkpoints), a T5X checkpoint (see `t5x`), a
      Hugging Face T5 or the hub's id of one (see `hugging_face`).
    step: the step to count from, where the file does not say, or another one
      of a run's checkpoints; None: the file's own.

  Raises:
    UserError: nothing there, a format that cannot be read, a damaged file.
  """
  if step is not None and step < 0:
    raise UserError(f'the step of {path} must be 0 or more, got {step}')
  found = pathlib.Path(files.place(path))
  name = os.fspath(path)
  if name in bundled_names():
    file = bundled_folder() / name / SAFETENSORS
    return _open_safetensors(name, file, step)
  if found.is_file():
    if found.suffix == '.safetensors':
      return _open_safetensors(name, found, step)
    raise UserError(f'cannot read {name}: {_FORMATS}')
  if hugging_face.is_model(name):
    return hugging_face.open_model(name, step)
  if run := _open_run(name, step):
    return run
  if t5x.is_checkpoint(name):
    base = t5x.open_checkpoint(name)
    return base if step is None else dataclasses.replace(base, step=step)
  if not found.is_dir():
    if hugging_face.is_hub_id(name):
      base = hugging_face.open_model(hugging_face.download(name), step)
      return dataclasses.replace(base, path=name)
    names = bundled_names()
    near = difflib.get_close_matches(name, names, 1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise UserError(
      f'no checkpoint {name}: not a file or folder, and the bundled models are '
      f'{", ".join(names) or "none"}{hint}'
    )
  if (found / SAFETENSORS).is_file():
    return _open_safetensors(name, found / SAFETENSORS, step)
  singles = sorted(found.glob('*.safetensors'))
  if len(singles) == 1:
    return _open_safetensors(name, singles[0], step)
  raise UserError(f'{name} holds no checkpoint: {_FORMATS}')


def open_checkpoint(path: str | os.PathLike) -> BaseCheckpoint:
  """`load_checkpoint` where nobody counts steps: a file need not say any."""
  try:
    return load_checkpoint(path)
  except UnknownStepError:
    return load_checkpoint(path, 0)


_FORMATS = (
  f'a folder with {SAFETENSORS} of this package, the MODEL_DIR of a run that '
  'trained params, a T5X checkpoint or a Hugging Face T5 is required'
)


def _open_run(name: str, step: int | None) -> BaseCheckpoint | None:
  """The parameters that one of our own runs trained: its best, or a step's."""
  if not trained_lib.of_run(name):
    return None
  found = trained_lib.of_run(name, step)
  for one in found:
    if one.is_base:
      return one.as_base()
  names = ', '.join(one.method.collection for one in found)
  raise UserError(
    f'{name} trained {names}, a base checkpoint needs {parameters.PARAMS}: give'
    ' the base that run started from'
  )


def save_base(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  step: int,
  metadata: Mapping[str, Any] | None = None,
  dtype: Any = None,
  stated: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes parameters as one safetensors file.

  Args:
    path: the folder that gets `model.safetensors`.
    params: nested dict, or a mapping of T5X paths (lazy arrays too).
    step: to which they were trained; runs on them count from there.
    metadata: further facts, written as text; None is left out.
    dtype: 'float32' or 'bfloat16' (rounded to nearest even); None: as is.
    stated: what shapes do not tell (see `BaseCheckpoint`).

  Returns:
    The file.

  Raises:
    UserError: if it cannot be written.
  """
  facts = {**(metadata or {}), 'step': int(step)}
  if stated:
    facts[STATED] = json.dumps(dict(stated))
  model = trained_lib.Trained(ModelTuning(), parameters.flatten(params), facts)
  return trained_lib.save_trained(path, model, dtype)[0]


def _open_safetensors(
  name: str, file: pathlib.Path, step: int | None
) -> BaseCheckpoint:
  arrays, metadata = tensor_files.read(file)
  if not any('/' in key for key in arrays):
    raise UserError(f'{file} holds no T5 of this package: {_FORMATS}')
  if step is None:
    saved = metadata.get('step', '')
    if not saved.isdigit():
      raise UnknownStepError(str(file))
    step = int(saved)
  stated = read_stated(metadata.get(STATED))
  return BaseCheckpoint(name, step, arrays, metadata, stated)
