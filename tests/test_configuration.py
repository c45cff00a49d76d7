"""gin files and words: what is accepted, what is refused and in which words."""

from collections.abc import Callable
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import gin
import optax
import pytest

from prompt_tuning import cli
from prompt_tuning import configuration
from prompt_tuning import gin_files
from prompt_tuning.errors import RestartError
from prompt_tuning.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Oven:
  degrees: int
  fan: bool = False
  trays: tuple[str, ...] = ()


def whisk(speed: float = 1.0, bowl: str | None = None) -> str:
  return f'whisked at {speed} in {bowl}'


def bake(
  oven: Oven,
  minutes: float,
  mixer: Callable[..., str] = whisk,
  note: str = 'plain',
  resolved_config: Callable[[], str] | None = None,
) -> dict:
  if oven.degrees > 300:
    raise UserError(f'degrees must be 300 at most, got {oven.degrees}')
  config = resolved_config() if resolved_config else ''
  return {
    'oven': dataclasses.asdict(oven),
    'minutes': minutes,
    'mixer': mixer(),
    'note': note,
    'config': config,
  }


@pytest.fixture(autouse=True)
def kitchen(monkeypatch, tmp_path):
  """Configurables and a command of our own instead of the package's."""
  names = dict.fromkeys(('Oven', 'whisk', 'bake'), __name__)
  monkeypatch.setattr(configuration, 'CONFIGURABLES', names)
  command = cli.Configured('bake', 'own.gin', over_processes=False)
  monkeypatch.setitem(cli.CONFIGURED, 'bake', command)
  monkeypatch.chdir(tmp_path)
  yield
  gin.clear_config()


def write(name, *lines):
  pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(name).write_text('\n'.join(lines) + '\n')
  return f'--gin_file={name}'


def bread():
  return write(
    'bread.gin',
    'bake.oven = @Oven()',
    'bake.minutes = %MINUTES',
    'Oven.degrees = 220',
  )


def run(*arguments):
  return configured(*arguments)()


def configured(*arguments):
  request, _ = cli.parse(arguments, own_file='own.gin')
  return configuration.configure('bake', request)


def fault(*arguments):
  with pytest.raises(gin_files.ConfigurationError) as caught:
    run(*arguments)
  message = str(caught.value)
  assert len(message.splitlines()) == 1
  return message


def test_files_and_flags_reach_the_function():
  result = run(bread(), '--gin.MINUTES=40', '--gin.bake.note="rye"')
  assert result['oven'] == {'degrees': 220, 'fan': False, 'trays': ()}
  assert (result['minutes'], result['note']) == (40, 'rye')


def test_a_flag_takes_its_value_with_or_without_equals():
  assert run(bread(), '--gin.MINUTES', '40')['minutes'] == 40
  request, job = cli.parse(
    ['--gin_file', 'a.gin', '--gin_search_paths', 'x,y', '--gin.A.b=1==1']
  )
  assert request.files == ('a.gin',)
  assert request.search_paths == ('x', 'y')
  assert request.bindings == ('--gin.A.b=1==1',)
  assert not job


def test_a_process_of_a_job_says_who_it_is():
  flags = '--coordinator_address=a:1 --num_processes=2 --process_id 1'.split()
  _, job = cli.parse(flags)
  assert job == {
    'coordinator_address': 'a:1',
    'num_processes': 2,
    'process_id': 1,
  }
  assert '--process_id must be a whole number' in fault('--process_id=x')
  flags = '--process_count=2 --process_index 1 --initialization_timeout=9'
  _, job = cli.parse([*flags.split(), '--multiprocess_gpu'])
  assert job == {
    'num_processes': 2,
    'process_id': 1,
    'initialization_timeout': 9,
    'multiprocess_gpu': True,
  }
  assert cli.parse(['--multiprocess_gpu=False', '--gin.A=1'])[1] == {}
  assert 'true or false, got 4' in fault('--multiprocess_gpu=4')
  words = 'must be a whole number, got long'
  assert words in fault('--initialization_timeout=long')


def test_t5xs_spelling_of_bindings_is_taken():
  flags = ['--gin_bindings=MINUTES = 40', '--gin_bindings', 'bake.note="rye"']
  result = run(bread(), *flags)
  assert (result['minutes'], result['note']) == (40, 'rye')
  assert 'no quotes' in fault('--gin_bindings=bake.note = rye')


def test_t5xs_flags_of_data_are_settings_of_the_task():
  flags = ['--tfds_data_dir=a b', '--seqio_additional_cache_dirs', 'c,d']
  request, _ = cli.parse(flags)
  assert request.bindings == (
    "--gin.Task.tfds_data_dir='a b'",
    "--gin.Task.cache_dirs=('c', 'd')",
  )
  assert 'did you mean --tfds_data_dir' in fault('--tfds_dta_dir=a')
  assert '--tfds_data_dir needs a value' in fault('--tfds_data_dir')


@pytest.mark.parametrize(
  'value, modules',
  [("'mine'", ('mine',)), ('None', ()), ("['a', 'b']", ['a', 'b'])],
)
def test_t5xs_name_of_a_module_is_taken(value, modules):
  request, _ = cli.parse([f'--gin.MIXTURE_OR_TASK_MODULE={value}'])
  (binding,), _ = gin_files.read_bindings(request)
  assert str(binding) == 'MIXTURE_OR_TASK_MODULES'
  assert binding.value == modules
  assert gin_files.trusted_modules([binding], ()) == set(modules)


def test_the_command_line_wins_over_files_and_its_last_flag_over_others():
  result = run(
    bread(), '--gin.MINUTES=40', '--gin.Oven.degrees=1', '--gin.MINUTES=50'
  )
  assert (result['oven']['degrees'], result['minutes']) == (1, 50)


def test_the_order_of_files_does_not_matter():
  files = [
    bread(),
    write('time.gin', 'MINUTES = 40'),
    write('mixer.gin', 'bake.mixer = @fast/whisk', 'fast/whisk.speed = 3'),
    write('bowl.gin', 'whisk.bowl = %BOWL', 'BOWL = "glass"'),
  ]
  results = []
  for order in itertools.permutations(files):
    result = run(*order)
    assert result['mixer'] == 'whisked at 3 in glass'
    results.append((result, configuration.resolved_config()))
  assert all(entry == results[0] for entry in results)


def test_a_function_is_passed_with_its_bindings():
  file = write('w.gin', 'bake.mixer = @whisk', 'whisk.speed = 2')
  result = run(bread(), file, '--gin.MINUTES=1')
  assert result['mixer'] == 'whisked at 2 in None'


def test_optax_is_known_by_name():
  bread()
  write('o.gin', 'bake.mixer = @optax.adamw', 'optax.adamw.b1 = 0.5')
  configured('bread', 'o', 'MINUTES=1')
  mixer = gin.get_bindings('bake')['mixer']
  assert mixer.__name__ == 'adamw'
  # gin itself writes adamw.b1, a name that nothing knows in a new process.
  assert 'optax.adamw.b1 = 0.5' in configuration.resolved_config()


@pytest.mark.parametrize(
  'name', ['jnp', 'functools', 'os', '_src', 'contrib', 'adamw.__globals__']
)
def test_what_is_not_optaxs_own_is_out_of_reach(name):
  assert f'@optax.{name} is n' in fault(
    bread(), 'MINUTES=1', f'bake.mixer=@optax.{name}'
  )
  assert configured('bread', 'MINUTES=1', 'bake.mixer=@optax.contrib.muon')


def test_a_module_that_a_file_imports_brings_its_own_configurables(
  monkeypatch,
):
  write(
    'own_mixers.py', 'import gin', '@gin.configurable',
    'def fold(turns=2):', "  return f'folded {turns}'",
  )  # fmt: skip
  file = write(
    'own.gin', 'import own_mixers', 'bake.mixer = @fold', 'fold.turns = 5'
  )
  monkeypatch.setattr(sys, 'path', list(sys.path))
  words = (file, bread(), '--gin.MINUTES=1')
  assert 'own.gin:1 imports own_mixers, code' in fault(*words)
  for leave in ('--allow_import=own_mixers', "Task.modules=('own_mixers',)"):
    request, _ = cli.parse([*words, leave])
    assert gin_files.read_bindings(request)[1] == ['import own_mixers']
  assert run(*words, '--allow_import=own_mixers')['mixer'] == 'folded 5'


def test_an_included_file_is_read_once():
  write('time.gin', 'MINUTES = 40')
  file = write('all.gin', "include 'time.gin'", "include 'bread.gin'")
  assert run(bread(), file)['minutes'] == 40


WORDS = {
  'rye': 'rye',
  '/a/b.gin': '/a/b.gin',
  'a b = c': 'a b = c',
  '-': '-',
  'it\'s 5%, "or so" # not more': 'it\'s 5%, "or so" # not more',
  '[:10]': '[:10]',
  '{text}': '{text}',
  'two\nlines': 'two\nlines',
  "'7'": '7',
  '': None,
}


@pytest.mark.parametrize('word, value', WORDS.items())
def test_a_word_needs_no_quotes(word, value):
  if value is None:
    assert 'not valid gin' in fault(bread(), 'MINUTES=1', f'bake.note={word}')
  else:
    assert run(bread(), 'MINUTES=1', f'bake.note={word}')['note'] == value


def test_words_are_files_and_bindings():
  write('mine/bread.gin', "include 'bread.gin'", 'bake.mixer = @whisk')
  bread()
  result = run(
    'whisk.speed=1e-3',
    'mine/bread',
    'MINUTES=%OTHER',
    'OTHER=7',
    'Oven.fan=True',
  )
  assert result['mixer'] == 'whisked at 0.001 in None'
  assert (result['minutes'], result['oven']['fan']) == (7, True)
  assert run('mine/bread.gin', 'MINUTES=7')['minutes'] == 7


@pytest.mark.parametrize(
  'word, hint',
  [
    ('bake.mixer=whisk', 'did you mean @whisk() (what it returns) or @whisk'),
    ('bake.mixer=Oven', 'did you mean @Oven()'),
    ('Oven.degrees=MINUTES', 'did you mean %MINUTES?'),
  ],
)
def test_a_bare_word_that_is_a_name_gets_a_hint(word, hint):
  assert hint in fault(bread(), 'MINUTES=1', word)


def test_a_bare_word_that_is_a_macro_and_fits_is_noted(capsys):
  assert run(bread(), 'MINUTES=1', 'bake.note=MINUTES')['note'] == 'MINUTES'
  assert 'did you mean bake.note=%MINUTES?' in capsys.readouterr().err
  run(bread(), 'MINUTES=1', 'bake.note=1 MINUTES')
  assert capsys.readouterr().err == ''


def test_what_is_nearer_to_the_command_line_holds():
  """Typed, then files named, then what they include, the deeper the weaker."""
  write('deep.gin', 'MINUTES = 3', 'Oven.degrees = 3', 'bake.note = "deep"')
  write(
    'middle.gin',
    "include 'deep.gin'",
    *('MINUTES = 2', 'Oven.degrees = 2', 'bake.oven = @Oven()'),
  )
  write('named.gin', "include 'middle.gin'", 'bake.minutes = %MINUTES')
  write('other.gin', 'MINUTES = 1')
  for files in itertools.permutations(['named', 'other']):
    result = run(*files)
    assert (result['minutes'], result['note']) == (1, 'deep')
    assert result['oven']['degrees'] == 2
    assert run(*files, 'MINUTES=0')['minutes'] == 0
  # A file that is named as well is as strong as others that are.
  assert 'bound twice' in fault('named', 'other', 'deep')
  assert run('named', 'deep')['minutes'] == 3


def test_equal_bindings_of_two_files_are_no_fault():
  write('a.gin', 'MINUTES = 4')
  write('b.gin', 'MINUTES = 4')
  assert run(bread(), 'a', 'b')['minutes'] == 4


def test_the_command_line_settles_what_two_files_bind():
  write('a.gin', 'MINUTES = 4')
  write('b.gin', 'MINUTES = 5')
  assert run(bread(), 'a', 'b', 'MINUTES=6')['minutes'] == 6


@pytest.fixture
def own_file():
  """The command's own file and the folder of a run."""
  write('own.gin', 'bake.oven = @Oven()', 'Oven.degrees = 100', 'MINUTES = 1')
  write(
    'runs/a/config.gin',
    'import math',
    'bake.minutes = %MINUTES',
    'bake.note = %MODEL_DIR',
    'bake.mixer = @whisk',
    'whisk.bowl = %EVAL_OUTPUT_DIR',
    'MINUTES = 2',
    "MODEL_DIR = 'where it was'",
    'other/Oven.fan = True',
    'train.what_another_command_has = 3',
  )


ALLOWED = '--allow_import=math'


@pytest.mark.parametrize('name', ['MIXTURE_OR_TASK_MODULES', 'Task.modules'])
def test_modules_that_a_runs_folder_names_need_leave_too(own_file, name):
  write('runs/a/config.gin', 'bake.minutes = 1', f"{name} = ('evil',)")
  refused = pytest.raises(gin_files.ConfigurationError, match='import=evil')
  with refused:
    run('runs/a', ALLOWED)
  run('runs/a', ALLOWED, '--allow_import=evil')


@pytest.mark.parametrize(
  'lines',
  [
    ('Task.modules = %OTHER', "OTHER = ('evil',)"),
    ('a/Task.modules = [%a/OTHER]', "a/OTHER = 'evil'"),
    ('Task.modules = (%ONE,)', 'ONE = %TWO', "TWO = 'evil'"),
  ],
)
def test_no_macro_hides_a_module_of_a_runs_folder(own_file, lines):
  write('runs/a/config.gin', 'bake.minutes = 1', *lines)
  with pytest.raises(gin_files.ConfigurationError, match='import=evil'):
    run('runs/a', ALLOWED)


def test_a_runs_folder_does_not_say_where_to_write(own_file):
  write('runs/a/config.gin', 'bake.minutes = 1', "infer.output_file = '/etc/x'")
  request, _ = cli.parse(['runs/a'], own_file='own.gin')
  found, _ = gin_files.read_bindings(request)
  assert 'infer.output_file' not in map(str, found)


def test_a_runs_folder_is_enough(own_file):
  result = run('runs/a', ALLOWED)
  assert result['oven']['degrees'] == 100  # its own file's
  assert result['minutes'] == 2  # the run's over its own file's
  assert result['note'] == 'runs/a'  # the folder's over the run's
  assert result['mixer'].endswith('in runs/a/eval_validation')
  assert run('runs/a/', ALLOWED)['note'] == 'runs/a'


def test_files_and_words_change_a_run(own_file):
  write('hot.gin', 'Oven.degrees = 300', 'MINUTES = 3')
  result = run('runs/a', ALLOWED, 'hot', 'MODEL_DIR=b')
  assert result['oven']['degrees'] == 300
  assert (result['minutes'], result['note']) == (3, 'b')


def test_a_run_is_told_where_to_write_by_its_split(own_file):
  def place(*words):
    request, _ = cli.parse(['runs/a', ALLOWED, *words], own_file='own.gin')
    found, _ = gin_files.read_bindings(request)
    values = {str(b): b.value for b in gin_files.holding(found)}
    return values['EVAL_OUTPUT_DIR']

  assert place() == 'runs/a/eval_validation'
  assert place('Evaluation.split=test') == 'runs/a/eval_test'
  write('part.gin', "Evaluation.split = 'test[:10]'")
  assert place('part') == 'runs/a/eval_test_10_'
  assert place('part', 'EVAL_OUTPUT_DIR=b') == 'b'


def test_a_run_imports_nothing_unasked(own_file):
  message = fault('runs/a')
  assert 'runs/a/config.gin:1 imports math' in message
  assert '--allow_import=math' in message
  write('runs/b/config.gin', "include 'more.gin'")
  write('more.gin', 'import math')
  assert 'more.gin:1 imports math' in fault('runs/b')


def test_a_folder_that_is_no_run_is_one_line(own_file):
  pathlib.Path('empty').mkdir()
  assert 'empty has no config.gin' in fault('empty')
  write('exported/prompt.safetensors')
  assert 'own models/... PROMPT_FILE=exported' in fault('exported')
  assert "nor is it a run's folder" in fault('runs/c')
  assert 'one run at a time' in fault('runs/a', 'runs/a/.')
  with pytest.raises(gin_files.ConfigurationError, match='is its gin file'):
    cli.parse(['runs/a'])


def test_the_resolved_configuration_is_the_same_run_again():
  first = run(
    bread(),
    write('w.gin', 'bake.mixer = @whisk', 'whisk.speed = 2'),
    '--gin.MINUTES=7',
    "--gin.Oven.trays=('a', 'b')",
  )
  text = configuration.resolved_config()
  write('again.gin', text)
  assert 'Oven.fan = False' in text  # a default
  assert 'MINUTES = 7' in text
  # Written before the mixer was called: its defaults are known only after.
  assert run('again') | {'config': first['config']} == first
  assert configuration.resolved_config() == text


def test_what_has_not_been_called_is_in_the_resolved_configuration():
  file = write('w.gin', 'bake.mixer = @whisk', 'whisk.speed = 2')
  text = run(bread(), file, 'MINUTES=7')['config']
  assert 'whisk.speed = 2' in text
  assert 'bake.note' in text


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--gin.Ovn.degrees=1', ['Ovn is not a config', 'did you mean Oven?']),
    ('--gin.Oven.degres=1', ['no parameter degres', 'did you mean degrees?']),
    ('--gin.bake.mixer=@whisck', ['whisck', 'did you mean whisk?']),
    ('--gin.bake.mixer=@optax.adamww', ['did you mean adamw?']),
    ('--gin.MINUTS=4', ['MINUTS is bound by', 'did you mean MINUTES?']),
    ('--gin.OTHER=4', ['%MINUTES is not bound', 'give MINUTES=']),
    ('--gin.bake.note=rye', ['no quotes', "'rye'", 'bake.note=rye']),
    ('--gin.bake.note=/a/b', ['no quotes', "'/a/b'", 'bake.note=/a/b']),
    ('--gin.bake.note="rye', ['--gin.bake.note="rye', 'not valid gin']),
    ('--gin.bake.note=(1', ['--gin.bake.note=(1', 'not valid gin']),
    ('--gin.bake.note=', ['--gin.bake.note=', 'not valid gin']),
    ('--gin.bake note=1', ['not valid gin']),
    ('bake note=1', ['not valid gin']),
    ('bake.note=@', ['not valid gin']),
    ('Ovn.degrees=1', ['Ovn is not a config', 'did you mean Oven?']),
    ('MINUTS=4', ['MINUTS is bound by MINUTS=4', 'did you mean MINUTES?']),
    ('--gin_fil=a', ['--gin_fil is not a flag', 'did you mean --gin_file?']),
    ('--gin_file', ['--gin_file needs a value']),
    ('--minutes=4', ['--minutes is not a flag', 'NAME=VALUE']),
    ('bred', ['bred is not found']),
    ('--gin_file=bred.gin', ['bred.gin is not found', 'searched: .']),
  ],
)
def test_a_mistyped_flag_gets_one_line_with_the_nearest_name(flag, words):
  message = fault(bread(), flag)
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  'line, words',
  [
    ('bake.note = rye', ['bad.gin:2: no quotes', "bake.note = 'rye'"]),
    ('bake.note = rye bread', ["bake.note = 'rye bread'"]),
    ('bake.note = [1, 2', ['bad.gin:2', 'not valid gin']),
    ('bake.note 3', ['bad.gin:2', 'not valid gin']),
    ('Oven.degres = 3', ['bad.gin:2', 'did you mean degrees?']),
    ('Ovn.fan = True', ['bad.gin:2', 'did you mean Oven?']),
    ('MINUTES = %A\nA = %B\nB = %A', ['bad.gin:', 'leads back to itself']),
    ('MINUTES = ' + '[' * 9999 + ']' * 9999, ['bad.gin']),
    ('import no_such_module', ['bad.gin:2', 'no_such_module']),
    ("include 'none.gin'", ['bad.gin:2', 'none.gin is not found']),
    ('from __gin__ import dynamic_registration', ['bad.gin:2', 'plain names']),
  ],
)
def test_a_fault_in_a_file_is_named_with_file_and_line(line, words):
  message = fault(bread(), write('bad.gin', '', line), '--gin.MINUTES=1')
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  'binding', ['Oven.degrees = 1', 'MINUTES = 4', 'prompt_tuning.Oven.fan = 1']
)
def test_two_files_that_bind_the_same_are_both_named(binding):
  first = write('a.gin', 'MINUTES = 3', 'Oven.fan = True')
  message = fault(write('z.gin', binding), bread(), first)
  assert 'bound twice' in message and 'z.gin:1' in message
  assert 'a.gin' in message or 'bread.gin:3' in message


@pytest.mark.parametrize(
  'binding', ['whisk.speed = 2', 'other/Oven.fan = True']
)
def test_what_nothing_uses_is_refused_in_files_and_flags(binding):
  message = fault(bread(), write('x.gin', binding), '--gin.MINUTES=1')
  assert 'x.gin:1' in message and 'nothing that bake calls' in message
  name, _, value = binding.partition(' = ')
  assert name in fault(bread(), '--gin.MINUTES=1', f'--gin.{name}={value}')


def test_a_macro_of_a_file_may_go_unused_and_one_typed_may_not():
  spare = write('x.gin', 'SPARE = 1')
  assert run(bread(), spare, 'MINUTES=1')['minutes'] == 1
  assert 'SPARE' not in configuration.resolved_config()
  for typed in ('SPARE=1', '--gin.SPARE=1'):
    message = fault(bread(), 'MINUTES=1', typed)
    assert 'SPARE is bound by' in message and 'remove it' in message


def test_an_included_file_may_bind_what_nothing_uses():
  write('wiring.gin', 'whisk.speed = 2', "include 'bread.gin'")
  bread()
  file = write('mine.gin', "include 'wiring.gin'")
  assert run(file, 'MINUTES=1')['mixer'] == 'whisked at 1.0 in None'
  write('wiring.gin', 'whisk.sped = 2')
  assert 'did you mean speed?' in fault(file, bread(), 'MINUTES=1')


def test_an_unused_macro_gets_the_nearest_used_name():
  message = fault(bread(), '--gin.MINUTES=1', '--gin.MINUTE=2')
  assert 'MINUTE is bound by --gin.MINUTE' in message
  assert 'did you mean MINUTES?' in message


def test_a_flag_may_cut_off_what_a_file_binds():
  file = write('w.gin', 'bake.mixer = @big/whisk', 'big/whisk.speed = 2')
  result = run(bread(), file, '--gin.MINUTES=1', '--gin.bake.mixer=@whisk')
  assert result['mixer'] == 'whisked at 1.0 in None'
  oven = write('o.gin', 'other/Oven.fan = True', 'bake.note = "x"')
  assert 'other/Oven.fan' in fault(bread(), oven, '--gin.MINUTES=1')


def test_what_a_flag_cut_off_is_not_in_the_resolved_configuration():
  file = write('w.gin', 'bake.mixer = @big/whisk', 'big/whisk.bowl = %BOWL')
  run(bread(), file, '--gin.MINUTES=1', '--gin.bake.mixer=@whisk')
  assert 'BOWL' not in configuration.resolved_config()


def test_a_parameter_without_value_is_asked_for_before_anything_runs():
  file = write('b.gin', 'bake.oven = @Oven()', 'bake.minutes = 1')
  message = fault(file)
  assert message.startswith('b.gin:1: Oven.degrees is not bound')


@pytest.mark.parametrize(
  'flag, words',
  [
    ("--gin.Oven.degrees='9'", "must be a whole number, got '9'"),
    ('--gin.Oven.degrees=9.5', 'must be a whole number, got 9.5'),
    ('--gin.Oven.fan=1', 'must be True or False, got 1'),
    ("--gin.MINUTES='40'", "must be a number, got '40' (--gin.MINUTES)"),
    ('--gin.bake.note=3', 'must be a string, got 3'),
    ('--gin.Oven.trays=3', 'got 3'),
  ],
)
def test_a_value_of_the_wrong_type_is_refused(flag, words):
  assert words in fault(bread(), '--gin.MINUTES=1', flag)


def test_what_fits_a_type_is_accepted():
  result = run(
    bread(),
    '--gin.MINUTES=1',
    "--gin.Oven.trays=['a']",
    '--gin.bake.mixer=@whisk',
    '--gin.whisk.bowl=None',
    '--gin.whisk.speed=2',
  )
  assert result['oven']['trays'] == ['a']


def test_search_paths_are_looked_at_before_the_packages_own(tmp_path):
  folder = tmp_path / 'mine' / 'models'
  folder.mkdir(parents=True)
  (folder / 't5_1_1_mini.gin').write_text('MINUTES = 99\n')
  assert (
    run(
      bread(),
      '--gin_file=models/t5_1_1_mini.gin',
      '--gin_search_paths=elsewhere,mine',
    )['minutes']
    == 99
  )


@pytest.mark.parametrize('prefix', ['', 'configs/'])
def test_the_packages_files_are_found_from_any_folder(prefix):
  for name in ('models/t5_1_1_mini.gin', 'models/t5_1_1_mini'):
    assert gin_files.find_file(f'{prefix}{name}').is_file()


def test_a_missing_file_gets_the_nearest_one_of_the_package():
  message = fault('--gin_file=configs/modls/t5_1_1_mini.gin')
  assert 'did you mean models/t5_1_1_mini.gin?' in message
  assert 'did you mean models/t5_1_1_mini?' in fault('models/t5_1_mini')


def test_a_command_prints_its_result_and_returns_zero(capsys):
  assert cli.main(['bake', bread(), 'MINUTES=4']) == 0
  printed = capsys.readouterr()
  assert '"minutes": 4' in printed.out
  assert printed.err == ''


@pytest.mark.parametrize(
  'words, code', [(['MINUTES=4', 'Oven.degrees=400'], 1), (['bread'], 2)]
)
def test_a_command_says_faults_in_one_line_and_returns_their_code(
  words, code, capsys
):
  assert cli.main(['bake', bread(), *words]) == code
  printed = capsys.readouterr()
  assert printed.out == ''
  assert re.fullmatch(r'error: .+\n', printed.err)


def raising(error):
  def finish(result):
    raise error

  return dataclasses.replace(cli.CONFIGURED['bake'], finish=finish)


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
  command = raising(ZeroDivisionError())
  monkeypatch.setitem(cli.CONFIGURED, 'bake', command)
  with pytest.raises(ZeroDivisionError):
    cli.main(['bake', bread(), 'MINUTES=4'])


@pytest.mark.parametrize(
  'error, code, words',
  [
    (OSError(28, 'No space left on device'), 1, 'No space left on device'),
    (RestartError('asked to stop'), 75, 'asked to stop'),
    (KeyboardInterrupt(), 130, 'interrupted'),
  ],
)
def test_what_ends_a_command_is_one_line_and_a_code(
  error, code, words, capsys, monkeypatch
):
  monkeypatch.setitem(cli.CONFIGURED, 'bake', raising(error))
  assert cli.main(['bake', bread(), 'MINUTES=4']) == code
  printed = capsys.readouterr().err
  assert words in printed and printed.count('\n') == 1


def test_flags_of_a_job_are_refused_where_there_is_none(capsys):
  assert cli.main(['bake', bread(), 'MINUTES=4', '--num_processes=2']) == 2
  assert 'is for jobs of train' in capsys.readouterr().err


def test_help_is_the_head_of_the_commands_own_file(capsys):
  write('own.gin', '# Bakes.', '#', '#   bake bread', '', '# Not the head.')
  assert cli.main(['bake', '--help']) == 0
  assert cli.main(['bake']) == 2
  printed = capsys.readouterr().out
  assert 'Bakes.\n\n  bake bread\n' in printed and 'Not the' not in printed
  assert '--gin_search_paths' in printed


def test_a_bug_is_a_line_for_a_shell_and_its_traceback_a_file(
  capsys, monkeypatch
):
  monkeypatch.setitem(cli.CONFIGURED, 'bake', raising(ZeroDivisionError('x')))
  words = ['prompt-tuning', 'bake', bread(), 'MINUTES=4']
  monkeypatch.setattr(sys, 'argv', words)
  assert cli.main() == 70
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ZeroDivisionError: x (a fault of prompt_tuni')
  file = pathlib.Path(re.search(r'; (\S+) says where', line)[1])
  assert 'Traceback' in file.read_text()
  file.unlink()


def test_sigterm_ends_a_command_with_a_line(capsys, monkeypatch):
  def finish(result):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # the signal comes first

  command = dataclasses.replace(cli.CONFIGURED['bake'], finish=finish)
  monkeypatch.setitem(cli.CONFIGURED, 'bake', command)
  before = signal.getsignal(signal.SIGTERM)
  assert cli.main(['bake', bread(), 'MINUTES=4']) == 75
  assert 'stopped by SIGTERM' in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_closed_pipe_is_no_fault():
  words = f'{sys.executable} -m prompt_tuning inspect t5_1_1_mini --arrays'
  done = subprocess.run(
    ['bash', '-c', f'set -o pipefail; {words} | head -1'],
    capture_output=True,
    cwd=REPOSITORY,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('t5_1_1_mini: model, 6,098,176 parameters')


def test_help_and_completion_name_commands_and_files(capsys):
  assert cli.main(['--help']) == 0
  printed = capsys.readouterr().out
  assert '  show ' in printed and 'tasks/ bbc_topics' in printed
  assert cli.main(['completion']) == 0
  words = capsys.readouterr().out
  assert ' models/t5_1_1_mini ' in words and "-W 'train eval" in words
  assert not subprocess.run(['bash', '-n'], input=words, text=True).returncode


def test_what_one_file_binds_in_place_of_another_leaves_that_unused():
  write('wiring.gin', 'bake.mixer = @whisk')
  file = write('run.gin', "include 'wiring.gin'", 'whisk.speed = 2.0')
  write('own.gin', 'bake.mixer = @optax.identity')
  words = (bread(), 'MINUTES=1')
  assert run(*words, file)['mixer'] == 'whisked at 2.0 in None'
  assert isinstance(run(*words, file, 'own')['mixer'], type(optax.identity()))
  assert 'nothing that bake calls' in fault(*words, 'own', 'whisk.speed=1.0')
