"""Base models by name or path: bundled, safetensors, or a run of our own.

Our safetensors files hold T5X paths ('encoder/layers_0/mlp/wo/kernel') in
float32 or bfloat16 and say in their metadata to which step they were trained.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import difflib
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

import prompt_tuning
from prompt_tuning.errors import UserError
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop import t5x
from prompt_tuning.training import checkpoints
from prompt_tuning.training.checkpoints import BaseCheckpoint
from prompt_tuning.training.checkpoints import LazyArray

SAFETENSORS = 'model.safetensors'

_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype(np.int32),
  'I64': np.dtype(np.int64),
}


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
  name = os.fspath(path)
  if name in bundled_names():
    file = bundled_folder() / name / SAFETENSORS
    return _open_safetensors(name, file, step)
  found = pathlib.Path(name).expanduser()
  if found.is_file():
    if found.suffix == '.safetensors':
      return _open_safetensors(name, found, step)
    raise UserError(f'cannot read {name}: {_FORMATS}')
  if hugging_face.is_model(name):
    return hugging_face.open_model(name, step)
  if t5x.is_checkpoint(name):
    base = t5x.open_checkpoint(name)
    return base if step is None else dataclasses.replace(base, step=step)
  if not found.is_dir():
    if '://' in name and (run := checkpoints.open_run(name, step)):
      return run
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
  run = checkpoints.open_run(name, step)
  if run is not None:
    return run
  files = sorted(found.glob('*.safetensors'))
  if len(files) == 1:
    return _open_safetensors(name, files[0], step)
  raise UserError(f'{name} holds no checkpoint: {_FORMATS}')


_FORMATS = (
  f'a folder with {SAFETENSORS} of this package, the MODEL_DIR of a run that '
  'trained params, a T5X checkpoint or a Hugging Face T5 is required'
)


def save_base(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  step: int,
  metadata: Mapping[str, Any] | None = None,
  dtype: Any = None,
) -> pathlib.Path:
  """Writes parameters as one safetensors file.

  Args:
    path: a .safetensors file, or a folder that gets `model.safetensors`.
    params: nested dict, or a mapping of T5X paths (lazy arrays too).
    step: to which they were trained; runs on them count from there.
    metadata: further facts, written as text; None is left out.
    dtype: 'float32' or 'bfloat16' (rounded to nearest even); None: as is.

  Returns:
    The file.

  Raises:
    UserError: if it cannot be written.
  """
  if '://' in os.fspath(path):
    raise UserError(
      f'a model is written to a folder of this machine, got {path}; copy it'
      ' there afterwards'
    )
  file = pathlib.Path(path).expanduser()
  if file.suffix != '.safetensors':
    file = file / SAFETENSORS
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  arrays = {}
  for name in sorted(flat):
    array = np.asarray(flat[name])
    if dtype is not None:
      array = array.astype(jnp.dtype(dtype))
    arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
  facts = {
    **(metadata or {}),
    'format': 'prompt_tuning',
    'step': int(step),
    'fingerprint': checkpoints.fingerprint(arrays),
    'prompt_tuning_version': prompt_tuning.__version__,
  }
  facts = {k: str(v) for k, v in facts.items() if v is not None}
  unfinished = file.with_name(file.name + '.unfinished')
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, unfinished, metadata=facts)
    unfinished.replace(file)
  except (OSError, safetensors.SafetensorError) as error:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)
    reason = getattr(error, 'strerror', None) or str(error)
    raise UserError(
      f'cannot write {file}: {reason}; free the disk or choose another folder'
    ) from error
  return file


def _open_safetensors(
  name: str, file: pathlib.Path, step: int | None
) -> BaseCheckpoint:
  with _reading(file):
    with safetensors.safe_open(file, framework='numpy') as opened:
      metadata = dict(opened.metadata() or {})
      arrays = {}
      for key in opened.keys():
        part = opened.get_slice(key)
        arrays[key] = LazyArray(
          tuple(part.get_shape()),
          _dtype(file, key, part.get_dtype()),
          hugging_face.safetensors_reader(file, key),
        )
  if not any('/' in key for key in arrays):
    raise UserError(f'{file} holds no T5 of this package: {_FORMATS}')
  saved = metadata.get('step')
  if step is None and saved is None:
    raise UserError(
      f'{file} does not say to which step it was trained; bind '
      'load_checkpoint.step'
    )
  with _reading(file):
    step = int(saved) if step is None else step
  return BaseCheckpoint(name, step, arrays, metadata)


def _dtype(file: pathlib.Path, key: str, name: str) -> np.dtype:
  if name not in _DTYPES:
    raise UserError(
      f'{file} stores {key} as {name}; this package reads {", ".join(_DTYPES)}'
    )
  return _DTYPES[name]


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    reason = ' '.join(str(error).split())[:120]
    raise UserError(
      f'cannot read {file} ({reason}); the file is damaged or of another '
      'kind, get it again'
    ) from error
