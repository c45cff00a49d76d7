"""A run's folder belongs to one process, or job, at a time."""

import fcntl
import os
import pathlib
import socket
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.training import hosts

LOCK = '.lock'


class RunLock:
  """Held from `__enter__` to `__exit__`, or until the process dies.

  The operating system holds it (flock; over NFS too), so a killed process
  leaves none behind. In a bucket there is no such thing: `kind` says so.
  """

  def __init__(self, model_dir: str | os.PathLike):
    self._path = os.fspath(model_dir)
    self._file: Any = None
    self.remark = ''

  def __enter__(self) -> 'RunLock':
    """Takes it, of a job in process 0.

    Raises:
      UserError: another process has it; the line names its host and number.
    """
    holder = self._take() if hosts.is_primary() else ''
    if hosts.agree(bool(holder)):
      who = holder or 'another job'
      raise UserError(
        f'MODEL_DIR {self._path} is in use by {who}: wait until that run ends,'
        ' stop it, or choose another MODEL_DIR'
      )
    return self

  def __exit__(self, *_) -> None:
    if self._file is not None:
      self._file.close()

  def _take(self) -> str:
    """'' if it is ours now, else who has it."""
    if '://' in self._path:
      self.remark = (
        f'{self._path} is no local folder and cannot be locked: take care that'
        ' no other run writes there'
      )
      return ''
    self._file = (pathlib.Path(self._path) / LOCK).open('a+')
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._file.seek(0)
      return self._file.read().strip() or 'another process'
    except OSError as error:
      self.remark = (
        f'{self._path} cannot be locked ({error.strerror}): take care that no'
        ' other run writes there'
      )
      return ''
    self._file.truncate(0)
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    self._file.flush()
    return ''
