"""Programs that one command has compiled, kept for the next (JAX's cache).

They lie in `$XDG_CACHE_HOME/prompt_tuning/jax`, else in
`~/.cache/prompt_tuning/jax`. JAX's own variables win: JAX_COMPILATION_CACHE_DIR
is another folder (gs:// too), JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
An entry's key has the program, its options, the versions of JAX and XLA, and
the kind of device; of CPUs also their instructions, so machines of several
kinds may share a home. Any number of processes may read and write at once.
"""

from collections.abc import Iterable
import contextlib
import os
import pathlib
import sys
import time
import warnings
import zlib

# Bytes above which what was used least lately goes. A program of the bundled
# model takes 0.2 MB, one of T5 XXL a few.
LIMIT = 2 * 2**30

_FOLDER = 'JAX_COMPILATION_CACHE_DIR'
_ENABLED = 'JAX_ENABLE_COMPILATION_CACHE'
_NO = ('n', 'no', 'f', 'false', 'off', '0')  # as JAX reads it
# JAX leaves out what compiles within a second: here a start has dozens of small
# programs, which together take as long as the step.
_LEAST_SECONDS = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
_ENTRY = '-cache'  # how JAX ends their names
# Entries older than this file were found whole.
_LOOKED_AT = '.looked_at'
# Seconds in which somebody may still write an entry.
_WRITING = 60


def use() -> None:
  """Has JAX keep compiled programs, in this process and those it starts.

  Where the folder cannot be had, a line says so, and nothing is kept.
  """
  is_off = os.environ.get(_ENABLED, '').lower() in _NO
  if is_off or os.environ.get(_FOLDER) is not None:
    return
  folder = 'a cache of yours'
  try:
    folder = _home()
    _require_own(folder)
    _tidy(folder)
  except OSError as error:
    print(
      f'note: compiled programs are not kept: {folder}: {error.strerror};'
      f' {_FOLDER} names another folder',
      file=sys.stderr,
    )
    return
  os.environ[_FOLDER] = str(folder)
  os.environ.setdefault(_LEAST_SECONDS, '0')
  if 'jax' in sys.modules:  # which read its variables when it was imported
    _tell_jax(folder)
  # An entry that cannot be read or written is compiled, and no news.
  warnings.filterwarnings('ignore', 'Error .* persistent compilation cache')


def _tell_jax(folder: pathlib.Path) -> None:
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update(_LEAST_SECONDS.lower(), float(os.environ[_LEAST_SECONDS]))


def _home() -> pathlib.Path:
  """The user's folder; OSError where there is none."""
  caches = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))
  if not caches.is_absolute():  # as the standard has it
    try:
      caches = pathlib.Path('~/.cache').expanduser()
    except RuntimeError as error:
      raise FileNotFoundError(0, 'nobody says where your home is') from error
  return caches / 'prompt_tuning' / 'jax'


def _require_own(folder: pathlib.Path) -> None:
  """Makes the folder; OSError where others could put programs into it."""
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  found = folder.stat()
  if found.st_uid != os.getuid() or found.st_mode & 0o022:
    raise PermissionError(
      0, 'others can write there, and its programs would run here'
    )
  if not os.access(folder, os.W_OK | os.X_OK):
    raise PermissionError(0, 'it cannot be written')


def _tidy(folder: pathlib.Path) -> None:
  """Takes away what is broken, and what was used least lately above `LIMIT`.

  JAX can do the latter with file locks, but then cannot write at all once a
  process was killed between an entry and its time. A file that another process
  takes away, or still reads, is no fault.
  """
  looked_at = folder / _LOOKED_AT
  since = looked_at.stat().st_mtime if looked_at.exists() else 0.0
  until = time.time() - _WRITING
  looked_at.touch()
  os.utime(looked_at, (until, until))
  entries = []  # (when it was used, bytes, path)
  with os.scandir(folder) as found:
    for entry in found:
      if not entry.name.endswith(_ENTRY):
        continue
      with contextlib.suppress(FileNotFoundError):
        facts = entry.stat()
        if since <= facts.st_mtime < until and not _is_whole(entry.path):
          os.unlink(entry.path)
          continue
        used = max(facts.st_atime, facts.st_mtime)
        entries.append((used, facts.st_size, entry.path))
  _keep_latest(entries)


def _keep_latest(entries: Iterable[tuple[float, int, str]]) -> None:
  total = 0
  for _, size, path in sorted(entries, reverse=True):
    total += size
    if total > LIMIT:
      pathlib.Path(path).unlink(missing_ok=True)


def _is_whole(path: str) -> bool:
  """Whether it is no entry that a killed process or a full disk cut short."""
  with open(path, 'rb') as file:
    data = file.read()
  if data[:1] != b'\x78':  # empty, or not zlib's: zstandard is installed
    return bool(data)
  try:
    zlib.decompress(data)
  except zlib.error:
    return False
  return True
