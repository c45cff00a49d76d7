"""Where compiled programs are kept; nothing of it can stop a command."""

import os
import subprocess
import sys
import time
import zlib

import pytest

from prompt_tuning import compilation_cache

VARIABLES = (
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_ENABLE_COMPILATION_CACHE',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS',
)
# Says how many programs were found, and how many were compiled and kept.
PROGRAM = """
from prompt_tuning import compilation_cache
compilation_cache.use()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
assert float(jax.jit(lambda x: x * 2 + 1)(3.0)) == 7
name = '/jax/compilation_cache/cache_'
print(events.count(name + 'hits'), events.count(name + 'misses'))
"""


@pytest.fixture
def caches(monkeypatch, tmp_path):
  """A user's folder of caches; this process's own environment comes back."""
  for name in VARIABLES:
    monkeypatch.setenv(name, '')  # so that what `use` sets goes again
    monkeypatch.delenv(name)
  monkeypatch.setattr(compilation_cache, '_tell_jax', lambda folder: None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
  return tmp_path / 'caches'


def start(**variables):
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM],
    env=os.environ | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def found_and_kept(process):
  said, faults = process.communicate(timeout=120)
  assert process.returncode == 0, faults
  assert 'compilation cache' not in faults
  return [int(count) for count in said.split()]


def kept_in(folder):
  return sorted(folder.glob('*-cache'))


def test_programs_are_kept_for_the_next_process_in_the_users_cache(caches):
  found, kept = found_and_kept(start())
  folder = caches / 'prompt_tuning' / 'jax'
  assert found == 0 and kept == len(kept_in(folder)) > 0
  assert folder.stat().st_mode & 0o777 == 0o700
  assert found_and_kept(start()) == [kept, 0]


def test_processes_that_start_at_once_share_them(caches):
  at_once = [start() for _ in range(3)]
  for process in at_once:
    found_and_kept(process)
  found, kept = found_and_kept(start())
  assert found > 0 and kept == 0


def test_without_xdg_it_is_in_the_home(caches, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')  # which the standard ignores
  monkeypatch.setenv('HOME', str(tmp_path))
  compilation_cache.use()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(
    tmp_path / '.cache' / 'prompt_tuning' / 'jax'
  )


def test_who_has_no_home_is_told_in_a_line(caches, monkeypatch, capsys):
  def nobody(path):
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setenv('XDG_CACHE_HOME', '')
  monkeypatch.setattr(compilation_cache.pathlib.Path, 'expanduser', nobody)
  compilation_cache.use()
  (line,) = capsys.readouterr().err.splitlines()
  assert 'nobody says where your home is' in line
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


def test_the_users_own_folder_wins(caches, monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'own'))
  compilation_cache.use()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path / 'own')
  assert not caches.exists()


@pytest.mark.parametrize('off', ['false', 'OFF', '0'])
def test_it_can_be_switched_off(caches, off):
  assert found_and_kept(start(JAX_ENABLE_COMPILATION_CACHE=off)) == [0, 0]
  assert not caches.exists()


def test_a_folder_that_cannot_be_had_is_one_line(caches, capsys):
  caches.write_text('in the way')
  compilation_cache.use()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('note: compiled programs are not kept: ')
  assert str(caches) in line and 'JAX_COMPILATION_CACHE_DIR' in line
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


def test_a_folder_that_others_can_write_is_refused(caches, capsys):
  folder = caches / 'prompt_tuning' / 'jax'
  folder.mkdir(parents=True)
  folder.chmod(0o777)
  compilation_cache.use()
  assert 'others can write there' in capsys.readouterr().err
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


def entry(folder, name, data, days):
  """An entry that was last used some days ago."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{name}-cache'
  path.write_bytes(data)
  when = time.time() - 24 * 3600 * days
  os.utime(path, (when, when))
  return path


def test_broken_programs_go_and_whole_ones_stay(caches):
  folder = caches / 'prompt_tuning' / 'jax'
  folder.mkdir(parents=True, mode=0o700)
  whole = zlib.compress(b'a program' * 100)
  stays = [
    entry(folder, 'whole', whole, days=1),
    entry(folder, 'being_written', whole[:9], days=0),
    entry(folder, 'of_zstandard', b'\x28\xb5\x2f\xfd', days=1),
  ]
  entry(folder, 'cut_short', whole[:9], days=1)
  entry(folder, 'empty', b'', days=1)
  compilation_cache.use()
  assert kept_in(folder) == sorted(stays)


def test_what_was_used_least_lately_goes_first(caches, monkeypatch):
  folder = caches / 'prompt_tuning' / 'jax'
  folder.mkdir(parents=True, mode=0o700)
  data = zlib.compress(b'a program')
  names = [entry(folder, str(days), data, days) for days in (3, 1, 2)]
  monkeypatch.setattr(compilation_cache, 'LIMIT', 2 * len(data))
  compilation_cache.use()
  assert kept_in(folder) == sorted(names[1:])
