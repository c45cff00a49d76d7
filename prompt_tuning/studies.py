"""The words of `prompt-tuning study`, and what other commands come to."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import shlex
from typing import Any

from prompt_tuning import configuration
from prompt_tuning import gin_files
from prompt_tuning.gin_files import Binding
from prompt_tuning.gin_files import ConfigurationError
from prompt_tuning.gin_files import Request

FLAGS_HELP = """\
Words and flags:
  FILE              a study: a gin file, of studies/ or of yours
  STUDY_DIR=FOLDER  where its runs and its report are
  NAME=VALUE        binds, in every command of the study that has a use for it;
                    study.NAME=VALUE and the like bind in the study itself
  --list            prints the commands
  --collect         writes the report of what is done, and runs nothing
  --at_once=N       so many cells side by side, each with its share of devices
  --executor=WHO    local; slurm (an array, by submitit); or the command of a
                    launcher, such as scripts/launch/jobset.sh
  --only=AXIS:A,B   the cells of these labels alone
  --adopt=FOLDER    takes runs below it that are cells of the study
  --help            this text"""
_ACTIONS = {'--list': 'list', '--collect': 'collect'}
_VALUES = {
  '--executor': 'study.executor={!r}',
  '--at_once': 'study.at_once={}',
  '--adopt': 'study.adopt=[{!r}]',
}
_ONLY = '--only'
_READS = ('--gin_file', '--gin_search_paths', '--allow_import')
_OWN_MODULE = 'prompt_tuning.study.'


def own_words(arguments: Sequence[str]) -> list[str]:
  """The arguments as words of the study alone; `study.words` has the others.

  Raises:
    ConfigurationError: an unknown flag, or one without its value.
  """
  own, others, only = [], [], {}
  for word in arguments:
    flag, equals, value = word.partition('=')
    if word in _ACTIONS:
      own.append(f'study.action={_ACTIONS[word]}')
    elif flag in _VALUES:
      if not value:
        raise ConfigurationError(f'{flag} needs a value: {flag}=...')
      own.append(_VALUES[flag].format(value))
    elif flag == _ONLY:
      axis, _, labels = value.partition(':')
      if not labels:
        raise ConfigurationError(f'{_ONLY} takes AXIS:LABEL,LABEL, got {value}')
      only[axis] = labels.split(',')
    elif flag.startswith('--') and not (
      flag in _READS or flag.startswith('--gin.')
    ):
      near = gin_files.nearest(flag, [*_ACTIONS, *_VALUES, _ONLY, '--help'])
      raise ConfigurationError(f'{flag} is not a flag of study{near}')
    elif not equals or flag in _READS or _is_own(_name(word)):
      own.append(word)
    else:
      others.append(word)
  own += [f'study.only={only!r}'] if only else []
  return own + ([f'study.words={shlex.join(others)!r}'] if others else [])


def _is_own(name: str) -> bool:
  """Whether a binding is the study's: its own, or of its grids and views."""
  target, _, parameter = name.rpartition('.')
  home = configuration.CONFIGURABLES.get(target.rpartition('/')[2], '')
  return name == 'STUDY_DIR' or (
    bool(parameter) and home.startswith(_OWN_MODULE)
  )


class Commands:
  """What is known of commands without running them (`study.Commands`)."""

  def __init__(
    self,
    parse: Callable[[Sequence[str], str], tuple[Request, Any]],
    functions: Mapping[str, tuple[str, str]],
  ):
    """Takes what reads a command line.

    Args:
      parse: from arguments and a command's own gin file to a request.
      functions: {command: (what it calls, its own file if it takes a run)}.
    """
    self._parse = parse
    self._functions = functions

  def settings(self, arguments: Sequence[str]) -> dict[str, Any]:
    """What a command's function would be given, {'Prompt.length': 20, ...}.

    Macros are replaced by what they stand for.

    Raises:
      ConfigurationError: the line of a fault names the command.
    """
    command, *words = arguments
    function, own_file = self._functions[command]
    try:
      request, _ = self._parse(words, own_file)
      usage, _ = configuration.checked(function, request)
    except ConfigurationError as error:
      line = str(error).splitlines()[0]
      raise ConfigurationError(
        f'{line} (in prompt-tuning {shlex.join(arguments)})'
      ) from None
    return _values([b for b in usage.bindings if str(b) in usage.used])

  def using(self, arguments: Sequence[str], words: Sequence[str]) -> list[str]:
    """Those of further bindings that the command has a use for."""
    command, *rest = arguments
    function, own_file = self._functions[command]
    request, _ = self._parse([*rest, *words], own_file)
    found, _ = gin_files.read_bindings(request)
    usage = configuration.Usage(function, gin_files.holding(found))
    return [word for word in words if _name(word) in usage.used]

  def of_config(self, text: str) -> dict[str, Any]:
    """The settings of a run, of its config.gin."""
    return _values(list(gin_files.bindings_in(text)))

  def key(self, settings: Mapping[str, Any]) -> str:
    """Equal for settings of the same run; defaults are not looked up."""
    return repr(
      sorted((k, repr(v)) for k, v in settings.items() if _matters(k))
    )

  def differences(
    self, wanted: Mapping[str, Any], found: Mapping[str, Any]
  ) -> list[str]:
    """In what the settings `found` are not those that are `wanted`.

    What one of them does not say is its parameter's default.
    """
    told = []
    for name in sorted({*wanted, *found}):
      if not _matters(name):
        continue
      one, other = (
        values[name] if name in values else _default(name)
        for values in (wanted, found)
      )
      # What gin cannot write, such as a function, is in no config.gin.
      if isinstance(one, _PLAIN) and isinstance(other, _PLAIN) and one != other:
        told.append(f'{name}: {other}, not {one}')
    return told


def _name(word: str) -> str:
  """What a binding of the command line binds."""
  return word.partition('=')[0].removeprefix('--gin.')


# Parameters that do not decide what a run is: where it reads and writes, how
# often it does, and on which devices.
_NO_MATTER = (
  *('model_dir', 'output_dir', 'overwrite', 'progress', 'partitioner'),
  *('log_period', 'checkpoint_period', 'keep_checkpoints'),
  # Where data lie; what they are, a run's digest of them says.
  *('local_data_dir', 'tfds_data_dir', 'cache_dirs'),
)
_PLAIN = (bool, int, float, str, list, dict, type(None))


def _matters(name: str) -> bool:
  target, _, parameter = name.rpartition('.')
  return parameter not in _NO_MATTER and not target.endswith('Partitioner')


def _values(bindings: Sequence[Binding]) -> dict[str, Any]:
  """Of parameters, without macros; tuples are lists, as in gin they may be."""
  macros = {str(b): b.value for b in bindings if not b.parameter}

  def value_of(value: Any) -> Any:
    if isinstance(value, gin_files.Reference):
      if value.startswith('%') and value[1:] in macros:
        return value_of(macros[value[1:]])
      return value.replace('prompt_tuning.', '')
    if isinstance(value, dict):
      return {key: value_of(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
      return [value_of(one) for one in value]
    return value

  return {str(b): value_of(b.value) for b in bindings if b.parameter}


def _default(name: str) -> Any:
  """Of a parameter; `inspect.Parameter.empty` where it has none."""
  target, _, parameter = name.rpartition('.')
  try:
    known = configuration.parameters_of(target.rpartition('/')[2])
    default = known[parameter].default
  except (ConfigurationError, KeyError):
    return inspect.Parameter.empty
  return _values([Binding('', 'a', 'b', default)])['a.b']
