"""The words of `prompt-tuning study`, and what other commands come to."""

from collections.abc import Callable, Mapping, Sequence
import shlex
from typing import Any

from prompt_tuning import configuration
from prompt_tuning import gin_files
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
    elif flag.startswith('--') and flag not in (
      '--gin_file',
      '--gin_search_paths',
      '--allow_import',
    ):
      near = gin_files.nearest(flag, [*_ACTIONS, *_VALUES, _ONLY, '--help'])
      raise ConfigurationError(f'{flag} is not a flag of study{near}')
    elif not equals or flag.startswith('--') or _is_own(flag):
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
    """See `configuration.settings`; the line of a fault names the command."""
    command, *words = arguments
    function, own_file = self._functions[command]
    # A run that will be there when its turn comes is read by then.
    try:
      request, _ = self._parse(words, own_file)
      return configuration.settings(function, request)
    except ConfigurationError as error:
      line = str(error).splitlines()[0]
      raise ConfigurationError(
        f'{line} (in prompt-tuning {shlex.join(arguments)})'
      ) from None

  def using(self, arguments: Sequence[str], words: Sequence[str]) -> list[str]:
    command, *rest = arguments
    function, own_file = self._functions[command]
    request, _ = self._parse([*rest, *words], own_file)
    spare = configuration.unused(function, request)
    return [word for word in words if word.partition('=')[0] not in spare]

  def of_config(self, text: str) -> dict[str, Any]:
    return configuration.settings_of_run(text)

  def differences(
    self, wanted: Mapping[str, Any], found: Mapping[str, Any]
  ) -> list[str]:
    return configuration.differences(wanted, found)
