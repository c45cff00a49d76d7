"""Where a path leads, and the one way to write a file: beside, then renamed.

Every path that a user gives goes through `place`. What a command writes is
looked at before it begins (`check_output`): nothing that it reads is written
over, and a result only where `overwrite` says so.
"""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import glob
import os
import pathlib
import secrets
import select
import shutil
import socket
import threading
import time
from typing import IO

from etils import epath

from prompt_tuning.errors import UserError

UNFINISHED = '.unfinished'

# Seconds in which a bucket, or whoever is at the other end of a pipe, must
# answer.
PATIENCE = 30


def place(path: str | os.PathLike) -> epath.Path:
  """A path as the user meant it: `~` is the home folder, gs:// a bucket.

  Raises:
    UserError: it is no path, in no place that can be reached, or a bucket that
      does not answer.
  """
  if not isinstance(path, str | os.PathLike) or not os.fspath(path):
    raise UserError(f'a path is needed, got {path!r}')
  name = os.fspath(path)
  try:
    os.fsencode(name)
  except UnicodeEncodeError:
    raise UserError(f'{name!r} is no path: no file system has it') from None
  if '\0' in name:
    raise UserError(f'{name!r} is no path: it has a zero byte')
  scheme, slashes, _ = name.partition('://')
  if not slashes:
    return epath.Path(os.path.expanduser(name))
  if scheme != 'gs':
    raise UserError(
      f'{name}: {scheme}:// cannot be read or written; copy it to this machine'
      ' or to a bucket (gs://)'
    )
  _require_answer(name)
  return epath.Path(name)


_answering: set[str] = set()


def _require_answer(name: str) -> None:
  """UserError for a bucket from which nothing is heard."""
  bucket = '/'.join(name.split('/')[:3])
  if bucket in _answering:
    return
  faults: list[Exception] = []

  def ask() -> None:
    try:
      epath.Path(name).exists()
    except Exception as error:  # its library has kinds of its own
      faults.append(error)

  # TensorFlow tries for minutes to find credentials: not in this thread.
  asking = threading.Thread(target=ask, daemon=True)
  with stderr_closed():
    asking.start()
    asking.join(PATIENCE)
  if asking.is_alive() or faults:
    said = reason(faults[0]) if faults else f'no answer in {PATIENCE} s'
    raise UserError(
      f'{bucket} cannot be reached ({said}): look at its name, the network and'
      ' your credentials (gcloud auth application-default login)'
    )
  _answering.add(bucket)


@contextlib.contextmanager
def stderr_closed() -> Iterator[None]:
  """Keeps what libraries in C++ say, past Python, off stderr.

  TF_CPP_MIN_LOG_LEVEL=0, which TensorFlow does not heed while it is imported,
  asks for all of it.
  """
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL') == '0':
    yield
    return
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def is_pipe(path: str | os.PathLike) -> bool:
  """Whether it is a named pipe."""
  return '://' not in os.fspath(path) and pathlib.Path(path).is_fifo()


def open_pipe(path: str | os.PathLike, mode: str) -> IO:
  """Opens a named pipe, 'r' or 'w', if somebody is at its other end in time."""
  flags = os.O_RDONLY if mode == 'r' else os.O_WRONLY
  until = time.monotonic() + PATIENCE
  while time.monotonic() < until:
    with contextlib.suppress(OSError):  # nobody reads
      descriptor = os.open(path, flags | os.O_NONBLOCK)
      heard = mode == 'w' or select.select([descriptor], [], [], PATIENCE)[0]
      if heard:
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, mode, encoding='utf-8')
      os.close(descriptor)
    time.sleep(0.1)
  other = 'writes to' if mode == 'r' else 'reads from'
  raise UserError(f'nobody {other} the pipe {path} ({PATIENCE} s)')


def check_output(
  path: str | os.PathLike,
  inputs: Iterable[str | os.PathLike | None] = (),
  *,
  overwrite: bool = False,
  what: str = 'the output',
  consent: str = 'overwrite=True',
) -> None:
  """Raises UserError where a file, or a folder of files, may not be written.

  Args:
    path: of a file, or of a folder that gets files. A device or a pipe may
      always be written to.
    inputs: what is read: no file of it, or folder, may be `path` or in it.
    overwrite: a file that is there, or files in the folder, may be replaced.
    what: names it in messages.
    consent: how the user says `overwrite`.
  """
  path = place(path)
  local = '://' not in os.fspath(path)
  if local:
    path = pathlib.Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
      return
    for given in filter(None, inputs):
      if '://' in os.fspath(given):
        continue
      source = os.path.realpath(place(given))
      if os.path.exists(source) and pathlib.Path(source).is_relative_to(path):
        raise UserError(
          f'{what} {path} would be written over {given}, which is read: choose'
          ' another place'
        )
  is_result = path.is_file() or (path.is_dir() and any(path.iterdir()))
  if is_result and not overwrite:
    kind = 'holds files' if path.is_dir() else 'exists'
    raise UserError(
      f'{what} {path} {kind}: choose another place, or give {consent} to'
      ' write over it'
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
  path = place(path)
  if '://' not in os.fspath(path):
    path = epath.Path(os.path.realpath(path))
    if path.exists() and not pathlib.Path(path).is_file():
      yield path
      return
  host = socket.gethostname()
  if '://' not in os.fspath(path):
    _sweep(path, host)
  token = f'{host}.{os.getpid()}.{secrets.token_hex(4)}'
  unfinished = path.parent / f'{path.name}.{token}{UNFINISHED}'
  try:
    yield unfinished
    if '://' not in os.fspath(path):
      _to_disk(unfinished)
    unfinished.replace(path)
  finally:
    with contextlib.suppress(OSError):
      if unfinished.is_dir():
        unfinished.rmtree()
      unfinished.unlink(missing_ok=True)


def _sweep(path: epath.Path, host: str) -> None:
  """Takes away what killed processes of this machine left of a file."""
  for left in pathlib.Path(path).parent.glob(
    f'{glob.escape(f"{path.name}.{host}")}.*{UNFINISHED}'
  ):
    process = left.name.split('.')[-3]
    if process.isdigit() and not _is_alive(int(process)):
      shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)  # only asks
  except ProcessLookupError:
    return False
  except OSError:
    pass  # somebody else's
  return True


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO]:
  """`beside`, opened for writing ('w' or 'wb')."""
  with beside(path) as unfinished:
    piped = is_pipe(unfinished)
    opened = open_pipe(unfinished, 'w') if piped else unfinished.open(mode)
    with opened as file:
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
