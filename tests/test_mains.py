"""The commands: a whole chain on a tiny model, and faults of the user."""

import json
import pathlib
import re
import subprocess
import sys
import types

import gin
import jax
import numpy as np
import pytest

import prompt_tuning
from prompt_tuning import cli
from prompt_tuning import exit_codes
from prompt_tuning.data.token_arrays import write_token_arrays
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.interop.base_checkpoints import save_base
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import save_prompt
from prompt_tuning.models import model as model_lib
from prompt_tuning.models import network
from prompt_tuning.training import checks

BASE_STEP = 40

MODEL = """
T5Config.vocab_size = 256
T5Config.emb_dim = 16
T5Config.num_heads = 2
T5Config.head_dim = 8
T5Config.mlp_dim = 32
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
"""

# Prompt tuning on token arrays: no TensorFlow, so these tests stay quick.
TRAIN = """
train.model = @EncoderDecoderModel()
EncoderDecoderModel.config = @T5Config()
train.model_dir = %MODEL_DIR
train.base = @load_checkpoint()
load_checkpoint.path = %INITIAL_CHECKPOINT_PATH
train.methods = (@Prompt(),)
Prompt.length = %PROMPT_LENGTH
train.train_steps_relative = %TRAIN_STEPS_RELATIVE
train.train_steps = %TRAIN_STEPS
train.data = @TokenArrayData()
TokenArrayData.folder = %TOKEN_ARRAYS
TokenArrayData.objective = 'prefix_lm'
TokenArrayData.batch_size = 8
TokenArrayData.feature_lengths = {'inputs': 8, 'targets': 8}
train.progress = False
PROMPT_LENGTH = 3
TRAIN_STEPS_RELATIVE = None
TRAIN_STEPS = None
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_vocabulary):
  """A base checkpoint, token arrays, texts and gin files."""
  folder = tmp_path_factory.mktemp('mains')
  config = network.T5Config(256, 16, 2, 8, 32, 1, 1)
  model = model_lib.EncoderDecoderModel(config)
  for name, seed in (('base', 0), ('other', 1)):
    params = jax.jit(model.init_params)(jax.random.key(seed))
    save_base(folder / name, params, BASE_STEP)
  vocabulary = load_vocabulary(tiny_vocabulary)
  documents = [vocabulary.encode('the film was good and i saw it twice')] * 40
  write_token_arrays(folder / 'arrays', documents, vocabulary)
  (folder / 'model.gin').write_text(MODEL)
  (folder / 'train.gin').write_text(TRAIN)
  (folder / 'texts.txt').write_text('the film was good\ndull\n')
  save_prompt(folder / 'wide', np.ones((3, 24), np.float32), {})
  save_prompt(folder / 'long', np.ones((7, 16), np.float32), {})
  return folder


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


def bind(**macros):
  return [f'--gin.{name}={value!r}' for name, value in macros.items()]


def train_arguments(folder, model_dir, *more, **macros):
  macros = {
    'INITIAL_CHECKPOINT_PATH': str(folder / 'base'),
    'TOKEN_ARRAYS': str(folder / 'arrays'),
    'MODEL_DIR': str(model_dir),
  } | macros
  files = [f'--gin_file={folder / name}.gin' for name in ('model', 'train')]
  return ['train', *files, *bind(**macros), *more]


def infer_arguments(folder, output, vocabulary, *more, **macros):
  macros = {
    'INITIAL_CHECKPOINT_PATH': str(folder / 'base'),
    'VOCABULARY': vocabulary,
    'INPUT_FILE': str(folder / 'texts.txt'),
    'OUTPUT_FILE': str(output),
  } | macros
  files = [f'--gin_file={folder}/model.gin', '--gin_file=runs/infer.gin']
  labels = ["--gin.infer.labels=['good', 'dull']"]
  quiet = ['infer.progress=False', 'infer.overwrite=True']
  return ['infer', *files, *labels, *quiet, *bind(**macros), *more]


@pytest.fixture(scope='module')
def run(folder):
  """The MODEL_DIR of two steps of prompt tuning, by the command."""
  model_dir = folder / 'run'
  arguments = train_arguments(folder, model_dir, TRAIN_STEPS_RELATIVE=2)
  assert cli.main(arguments) == 0
  gin.clear_config()
  return model_dir


def test_train_leaves_a_prompt_with_its_facts(run):
  table, facts = load_prompt(run / 'prompt')
  assert table.shape == (1, 3, 16)
  assert facts['step'] == BASE_STEP + 2
  assert facts['placement'] == 'prefix'
  assert facts['base'] == str(run.parent / 'base')
  assert len(facts['base_fingerprint']) == 16


def test_train_writes_the_whole_configuration(run):
  text = (run / 'config.gin').read_text()
  assert 'PROMPT_LENGTH = 3' in text
  # A default; those of classes do not show under jaxtyping's hook.
  assert 'train.validation_batches = 8' in text


def test_the_written_configuration_is_the_same_run(run, folder, tmp_path):
  text = (run / 'config.gin').read_text()
  (tmp_path / 'again.gin').write_text(text)
  arguments = ['train', f'--gin_file={tmp_path}/again.gin']
  assert cli.main([*arguments, *bind(MODEL_DIR=str(tmp_path / 'run'))]) == 0
  np.testing.assert_array_equal(
    load_prompt(tmp_path / 'run' / 'prompt')[0], load_prompt(run / 'prompt')[0]
  )


def test_export_writes_the_prompt_of_a_run(run, tmp_path, capsys):
  arguments = ['export', '--gin_file=runs/export.gin']
  macros = {'MODEL_DIR': str(run), 'EXPORT_DIR': str(tmp_path / 'out')}
  assert cli.main([*arguments, *bind(**macros)]) == 0
  written = json.loads(capsys.readouterr().out)
  assert written['step'] == BASE_STEP + 2
  assert str(tmp_path / 'out' / 'prompt.npy') in written['files']
  for name in ('prompt.npy', 'prompt.safetensors'):
    np.testing.assert_array_equal(
      load_prompt(tmp_path / 'out' / name)[0], load_prompt(run / 'prompt')[0]
    )


def test_an_exported_prompt_starts_another_run(run, folder, tmp_path):
  """With a learning rate of 0 and no decay it comes out as it went in."""
  arguments = train_arguments(
    folder,
    tmp_path / 'run',
    '--gin_file=prompts/from_file.gin',
    '--gin.train.learning_rate=0.0',
    '--gin.train.optimizer=@adafactor',
    TRAIN_STEPS_RELATIVE=1,
    PROMPT_FILE=str(run / 'prompt' / 'prompt.npy'),
  )
  assert cli.main(arguments) == 0
  np.testing.assert_array_equal(
    load_prompt(tmp_path / 'run' / 'prompt')[0], load_prompt(run / 'prompt')[0]
  )


def test_infer_reads_texts_and_writes_json(
  run, folder, tiny_vocabulary, tmp_path
):
  output = tmp_path / 'out.jsonl'
  arguments = infer_arguments(
    folder, output, tiny_vocabulary, PROMPT_FILE=str(run / 'prompt')
  )
  assert cli.main(arguments) == 0
  records = [json.loads(line) for line in output.read_text().splitlines()]
  assert [r['input'] for r in records] == ['the film was good', 'dull']
  assert set(records[0]['scores']) == {'good', 'dull'}


def run_without(modules, *words):
  """A command in a process of its own, in which modules are not there."""
  program = (
    'import sys\n'
    f'sys.modules.update(dict.fromkeys({modules}))\n'
    'from prompt_tuning import cli\n'
    f'sys.exit(cli.main({list(words)}))\n'
  )
  return subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, timeout=300
  )


TENSORFLOW = ['tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'seqio']
OF_TRAINING_ALONE = ['orbax', 'tensorboardX', 'sklearn', 'scipy.special']


def test_infer_imports_neither_tensorflow_nor_what_training_alone_needs(
  run, folder, tiny_vocabulary, tmp_path
):
  output = tmp_path / 'out.jsonl'
  words = infer_arguments(
    folder, output, tiny_vocabulary, PROMPT_FILE=str(run / 'prompt')
  )
  done = run_without(TENSORFLOW + OF_TRAINING_ALONE, *words)
  assert done.returncode == 0, done.stderr
  assert len(output.read_text().splitlines()) == 2


def test_training_on_token_arrays_imports_no_tensorflow(folder, tmp_path):
  words = train_arguments(folder, tmp_path / 'run', TRAIN_STEPS_RELATIVE=1)
  done = run_without(TENSORFLOW, *words)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'result.json').exists()


@pytest.mark.parametrize('command', ['', *cli.COMMANDS])
def test_help_imports_neither_jax_nor_tensorflow(command):
  heavy = ['jax', 'jaxlib', 'flax', 'optax', *TENSORFLOW]
  words = [command, '--help'] if command else ['--help']
  done = run_without(heavy, *words)
  assert done.returncode == 0, done.stderr
  assert 'prompt-tuning' in done.stdout


def test_infer_works_without_a_prompt(folder, tiny_vocabulary, tmp_path):
  output = tmp_path / 'out.jsonl'
  more = ['--gin.infer.trained=()']
  assert cli.main(infer_arguments(folder, output, tiny_vocabulary, *more)) == 0
  assert len(output.read_text().splitlines()) == 2


@pytest.fixture
def whole_run(folder, tiny_vocabulary, tmp_path, monkeypatch):
  """A folder that holds all that is needed, of a run by words alone."""
  monkeypatch.chdir(tmp_path)
  words = ['train', f'{folder}/model', f'{folder}/train', f'{folder}/words']
  (folder / 'words.gin').write_text(f'VOCABULARY = {tiny_vocabulary!r}\n')
  words += [f'INITIAL_CHECKPOINT_PATH={folder}/base']
  words += [f'TOKEN_ARRAYS={folder}/arrays', 'TRAIN_STEPS_RELATIVE=2']
  assert cli.main([*words, 'MODEL_DIR=runs/a']) == 0
  return tmp_path / 'runs' / 'a'


def test_train_says_what_it_wrote(folder, tmp_path, capsys):
  arguments = train_arguments(folder, tmp_path / 'a', TRAIN_STEPS_RELATIVE=1)
  assert cli.main(arguments) == 0
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed['step'] == printed['best_step'] == BASE_STEP + 1
  assert str(tmp_path / 'a' / 'prompt' / 'prompt.npy') in printed['files']


def test_a_runs_folder_is_enough_to_infer_and_export(
  whole_run, folder, tiny_vocabulary, capsys
):
  words = [f'INPUT_FILE={folder}/texts.txt', 'OUTPUT_FILE=out.jsonl']
  words += [f'VOCABULARY={tiny_vocabulary}', "infer.labels=['good', 'dull']"]
  assert cli.main(['infer', 'runs/a', *words]) == 0
  gin.clear_config()
  capsys.readouterr()
  assert cli.main(['export', 'runs/a', 'EXPORT_DIR=out']) == 0
  assert 'out/prompt.npy' in json.loads(capsys.readouterr().out)['files']
  gin.clear_config()
  by_file = [w.replace('out.jsonl', 'again.jsonl') for w in words]
  assert cli.main(['infer', 'runs/a', 'PROMPT_FILE=out', *by_file]) == 0
  again = (whole_run.parents[1] / 'again.jsonl').read_text()
  assert (whole_run.parents[1] / 'out.jsonl').read_text() == again


def test_a_run_that_moved_is_still_enough(whole_run, capsys):
  whole_run.rename(whole_run.with_name('b'))
  assert cli.main(['export', 'runs/b', 'EXPORT_DIR=out']) == 0
  assert 'out/prompt.npy' in json.loads(capsys.readouterr().out)['files']


def fault(capsys, arguments, code=1):
  """The one line that a faulty command prints."""
  capsys.readouterr()
  assert cli.main(arguments) == code
  printed = capsys.readouterr()
  assert re.fullmatch(r'error: .+\n', printed.err), printed.err
  assert printed.out == ''
  return printed.err


@pytest.mark.parametrize(
  'macros, more, words',
  [
    (
      {'INITIAL_CHECKPOINT_PATH': '/none'},
      [],
      ['no checkpoint /none'],
    ),
    ({}, ['--gin.T5Config.emb_dim=24'], ['embed 16, the model needs 24']),
    ({'TOKEN_ARRAYS': '/none'}, [], ['/none']),
    ({'TRAIN_STEPS': 2, 'TRAIN_STEPS_RELATIVE': None}, [], ['not beyond']),
    ({'TRAIN_STEPS_RELATIVE': None}, [], ['TRAIN_STEPS_RELATIVE']),
    ({'TRAIN_STEPS': 99}, [], ['TRAIN_STEPS_RELATIVE', 'TRAIN_STEPS']),
    ({}, ['--gin.train.methods=()'], ['methods is empty']),
    ({}, ['--gin.T5Config.vocab_size=20'], ['vocab']),
    ({}, ["--gin.T5Config.remat_policy='al'"], ['remat_policy', "'al'"]),
    ({}, ['--gin.T5Config.mlp_activations=("gel",)'], ['mlp_activations']),
    ({'MODEL_DIR': '/proc/none'}, [], ['/proc/none']),
  ],
)
def test_train_says_what_is_wrong_in_one_line(
  folder, tmp_path, capsys, macros, more, words
):
  macros = {'TRAIN_STEPS_RELATIVE': 2} | macros
  model_dir = macros.pop('MODEL_DIR', tmp_path / 'run')
  arguments = train_arguments(folder, model_dir, *more, **macros)
  message = fault(capsys, arguments)
  for word in words:
    assert word in message
  assert not (tmp_path / 'run' / 'config.gin').exists()


@pytest.mark.parametrize(
  'name, words',
  [
    ('wide', 'has embed 24, the model needs 16'),
    ('long', 'has length 7, the model needs 3: bind PROMPT_LENGTH = 7'),
    ('none', 'no prompt at'),
  ],
)
def test_a_prompt_file_of_another_shape_is_refused(
  folder, tmp_path, capsys, name, words
):
  arguments = train_arguments(
    folder,
    tmp_path / 'run',
    '--gin_file=prompts/from_file.gin',
    TRAIN_STEPS_RELATIVE=1,
    PROMPT_FILE=str(folder / name),
  )
  assert words in fault(capsys, arguments)


@pytest.mark.parametrize(
  'macros, more, words',
  [
    ({'PROMPT_FILE': 'wide'}, [], 'has embed 24, the model needs 16'),
    ({'INPUT_FILE': '/none.txt'}, [], '/none.txt cannot be read'),
    ({'VOCABULARY': '/none'}, [], 'vocabulary /none'),
    ({'OUTPUT_FILE': '/proc/none/out'}, [], '/proc/none/out cannot'),
    ({}, ["--gin.infer.labels=['good']"], 'two strings or more'),
    ({}, ['--gin.infer.batch_size=0'], 'batch_size must be 1 or more'),
    ({}, ['--gin.infer.prompt_index=4'], 'numbered from 0'),
    ({}, ["--gin.infer.template='{q}'"], 'texts.txt:1 has no field q'),
  ],
)
def test_infer_says_what_is_wrong_in_one_line(
  folder, tiny_vocabulary, tmp_path, capsys, macros, more, words
):
  macros = {'PROMPT_FILE': 'long'} | macros
  macros['PROMPT_FILE'] = str(folder / macros['PROMPT_FILE'])
  output = tmp_path / 'out.jsonl'
  output.write_text('earlier')
  arguments = infer_arguments(folder, output, tiny_vocabulary, *more, **macros)
  assert words in fault(capsys, arguments)
  assert output.read_text() == 'earlier'
  assert not list(tmp_path.glob('*.partial'))


def test_a_prompt_of_another_base_is_refused(
  run, folder, tiny_vocabulary, tmp_path, capsys
):
  arguments = infer_arguments(
    folder,
    tmp_path / 'out',
    tiny_vocabulary,
    PROMPT_FILE=str(run / 'prompt'),
    INITIAL_CHECKPOINT_PATH=str(folder / 'other'),
  )
  message = fault(capsys, arguments)
  assert 'was trained on' in message and str(folder / 'other') in message


def test_another_run_in_the_same_folder_is_refused_and_leaves_it_intact(
  run, folder, capsys
):
  before = (run / 'config.gin').read_text()
  arguments = train_arguments(
    folder, run, TRAIN_STEPS_RELATIVE=9, PROMPT_LENGTH=5
  )
  assert 'MODEL_DIR' in fault(capsys, arguments)
  assert (run / 'config.gin').read_text() == before
  assert load_prompt(run / 'prompt')[0].shape == (1, 3, 16)


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], 'is not bound'),
    (['--gin.MODEL_DIRS="x"'], 'did you mean MODEL_DIR?'),
    (['--gin.train.leaning_rate=1.0'], 'did you mean learning_rate?'),
    (['--gin.MODEL_DIR=/tmp/x'], 'no quotes'),
    (['--gin_file=runs/prompt_tun.gin'], 'did you mean runs/prompt_tune.gin?'),
    (['--model_dir=x'], 'is not a flag'),
    (['MODEL_DIRS=x'], 'did you mean MODEL_DIR?'),
    (['runs/prompt_tun'], 'did you mean runs/prompt_tune?'),
  ],
)
def test_faults_of_usage_have_exit_code_two(folder, capsys, flags, words):
  files = [f'--gin_file={folder / name}.gin' for name in ('model', 'train')]
  message = fault(capsys, ['train', *files, *flags], code=2)
  assert words in message


@pytest.mark.parametrize(
  'flag, words',
  [
    ("train.learning_rate='x'", 'must be a number or a function (@name)'),
    ("Prompt.placement='front'", "'suffix' or 'around', got 'front'"),
    ("train.model='t5'", 'must be @EncoderDecoderModel()'),
    ('train.methods=3', 'must be a list, got 3'),
    ('train.seed=0.5', 'must be a whole number, got 0.5'),
    ('TokenArrayData.feature_lengths=8', 'must be a dictionary, got 8'),
  ],
)
def test_a_value_of_another_type_is_refused(
  folder, tmp_path, capsys, flag, words
):
  arguments = train_arguments(folder, tmp_path / 'run', f'--gin.{flag}')
  assert words in fault(capsys, arguments, code=2)


def test_a_fault_without_words_is_named(capsys):
  def late():
    raise TimeoutError

  assert exit_codes.guarded(late) == 1
  assert capsys.readouterr().err == 'error: TimeoutError\n'


def test_a_model_is_exported_in_types_that_files_have(run, tmp_path, capsys):
  arguments = ['export', str(run), f'EXPORT_DIR={tmp_path}/out']
  message = fault(capsys, [*arguments, 'export.dtype=int8'])
  assert "stored as float32 or bfloat16, got 'int8'" in message
  assert not (tmp_path / 'out').exists()


def test_export_of_no_run_is_told(folder, tmp_path, capsys):
  arguments = ['export', '--gin_file=runs/export.gin']
  macros = {'MODEL_DIR': str(tmp_path), 'EXPORT_DIR': str(tmp_path / 'out')}
  message = fault(capsys, [*arguments, *bind(**macros)])
  assert 'no complete checkpoint' in message
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_shows_an_example(name, capsys):
  try:
    assert cli.main([name, '--help']) == 0
  except SystemExit as end:  # argparse's
    assert not end.code
  assert f'prompt-tuning {name} ' in capsys.readouterr().out


def test_the_package_is_the_console_command():
  command = [sys.executable, '-m', 'prompt_tuning', '--version']
  printed = subprocess.run(command, check=True, capture_output=True, text=True)
  assert printed.stdout.strip() == prompt_tuning.__version__


def test_a_module_shadows_nothing_of_the_standard_library():
  folder = pathlib.Path(prompt_tuning.__file__).parent
  assert not {path.stem for path in folder.glob('*.py')} & {
    name for name in sys.stdlib_module_names if not name.startswith('_')
  }


def test_a_stranger_to_the_files_is_one_line(tmp_path, capsys):
  for arguments, code in (
    (['inspect', f'{tmp_path}/none'], 1),
    (['diff', f'{tmp_path}/none', f'{tmp_path}/other'], 2),
    (['convert', f'{tmp_path}/none', f'{tmp_path}/out', '--to=numpy'], 1),
  ):
    assert f'{tmp_path}/none' in fault(capsys, arguments, code)


def test_the_console_command_names_its_commands(capsys):
  assert cli.main(['--help']) == 0
  printed = capsys.readouterr().out
  assert all(name in printed for name in cli.COMMANDS)
  assert cli.main([]) == 2
  assert cli.main(['--version']) == 0
  capsys.readouterr()
  assert cli.main(['trian']) == 2
  assert 'did you mean train?' in capsys.readouterr().err


def test_what_may_change_lets_a_run_go_on(folder, tmp_path):
  few = train_arguments(folder, tmp_path, TRAIN_STEPS_RELATIVE=1)
  assert cli.main(few) == 0
  gin.clear_config()
  more = train_arguments(
    folder, tmp_path, 'train.log_period=1', TRAIN_STEPS_RELATIVE=2
  )
  assert cli.main(more) == 0
  steps = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
  assert str(BASE_STEP + 2) in steps


def test_a_finished_run_does_not_give_old_results_as_new(run, folder, capsys):
  before = (run / 'config.gin').read_text()
  arguments = train_arguments(
    folder, run, 'train.learning_rate=0.1', TRAIN_STEPS_RELATIVE=2
  )
  assert 'another learning_rate: 0.3, this one has 0.1' in fault(
    capsys, arguments
  )
  assert (run / 'config.gin').read_text() == before


def test_a_best_metric_that_nobody_measures_is_told_before_a_step(
  folder, tmp_path, capsys
):
  arguments = train_arguments(
    folder,
    tmp_path,
    'train.validation_data=@TokenArrayData()',
    'train.best_metric=validation/los',
    TRAIN_STEPS_RELATIVE=2,
  )
  message = fault(capsys, arguments)
  assert 'did you mean validation/loss?' in message
  assert not list((tmp_path / 'checkpoints').iterdir())


def test_equal_runs_leave_equal_bytes(folder, tmp_path):
  made = []
  for name in 'ab':
    home = tmp_path / name
    assert not cli.main(train_arguments(folder, home, TRAIN_STEPS_RELATIVE=2))
    gin.clear_config()
    made.append((home / 'prompt' / 'prompt.safetensors').read_bytes())
  assert made[0] == made[1]


def test_what_is_measured_in_gigabytes_is_refused_in_time(
  folder, tmp_path, capsys
):
  arguments = train_arguments(
    folder, tmp_path, TRAIN_STEPS_RELATIVE=2, PROMPT_LENGTH=10**9
  )
  assert 'GiB a device, which has' in fault(capsys, arguments)


@pytest.mark.parametrize(
  'binding, words',
  [
    ('train.seed=4294967296', 'seed must be from 0'),
    ('train.seed=-1', 'seed must be from 0'),
    ('train.learning_rate=-0.1', 'learning_rate must be 0 or more'),
    ('T5Config.num_heads=0', 'num_heads must be 1 or more'),
    ('T5Config.dropout_rate=1.5', r'dropout_rate must be in [0, 1)'),
    ('adafactor.decay_rate=-1.0', 'decay_rate must be in [0, inf)'),
    ('TokenArrayData.batch_size=-2', 'batch_size must be 1 or more'),
    ('MODEL_DIR=http://a', 'http:// cannot be read or written'),
    ('INITIAL_CHECKPOINT_PATH=s3://a/b', 's3:// cannot be read'),
  ],
)
def test_a_value_out_of_range_is_a_line(
  folder, tmp_path, capsys, binding, words
):
  arguments = train_arguments(folder, tmp_path, TRAIN_STEPS_RELATIVE=2)
  arguments += ['train.optimizer=@adafactor', binding]
  macro = binding.partition('=')[0]
  arguments = [a for a in arguments if not a.startswith(f'--gin.{macro}=')]
  assert words in fault(capsys, arguments)


def test_a_full_disk_is_told_before_the_first_step(
  folder, tmp_path, capsys, monkeypatch
):
  usage = types.SimpleNamespace(free=100)
  monkeypatch.setattr(checks.shutil, 'disk_usage', lambda path: usage)
  message = fault(
    capsys, train_arguments(folder, tmp_path, TRAIN_STEPS_RELATIVE=2)
  )
  assert 'GiB free, two checkpoints of this run take' in message


def test_a_function_is_known_by_what_is_bound_of_it(folder, tmp_path, capsys):
  words = ['EncoderDecoderModel.decode_fn=@temperature_sample']
  few = train_arguments(folder, tmp_path, *words, TRAIN_STEPS_RELATIVE=1)
  assert not cli.main([*few, 'temperature_sample.topk=4'])
  gin.clear_config()
  message = fault(capsys, [*few, 'temperature_sample.topk=5'])
  assert 'another model decode_fn topk: 4, this one has 5' in message
