"""The one way in which this package writes a file: beside, then renamed.

What a command writes is looked at before it begins (`check_output`): nothing
that it reads is written over, and a result only where `overwrite` says so.
"""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import os
import pathlib
import secrets
from typing import IO

from etils import epath

from prompt_tuning.errors import UserError

UNFINISHED = '.unfinished'


def check_output(
  path: str | os.PathLike,
  inputs: Iterable[str | os.PathLike | None] = (),
  *,
  overwrite: bool = False,
  what: str = 'the output',
) -> None:
  """Raises UserError where a file, or a folder of files, may not be written.

  Args:
    path: of a file, or of a folder that gets files. A device or a pipe may
      always be written to.
    inputs: what is read: no file of it, or folder, may be `path` or in it.
    overwrite: a file that is there, or files in the folder, may be replaced.
    what: names it in messages.
  """
  path = epath.Path(path).expanduser()
  local = '://' not in os.fspath(path)
  if local:
    path = pathlib.Path(os.path.realpath(path))
    for given in filter(None, inputs):
      source = os.path.realpath(os.path.expanduser(given))
      if os.path.exists(source) and pathlib.Path(source).is_relative_to(path):
        raise UserError(
          f'{what} {path} would be written over {given}, which is read: choose'
          ' another place'
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
      return
  is_result = path.is_file() or (path.is_dir() and any(path.iterdir()))
  if is_result and not overwrite:
    kind = 'holds files' if path.is_dir() else 'exists'
    raise UserError(
      f'{what} {path} {kind}: choose another place, or say overwrite'
    )
  if local:
    parent = path
    while not parent.exists():
      parent = parent.parent
    if not os.access(parent, os.W_OK) or (path != parent and parent.is_file()):
      raise UserError(
        f'{what} {path} cannot be written: {parent} is in the way'
      )


@contextlib.contextmanager
def beside(path: str | os.PathLike) -> Iterator[epath.Path]:
  """A place to write to, which takes the path's name once all is written.

  Either the whole file stands there in the end or what stood there before,
  also when the machine goes down. A symbolic link stays, its target is
  replaced; what is no regular file (a device, a pipe) is written to directly.

  Args:
    path: local, or any place where etils.epath can write; its folder exists.

  Raises:
    OSError: it cannot be written.
  """
  path = epath.Path(path).expanduser()
  if '://' not in os.fspath(path):
    path = epath.Path(os.path.realpath(path))
    if path.exists() and not pathlib.Path(path).is_file():
      yield path
      return
  token = f'{os.getpid()}-{secrets.token_hex(4)}'
  unfinished = path.parent / f'{path.name}.{token}{UNFINISHED}'
  try:
    yield unfinished
    if '://' not in os.fspath(path):
      _to_disk(unfinished)
    unfinished.replace(path)
  finally:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO]:
  """`beside`, opened for writing ('w' or 'wb')."""
  with beside(path) as unfinished, unfinished.open(mode) as file:
    yield file


def _to_disk(path: epath.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


# tensorstore and others report a fault of the disk as an error of another kind.
_STORAGE = tuple(
  os.strerror(code)
  for code in (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
  )
)
_STATUSES = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'FAILED_PRECONDITION')


def is_storage_fault(error: Exception) -> bool:
  """Whether the disk is to blame."""
  if isinstance(error, OSError):
    return True
  return any(mark in str(error) for mark in (*_STATUSES, *_STORAGE))


def reason(error: Exception) -> str:
  """A fault of reading or writing in one short line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  for words in _STORAGE:
    if words in text:
      return words
  return ' '.join(text.split())[:160] or type(error).__name__
