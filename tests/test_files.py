"""Paths, and what may be written where."""

import os
import pathlib
import socket
import stat
import subprocess
import threading

from etils import epath
import pytest

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.serving import jobs


@pytest.mark.parametrize(
  'path, said',
  [
    (None, 'a path is needed, got None'),
    (5, 'a path is needed, got 5'),
    ('', 'a path is needed'),
    ('a\0b', 'zero byte'),
    ('a\ud800', 'no file system has it'),
    ('http://host/a', 'http:// cannot be read or written'),
    ('s3://bucket/a', 's3:// cannot be read or written'),
  ],
)
def test_what_is_no_place_is_told_in_a_line(path, said):
  with pytest.raises(UserError, match=said) as caught:
    files.place(path)
  assert '\n' not in str(caught.value)


def test_the_home_folder_is_known(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert os.fspath(files.place('~/a')) == '/home/me/a'


def test_a_bucket_that_does_not_answer_is_given_up(monkeypatch):
  never = threading.Event()

  class Silent:
    def __init__(self, name):
      del name

    def exists(self):
      never.wait()

  monkeypatch.setattr(files.epath, 'Path', Silent)
  monkeypatch.setattr(files, 'PATIENCE', 0.1)
  with pytest.raises(UserError, match='gs://silent cannot be reached'):
    files.place('gs://silent/a')
  never.set()


@pytest.mark.parametrize('mode, other', [('r', 'writes to'), ('w', 'reads')])
def test_a_pipe_without_another_end_is_given_up(
  tmp_path, monkeypatch, mode, other
):
  os.mkfifo(tmp_path / 'pipe')
  monkeypatch.setattr(files, 'PATIENCE', 0.1)
  with pytest.raises(UserError, match=f'nobody {other}'):
    files.open_pipe(tmp_path / 'pipe', mode)


def test_results_and_inputs_are_not_written_over(tmp_path):
  one, folder = tmp_path / 'one', tmp_path / 'folder'
  folder.mkdir()
  files.check_output(one)
  files.check_output(folder)
  one.write_text('mine')
  (folder / 'part').write_text('mine')
  for path, said in ((one, 'one exists'), (folder, 'folder holds files')):
    with pytest.raises(UserError, match=f'{said}: .*overwrite=True'):
      files.check_output(path)
    files.check_output(path, overwrite=True)
  link = tmp_path / 'link'
  link.symlink_to(one)
  for path, read in ((one, one), (link, one), (folder, folder / 'part')):
    with pytest.raises(UserError, match='would be written over'):
      files.check_output(path, [None, read], overwrite=True)
  with pytest.raises(UserError, match='one is in the way'):
    files.check_output(one / 'below')
  files.check_output('/dev/null', ['/dev/null'])


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / 'file'
  path.write_text('before')
  with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
    file.write('half')
    raise ZeroDivisionError
  assert path.read_text() == 'before'
  with files.replacing(path) as file:
    file.write('after')
  assert path.read_text() == 'after'
  assert os.listdir(tmp_path) == ['file']
  old = os.umask(0o027)
  try:
    with files.replacing(tmp_path / 'new') as file:
      file.write('x')
  finally:
    os.umask(old)
  assert stat.S_IMODE((tmp_path / 'new').stat().st_mode) == 0o640


def test_devices_and_links_stay(tmp_path):
  with files.replacing('/dev/null') as file:
    file.write('x')
  assert pathlib.Path('/dev/null').is_char_device()
  target, link = tmp_path / 'target', tmp_path / 'link'
  link.symlink_to(target)
  with files.replacing(link) as file:
    file.write('x')
  assert link.is_symlink() and target.read_text() == 'x'


def test_what_killed_processes_left_is_taken_away(tmp_path):
  path = tmp_path / 'file'
  host = socket.gethostname()
  ended = subprocess.Popen(['true'])
  ended.wait()
  left = tmp_path / f'file.{host}.{ended.pid}.ab{files.UNFINISHED}'
  others = [
    tmp_path / f'file.{host}.{os.getpid()}.ab{files.UNFINISHED}',
    tmp_path / f'file.elsewhere.{ended.pid}.ab{files.UNFINISHED}',
  ]
  for one in (left, *others):
    one.write_text('x')
  with files.replacing(path) as file:
    file.write('x')
  assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_an_evaluation_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / 'file').write_text('')
  config = epath.Path(tmp_path / 'file' / 'eval' / 'config.gin')
  with pytest.raises(UserError, match='EVAL_OUTPUT_DIR .* Not a directory'):
    jobs._write_config(config, '', overwrite=False)
