"""Prompts as files: `prompt.npy` for numbers, `prompt.safetensors` for facts.

Both hold one float32 array, [P, E] for a single prompt and [K, P, E] for a
table of several; the .npy file is what public prompts come as, the other one
also says which base model the prompt belongs to. Nothing is ever unpickled.
"""

from collections.abc import Mapping
import contextlib
import io
import math
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
from jaxtyping import Float
import numpy as np
import safetensors
import safetensors.numpy

import prompt_tuning
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import t5x

NPY = 'prompt.npy'
SAFETENSORS = 'prompt.safetensors'

# Names of metadata that are not text; safetensors stores text alone.
_NUMBERS = {
  'num_prompts': int,
  'prompt_length': int,
  'embed': int,
  'step': int,
  'inputs_length': int,
  'targets_length': int,
  'metric_value': float,
}


def save_prompt(
  folder: str | os.PathLike,
  table: Float[np.ndarray | jax.Array, '*K P E'],
  metadata: Mapping[str, Any],
) -> list[epath.Path]:
  """Writes `prompt.npy` and `prompt.safetensors`.

  Args:
    folder: created if need be.
    table: the prompt's rows; [P, E] is fine too.
    metadata: facts such as base, base_fingerprint, task, step, metric and
      metric_value, placement; None is left out. K, P, E and the versions of
      this package and of JAX are added.

  Returns:
    The paths of the two files.

  Raises:
    UserError: if the folder cannot be written.
  """
  folder = epath.Path(folder).expanduser()
  table = _checked(np.asarray(table), 'the prompt')
  facts = {
    **metadata,
    'num_prompts': table.shape[0],
    'prompt_length': table.shape[1],
    'embed': table.shape[2],
    'prompt_tuning_version': prompt_tuning.__version__,
    'jax_version': jax.__version__,
  }
  facts = {k: str(v) for k, v in facts.items() if v is not None}
  array = np.ascontiguousarray(table[0] if len(table) == 1 else table)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / NPY) as unfinished:
      content = io.BytesIO()
      np.save(content, array, allow_pickle=False)
      unfinished.write_bytes(content.getvalue())
    with _replacing(folder / SAFETENSORS) as unfinished:
      unfinished.write_bytes(
        safetensors.numpy.save({'prompt': array}, metadata=facts)
      )
  except OSError as error:
    raise UserError(
      f'cannot write the prompt to {folder}: {error.strerror}; free the disk '
      'or choose another folder'
    ) from error
  return [folder / NPY, folder / SAFETENSORS]


def load_prompt(
  path: str | os.PathLike, variable: str = t5x.PROMPT
) -> tuple[Float[np.ndarray, 'K P E'], dict[str, Any]]:
  """Reads a prompt from a file, or from a folder that holds one.

  Args:
    path: a numpy file (.npy, or the public prompt tuning's
      `encoder.prompt.prompt.prompt`), a .safetensors file, a folder that
      `save_prompt` wrote, a PEFT adapter, or a T5X checkpoint with a prompt in
      it.
    variable: where a T5X checkpoint has the prompt, an array [P, E].

  Returns:
    The table, float32, K = 1 for a file of [P, E], and the metadata; an .npy
    file has none. num_prompts, prompt_length, embed and step are integers,
    metric_value is a float, anything else text.

  Raises:
    UserError: there is no such file, or it is damaged, of another shape, or
      not finite.
  """
  path = epath.Path(path).expanduser()
  if '://' in os.fspath(path):
    with tempfile.TemporaryDirectory() as folder:
      if local := _downloaded(path, pathlib.Path(folder)):
        try:
          return load_prompt(local)
        except UserError as error:
          named = str(error).replace(str(local), str(path))
          raise UserError(named) from error
  if adapters.is_peft(path):
    array, metadata = adapters.load_peft(path)
    return _checked(array, str(path)), metadata
  if t5x.is_checkpoint(path):
    array, step = t5x.read_array(path, variable), t5x.open_checkpoint(path).step
    return _checked(array, str(path)), {'step': step, 'format': 't5x'}
  if path.is_dir():
    inside = [path / name for name in (SAFETENSORS, NPY)]
    found = [file for file in inside if file.is_file()]
    if not found:
      raise UserError(
        f'no prompt in {path}: it needs {SAFETENSORS} or {NPY}; name the file, '
        'or the folder of an export'
      )
    path = found[0]
  if not path.is_file():
    raise UserError(
      f'no prompt at {path}; give a .npy or .safetensors file, or a folder '
      'with one'
    )
  if path.suffix == '.safetensors':
    array, metadata = _read_safetensors(path)
  elif _is_npy(path):
    array, metadata = _read_npy(path), {}
  else:
    raise UserError(
      f'{path.name} is no prompt: a prompt is a .npy or .safetensors file, got '
      f'{path}'
    )
  return _checked(array, str(path)), metadata


def _downloaded(path: epath.Path, folder: pathlib.Path) -> pathlib.Path | None:
  """A copy on this machine of a prompt's file or folder in a bucket."""
  local = folder / path.name
  if not path.is_dir():
    if not path.exists():
      return None
    local.write_bytes(path.read_bytes())
    return local
  files = [
    file
    for file in path.iterdir()
    if file.suffix in ('.npy', '.safetensors')
    or file.name.startswith('adapter')
  ]
  for file in files:
    local.mkdir(exist_ok=True)
    (local / file.name).write_bytes(file.read_bytes())
  return local if files else None


def _is_npy(path: pathlib.Path) -> bool:
  """By its name or, as the public prompt tuning has none, its first bytes."""
  if path.suffix == '.npy':
    return True
  with contextlib.suppress(OSError), path.open('rb') as file:
    return file.read(6) == b'\x93NUMPY'
  return False


def _read_npy(path: pathlib.Path) -> np.ndarray:
  try:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise ValueError('an archive of several arrays')
    return array
  except (OSError, ValueError, EOFError, SyntaxError) as error:
    raise _damaged(path, error) from error


def _read_safetensors(
  path: pathlib.Path,
) -> tuple[np.ndarray, dict[str, Any]]:
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      names = list(file.keys())
      texts = file.metadata() or {}
      array = file.get_tensor(names[0]) if len(names) == 1 else None
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise _damaged(path, error) from error
  if array is None:
    raise UserError(
      f'{path} holds {len(names)} arrays, a prompt file holds one; give the '
      f'{SAFETENSORS} of an export'
    )
  try:
    metadata = {k: _NUMBERS.get(k, str)(v) for k, v in texts.items()}
  except ValueError as error:
    raise _damaged(path, error) from error
  return array, metadata


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())[:120]
  return UserError(
    f'cannot read the prompt {path} ({reason}); the file is damaged or of '
    'another kind, export it again'
  )


def _checked(array: np.ndarray, source: str) -> np.ndarray:
  """`array` as a finite float32 table [K, P, E]."""
  # bfloat16 is no np.floating; its kind is 'V', as unknown types' is.
  is_float = array.dtype.kind == 'f' or array.dtype.name == 'bfloat16'
  if array.ndim not in (2, 3) or 0 in array.shape or not is_float:
    raise UserError(
      f'{source} has shape {list(array.shape)} of {array.dtype}, a prompt '
      'needs floats of [length, embed] or [prompts, length, embed]'
    )
  table = np.array(array, np.float32).reshape(-1, *array.shape[-2:])
  if not np.isfinite(table).all():
    bad = math.prod(table.shape) - int(np.isfinite(table).sum())
    raise UserError(
      f'{source} has {bad} values that are not finite; export the checkpoint '
      'of an earlier step'
    )
  return table


class _replacing:
  """A path to write to, which takes the place of `target` at the end."""

  def __init__(self, target: epath.Path):
    self._target = target
    self._unfinished = target.with_name(target.name + '.unfinished')

  def __enter__(self) -> epath.Path:
    return self._unfinished

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      self._unfinished.replace(self._target)
    else:
      self._unfinished.unlink(missing_ok=True)
