"""The console command: `prompt-tuning train | eval | infer | export | ...`.

`python -m prompt_tuning` is the same.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import textwrap
import threading
import traceback
from typing import Any

import prompt_tuning
from prompt_tuning import compilation_cache
from prompt_tuning import configuration
from prompt_tuning import errors
from prompt_tuning import exit_codes
from prompt_tuning import file_commands
from prompt_tuning import gin_files
from prompt_tuning import studies
from prompt_tuning.gin_files import ConfigurationError

COMMANDS = {
  'train': 'train a prompt on a frozen T5, another method, or the T5 itself',
  'eval': "score a run, a prompt or a plain T5 on a task's metrics",
  'infer': 'predict for the texts of a file',
  'export': 'write what a run trained, as files',
  'compile': 'say what a run needs of devices that need not be there',
  'study': 'run a grid of trainings, and write tables and figures of them',
  'convert': 'write a model or a prompt in another format',
  'inspect': 'say what is in models and prompts',
  'diff': 'say how two models or prompts differ',
  'show': 'show what a task feeds to the model, and how long its texts are',
  'completion': 'print what makes bash complete these words',
}


@dataclasses.dataclass(frozen=True)
class Configured:
  """A command that gin configures.

  Attributes:
    function: what it calls, by its name in gin.
    own_file: the gin file whose head is the help.
    takes_run: whether a run's folder is enough; the own file adds the rest.
    over_processes: whether it can run as several, each with its devices.
    keeps_programs: whether it takes compiled programs of earlier commands.
    finish: what is left to do with the result; returns what is printed.
  """

  function: str
  own_file: str
  takes_run: bool = True
  over_processes: bool = True
  keeps_programs: bool = True
  finish: Callable[[Any], Any] = lambda result: result


def _trained(result: Any) -> dict[str, Any]:
  if result.interrupted:
    raise errors.RestartError(
      f'asked to stop at step {result.step}, which is saved; the same command'
      ' continues'
    )
  steps = {'step': result.step, 'best_step': result.best_step}
  return steps | {'files': result.files} | result.metrics


def _inferred(result: dict[str, Any]) -> None:
  """The summary to stderr: stdout may be the output file."""
  print(json.dumps(result), file=sys.stderr)


def _studied(result: dict[str, Any]) -> dict[str, Any] | None:
  if 'commands' not in result:
    return result
  print(*result['commands'], sep='\n')
  return None


CONFIGURED = {
  'train': Configured('train', 'runs/prompt_tune.gin', False, finish=_trained),
  'eval': Configured('evaluate', 'runs/eval.gin'),
  'infer': Configured('infer', 'runs/infer.gin', finish=_inferred),
  'export': Configured('export', 'runs/export.gin', over_processes=False),
  'compile': Configured(
    'compile_steps',
    'runs/compile.gin',
    takes_run=False,
    over_processes=False,
    keeps_programs=False,  # it says how long compiling takes
  ),
  'study': Configured(
    'study',
    'studies/demo.gin',
    takes_run=False,
    over_processes=False,
    # Its cells see to that, each as its own command does.
    keeps_programs=False,
    finish=_studied,
  ),
}

_HELP = """\
prompt-tuning {}: soft prompts on a frozen T5

Usage: prompt-tuning COMMAND FILE ... NAME=VALUE ...
       prompt-tuning convert | inspect | diff PATH ...

{}

prompt-tuning COMMAND --help shows an example. FILEs there are:
{}"""
# sysexits.h: an internal fault of the program.
_BUG = 70
_JOB_FLAGS = (
  *('--coordinator_address', '--num_processes', '--process_id'),
  '--initialization_timeout',
)
_IS_JOB = '--multiprocess_gpu'  # alone, or =true and =false
_FLAGS = (
  *('--gin_file', '--gin_bindings', '--gin_search_paths', '--allow_import'),
  *(*gin_files.OF_TASK, *_JOB_FLAGS, _IS_JOB),
)
# What T5X calls them.
_ALSO = {
  '--process_count': '--num_processes',
  '--process_index': '--process_id',
}
_FLAGS_HELP = """\
Words and flags:
  FILE              a gin file, with or without .gin: from here, the search
                    paths or the package's configs; in any order
  NAME=VALUE        binds a macro or a parameter, over all files; what is no
                    number, list and so on is a text; @ and % are gin's
  RUN               for eval, infer, export: the folder of a run (MODEL_DIR)
  --gin_file=FILE --gin.NAME=VALUE --gin_search_paths=A,B
                    as in T5X: the value is gin, a text keeps its quotes
  --allow_import=MODULE
                    a module that gin files, a run's too, may import
  --tfds_data_dir=FOLDER
                    of TFDS's data sets, in place of TFDS_DATA_DIR
  --seqio_additional_cache_dirs=A,B
                    where cached tasks are, for USE_CACHED_TASKS=True
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I
                    of a train, eval or infer over several processes (also
                    --process_count, --process_index, --multiprocess_gpu); TPU
                    pods, Slurm and MPI need none of them
  --initialization_timeout=SECONDS
                    how long its processes wait for each other: 300
  --help            this text"""


def parse(
  arguments: Sequence[str], own_file: str = ''
) -> tuple[gin_files.Request, dict[str, Any]]:
  """What is asked for, and who is who in a job (`training.hosts.connect`).

  Args:
    arguments: words and flags.
    own_file: of a command that takes a run's folder.

  Raises:
    ConfigurationError: an unknown flag, one that lacks its value, a folder
      that is no run's.
  """
  given: dict[str, list[str]] = {flag: [] for flag in _FLAGS}
  words: list[str] = []
  bindings: list[str] = []
  rest = list(arguments)
  while rest:
    word = rest.pop(0)
    flag, equals, value = word.partition('=')
    if not word.startswith('--'):
      (bindings if equals else words).append(word)
      continue
    flag = _ALSO.get(flag, flag)
    is_binding = flag.startswith('--gin.') and len(flag) > len('--gin.')
    if not is_binding and flag not in _FLAGS:
      near = gin_files.nearest(flag, [*_FLAGS, '--help'])
      raise ConfigurationError(
        f'{flag} is not a flag{near}; flags are {", ".join(_FLAGS)}, '
        '--gin.NAME=VALUE, --help, and NAME=VALUE needs none'
      )
    if flag == _IS_JOB and not equals:
      value = 'true'
    elif not equals:
      if not rest or rest[0].startswith('--'):
        raise ConfigurationError(f'{flag} needs a value: {flag}=...')
      value = rest.pop(0)
    if is_binding:
      bindings.append(f'{flag}={value}')
    elif flag == '--gin_bindings':
      bindings.append(f'--gin.{value}')
    else:
      given[flag].append(value)
  paths = _listed(given['--gin_search_paths'])
  for flag, name in gin_files.OF_TASK.items():
    if values := given[flag]:
      value = _listed(values) if name.endswith('dirs') else values[-1]
      bindings.append(f'--gin.{name}={value!r}')
  runs = [word for word in words if _is_run(word, own_file, paths)]
  if len(runs) > 1:
    raise ConfigurationError(f'one run at a time, got {", ".join(runs)}')
  job: dict[str, Any] = {}
  for flag in (flag for flag in _JOB_FLAGS if given[flag]):
    job[flag[2:]] = value = given[flag][-1]
    if flag != '--coordinator_address':
      if not value.isdigit():
        raise ConfigurationError(f'{flag} must be a whole number, got {value}')
      job[flag[2:]] = int(value)
  if given[_IS_JOB]:
    value = given[_IS_JOB][-1].lower()
    if value not in ('true', 'false'):
      raise ConfigurationError(f'{_IS_JOB} is true or false, got {value}')
    job |= {'multiprocess_gpu': True} if value == 'true' else {}
  request = gin_files.Request(
    files=(*given['--gin_file'], *(word for word in words if word not in runs)),
    bindings=tuple(bindings),
    search_paths=paths,
    run=runs[0].rstrip('/') if runs else '',
    own_file=own_file,
    allowed_imports=tuple(given['--allow_import']),
  )
  return request, job


def _listed(given: Sequence[str]) -> tuple[str, ...]:
  return tuple(filter(None, ','.join(given).split(',')))


def _is_run(word: str, own_file: str, paths: Sequence[str]) -> bool:
  """Whether a word is a run's folder; else it is a gin file."""
  from etils import epath  # a run may be in a bucket

  config = epath.Path(word) / 'config.gin'
  if own_file and config.exists():
    return True
  try:
    gin_files.find_file(word, paths)
    return False
  except ConfigurationError as error:
    fault = f'{error}'
    if config.exists():
      fault = f'{word} is a run, {config} is its gin file'
    elif own_file and config.parent.is_dir():
      fault = f'{word} has no config.gin: it is no folder of a run (MODEL_DIR)'
      own, held = (
        own_file.removesuffix('.gin'),
        config.parent.glob('*.safetensors'),
      )
      if not all(file.name.startswith('model') for file in held):
        fault += f'; of what it holds: {own} models/... PROMPT_FILE={word}'
    elif own_file:
      fault += "; nor is it a run's folder"
    raise ConfigurationError(fault) from None


def call(name: str, arguments: Sequence[str]) -> Any:
  """Does what a configured command does; returns what is to be printed.

  Raises:
    UserError: the arguments, or what they name, are at fault.
  """
  command = CONFIGURED[name]
  known = {}
  if name == 'study':
    arguments = studies.own_words(arguments)
    own_files = {
      name: (one.function, one.own_file * one.takes_run)
      for name, one in CONFIGURED.items()
    }
    known['commands'] = studies.Commands(parse, own_files)
  request, job = parse(arguments, command.own_file * command.takes_run)
  lost = contextlib.nullcontext()
  keeps_programs = command.keeps_programs
  if command.over_processes:
    from prompt_tuning.training import hosts

    # Before anything may ask JAX for its devices.
    hosts.connect(**job)
    lost = hosts.naming_lost_processes()
    # Processes of a job may tune a program together: all must find it, or none.
    keeps_programs &= not hosts.in_job()
  elif job:
    raise ConfigurationError(
      f'--{next(iter(job))} is for jobs of train, eval and infer'
    )
  if keeps_programs:
    compilation_cache.use()
  with _saying(f'prompt-tuning {name}: loading libraries'):
    function = configuration.configure(command.function, request)
  with lost:
    result = command.finish(function(**known))
  # Of a job, one process prints.
  return result if not command.over_processes or hosts.is_primary() else None


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
  """Says on stderr what goes on, if it takes a while."""
  said = threading.Timer(
    0.7, functools.partial(print, what, file=sys.stderr, flush=True)
  )
  said.daemon = True
  said.start()
  try:
    yield
  finally:
    said.cancel()


def _run(name: str, arguments: Sequence[str]) -> int:
  """The exit code of a command that gin configures, its result printed."""

  def work() -> int:
    result = call(name, arguments)
    if isinstance(result, dict):
      print(json.dumps(result, default=float))
    return 0

  return exit_codes.guarded(work)


def _configured(name: str, arguments: Sequence[str]) -> int:
  if not arguments or {'--help', '-h'} & set(arguments):
    file = gin_files.find_file(CONFIGURED[name].own_file)
    head = file.read_text().split('\n\n')[0]
    print(head.replace('\n#', '\n').replace('\n ', '\n')[2:] + '\n')
    print(studies.FLAGS_HELP if name == 'study' else _FLAGS_HELP)
    return 0 if arguments else 2
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  if not CONFIGURED[name].over_processes:
    return _run(name, arguments)
  from prompt_tuning.training import hosts

  with hosts.leaving_at_once():
    code = _run(name, arguments)
    if code:
      hosts.leave(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command named first with the arguments after it.

  Args:
    arguments: None takes the shell's; then a bug of ours is a line too, and
      its traceback in a file, and the process ends (`exit_codes.leave`).

  Returns:
    The exit code: 0; 1 for a fault of data, paths or shapes; 2 for one of
    usage or gin; 70 for a bug; 75 where the same command goes on: the run was
    asked to stop, or another process of its job was lost; 130 where it was
    interrupted.
  """
  if arguments is not None:
    return _main(arguments)
  try:
    return exit_codes.leave(_main(sys.argv[1:]))
  except Exception as error:
    said = (str(error).splitlines() or [''])[0][:200]
    with tempfile.NamedTemporaryFile(
      'w', prefix='prompt_tuning_', suffix='.txt', delete=False
    ) as file:
      traceback.print_exc(file=file)
    print(
      f'error: {type(error).__name__}: {said} (a fault of prompt_tuning'
      f' {prompt_tuning.__version__}; {file.name} says where)',
      file=sys.stderr,
    )
    return _BUG


def _gin_files() -> Iterator[str]:
  """Lines on the package's gin files, a folder each."""
  folders: dict[str, list[str]] = {}
  for name in gin_files.shipped():
    folder, _, file = name.partition('/')
    if folder != 'wiring':  # files include these
      folders.setdefault(folder, []).append(file)
  for folder, names in folders.items():
    yield from textwrap.wrap(
      ' '.join(names),
      78,
      initial_indent=f'  {folder}/ ',
      subsequent_indent='    ',
    )


_COMPLETION = """\
# prompt-tuning completion has bash complete its words, here or in ~/.bashrc:
# source <(prompt-tuning completion)
complete -o default -W '{}' prompt-tuning"""


def _main(arguments: Sequence[str]) -> int:
  command, *rest = arguments or ['']
  if command in ('', '--help', '-h', 'help'):
    commands = [f'  {name:12}{text}' for name, text in COMMANDS.items()]
    print(
      _HELP.format(
        prompt_tuning.__version__, '\n'.join(commands), '\n'.join(_gin_files())
      )
    )
    return 0 if command else 2
  if command == '--version':
    print(prompt_tuning.__version__)
    return 0
  if command in CONFIGURED:
    return _configured(command, rest)
  if command in file_commands.COMMANDS:
    return file_commands.run(command, rest)
  if command == 'show':
    from prompt_tuning.data import show

    return exit_codes.guarded(lambda: show.main(rest))
  if command == 'completion':
    print(_COMPLETION.format(' '.join([*COMMANDS, *gin_files.shipped()])))
    return 0
  near = gin_files.nearest(command, COMMANDS)
  commands = f'commands are {", ".join(COMMANDS)}'
  print(f'error: {command} is not a command{near}; {commands}', file=sys.stderr)
  return 2
