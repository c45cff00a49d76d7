"""T5X checkpoints, read and written.

T5X's own layout is a folder with a msgpack index, the file `checkpoint`, whose
leaves are small arrays or tensorstore specs of zarr arrays beside it
(`target.encoder.layers_0.mlp.wo.kernel/`). With orbax, T5X writes a tree of
zarr or zarr3 arrays, in one OCDBT database or a folder each, described by
`_METADATA`. Both are read array by array and slice by slice, from local folders
and gs://. Nothing is ever unpickled.

Paths in here are those of T5X's state: 'target/...' for parameters,
'state/param_states/...' for the optimiser's.
"""

from collections.abc import Iterator, Mapping
import json
import math
import os
import pathlib
import re
from typing import Any

from flax import serialization
from flax import traverse_util
from jaxtyping import Float
import numpy as np
import tensorstore as ts

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.interop import faults
from prompt_tuning.models import parameters
from prompt_tuning.models.parameters import LazyArray
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import storage_dtype

INDEX = 'checkpoint'
# Where the public prompt tuning's model holds its prompt.
PROMPT = 'encoder/prompt/prompt/prompt'

_METADATA = '_METADATA'
_FOLDER = re.compile(r'checkpoint_(\d+)')
# About what T5X makes its chunks: a shard reads no more than it needs.
_CHUNK_BYTES = 64 * 2**20


def is_checkpoint(path: str | os.PathLike) -> bool:
  """True for a T5X checkpoint, or a folder of `checkpoint_<step>` folders."""
  return _find(os.fspath(path)) is not None


def open_checkpoint(path: str | os.PathLike) -> BaseCheckpoint:
  """A T5X checkpoint's parameters; its arrays are read when asked for.

  Args:
    path: a checkpoint's folder, a folder of `checkpoint_<step>` folders (the
      newest is taken), local or gs://.

  Returns:
    The parameters by T5X path, without 'target/'. A prompt at PROMPT is none of
    them: `read_array` gives it. The step is the checkpoint's.

  Raises:
    UserError: nothing there, damaged, or another format.
  """
  arrays = open_state(path)
  step = _step(os.fspath(path), arrays)
  params = {
    name.removeprefix('target/'): array
    for name, array in arrays.items()
    if name.startswith('target/') and name != f'target/{PROMPT}'
  }
  if not params:
    raise UserError(
      f'{path} is a T5X checkpoint without parameters; give another one'
    )
  return BaseCheckpoint(os.fspath(path), step, params, {'format': 't5x'})


def open_state(path: str | os.PathLike) -> dict[str, Any]:
  """All arrays of a T5X checkpoint by path, the optimiser's included."""
  name = os.fspath(path)
  folder = _find(name)
  if folder is None:
    raise UserError(
      f'no T5X checkpoint in {name}: a folder with the file {INDEX}, with '
      f'{_METADATA}, or of checkpoint_<step> folders is required'
    )
  with _reading(folder):
    if (data := _read_bytes(folder, INDEX)) is not None:
      return dict(_indexed(folder, data))
    return dict(_orbax(folder, _read_bytes(folder, _METADATA)))


def read_array(path: str | os.PathLike, name: str = PROMPT) -> np.ndarray:
  """One array of a checkpoint by its path, with or without 'target/'."""
  arrays = open_state(path)
  for candidate in (name, f'target/{name}'):
    if candidate in arrays:
      return np.asarray(arrays[candidate])
  raise UserError(
    f'{path} has no array {name}; it has {", ".join(sorted(arrays)[:5])}, ...'
  )


def write_checkpoint(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  step: int,
  prompt: Float[np.ndarray, 'P E'] | None = None,
  dtype: str = 'float32',
) -> pathlib.Path:
  """Writes `checkpoint_<step>` in T5X's layout, without optimiser state.

  Arrays are read and written one at a time. A prompt is folded in at PROMPT,
  and written to `numpy_checkpoints/checkpoint_<step>/` as the public prompt
  tuning does.

  Args:
    path: the folder that gets the checkpoint, a MODEL_DIR of T5X.
    params: arrays by T5X path (lazy ones too).
    step: the model's; T5X counts on from it.
    prompt: one prompt, float32 whatever `dtype`.
    dtype: of the parameters, 'float32' or 'bfloat16'.

  Returns:
    The checkpoint's folder, which appears once it is complete.

  Raises:
    UserError: if it exists or cannot be written.
  """
  root = pathlib.Path(files.place(path))
  folder = root / f'checkpoint_{step}'
  if folder.exists():
    raise UserError(f'{folder} exists; remove it or choose another folder')
  arrays = dict(params)
  types = dict.fromkeys(arrays, np.dtype(storage_dtype(dtype)))
  if prompt is not None:
    arrays[PROMPT] = np.asarray(prompt, np.float32)
    types[PROMPT] = np.dtype(np.float32)
  with faults.writing(folder):
    root.mkdir(parents=True, exist_ok=True)
    with files.beside(folder) as unfinished:
      unfinished.mkdir()
      specs = {
        name: _write_array(unfinished, name, arrays[name], types[name])
        for name in sorted(arrays)
      }
      state = {'step': np.asarray(step, np.int32)}
      optimizer = {'target': parameters.nest(specs), 'state': state}
      index = {'version': 3, 'optimizer': optimizer}
      data = serialization.msgpack_serialize(index)
      (unfinished / INDEX).write_bytes(data)
      if prompt is not None:
        file = root / 'numpy_checkpoints' / folder.name
        file.mkdir(parents=True, exist_ok=True)
        file /= PROMPT.replace('/', '.')
        with files.replacing(file, 'wb') as opened:
          np.save(opened, arrays[PROMPT], allow_pickle=False)
  return folder


def _write_array(
  folder: os.PathLike, name: str, array: Any, dtype: np.dtype
) -> dict[str, Any]:
  """Writes a parameter's zarr array; returns its entry in the index."""
  array = np.asarray(array).astype(dtype)
  rows = max(_CHUNK_BYTES * len(array) // max(array.nbytes, 1), 1)
  chunks = [min(rows, len(array)), *array.shape[1:]]
  metadata = {
    'chunks': chunks,
    'compressor': {'id': 'gzip', 'level': 1},
    'shape': list(array.shape),
  }
  below = f'target.{name.replace("/", ".")}/'
  spec = {'driver': 'zarr', 'dtype': dtype.name, 'metadata': metadata}
  kvstore = _kvstore(os.path.abspath(folder), below)
  store = ts.open({**spec, 'kvstore': kvstore}, create=True).result()
  store.write(array).result()
  return {**spec, 'kvstore': {'driver': 'file', 'path': below}}


# Reading.


def _find(path: str) -> str | None:
  """The folder of the checkpoint itself; None where there is none."""
  path = path.rstrip('/')
  if not path.startswith('gs://'):
    path = str(pathlib.Path(path).expanduser().absolute())
    if not os.path.isdir(path):
      return None
  for below in ('', '/state'):
    if any(_exists(path + below, name) for name in (INDEX, _METADATA)):
      return path + below
  if path.startswith('gs://'):
    return None
  steps = {
    int(match[1]): name
    for name in os.listdir(path)
    if (match := _FOLDER.fullmatch(name)) and _find(f'{path}/{name}')
  }
  return _find(f'{path}/{steps[max(steps)]}') if steps else None


def _kvstore(folder: str, below: str = '') -> dict[str, Any]:
  if folder.startswith('gs://'):
    bucket, _, path = folder.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': f'{path}/{below}'}
  return {'driver': 'file', 'path': f'{folder}/{below}'}


def _exists(folder: str, name: str) -> bool:
  if not folder.startswith('gs://'):
    return os.path.isfile(f'{folder}/{name}')
  with _reading(folder):
    return _read_bytes(folder, name) is not None


def _read_bytes(folder: str, name: str) -> bytes | None:
  """A file of the checkpoint; None if it is not there."""
  if not folder.startswith('gs://'):
    path = pathlib.Path(folder, name)
    return path.read_bytes() if path.is_file() else None
  store = ts.KvStore.open(_kvstore(folder)).result()
  found = store.read(name).result()
  return found.value if found.state == 'value' else None


def _step(path: str, arrays: Mapping[str, Any]) -> int:
  if 'state/step' in arrays:
    with _reading(path):
      return int(np.asarray(arrays['state/step']).reshape(()))
  raise UserError(
    f'{path} does not say to which step it was trained (state/step); it is '
    'no T5X checkpoint'
  )


def _indexed(folder: str, data: bytes) -> Iterator[tuple[str, Any]]:
  """The arrays of T5X's own layout."""
  tree = serialization.msgpack_restore(data)
  leaves = traverse_util.flatten_dict(
    tree.get('optimizer', tree),
    sep='/',
    is_leaf=lambda _, node: 'driver' in node and 'kvstore' in node,
  )
  for name, leaf in leaves.items():
    if isinstance(leaf, np.ndarray | np.generic | int | float):
      yield name, np.asarray(leaf)
    elif isinstance(leaf, Mapping):
      # Paths were those of the machine that wrote them, the driver too.
      below = pathlib.PurePosixPath(leaf['kvstore']['path']).name
      yield name, _lazy(folder, below, {**leaf['metadata'], **leaf})
    elif isinstance(leaf, str) and leaf.startswith('PLACEHOLDER://'):
      below = leaf.removeprefix('PLACEHOLDER://').replace('/', '.')
      yield name, _lazy(folder, pathlib.PurePosixPath(below).name, {})
    elif leaf is not None:
      raise ValueError(f'{name} is {type(leaf).__name__}')


def _lazy(folder: str, below: str, known: Mapping[str, Any]) -> LazyArray:
  """An array in a folder of its own, which says what the index does not."""
  if not {'shape', 'dtype'} <= known.keys():
    data = _read_bytes(folder, f'{below}/.zarray')
    if data is None:
      raise ValueError(f'{below}/.zarray is missing')
    known = {**json.loads(data), **known}
  shape = tuple(int(size) for size in known['shape'])
  spec = {
    'driver': 'zarr',
    'kvstore': _kvstore(folder, f'{below}/'),
    'fill_missing_data_reads': False,
  }
  dtype = np.dtype(known['dtype'])
  return LazyArray(shape, dtype, _reader(folder, spec, shape, dtype))


def _reader(
  folder: str, spec: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype
):
  def read(index):
    with _reading(folder):
      store = ts.open(spec, read=True, open=True).result()
      found = list(store.shape), store.dtype.numpy_dtype.name
      if found != (list(shape), dtype.name):
        raise UserError(
          f'{spec["kvstore"]["path"]} has shape {found[0]} of {found[1]}, the'
          f' index says {list(shape)} of {dtype.name}; the checkpoint is'
          ' damaged, get it again'
        )
      wanted = store[_bounded(index, shape)]
      _require_memory(spec['kvstore']['path'], store, wanted)
      return np.asarray(wanted.read().result())

  return read


def _require_memory(path: str, store: Any, wanted: Any) -> None:
  """Raises UserError for what no memory of this machine can hold.

  tensorstore would end the process.
  """
  chunk = store.chunk_layout.read_chunk.shape or ()
  itemsize = store.dtype.numpy_dtype.itemsize
  needed = itemsize * max(math.prod(chunk), math.prod(wanted.shape))
  there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if needed > there:
    raise UserError(
      f'{path} needs {needed / 2**30:.4g} GiB, this machine has'
      f' {there / 2**30:.4g}; is the checkpoint damaged?'
    )


def _bounded(index: Any, shape: tuple[int, ...]) -> Any:
  """An index whose slices end where the array does, as numpy's may not."""
  index = index if isinstance(index, tuple) else (index,)
  if Ellipsis in index:
    return index if len(index) > 1 else ...
  return tuple(
    slice(*part.indices(size)) if isinstance(part, slice) else part
    for part, size in zip(index, shape, strict=False)
  )


def _orbax(folder: str, data: bytes) -> Iterator[tuple[str, Any]]:
  """The arrays of orbax's layout."""
  metadata = json.loads(data)
  driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
  ocdbt = _exists(folder, 'manifest.ocdbt')
  for entry in metadata['tree_metadata'].values():
    keys = [str(part['key']) for part in entry['key_metadata']]
    kind = entry['value_metadata']
    empty = kind.get('value_type') in ('None', 'Dict')
    if empty or kind.get('skip_deserialize'):
      continue
    below = f'{".".join(keys)}/'
    kvstore = _kvstore(folder, below)
    if ocdbt:
      kvstore = {'driver': 'ocdbt', 'base': _kvstore(folder), 'path': below}
    spec = {'driver': driver, 'kvstore': kvstore}
    # zarr3 leaves out chunks of zeros, of which parameters have none.
    if driver == 'zarr' or keys[0] == 'target':
      spec['fill_missing_data_reads'] = False
    store = ts.open(spec, read=True, open=True).result()
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    read = _reader(folder, spec, shape, dtype)
    yield '/'.join(keys), LazyArray(shape, dtype, read)


def _reading(folder: str) -> Any:
  return faults.reading(f'the T5X checkpoint {folder}', 'not complete')
