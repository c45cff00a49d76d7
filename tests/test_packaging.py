"""What the wheel carries, and what runs without TensorFlow."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The names in a wheel that is built from a copy of the repository."""
  source = tmp_path_factory.mktemp('source')
  for name in ('setup.py', 'MANIFEST.in', 'LICENSE', 'pyproject.toml'):
    shutil.copy(REPOSITORY / name, source)
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('prompt_tuning', 'configs'):
    shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
  subprocess.run(
    [sys.executable, 'setup.py', '--quiet', 'bdist_wheel'],
    cwd=source,
    check=True,
    capture_output=True,
    timeout=120,
  )
  (built,) = (source / 'dist').glob('*.whl')
  return zipfile.ZipFile(built)


def files(folder):
  return {
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / folder).rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }


def test_the_wheel_has_every_gin_file(wheel):
  expected = {f'prompt_tuning/{name}' for name in files('configs')}
  assert len(expected) > 15
  assert expected <= set(wheel.namelist())


def test_the_wheel_has_every_file_of_the_package(wheel):
  assert files('prompt_tuning') <= set(wheel.namelist())


def test_the_wheel_has_the_command_and_the_licence(wheel):
  names = {name.split('/')[-1]: name for name in wheel.namelist()}
  commands = wheel.read(names['entry_points.txt']).decode()
  assert 'prompt-tuning = prompt_tuning.cli:main' in commands
  assert 'Apache License' in wheel.read(names['LICENSE']).decode()


def test_the_wheel_finds_its_gin_files_from_any_folder(wheel, tmp_path):
  wheel.extractall(tmp_path / 'site')
  program = (
    'from prompt_tuning import gin_files;'
    "print(gin_files.find_file('configs/runs/prompt_tune.gin'))"
  )
  found = subprocess.run(
    [sys.executable, '-c', program],
    cwd=tmp_path,
    env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': ''},
    check=True,
    capture_output=True,
    text=True,
    timeout=120,
  ).stdout.strip()
  assert found.startswith(str(tmp_path / 'site' / 'prompt_tuning' / 'configs'))


def test_only_data_needs_tensorflow():
  """Imports everything else where TensorFlow cannot be imported."""
  modules = sorted(
    name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    for name in files('prompt_tuning')
    if name.endswith('.py')
  )
  task_free = (
    'prompt_tuning.data.token_arrays',
    'prompt_tuning.data.vocabularies',
    'prompt_tuning.data.virtual_tokens',
    'prompt_tuning.data.task',
    'prompt_tuning.data.task_data',
    'prompt_tuning.data.token_array_data',
    'prompt_tuning.data.records',
  )
  modules = [
    name
    for name in modules
    if not name.startswith('prompt_tuning.data.') or name in task_free
  ]
  assert len(modules) > 20
  blocked = ['tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'seqio']
  program = (
    'import importlib, sys\n'
    f'sys.modules.update(dict.fromkeys({blocked}))\n'
    f'for name in {modules}: importlib.import_module(name)\n'
  )
  subprocess.run(
    [sys.executable, '-c', program],
    cwd=REPOSITORY,
    check=True,
    timeout=120,
  )
