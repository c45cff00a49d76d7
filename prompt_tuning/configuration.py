"""From gin files and --gin flags to one call of one plain function.

Nothing below the mains knows gin: the names a gin file may use stand in
`CONFIGURABLES`, and their modules are imported only when a file names them.
Files are read into a list of bindings first, checked as a whole (so that their
order cannot matter) and handed to gin in sorted order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import difflib
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
import tokenize
import types
import typing
from typing import Any

import gin
from gin import config_parser

from prompt_tuning import errors

# Gin name -> where it lives. `@optax.<name>` is looked up in optax itself.
CONFIGURABLES = {
  # What the mains call.
  'train': 'prompt_tuning.training.loop:train',
  'evaluate': 'prompt_tuning.training.inference:evaluate',
  'infer': 'prompt_tuning.training.inference:infer',
  'compile_steps': 'prompt_tuning.training.compilation:compile_steps',
  'export': 'prompt_tuning.interop.export:export',
  # The model and its prompt.
  'T5Config': 'prompt_tuning.models.network:T5Config',
  'EncoderDecoderModel': 'prompt_tuning.models.model:EncoderDecoderModel',
  'Prompt': 'prompt_tuning.models.prompt:Prompt',
  'uniform': 'prompt_tuning.models.prompt:uniform',
  'sampled_vocabulary': 'prompt_tuning.models.prompt:sampled_vocabulary',
  'class_labels': 'prompt_tuning.models.prompt:class_labels',
  'from_string': 'prompt_tuning.models.prompt:from_string',
  'from_file': 'prompt_tuning.interop.export:from_file',
  'temperature_sample': 'prompt_tuning.models.decoding:temperature_sample',
  'beam_search': 'prompt_tuning.models.decoding:beam_search',
  # Data and evaluation.
  'TaskData': 'prompt_tuning.data.task_data:TaskData',
  'classification_task': (
    'prompt_tuning.data.classification:classification_task'
  ),
  'TokenArrayData': 'prompt_tuning.data.token_arrays:TokenArrayData',
  'Evaluation': 'prompt_tuning.training.evaluator:Evaluation',
  # Devices.
  'Partitioner': 'prompt_tuning.training.sizing:Partitioner',
  # Optimisation.
  'adafactor': 'prompt_tuning.training.optimizers:adafactor',
  'create_learning_rate_scheduler': (
    'prompt_tuning.training.optimizers:create_learning_rate_scheduler'
  ),
  # Checkpoints and prompts on disk.
  'load_checkpoint': 'prompt_tuning.interop.base_checkpoints:load_checkpoint',
  'load_prompt': 'prompt_tuning.interop.prompts:load_prompt',
}

_GIN_MODULE = 'prompt_tuning'


class ConfigurationError(errors.UserError):
  """A fault of gin files or flags; the mains exit with code 2."""


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/name`, `@scope/name()` or `%MACRO` inside a value."""

  name: str
  scopes: tuple[str, ...] = ()
  kind: str = 'function'  # or 'call', 'macro'

  def __repr__(self) -> str:
    full_name = '/'.join((*self.scopes, self.name))
    if self.kind == 'macro':
      return f'%{full_name}'
    return f'@{full_name}' + ('()' if self.kind == 'call' else '')


@dataclasses.dataclass(frozen=True)
class Binding:
  """`scope/name.parameter = value`; a macro has no parameter.

  Attributes:
    scope: gin scopes joined by '/', or ''.
    name: the configurable as typed, or the macro.
    parameter: '' for a macro.
    value: literals and `Reference`s; its repr is gin again.
    where: 'file:line', or the flag.
  """

  scope: str
  name: str
  parameter: str
  value: Any
  where: str

  @property
  def key(self) -> tuple[str, str, str]:
    """What is bound; two spellings of one thing have one key."""
    return self.scope, _canonical(self.name), self.parameter

  def __str__(self) -> str:
    prefix = f'{self.scope}/' if self.scope else ''
    suffix = f'.{self.parameter}' if self.parameter else ''
    return f'{prefix}{self.name}{suffix}'


@dataclasses.dataclass(frozen=True)
class Flags:
  """What stood on the command line.

  Attributes:
    gin_files: in the order given, which does not matter.
    search_paths: folders to look for them, before the package's own configs.
    bindings: (name, value) of every --gin.NAME=value, values still text.
    job: of a process of several: arguments of `training.hosts.connect`.
  """

  gin_files: tuple[str, ...] = ()
  search_paths: tuple[str, ...] = ()
  bindings: tuple[tuple[str, str], ...] = ()
  job: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def configs_folder() -> pathlib.Path:
  """The gin files that come with the package: installed, or the clone's."""
  package = pathlib.Path(__file__).parent
  installed = package / 'configs'
  return installed if installed.is_dir() else package.parent / 'configs'


def parse_flags(arguments: Sequence[str]) -> Flags:
  """Reads --gin_file, --gin_search_paths, --gin.NAME=value and a job's flags.

  Raises:
    ConfigurationError: an unknown flag, or one that lacks its value.
  """
  files: list[str] = []
  paths: list[str] = []
  bindings: list[tuple[str, str]] = []
  job: dict[str, Any] = {}
  rest = list(arguments)
  while rest:
    flag, equals, value = rest.pop(0).partition('=')
    known = flag in ('--gin_file', '--gin_search_paths', *_JOB_FLAGS)
    if not (known or (flag.startswith('--gin.') and len(flag) > 6)):
      near = _nearest(
        flag, ['--gin_file', '--gin_search_paths', *_JOB_FLAGS, '--help']
      )
      raise ConfigurationError(
        f'{flag} is not a flag{near}; flags are --gin_file, '
        f'--gin_search_paths, --gin.NAME=value, {", ".join(_JOB_FLAGS)}, --help'
      )
    if not equals:
      if not rest or rest[0].startswith('--'):
        raise ConfigurationError(f'{flag} needs a value: {flag}=...')
      value = rest.pop(0)
    if flag == '--gin_file':
      files.append(value)
    elif flag == '--gin_search_paths':
      paths.extend(path for path in value.split(',') if path)
    elif flag == '--coordinator_address':
      job['coordinator_address'] = value
    elif flag in _JOB_FLAGS:
      if not value.isdigit():
        raise ConfigurationError(f'{flag} must be a whole number, got {value}')
      job[flag.removeprefix('--')] = int(value)
    else:
      bindings.append((flag.removeprefix('--gin.'), value))
  return Flags(tuple(files), tuple(paths), tuple(bindings), job)


_JOB_FLAGS = ('--coordinator_address', '--num_processes', '--process_id')


def find_file(name: str, search_paths: Sequence[str] = ()) -> pathlib.Path:
  """The gin file of that name: here, in the search paths, in the package.

  Raises:
    ConfigurationError: none has it; the message names the nearest one.
  """
  own = configs_folder()
  candidates = [pathlib.Path(name)]
  candidates += [pathlib.Path(path) / name for path in search_paths]
  candidates += [own / name, own / name.removeprefix('configs/')]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  shipped = [
    path.relative_to(own).as_posix() for path in sorted(own.rglob('*.gin'))
  ]
  near = _nearest(name.removeprefix('configs/'), shipped)
  searched = ', '.join(['.', *search_paths, "the package's configs"])
  raise ConfigurationError(
    f'--gin_file={name} is not found{near}; searched: {searched}'
  )


@dataclasses.dataclass(frozen=True)
class Bindings:
  """What files and flags say.

  Attributes:
    all: the bindings that hold, flags over files, sorted.
    of_files: those of the files alone, sorted.
    imports: gin's import statements.
  """

  all: list[Binding]
  of_files: list[Binding]
  imports: list[str]


def read_bindings(flags: Flags) -> Bindings:
  """Reads every file once, and the command line's bindings over them.

  Raises:
    ConfigurationError: a missing file, unreadable gin, two files that bind
      the same thing.
  """
  bindings: dict[tuple[str, str, str], Binding] = {}
  imports: list[str] = []
  seen: set[pathlib.Path] = set()
  found: list[Binding] = []
  waiting = [(name, '') for name in flags.gin_files]
  while waiting:
    name, included_from = waiting.pop(0)
    try:
      path = find_file(name, flags.search_paths)
    except ConfigurationError as error:
      raise ConfigurationError(f'{included_from}{error}') from None
    if path.resolve() in seen:
      continue
    seen.add(path.resolve())
    try:
      text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigurationError(f'{name} cannot be read: {error}') from None
    for statement in _statements(text, name):
      location = f'{name}:{statement.location.line_num}'
      if isinstance(statement, config_parser.IncludeStatement):
        waiting.append((statement.filename, f'{location}: '))
      elif isinstance(statement, config_parser.ImportStatement):
        _import_for_gin(statement, location)
        imports.append(statement.format())
      elif isinstance(statement, config_parser.BindingStatement):
        found.append(_binding(statement, location))
  # Only now: an import of the last file may register a name of the first.
  for binding in found:
    other = bindings.setdefault(binding.key, binding)
    if other is not binding:
      first, second = sorted([other.where, binding.where])
      raise ConfigurationError(
        f'{binding} is bound twice, by {first} and by {second}: keep one, or '
        f'override both with --gin.{binding}=...'
      )
  of_files = [bindings[key] for key in sorted(bindings)]
  for name, text in flags.bindings:
    binding = _command_line_binding(name, text)
    bindings[binding.key] = binding
  holding = [bindings[key] for key in sorted(bindings)]
  return Bindings(holding, of_files, sorted(set(imports)))


def configure(function: str, flags: Flags) -> Callable[..., Any]:
  """Checks everything that is bound and hands it to gin.

  Args:
    function: the configurable that the main is going to call.
    flags: of the command line.

  Returns:
    The function with its bindings: call it without further arguments.

  Raises:
    ConfigurationError: names that do not exist, parameters without a value,
      values of a wrong type, bindings that nothing uses.
  """
  gin.clear_config()
  bindings = read_bindings(flags)
  for binding in bindings.all:
    _check_names(binding)
  # A flag may cut off what a file binds: --gin.train.evaluation=None leaves
  # the run file's Evaluation without a user, which is no fault of the file.
  without_flags = _Usage(function, bindings.of_files)
  without_flags.walk()
  usage = _Usage(function, bindings.all)
  used = usage.check(excused=without_flags.used)
  lines = bindings.imports + [f'{_gin_key(b)} = {b.value!r}' for b in used]
  gin.parse_config('\n'.join(lines))
  gin.finalize()
  return _registered(function)


def resolved_config() -> str:
  """The whole configuration as gin, defaults of what has been called included.

  A run writes this to MODEL_DIR/config.gin; the file given back as --gin_file
  is the same run.
  """
  called = gin.operative_config_str()
  known = {binding.key for binding in _bindings_in(called)}
  later = [
    f'{binding} = {binding.value!r}'
    for binding in _bindings_in(gin.config_str())
    if binding.key not in known
  ]
  if later:
    called += '\n'.join(['\n# Bound, not called so far:', *later, ''])
  return called


def bound_value(name: str, parameter: str) -> Any:
  """What gin gives a parameter of a configurable; references are called."""
  bound = gin.get_bindings(_canonical(name), resolve_references=False)
  return copy.deepcopy(bound[parameter])


def run_main(
  function: str,
  arguments: Sequence[str] | None,
  description: str | None,
  finish: Callable[[Any], Any] | None = None,
) -> int:
  """The whole of a main: flags, one call, its result as JSON, an exit code.

  Args:
    function: the configurable to call. If it takes `resolved_config`, it gets
      the function of that name and decides when the text is complete.
    arguments: without the program's name; None takes the process's own.
    description: what --help says, the main's docstring.
    finish: what is left to do with the result; returns what is printed.

  Returns:
    0; 1 for a fault of data, paths or shapes; 2 for one of usage or gin; 75
    where the same command goes on: the run was asked to stop, or another
    process of its job was lost.
  """
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  if not arguments or {'--help', '-h'} & set(arguments):
    print(inspect.cleandoc(description or '') + '\n\n' + _FLAGS_HELP)
    return 0 if arguments else 2
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  if function not in _OVER_PROCESSES:
    return _run(function, arguments, finish)
  from prompt_tuning.training import hosts

  with hosts.leaving_at_once():
    code = _run(function, arguments, finish)
    if code:
      hosts.leave(code)
    return code


def _run(
  function: str,
  arguments: Sequence[str],
  finish: Callable[[Any], Any] | None,
) -> int:
  """What `run_main` does once it is clear that it should."""
  try:
    flags = parse_flags(arguments)
    if function in _OVER_PROCESSES:
      # Before anything may ask JAX for its devices.
      from prompt_tuning.training import hosts

      hosts.connect(**flags.job)
    elif flags.job:
      raise ConfigurationError(
        f'--{next(iter(flags.job))} is for jobs of train, eval and infer'
      )
    call = configure(function, flags)
    settings = {}
    if 'resolved_config' in _signature(_resolve(function)).parameters:
      settings['resolved_config'] = resolved_config
    with _naming_lost_processes(function):
      result = call(**settings)
      if finish is not None:
        result = finish(result)
  except errors.UserError as error:
    # gin appends lines that name the configurable; ours is the first.
    print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
    if isinstance(error, errors.RestartError):
      return error.EXIT_CODE
    return 2 if isinstance(error, ConfigurationError) else 1
  except OSError as error:
    print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('error: interrupted', file=sys.stderr)
    return 130
  if isinstance(result, dict) and _prints(function):
    print(json.dumps(result, default=float))
  return 0


# What can run as several processes, each with its devices.
_OVER_PROCESSES = ('train', 'evaluate', 'infer')


def _naming_lost_processes(function: str) -> contextlib.AbstractContextManager:
  if function not in _OVER_PROCESSES:
    return contextlib.nullcontext()
  from prompt_tuning.training import hosts

  return hosts.naming_lost_processes()


def _prints(function: str) -> bool:
  """Of a job, one process prints its result."""
  if function not in _OVER_PROCESSES:
    return True
  from prompt_tuning.training import hosts

  return hosts.is_primary()


_FLAGS_HELP = """\
Flags:
  --gin_file=FILE          a gin file, from here, the search paths or the
                           package's configs; repeat it, in any order
  --gin_search_paths=A,B   folders to look for gin files
  --gin.NAME=VALUE         binds a macro or a parameter, over the files; a
                           string keeps its quotes: --gin.MODEL_DIR="'/tmp/a'"
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I
                           of a train, eval or infer over several processes;
                           TPU pods, Slurm and MPI need none of them
  --help                   this text"""


class _Usage:
  """Walks from the function that is called along @references and %macros."""

  def __init__(self, function: str, bindings: Sequence[Binding]):
    self.function = function
    self.bindings = bindings
    self.macros = {
      str(binding): binding for binding in bindings if not binding.parameter
    }
    self.used: set[tuple[str, str, str]] = set()
    self.visited: set[tuple] = set()
    self.wanted: dict[str, str] = {}
    self.faults: list[ConfigurationError] = []

  def walk(self) -> None:
    """Finds what is used, and what is wanted and not bound."""
    self._visit(self.function, (), called=True, by='')

  def check(self, excused: set[tuple[str, str, str]]) -> list[Binding]:
    """Raises ConfigurationError for what is missing, then for what is unused.

    A misspelt macro is both, and gets one message that says so.

    Args:
      excused: keys that need not be used, unless a flag binds them.

    Returns:
      The bindings that are used.
    """
    self.walk()
    unused = [
      b
      for b in self.bindings
      if b.key not in self.used
      and (b.key not in excused or b.where.startswith('--'))
    ]
    spare = {str(b): b.where for b in unused if not b.parameter}
    for macro, by in sorted(self.wanted.items()):
      close = difflib.get_close_matches(macro, spare, n=1, cutoff=0.7)
      if close:
        raise ConfigurationError(
          f'{close[0]} is bound by {spare[close[0]]} but nothing uses it, and '
          f'%{macro}, needed by {by}, is not bound: did you mean {macro}?'
        )
    if self.wanted:
      macro, by = min(self.wanted.items())
      raise ConfigurationError(
        f'%{macro} is not bound, needed by {by}: give --gin.{macro}=...'
        + _shipped_with(('', macro, ''))
      )
    if self.faults:
      raise self.faults[0]
    for binding in unused:
      near = ''
      if not binding.parameter:
        used = [str(b) for b in self.bindings if b.key in self.used]
        near = _nearest(str(binding), [u for u in used if '.' not in u])
      raise ConfigurationError(
        f'{binding} is bound by {binding.where} but nothing that '
        f'{self.function} calls uses it{near}: remove it'
      )
    return [b for b in self.bindings if b.key in self.used]

  def _visit(
    self, name: str, scopes: tuple[str, ...], called: bool, by: str
  ) -> None:
    canonical = _canonical(name)
    if (canonical, scopes, called) in self.visited:
      return
    self.visited.add((canonical, scopes, called))
    prefixes = ['/'.join(scopes[:n]) for n in range(len(scopes) + 1)]
    bound: dict[str, Binding] = {}
    for prefix in prefixes:
      for binding in self.bindings:
        scope, owner, parameter = binding.key
        if parameter and owner == canonical and scope == prefix:
          self.used.add(binding.key)
          bound[parameter] = binding
    for parameter, binding in bound.items():
      self._check_type(name, parameter, binding)
      self._follow(binding.value, scopes, binding)
    if called:
      self._check_required(name, set(bound), by)

  def _follow(
    self, value: Any, scopes: tuple[str, ...], binding: Binding
  ) -> None:
    for reference in _references(value):
      if reference.kind != 'macro':
        self._visit(
          reference.name,
          reference.scopes or scopes,
          called=reference.kind == 'call',
          by=f'{binding.where}: ',
        )
        continue
      macro = '/'.join((*reference.scopes, reference.name))
      if macro not in self.macros:
        self.wanted.setdefault(macro, f'{binding} ({binding.where})')
        continue
      target = self.macros[macro]
      if (macro, '%') not in self.visited:
        self.visited.add((macro, '%'))
        self.used.add(target.key)
        # gin evaluates a macro's value in the scope of the macro's name.
        self._follow(target.value, (*reference.scopes, reference.name), target)

  def _literal(self, value: Any, depth: int = 0) -> Any:
    """The value with a macro at its top replaced; macros may chain."""
    if isinstance(value, Reference) and value.kind == 'macro' and depth < 10:
      target = self.macros.get('/'.join((*value.scopes, value.name)))
      return self._literal(target.value, depth + 1) if target else value
    return value

  def _check_type(self, name: str, parameter: str, binding: Binding) -> None:
    value = self._literal(binding.value)
    hint = _type_hints(_resolve(name)).get(parameter)
    if hint is None or _fits(value, hint):
      return
    origin = binding
    if isinstance(binding.value, Reference):
      origin = self.macros.get(binding.value.name, binding)
    self.faults.append(
      ConfigurationError(
        f'{name}.{parameter} must be {_describe(hint)}, got {value!r} '
        f'({origin.where})'
      )
    )

  def _check_required(self, name: str, bound: set[str], by: str) -> None:
    for parameter in _signature(_resolve(name)).parameters.values():
      if (
        parameter.default is not inspect.Parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        or parameter.name in bound
      ):
        continue
      key = ('', _canonical(name), parameter.name)
      self.faults.append(
        ConfigurationError(
          f'{by}{name}.{parameter.name} is not bound: give '
          f'--gin.{name}.{parameter.name}=...' + _shipped_with(key)
        )
      )


class _Delegate(config_parser.ParserDelegate):
  """Makes `Reference`s, where gin's own would look names up at once."""

  def configurable_reference(self, name: str, evaluate: bool) -> Reference:
    *scopes, name = name.split('/')
    return Reference(name, tuple(scopes), 'call' if evaluate else 'function')

  def macro(self, name: str) -> Reference:
    *scopes, name = name.split('/')
    return Reference(name, tuple(scopes), 'macro')


def _statements(text: str, file: str) -> Iterator[Any]:
  """gin's statements; a fault of syntax becomes one line."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    raise ConfigurationError(_syntax_fault(error, text, file)) from None


def _syntax_fault(error: Exception, text: str, file: str) -> str:
  lines = text.splitlines() or ['']
  number = None
  if isinstance(error, SyntaxError):
    number = error.lineno
  elif isinstance(error, tokenize.TokenError):
    number = error.args[1][0]
  number = min(number or len(lines), len(lines))
  line = lines[number - 1].strip()
  name, equals, value = line.partition('=')
  name, value = name.strip(), value.split('#')[0].strip()
  where = f'{file}:{number}: ' if file else ''
  if equals and re.match(r'^[A-Za-z./~:]', value) and '(' not in value:
    if not file:
      fixed = f'''--gin.{name}="'{value}'"'''
      return f'--gin.{line} has no quotes around its string: {fixed}'
    return f"{where}no quotes around a string: {name} = '{value}'"
  reason = str(error.args[0] if error.args else error).splitlines()[0]
  flag = '' if file else '--gin.'
  return f'{where}{flag}{line} is not valid gin ({reason.rstrip(".")})'


def _bindings_in(text: str, name: str = '') -> Iterator[Binding]:
  for statement in _statements(text, name):
    if isinstance(statement, config_parser.BindingStatement):
      yield _binding(statement, name)


def _binding(statement: Any, where: str) -> Binding:
  return Binding(
    statement.scope,
    statement.selector,
    statement.arg_name,
    statement.value,
    where,
  )


def _command_line_binding(name: str, text: str) -> Binding:
  statements = list(_statements(f'{name}={text}', ''))
  if len(statements) != 1 or not isinstance(
    statements[0], config_parser.BindingStatement
  ):
    raise ConfigurationError(f'--gin.{name}={text} is not one binding')
  return _binding(statements[0], f'--gin.{name}')


def _import_for_gin(
  statement: config_parser.ImportStatement, location: str
) -> None:
  if statement.module.startswith('__gin__'):
    raise ConfigurationError(
      f'{location}: dynamic registration is not supported; remove the line '
      'and use plain names such as @T5Config()'
    )
  # As `python -m` does: a module of the user's working folder is found.
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.append(os.getcwd())
  try:
    importlib.import_module(statement.module)
  except ImportError as error:
    raise ConfigurationError(
      f'{location}: import {statement.module} failed: {error}'
    ) from None


def _references(value: Any) -> Iterator[Reference]:
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, dict):
    for key, entry in value.items():
      yield from _references(key)
      yield from _references(entry)
  elif isinstance(value, list | tuple):
    for entry in value:
      yield from _references(entry)


def _canonical(name: str) -> str:
  """One spelling for a configurable; other names as they are."""
  short = name.removeprefix(f'{_GIN_MODULE}.')
  return short if short in CONFIGURABLES else name


def _gin_key(binding: Binding) -> str:
  """The binding's left side, registering what it names."""
  if binding.parameter:
    _registered(binding.name)
  for reference in _references(binding.value):
    if reference.kind != 'macro':
      _registered(reference.name)
  return str(binding)


def _resolve(name: str) -> Any:
  """The plain Python object behind a configurable's name.

  Raises:
    ConfigurationError: no such name.
  """
  name = _canonical(name)
  if name in CONFIGURABLES:
    module, attribute = CONFIGURABLES[name].split(':')
    return getattr(importlib.import_module(module), attribute)
  if name.startswith('optax.'):
    import optax

    target: Any = optax
    for part in name.split('.')[1:]:
      choices = [entry for entry in dir(target) if not entry.startswith('_')]
      if not hasattr(target, part):
        near = _nearest(part, choices)
        raise ConfigurationError(f'@{name} is not in optax{near}')
      target = getattr(target, part)
    return target
  try:
    # Registered by a module that a gin file imports.
    return inspect.unwrap(gin.get_configurable(name))
  except ValueError:
    known = [*CONFIGURABLES, 'optax.adamw']
    raise ConfigurationError(
      f'{name} is not a configurable{_nearest(name, known)}'
    ) from None


_REGISTERED: dict[str, Callable[..., Any]] = {}


def _registered(name: str) -> Callable[..., Any]:
  """The configurable, made known to gin under its name."""
  name = _canonical(name)
  if name not in _REGISTERED:
    if name in CONFIGURABLES:
      _REGISTERED[name] = gin.external_configurable(
        _resolve(name), name=name, module=_GIN_MODULE
      )
    elif name.startswith('optax.'):
      module, _, short = name.rpartition('.')
      _REGISTERED[name] = gin.external_configurable(
        _resolve(name), name=short, module=module
      )
    else:
      return gin.get_configurable(name)
  return _REGISTERED[name]


def _check_names(binding: Binding) -> None:
  """Every name in the binding exists.

  Raises:
    ConfigurationError: with the place and the nearest name.
  """
  try:
    for reference in _references(binding.value):
      if reference.kind != 'macro':
        _resolve(reference.name)
    if not binding.parameter:
      return
    signature = _signature(_resolve(binding.name))
  except ConfigurationError as error:
    raise ConfigurationError(f'{binding.where}: {error}') from None
  parameters = signature.parameters.values()
  names = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
  if len(names) == len(parameters) and binding.parameter not in names:
    near = _nearest(binding.parameter, names)
    raise ConfigurationError(
      f'{binding.where}: {binding.name} has no parameter '
      f'{binding.parameter}{near}; it has {", ".join(names)}'
    )


def _signature(target: Any) -> inspect.Signature:
  return inspect.signature(target)


def _type_hints(target: Any) -> dict[str, Any]:
  function = target
  if inspect.isclass(target) and not dataclasses.is_dataclass(target):
    function = target.__init__
  try:
    return typing.get_type_hints(function)
  except (NameError, TypeError, AttributeError):
    return {}


def _fits(value: Any, hint: Any) -> bool:
  """False only where a literal surely has the wrong type."""
  if any(True for _ in _references(value)):
    return True
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, choice) for choice in typing.get_args(hint))
  if origin is typing.Literal:
    return value in typing.get_args(hint)
  if hint is bool or hint is str or hint is type(None):
    return isinstance(value, hint)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if hint is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if hint is Callable or origin is Callable:
    return False
  kind = origin or hint
  if not inspect.isclass(kind):
    return True
  if issubclass(kind, Mapping):
    return isinstance(value, dict)
  if issubclass(kind, Sequence):
    return isinstance(value, list | tuple)
  # A class of ours is given by @reference, never by a literal.
  return not kind.__module__.startswith('prompt_tuning.')


def _describe(hint: Any) -> str:
  """A type as a person would say it."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(_describe(choice) for choice in typing.get_args(hint))
  if origin is typing.Literal:
    return ' or '.join(repr(choice) for choice in typing.get_args(hint))
  if hint is Callable or origin is Callable:
    return 'a function (@name)'
  if hint in _WORDS:
    return _WORDS[hint]
  kind = origin or hint
  if inspect.isclass(kind) and issubclass(kind, Mapping):
    return 'a dictionary'
  if inspect.isclass(kind) and issubclass(kind, Sequence):
    return 'a list'
  return f'@{hint.__name__}()' if inspect.isclass(hint) else str(hint)


_WORDS = {
  type(None): 'None',
  bool: 'True or False',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  os.PathLike: 'a path',
}


def _nearest(name: str, choices: Sequence[str]) -> str:
  """', did you mean X?' without the question mark, or ''."""
  close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
  return f' (did you mean {close[0]}?)' if close else ''


def _shipped_with(key: tuple[str, str, str]) -> str:
  """Names the package's gin files that bind the key, if any."""
  own = configs_folder()
  files = []
  for path in sorted(own.rglob('*.gin')):
    name = path.relative_to(own).as_posix()
    if any(b.key == key for b in _bindings_in(path.read_text(), name)):
      files.append(name)
  if not files:
    return ''
  others = f' (or {", ".join(files[1:4])})' if files[1:] else ''
  return f' or --gin_file={files[0]}{others}'
