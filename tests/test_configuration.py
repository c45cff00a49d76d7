"""gin files and flags: what is accepted, what is refused and in which words."""

from collections.abc import Callable
import dataclasses
import itertools
import re
import sys

import gin
import pytest

from prompt_tuning import configuration
from prompt_tuning.errors import UserError


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
  """Three configurables of our own instead of the package's."""
  names = {name: f'{__name__}:{name}' for name in ('Oven', 'whisk', 'bake')}
  monkeypatch.setattr(configuration, 'CONFIGURABLES', names)
  monkeypatch.chdir(tmp_path)
  yield
  gin.clear_config()


def write(name, *lines):
  with open(name, 'w') as file:
    file.write('\n'.join(lines) + '\n')
  return f'--gin_file={name}'


def bread():
  return write(
    'bread.gin',
    'bake.oven = @Oven()',
    'bake.minutes = %MINUTES',
    'Oven.degrees = 220',
  )


def run(*arguments):
  flags = configuration.parse_flags(arguments)
  return configuration.configure('bake', flags)()


def fault(*arguments):
  with pytest.raises(configuration.ConfigurationError) as caught:
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
  flags = configuration.parse_flags(
    ['--gin_file', 'a.gin', '--gin_search_paths', 'x,y', '--gin.A.b=1==1']
  )
  assert flags.gin_files == ('a.gin',)
  assert flags.search_paths == ('x', 'y')
  assert flags.bindings == (('A.b', '1==1'),)


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
  arguments = ['--gin_file=bread.gin', '--gin_file=o.gin', '--gin.MINUTES=1']
  configuration.configure('bake', configuration.parse_flags(arguments))
  mixer = gin.get_bindings('bake')['mixer']
  assert mixer.__name__ == 'adamw'


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
  assert run(file, bread(), '--gin.MINUTES=1')['mixer'] == 'folded 5'


def test_an_included_file_is_read_once():
  write('time.gin', 'MINUTES = 40')
  file = write('all.gin', "include 'time.gin'", "include 'bread.gin'")
  assert run(bread(), file)['minutes'] == 40


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
  assert run('--gin_file=again.gin') == first
  assert configuration.resolved_config() == text


def test_what_has_not_been_called_is_in_the_resolved_configuration():
  file = write('w.gin', 'bake.mixer = @whisk', 'whisk.speed = 2')
  flags = configuration.parse_flags([bread(), file, '--gin.MINUTES=7'])
  call = configuration.configure('bake', flags)
  text = call(resolved_config=configuration.resolved_config)['config']
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
    ('--gin.OTHER=4', ['%MINUTES is not bound', '--gin.MINUTES=']),
    ('--gin.bake.note=rye', ['no quotes', '''--gin.bake.note="'rye'"''']),
    ('--gin.bake.note=/a/b', ['no quotes', '''--gin.bake.note="'/a/b'"''']),
    ('--gin.bake.note="rye', ['--gin.bake.note="rye', 'not valid gin']),
    ('--gin.bake.note=(1', ['--gin.bake.note=(1', 'not valid gin']),
    ('--gin.bake.note=', ['--gin.bake.note=', 'not valid gin']),
    ('--gin.bake note=1', ['not valid gin']),
    ('--gin_fil=a', ['--gin_fil is not a flag', 'did you mean --gin_file?']),
    ('--gin_file', ['--gin_file needs a value']),
    ('bread.gin', ['bread.gin is not a flag']),
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
  'binding',
  ['SPARE = 1', 'whisk.speed = 2', 'other/Oven.fan = True'],
)
def test_what_nothing_uses_is_refused_in_files_and_flags(binding):
  message = fault(bread(), write('x.gin', binding), '--gin.MINUTES=1')
  assert 'x.gin:1' in message and 'nothing that bake calls' in message
  name, _, value = binding.partition(' = ')
  assert name in fault(bread(), '--gin.MINUTES=1', f'--gin.{name}={value}')


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
  path = configuration.find_file(f'{prefix}models/t5_1_1_mini.gin')
  assert path.is_file()


def test_a_missing_file_gets_the_nearest_one_of_the_package():
  message = fault('--gin_file=configs/modls/t5_1_1_mini.gin')
  assert 'did you mean models/t5_1_1_mini.gin?' in message


def test_run_main_prints_the_result_and_returns_zero(capsys):
  code = configuration.run_main('bake', [bread(), '--gin.MINUTES=4'], 'Bakes.')
  assert code == 0
  printed = capsys.readouterr()
  assert '"minutes": 4' in printed.out
  assert printed.err == ''


@pytest.mark.parametrize(
  'flags, code', [(['--gin.MINUTES=4', '--gin.Oven.degrees=400'], 1), ([], 2)]
)
def test_run_main_says_faults_in_one_line_and_returns_their_code(
  flags, code, capsys
):
  assert configuration.run_main('bake', [bread(), *flags], 'Bakes.') == code
  printed = capsys.readouterr()
  assert printed.out == ''
  assert re.fullmatch(r'error: .+\n', printed.err)


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
  def fail():
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    configuration.run_main(
      'bake', [bread(), '--gin.MINUTES=4'], 'x', finish=lambda result: fail()
    )


def test_a_full_disk_is_one_line(capsys):
  def fail(result):
    raise OSError(28, 'No space left on device', 'a/prompt.npy')

  arguments = [bread(), '--gin.MINUTES=4']
  assert configuration.run_main('bake', arguments, 'x', finish=fail) == 1
  assert 'No space left on device' in capsys.readouterr().err


def test_help_says_what_to_do(capsys):
  assert configuration.run_main('bake', ['--help'], 'Bakes.') == 0
  assert configuration.run_main('bake', [], 'Bakes.') == 2
  printed = capsys.readouterr().out
  assert 'Bakes.' in printed and '--gin_search_paths' in printed
