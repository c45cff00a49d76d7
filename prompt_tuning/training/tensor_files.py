"""safetensors files: read slice by slice, written whole or not at all."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.models.parameters import LazyArray

ENDING = '.safetensors'

_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype(np.int32),
  'I64': np.dtype(np.int64),
}


def read(file: str | os.PathLike) -> tuple[dict[str, LazyArray], dict]:
  """The arrays of a file, by name, and its metadata, texts by name.

  Raises:
    UserError: it cannot be read, or holds other types than floats and integers;
      damage may show only when an array is read.
  """
  file = pathlib.Path(file)
  with _reading(file), safetensors.safe_open(file, framework='numpy') as opened:
    arrays = {}
    for name in opened.keys():
      part = opened.get_slice(name)
      dtype = part.get_dtype()
      if dtype not in _DTYPES:
        raise UserError(
          f'{file} stores {name} as {dtype}; this package reads'
          f' {", ".join(_DTYPES)}'
        )
      arrays[name] = LazyArray(
        tuple(part.get_shape()), _DTYPES[dtype], _Reader(file, name)
      )
    return arrays, dict(opened.metadata() or {})


class _Reader:
  """Reads one array of a file; of slices, those alone."""

  def __init__(self, file: pathlib.Path, name: str):
    self._file = file
    self._name = name

  def __call__(self, index: Any) -> np.ndarray:
    with (
      _reading(self._file),
      safetensors.safe_open(self._file, framework='numpy') as opened,
    ):
      parts = index if isinstance(index, tuple) else (index,)
      if all(isinstance(i, slice) and i.step in (None, 1) for i in parts):
        part = opened.get_slice(self._name)
        ranges = zip(parts, part.get_shape(), strict=False)
        return part[tuple(slice(*i.indices(size)[:2]) for i, size in ranges)]
      return opened.get_tensor(self._name)[index]


def write(
  file: str | os.PathLike,
  arrays: Mapping[str, Any],
  metadata: Mapping[str, Any],
  dtype: Any = None,
) -> epath.Path:
  """Writes arrays and facts; the folder is made if need be.

  Args:
    file: local, or gs:// where the arrays are small.
    arrays: by name; lazy ones too.
    metadata: written as text; None is left out.
    dtype: of the arrays (rounded to nearest even); None: as they are.

  Raises:
    UserError: it cannot be written.
  """
  file = files.place(file)
  ready = {}
  for name in sorted(arrays):
    array = np.asarray(arrays[name])
    if dtype is not None:
      array = array.astype(jnp.dtype(dtype))
    ready[name] = np.ascontiguousarray(array).reshape(array.shape)
  facts = {k: str(v) for k, v in metadata.items() if v is not None}
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.beside(file) as unfinished:
      if '://' in os.fspath(file):
        with tempfile.TemporaryDirectory() as folder:
          local = pathlib.Path(folder, 'arrays')
          safetensors.numpy.save_file(ready, local, facts)
          _sort_metadata(local)
          unfinished.write_bytes(local.read_bytes())
      else:
        # Without a copy of all of it in memory.
        unfinished.touch()
        usual = os.stat(unfinished).st_mode  # safetensors has its own
        safetensors.numpy.save_file(ready, unfinished, facts)
        os.chmod(unfinished, usual)
        _sort_metadata(unfinished)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f'cannot write {file}: {files.reason(error)}; free the disk or choose'
      ' another folder'
    ) from error
  return file


def _sort_metadata(file: os.PathLike) -> None:
  """Makes equal contents equal bytes: safetensors orders facts at random."""
  with open(file, 'r+b') as opened:
    size = int.from_bytes(opened.read(8), 'little')
    header = json.loads(opened.read(size))
    facts = header.get('__metadata__', {})
    header |= {'__metadata__': dict(sorted(facts.items()))}
    text = json.dumps(header, ensure_ascii=False, separators=(',', ':'))
    data = text.encode().ljust(size)
    if len(data) == size:
      opened.seek(8)
      opened.write(data)


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(
      f'cannot read {file} ({files.reason(error)}); the file is damaged or of'
      ' another kind, get it again'
    ) from error
