"""Prompts of any format: ours, numpy files, PEFT adapters, T5X checkpoints.

Ours are `prompt.npy` for numbers and `prompt.safetensors` for facts. Both hold
one float32 array, [P, E] for a single prompt and [K, P, E] for a table of
several; the .npy file is what public prompts come as, the other one also says
which base model the prompt belongs to. Nothing is ever unpickled.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from prompt_tuning import files
from prompt_tuning import methods as methods_lib
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import faults
from prompt_tuning.interop import peft_methods
from prompt_tuning.interop import t5x
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prompt import Initializer
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.training import tensor_files
from prompt_tuning.training import trained as trained_lib
from prompt_tuning.training.trained import Trained

NPY = 'prompt.npy'
SAFETENSORS = 'prompt.safetensors'


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
  prompt = _prompt(np.asarray(table), metadata, 'the prompt')
  return trained_lib.save_trained(folder, prompt)


def load_prompt(
  path: str | os.PathLike, variable: str = t5x.PROMPT
) -> tuple[Float[np.ndarray, 'K P E'], dict[str, Any]]:
  """Reads a prompt from a file, or from a folder that holds one.

  Args:
    path: see `load_trained`, of which it takes what holds a prompt alone.
    variable: likewise.

  Returns:
    The table, float32, K = 1 for a file of [P, E], and the metadata; an .npy
    file has none. num_prompts, prompt_length, embed and step are integers,
    metric_value is a float, anything else text.

  Raises:
    UserError: there is no such file, or it is damaged, of another shape, or
      not finite.
  """
  prompt = _as_prompt(path, variable)
  return np.asarray(prompt.arrays['table']), dict(prompt.facts)


def _as_prompt(path: str | os.PathLike, variable: str) -> Trained:
  """The prompt, plain or made so, that a file or folder holds alone."""
  found = load_trained(path, variable)
  prompts = [one.as_prompt() or one for one in found]
  if len(found) != 1 or not isinstance(prompts[0].method, Prompt):
    names = ', '.join(one.method.collection for one in found)
    raise UserError(f'{path} holds {names}, a prompt alone is required')
  return prompts[0]


def load_trained(
  path: str | os.PathLike | Sequence[str], variable: str = t5x.PROMPT
) -> tuple[Trained, ...]:
  """What methods trained, from a run, a file or a folder of files.

  Args:
    path: the MODEL_DIR of a run (its best checkpoint, or a checkpoint by
      name), a file or folder of `save_trained`, a prompt as a numpy file (.npy,
      or the public prompt tuning's `encoder.prompt.prompt.prompt`), a PEFT
      adapter, or a T5X checkpoint with a prompt in it. Of a list of prompts, of
      one length and placement, it makes one table.
    variable: where a T5X checkpoint has the prompt, an array [P, E].

  Raises:
    UserError: there is no such file, or it is damaged, of another shape, or
      not finite.
  """
  if isinstance(path, list | tuple):
    return (_table(path, variable),)
  path = files.place(path)
  if '://' in os.fspath(path):
    with tempfile.TemporaryDirectory() as folder:
      if local := _downloaded(path, pathlib.Path(folder)):
        try:
          return load_trained(local)
        except UserError as error:
          named = str(error).replace(str(local), str(path))
          raise UserError(named) from error
  if adapters.is_peft(path):
    return (peft_methods.load(path),)
  if t5x.is_checkpoint(path):
    array, step = t5x.read_array(path, variable), t5x.open_checkpoint(path).step
    return (_prompt(array, {'step': step, 'format': 't5x'}, str(path)),)
  if path.is_dir():
    return _of_folder(path)
  if not path.is_file():
    raise UserError(
      f'no prompt at {path}; give a .npy or .safetensors file, or a folder '
      'with one'
    )
  if path.suffix == tensor_files.ENDING:
    return (_of_safetensors(path),)
  if not _is_npy(path):
    raise UserError(
      f'{path.name} is no prompt: a prompt is a .npy or .safetensors file, got '
      f'{path}'
    )
  return (_prompt(_read_npy(path), {}, str(path)),)


def _table(paths: Sequence[str], variable: str) -> Trained:
  """Several prompts as one table; its facts are those that they share."""
  if not paths:
    raise UserError('PROMPT_FILE is an empty list; name prompts')
  found = [_as_prompt(path, variable) for path in paths]
  first = found[0]
  for path, one in zip(paths, found):
    for name in ('length', 'placement'):
      here, there = (getattr(x.method, name) for x in (first, one))
      if here != there:
        raise UserError(
          f'PROMPT_FILE {path} has {name} {there}, {paths[0]} has {here}: the'
          ' prompts of a table are alike'
        )
    here, there = (x.arrays['table'].shape[-1] for x in (first, one))
    if here != there:
      raise UserError(
        f'PROMPT_FILE {path} has embed {there}, {paths[0]} has {here}: give'
        ' prompts of one model'
      )
  table = np.concatenate([np.asarray(x.arrays['table']) for x in found])
  method = dataclasses.replace(first.method, num_prompts=len(table))
  facts = {
    name: fact
    for name, fact in first.facts.items()
    if all(x.facts.get(name) == fact for x in found) or name == 'step'
  }
  return Trained(method, {'table': table}, facts)


def _of_folder(path: epath.Path) -> tuple[Trained, ...]:
  """Of a run's folder, or of one with files of methods."""
  if run := trained_lib.of_run(path):
    return tuple(run)
  names = methods_lib.by_collection()
  # Of an export all stand in one folder, of a run in one for each method.
  for folders in ([path], [path / name for name in names]):
    files = [
      folder / f'{name}{tensor_files.ENDING}'
      for folder in folders
      for name in names
    ]
    found = [file for file in files if file.is_file()]
    if found:
      read = [_of_safetensors(file) for file in found]
      here = {one.method.collection for one in read}
      read = [one for one in read if not _stands_for(one, here)]
      return tuple(
        sorted(read, key=lambda one: one.facts.get(trained_lib.ORDER, 0))
      )
  if (path / NPY).is_file():
    return load_trained(path / NPY)
  raise UserError(
    f'no prompt in {path}: it needs {SAFETENSORS} or {NPY}; name the file, '
    'or the folder of an export or of a run'
  )


def _stands_for(one: Trained, collections: Collection[str]) -> bool:
  """Whether it is the plain form of a method that is there itself."""
  return one.facts.get(trained_lib.PLAIN_OF) in collections


def _of_safetensors(path: epath.Path) -> Trained:
  arrays, texts = tensor_files.read(path)
  if 'method' in texts or methods_lib.of_collection(path.stem):
    return trained_lib.load_file(path)
  if len(arrays) != 1:
    raise UserError(
      f'{path} holds {len(arrays)} arrays, a prompt file holds one; give the '
      f'{SAFETENSORS} of an export'
    )
  return _prompt(np.asarray(*arrays.values()), texts, str(path))


def from_file(path: str | os.PathLike) -> Initializer:
  """A prompt starts as the one in a file that `export` or others wrote.

  Args:
    path: see `load_prompt`.

  Returns:
    An initialiser (see `methods.prompt`). It raises UserError where the file's
    shape is not the prompt's.
  """
  table, _ = load_prompt(path)

  def init(rng, shape, embedding, text):
    del rng, embedding, text
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


def source_prompts(paths: Sequence[str | os.PathLike]) -> Initializer:
  """The prompts of several files as one table.

  For `Attempt.sources`, and `MultitaskPrompt.teachers` in their tasks' order.

  Args:
    paths: see `load_prompt`; files of one prompt each.

  Returns:
    An initialiser (see `methods.prompt`). It raises UserError where number,
    length or embed are not what is needed.
  """
  tables = {path: load_prompt(path)[0] for path in paths}

  def init(rng, shape, embedding, text):
    del rng, embedding, text
    number, *rows = shape
    if len(tables) != number:
      raise UserError(
        f'source_prompts gives {len(tables)} prompts, {number} are wanted: bind'
        f' Attempt.num_sources = {len(tables)}, for teachers Prompt.num_prompts'
      )
    for path, table in tables.items():
      if table.shape != (1, *rows):
        raise UserError(
          f'the source prompt {path} has shape {list(table.shape)},'
          f' {[1, *rows]} is needed: give one of this length and model'
        )
    return jnp.asarray(np.concatenate(list(tables.values())), jnp.float32)

  return init


def multitask_source(
  path: str | os.PathLike,
) -> Callable[[], Mapping[str, Any]]:
  """The arrays of a trained MultitaskPrompt, for `MultitaskPrompt.source`.

  Args:
    path: of a run, a file or a PEFT adapter (see `load_trained`).
  """
  return _arrays_of(MultitaskPrompt, path)


def attempt_attention(
  path: str | os.PathLike,
) -> Callable[[], Mapping[str, Any]]:
  """The arrays of a trained Attempt, for `Attempt.attention`.

  Args:
    path: of a run or a file.
  """
  return _arrays_of(Attempt, path)


def _arrays_of(
  kind: type[Method], path: str | os.PathLike
) -> Callable[[], Mapping[str, Any]]:
  """Gives the arrays that a method of this kind has at the path."""
  found = load_trained(path)
  for one in found:
    if isinstance(one.method, kind):
      arrays = {k: np.asarray(x, np.float32) for k, x in one.arrays.items()}
      return lambda: arrays
  names = ', '.join(one.method.collection for one in found)
  raise UserError(f'{path} holds {names}, {kind.collection} is required')


def _prompt(array: Any, facts: Mapping[str, Any], source: str) -> Trained:
  """A finite table of floats, whoever wrote it."""
  facts = {name: fact for name, fact in facts.items() if fact is not None}
  try:
    method, arrays = Prompt.from_file({'prompt': array}, {}, facts)
  except ValueError as error:
    raise UserError(f'{source} has {error}') from None
  bad = int((~np.isfinite(arrays['table'])).sum())
  if bad:
    raise UserError(
      f'{source} has {bad} values that are not finite; export the checkpoint '
      'of an earlier step'
    )
  return Trained(method, arrays, facts)


def _downloaded(path: epath.Path, folder: pathlib.Path) -> pathlib.Path | None:
  """A copy on this machine of a prompt's file or folder in a bucket."""
  local = folder / path.name
  if not path.is_dir():
    found = {local: path} if path.exists() else {}
  else:
    local.mkdir()
    found = {
      local / file.name: file
      for file in path.iterdir()
      if file.suffix in ('.npy', '.safetensors')
      or file.name.startswith('adapter')
    }
  for copy, file in found.items():
    copy.write_bytes(file.read_bytes())
  return local if found else None


def _is_npy(path: pathlib.Path) -> bool:
  """By its name or, as the public prompt tuning has none, its first bytes."""
  if path.suffix == '.npy':
    return True
  with faults.reading(path), path.open('rb') as file:
    return file.read(6) == b'\x93NUMPY'


def _read_npy(path: pathlib.Path) -> np.ndarray:
  with faults.reading(f'the prompt {path}'):
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise ValueError('an archive of several arrays')
    return array
