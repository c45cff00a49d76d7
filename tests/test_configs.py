"""The gin files that come with the package."""

import collections
import itertools
import math
import pathlib
import re
import shlex

import gin
import jax
import numpy as np
import pytest

import prompt_tuning
from prompt_tuning import cli
from prompt_tuning import configuration
from prompt_tuning import gin_files
from prompt_tuning.models import network
from prompt_tuning.training import optimizers

FOLDER = gin_files.configs_folder()
FILES = [p.relative_to(FOLDER).as_posix() for p in gin_files.own_files()]
WIRING = [name for name in FILES if name.startswith('wiring/')]
RUNS = [name for name in FILES if name.startswith(('runs/', 'methods/'))]
TUNE = 'train models/t5_1_1_mini tasks/bbc_topics runs/prompt_tune MODEL_DIR=x'


@pytest.fixture(autouse=True)
def clean_gin(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  yield
  gin.clear_config()


def request_of(command):
  """The function that a command calls, and what the command asks for."""
  name, *arguments = (
    shlex.split(command) if isinstance(command, str) else command
  )
  configured = cli.CONFIGURED[name]
  own_file = configured.own_file if configured.takes_run else ''
  return configured.function, cli.parse(arguments, own_file)[0]


def configure(command):
  configuration.configure(*request_of(command))


def commands(name):
  """The complete commands in a gin file's head."""
  head = (FOLDER / name).read_text().split('\n\n')[0].replace('\n#', '\n')
  found = re.findall(r'^ +prompt-tuning ((?:.*\\\n)*.*)$', head, re.MULTILINE)
  lines = [command.replace('\\\n', ' ') for command in found]
  return [shlex.split(line) for line in lines if '...' not in line]


def make_run():
  """The folder that the heads of eval, infer and export name."""
  configure(commands('runs/prompt_tune.gin')[0])
  folder = pathlib.Path('runs/bbc')
  folder.mkdir(parents=True)
  (folder / 'config.gin').write_text(configuration.resolved_config())
  gin.clear_config()


def own_bindings(name):
  """Of a file without those it includes."""
  return list(gin_files.bindings_in((FOLDER / name).read_text()))


def test_what_t5x_calls_settings_of_data_reaches_the_task():
  flags = '--tfds_data_dir=a --seqio_additional_cache_dirs=b,c'
  names = 'USE_CACHED_TASKS=True MIXTURE_OR_TASK_MODULE=mine'
  configure(f'{TUNE} TRAIN_STEPS_RELATIVE=1 {flags} {names}')
  bound = gin.get_bindings('prompt_tuning.Task')
  assert (bound['tfds_data_dir'], bound['cache_dirs']) == ('a', ('b', 'c'))
  assert bound['use_cached'] is True and bound['modules'] == ('mine',)
  words = 'bound by --tfds_data_dir but nothing that infer calls'
  with pytest.raises(gin_files.ConfigurationError, match=words):
    configure(
      'infer models/t5_1_1_mini runs/infer infer.trained=() INPUT_FILE=a'
      ' OUTPUT_FILE=b --tfds_data_dir=a'
    )


@pytest.mark.parametrize('name', FILES)
def test_every_file_can_be_read_and_says_what_it_does(name):
  request = gin_files.Request(files=(name,))
  assert gin_files.read_bindings(request)[0]
  head = (FOLDER / name).read_text().split('\n\n')[0]
  assert head.startswith('# ')
  used = f"include '{name}'" if name in WIRING else name.removesuffix('.gin')
  by_itself = ('runs/export.gin', 'runs/eval.gin', 'runs/infer.gin')
  assert used in head or name in by_itself
  assert '--gin' not in head


@pytest.mark.parametrize('name', RUNS)
def test_a_run_file_says_what_to_expect(name):
  head = (FOLDER / name).read_text().split('\n\n')[0]
  assert 'Expected time' in head
  if name.startswith('methods/'):
    assert 'not yet measured' in head or 'studies/' in head


@pytest.mark.parametrize('name', RUNS)
def test_the_commands_in_a_head_are_complete(name):
  make_run()
  assert commands(name)
  for command in commands(name):
    function, request = request_of(command)
    configuration.configure(function, request)
    named = [gin_files.find_file(file) for file in request.files]
    assert FOLDER / name in named or request.own_file == name


@pytest.mark.parametrize('name', RUNS)
def test_the_order_of_files_changes_nothing(name):
  make_run()
  function, request = request_of(commands(name)[0])
  texts = set()
  for order in itertools.permutations(request.files):
    permuted = gin_files.Request(**vars(request) | {'files': order})
    configuration.configure(function, permuted)
    texts.add(configuration.resolved_config())
  assert len(texts) == 1


STUDIES = [name for name in FILES if name.startswith('studies/')]
# Where the cells of one size say enough of those of all.
SIZES = ('super_glue', 'power_of_scale', 'parameters')


@pytest.mark.parametrize('name', STUDIES)
def test_every_cell_of_a_study_is_a_command_that_works(name, capsys):
  words = ['study', name, '--list', 'VOCABULARY=t5_1_1_mini']
  if pathlib.Path(name).stem in SIZES:
    words += ['--only=model:xl']
  assert cli.main(words) == 0, capsys.readouterr().err
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) > 4 and all(x.startswith('prompt-tuning ') for x in lines)
  head = (FOLDER / name).read_text().split('\n\n')[0]
  assert 'prompt-tuning study' in head and 'Expected' in head


def test_each_binding_of_the_wiring_stands_once():
  """So do other references, but in files of one folder that exclude others."""
  homes = collections.defaultdict(list)
  for name in FILES:
    for binding in own_bindings(name):
      wired = any(gin_files.references(binding.value)) and binding.parameter
      if wired or (name in WIRING and binding.parameter):
        homes[str(binding)].append(name)
  assert len(homes) > 40
  choices = {target for target, names in homes.items() if len(names) > 1}
  choices = {t for t in choices if not t.startswith('study.')}  # one a command
  assert choices == {
    'train.methods',  # of runs/ and methods/
    'train.learning_rate',  # of schedules/
    'train.optimizer',  # of wiring/train, and a method that has its own
    'train.data',  # of wiring/train_task and wiring/train_arrays
    'Prompt.initializer',  # of prompts/
    'Prompt.reparametrization',  # of reparametrizations/
  }


def test_files_of_two_folders_never_bind_the_same():
  """Files of one folder exclude each other, those of two may meet."""
  homes = collections.defaultdict(set)
  for name in FILES:
    if name not in WIRING:  # which all others overrule
      for binding in own_bindings(name):
        folder = name.split('/')[0].replace('methods', 'runs')
        homes[str(binding)].add(folder)
  assert all(len(folders) == 1 for folders in homes.values()), homes


OPTIONAL = [
  name.removesuffix('.gin')
  for name in FILES
  if name.split('/')[0]
  in ('prompts', 'reparametrizations', 'schedules', 'tasks', 'meshes')
]
NEEDED = {
  'schedules/cosine': 'TRAIN_STEPS_RELATIVE=9',
  'prompts/from_string': "PROMPT_TEXT='a text'",
  'prompts/from_file': 'PROMPT_FILE=runs/other',
  'meshes/model_parallel': 'NUM_PARTITIONS=2',
  'tasks/from_files': (
    "TASK_NAME=a TASK_FILES=\"{'train': 'a.csv'}\" TASK_LABELS=\"['b']\""
  ),
}


@pytest.mark.parametrize('name', OPTIONAL)
def test_every_file_of_a_choice_goes_with_prompt_tuning(name):
  task = '' if name.startswith('tasks/') else 'tasks/bbc_topics'
  tune = TUNE.replace('tasks/bbc_topics', task)
  configure(f'{tune} {name} {NEEDED.get(name, "")}')


def test_the_bundled_model_needs_no_words():
  bundled = pathlib.Path(prompt_tuning.__file__).parent / 'bundled'
  values = {str(b): b.value for b in own_bindings('models/t5_1_1_mini.gin')}
  for macro in ('INITIAL_CHECKPOINT_PATH', 'VOCABULARY'):
    assert (bundled / values[macro]).is_dir()


# The paper's counts without the prompt (table 4).
PARAMETERS = {
  'small': 76_961_152,
  'base': 247_577_856,
  'large': 783_150_080,
  'xl': 2_849_757_184,
  'xxl': 11_135_332_352,
}


@pytest.mark.parametrize('size', PARAMETERS)
def test_a_model_has_as_many_parameters_as_in_the_paper(size):
  name = f'models/t5_1_1_{size}.gin'
  request = gin_files.Request(files=(name,))
  config = configuration.configure('T5Config', request)()
  shapes = jax.tree.leaves(network.parameter_shapes(config))
  count = sum(math.prod(leaf.shape) for leaf in shapes)
  assert count == PARAMETERS[size]
  assert f'{count:,} parameters' in (FOLDER / name).read_text()


def bound(name):
  return gin.get_bindings(name, resolve_references=True)


def test_the_recipe_of_prompt_tuning_is_the_papers():
  """Section 3, by `runs/prompt_tune` alone."""
  configure(TUNE)
  assert bound('Prompt')['length'] == 100
  assert bound('TaskData')['batch_size'] == 32
  assert bound('adafactor') == {
    'multiply_by_parameter_scale': False,
    'weight_decay_rate': 1e-5,
  }
  assert bound('T5Config')['dropout_rate'] == 0.0
  train = gin.get_bindings('train', resolve_references=False)
  assert train['best_metric'] == 'score'
  for macro, value in {
    'LEARNING_RATE': 0.3,
    'TRAIN_STEPS_RELATIVE': None,
    'TRAIN_STEPS': None,
  }.items():
    assert gin.query_parameter(f'{macro}/macro.value') == value
  assert repr(train['learning_rate']) == '%LEARNING_RATE'
  recipe = (FOLDER / 'runs/prompt_tune.gin').read_text()
  assert '(TRAIN_STEPS_RELATIVE=30000;' in recipe  # no run lasts by default


@pytest.mark.parametrize(
  'task, words',
  [
    ('bbc_topics', None),
    (
      'super_glue_record',
      ('commonsense', 'reasoning', 'reading', 'comprehension'),
    ),
    ('super_glue_wsc', ('commonsense', 'pronoun', 'resolution')),
  ],
)
def test_label_words_are_the_tasks(task, words):
  tune = TUNE.replace('bbc_topics', task)
  configure(f'{tune} prompts/class_labels')
  assert bound('class_labels')['words'] == words


def schedule(command):
  configure(command)
  name = 'prompt_tuning.create_learning_rate_scheduler'
  return gin.get_configurable(name)()


def test_the_cosine_falls_from_one_half_to_nothing_over_the_run():
  rate = schedule(f'{TUNE} schedules/cosine TRAIN_STEPS_RELATIVE=400')
  steps = np.arange(400)
  rates = np.array([rate(step) for step in steps])
  expected = 0.25 * (1 + np.cos(np.pi * steps / 400))
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)
  # The rate of the runs that were measured, which counted the base's steps.
  measured = optimizers.create_learning_rate_scheduler(
    'constant * cosine_decay', 0.5, warmup_steps=15197, steps_per_cycle=400
  )
  np.testing.assert_array_equal(rates, [measured(15197 + s) for s in steps])


def test_a_named_schedule_takes_the_place_of_the_run_files():
  rate = schedule(
    'train models/t5_1_1_mini runs/pretrain schedules/cosine TOKEN_ARRAYS=a'
    ' "TASK_FEATURE_LENGTHS={}" MODEL_DIR=x TRAIN_STEPS_RELATIVE=10'
  )
  assert float(rate(0)) == 0.5
  rate = schedule(
    'train models/t5_1_1_mini runs/pretrain TOKEN_ARRAYS=a'
    ' "TASK_FEATURE_LENGTHS={}" MODEL_DIR=x TRAIN_STEPS_RELATIVE=10'
  )
  assert float(rate(0)) == pytest.approx(0.01)
