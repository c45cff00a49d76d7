"""The gin files that come with the package."""

import importlib
import itertools
import math
import re
import shlex

import gin
import jax
import pytest

from prompt_tuning import configuration
from prompt_tuning.models import network

FOLDER = configuration.configs_folder()
FILES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*.gin'))
RUNS = [name for name in FILES if name.startswith('runs/')]
PROMPTS = [name for name in FILES if name.startswith('prompts/')]
FUNCTIONS = {
  'train': 'train',
  'eval': 'evaluate',
  'infer': 'infer',
  'export': 'export',
  'compile': 'compile_steps',
}


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


def command(name):
  """The arguments of the command in a gin file's or a main's head."""
  if name.endswith('.gin'):
    text = (FOLDER / name).read_text().replace('\n#', '\n')
  else:
    text = importlib.import_module(f'prompt_tuning.{name}').__doc__
  start = re.search(r'^ +prompt-tuning (?!.*\.\.\.)', text, re.MULTILINE).end()
  taken = []
  for line in text[start:].split('\n'):
    taken.append(line.strip().removesuffix('\\'))
    if not line.rstrip().endswith('\\'):
      break
  return shlex.split(' '.join(taken))


def bindings(name):
  flags = configuration.Flags(gin_files=(name,))
  return configuration.read_bindings(flags).all


@pytest.mark.parametrize('name', FILES)
def test_every_file_can_be_read_and_says_what_it_does(name):
  assert bindings(name)
  head = (FOLDER / name).read_text()
  assert head.startswith('# ')
  assert f'--gin_file={name}' in head or 'bundled model' in head


@pytest.mark.parametrize('name', RUNS)
def test_a_run_file_says_what_to_expect(name):
  assert '# Expected time' in (FOLDER / name).read_text()


@pytest.mark.parametrize('name', [*RUNS, *FUNCTIONS])
def test_the_command_in_a_head_is_complete(name):
  main, *arguments = command(name)
  flags = configuration.parse_flags(arguments)
  configuration.configure(FUNCTIONS[main], flags)
  if name in RUNS:
    assert name in flags.gin_files


@pytest.mark.parametrize('name', RUNS)
def test_the_order_of_files_changes_nothing(name):
  main, *arguments = command(name)
  flags = configuration.parse_flags(arguments)
  texts = set()
  for order in itertools.permutations(flags.gin_files):
    permuted = configuration.Flags(order, (), flags.bindings)
    configuration.configure(FUNCTIONS[main], permuted)
    texts.add(configuration.resolved_config())
  assert len(texts) == 1


@pytest.mark.parametrize('name', PROMPTS)
def test_every_prompt_file_goes_with_prompt_tuning(name):
  arguments = [
    argument
    for argument in command('runs/prompt_tune.gin')[1:]
    if 'prompts/' not in argument
  ]
  arguments += [f'--gin_file={name}']
  bound = {str(binding) for binding in bindings(name)}
  if 'from_string.text' in bound:
    arguments += ["--gin.PROMPT_TEXT='a text'"]
  if 'from_file.path' in bound:
    arguments += ["--gin.PROMPT_FILE='/tmp/prompt'"]
  configuration.configure('train', configuration.parse_flags(arguments))


def test_a_macro_is_bound_in_one_folder_only():
  """Files of one folder exclude each other, those of two may meet."""
  homes = {}
  for name in FILES:
    for binding in bindings(name):
      if not binding.parameter:
        homes.setdefault(str(binding), set()).add(name.split('/')[0])
  assert all(len(folders) == 1 for folders in homes.values()), homes


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
  flags = configuration.Flags(gin_files=(name,))
  config = configuration.configure('T5Config', flags)()
  shapes = jax.tree.leaves(network.parameter_shapes(config))
  count = sum(math.prod(leaf.shape) for leaf in shapes)
  assert count == PARAMETERS[size]
  assert f'{count:,} parameters' in (FOLDER / name).read_text()


def test_the_recipe_of_prompt_tuning_is_the_papers():
  """Section 3: no parameter scaling, decay 1e-5, batch 32, 100 tokens."""
  main, *arguments = command('runs/prompt_tune.gin')
  configuration.configure('train', configuration.parse_flags(arguments))
  adafactor = gin.get_bindings('adafactor')
  assert adafactor['multiply_by_parameter_scale'] is False
  assert adafactor['weight_decay_rate'] == 1e-5
  assert gin.get_bindings('TaskData')['batch_size'] == 32
  assert gin.get_bindings('Prompt', resolve_references=True)['length'] == 100
