"""A run's folder in the hands of one process."""

import os
import socket
import subprocess
import sys

import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training.run_lock import LOCK
from prompt_tuning.training.run_lock import RunLock

HOLD = """
import sys
from prompt_tuning.training.run_lock import RunLock
with RunLock(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as holder:
    assert holder.stdout.readline() == 'held\n'
    said = f'in use by process {holder.pid} on {socket.gethostname()}: wait'
    with pytest.raises(UserError, match=said), RunLock(tmp_path):
      pass
    holder.kill()
    holder.wait()
    # A killed process leaves no lock behind, only its name.
    with RunLock(tmp_path) as lock:
      assert not lock.remark
      assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_folder_is_free_again_after_its_run(tmp_path):
  for _ in range(2):
    with RunLock(tmp_path):
      with pytest.raises(UserError, match='in use'), RunLock(tmp_path):
        pass


def test_a_bucket_says_that_it_cannot_be_locked():
  with RunLock('gs://bucket/run') as lock:
    assert 'cannot be locked' in lock.remark
