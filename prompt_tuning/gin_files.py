"""Gin's text as bindings: files, a run's config.gin, and what is typed.

Everything is read first. Which of several bindings of one thing holds is a
matter of their level, never of the order of files.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import difflib
import importlib
import math
import os
import pathlib
import re
import sys
import tokenize
from typing import Any

from gin import config_parser

from prompt_tuning import errors

# Flags of T5X that are settings of a task here.
OF_TASK = {
  '--tfds_data_dir': 'Task.tfds_data_dir',
  '--seqio_additional_cache_dirs': 'Task.cache_dirs',
}

# Who wins where several bind one thing: the first of these, and of two files
# of one kind the one that is included less deeply.
TYPED, FILE, RUN_FOLDER, RUN_CONFIG, OWN_FILE = range(5)
Level = tuple[int, int]


class ConfigurationError(errors.UserError):
  """A fault of gin files or bindings; the commands exit with code 2."""


class Reference(str):
  """`@scope/name`, `@scope/name()` or `%MACRO` inside a value."""

  __repr__ = str.__str__  # gin again, as the repr of every other value is

  @property
  def path(self) -> list[str]:
    """Scopes and, last, the name."""
    return self.strip('@%()').removeprefix('prompt_tuning.').split('/')


class _Delegate(config_parser.ParserDelegate):
  """Makes `Reference`s, where gin's own would look names up at once."""

  def configurable_reference(self, name: str, evaluate: bool) -> Reference:
    return Reference(f'@{name}' + '()' * evaluate)

  def macro(self, name: str) -> Reference:
    return Reference(f'%{name}')


@dataclasses.dataclass(frozen=True)
class Binding:
  """`scope/name.parameter = value`; a macro has no parameter.

  Attributes:
    where: 'file:line', or what was typed.
    level: of two bindings of one thing the smaller level holds.
  """

  scope: str
  name: str
  parameter: str
  value: Any
  where: str = ''
  level: Level = (FILE, 0)

  def __str__(self) -> str:
    prefix = f'{self.scope}/' if self.scope else ''
    suffix = f'.{self.parameter}' if self.parameter else ''
    return f'{prefix}{self.name}{suffix}'


@dataclasses.dataclass(frozen=True)
class Request:
  """What stood on the command line.

  Attributes:
    files: gin files in the order given, which does not matter.
    bindings: as typed, 'NAME=VALUE' or T5X's '--gin.NAME=VALUE'.
    search_paths: folders to look for files, before the package's configs.
    run: the folder of a run (its MODEL_DIR), whose config.gin is read.
    own_file: a gin file for what the run does not say.
    allowed_imports: modules that gin files may import.
  """

  files: tuple[str, ...] = ()
  bindings: tuple[str, ...] = ()
  search_paths: tuple[str, ...] = ()
  run: str = ''
  own_file: str = ''
  allowed_imports: tuple[str, ...] = ()


def configs_folder() -> pathlib.Path:
  """The gin files that come with the package: installed, or the clone's."""
  package = pathlib.Path(__file__).parent
  installed = package / 'configs'
  return installed if installed.is_dir() else package.parent / 'configs'


def own_files() -> list[pathlib.Path]:
  """The gin files of the commands; those of t5x/ are T5X's mains'."""
  own = configs_folder()
  return [
    path
    for path in sorted(own.rglob('*.gin'))
    if path.relative_to(own).parts[0] != 't5x'
  ]


def shipped() -> list[str]:
  """Their names, 'models/t5_1_1_base' and so on."""
  own = configs_folder()
  return [
    path.relative_to(own).with_suffix('').as_posix() for path in own_files()
  ]


def find_file(name: str, search_paths: Sequence[str] = ()) -> pathlib.Path:
  """The gin file of that name: here, in the search paths, in the package.

  Raises:
    ConfigurationError: none has it; the message names the nearest one.
  """
  own, short = configs_folder(), name.removeprefix('configs/')
  for folder in ('.', *search_paths, own):
    for spelling in (name, f'{name}.gin', short, f'{short}.gin'):
      if (path := pathlib.Path(folder) / spelling).is_file():
        return path
  ending = '.gin' if name.endswith('.gin') else ''
  there = [f'{file}{ending}' for file in shipped()]
  searched = ', '.join(['.', *search_paths, "the package's configs"])
  raise ConfigurationError(
    f'gin file {name} is not found{nearest(short, there)}; searched: {searched}'
  )


def read_bindings(request: Request) -> tuple[list[Binding], list[str]]:
  """All bindings of files, run and command line, and gin's import statements.

  Raises:
    ConfigurationError: a missing file, unreadable gin, an import that fails
      or that is not allowed.
  """
  found = [
    _typed_binding(text, (TYPED, -position))
    for position, text in enumerate(request.bindings)
  ]
  waiting = [((FILE, 0), name, '') for name in request.files]
  if request.run:
    waiting += [((RUN_CONFIG, 0), f'{request.run}/config.gin', '')]
    waiting += [((OWN_FILE, 0), request.own_file, '')]
  imports, seen, waiting_imports = set(), set(), []
  while waiting:
    # The strongest first: a file that is met twice is as strong as that.
    waiting.sort()
    (kind, depth), name, by = waiting.pop(0)
    path, text = _read(name, request, by)
    if path in seen:
      continue
    seen.add(path)
    name = name if name.endswith('.gin') else f'{name}.gin'
    for statement in _statements(text, name):
      where = f'{name}:{statement.location.line_num}'
      if isinstance(statement, config_parser.IncludeStatement):
        waiting.append(((kind, depth + 1), statement.filename, f'{where}: '))
      elif isinstance(statement, config_parser.ImportStatement):
        waiting_imports.append((statement, where))
      elif isinstance(statement, config_parser.BindingStatement):
        binding = _binding(statement, where, (kind, depth))
        # Where a command writes is said by who runs it.
        if kind != RUN_CONFIG or binding.parameter not in _OUTPUTS:
          found.append(binding)
  if request.run:
    found += _of_run(request.run, found)
  trusted = trusted_modules(found, request.allowed_imports)
  for statement, where in waiting_imports:
    known = statement.module.startswith('__gin__')  # told of by itself
    if not known and statement.module not in trusted:
      _refuse(where, statement.module)
    _import(statement.module, where)
    imports.add(statement.format())
  return found, sorted(imports)


# Parameters that say where a command writes.
_OUTPUTS = ('output_dir', 'output_file', 'model_dir', 'report_file')
# The macro of modules whose import registers tasks, and what it is for.
_MODULES, _OF_MODULES = 'MIXTURE_OR_TASK_MODULES', ('Task', 'modules')
_T5X_MODULE = 'MIXTURE_OR_TASK_MODULE'  # one module or None


def trusted_modules(
  found: Iterable[Binding], allowed: Iterable[str]
) -> set[str]:
  """Modules that may be imported: those that a person names.

  Args:
    found: bindings, of which those of a run's config.gin do not count.
    allowed: by a flag.
  """
  named = [
    b.value
    for b in found
    if b.level[0] != RUN_CONFIG
    and (b.name == _MODULES or (b.name, b.parameter) == _OF_MODULES)
  ]
  return {*allowed, *(text for value in named for text in _texts(value))}


def check_modules(held: Iterable[Binding], trusted: set[str]) -> None:
  """Looks at what tasks' modules come to, by way of whichever macros.

  Raises:
    ConfigurationError: a run's config.gin names one that nobody trusts.
  """
  held = list(held)
  macros = {str(b): b for b in held if not b.parameter}
  waiting = [
    b
    for b in held
    if b.name == _MODULES or (b.name, b.parameter) == _OF_MODULES
  ]
  seen = set()
  while waiting:
    binding = waiting.pop()
    if str(binding) in seen:
      continue
    seen.add(str(binding))
    for text in _texts(binding.value):
      if binding.level[0] == RUN_CONFIG and text not in trusted:
        _refuse(binding.where, text)
    for reference in references(binding.value):
      if reference.startswith('@') and binding.level[0] == RUN_CONFIG:
        _refuse(binding.where, reference)
      if reference[1:] in macros:
        waiting.append(macros[reference[1:]])


def _texts(value: Any) -> Iterator[str]:
  if isinstance(value, str) and not isinstance(value, Reference):
    yield value
  elif isinstance(value, list | tuple):
    for entry in value:
      yield from _texts(entry)


def _refuse(where: str, module: str) -> None:
  raise ConfigurationError(
    f'{where} imports {module}, code that would run: if you trust it, add '
    f'--allow_import={module}'
  )


def holding(found: Iterable[Binding], strict: bool = True) -> list[Binding]:
  """The strongest binding of each thing, sorted.

  Raises:
    ConfigurationError: two of one level bind different values (if `strict`).
  """
  strongest: dict[str, Binding] = {}
  for binding in sorted(found, key=lambda b: (b.level, b.where)):
    other = strongest.setdefault(str(binding), binding)
    same_level = other.level == binding.level
    if strict and same_level and repr(other.value) != repr(binding.value):
      raise ConfigurationError(
        f'{binding} is bound twice, by {other.where} and by {binding.where}: '
        f'keep one, or override both with {binding}=...'
      )
  return [strongest[key] for key in sorted(strongest)]


def bindings_in(
  text: str, where: str = '', level: Level = (FILE, 0)
) -> Iterator[Binding]:
  """The bindings of gin's text, as they come."""
  for statement in _statements(text):
    if isinstance(statement, config_parser.BindingStatement):
      yield _binding(statement, where, level)


def references(value: Any) -> Iterator[Reference]:
  """Every reference and macro in a value."""
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, dict):
    yield from references([*value, *value.values()])
  elif isinstance(value, list | tuple):
    for entry in value:
      yield from references(entry)


def nearest(name: str, choices: Iterable[str]) -> str:
  """' (did you mean X?)', or ''."""
  close = difflib.get_close_matches(name, sorted(choices), n=1, cutoff=0.6)
  return f' (did you mean {close[0]}?)' if close else ''


def shipped_with(target: str) -> str:
  """' or FILE' for the package's gin files that bind something, or ''."""
  own = configs_folder()
  files = [
    path.relative_to(own).with_suffix('').as_posix()
    for path in own_files()
    if any(str(binding) == target for binding in bindings_in(path.read_text()))
  ]
  others = f' (or {", ".join(files[1:4])})' if files[1:] else ''
  return f' or {files[0]}{others}' if files else ''


def _read(name: str, request: Request, by: str) -> tuple[str, str]:
  """Path and text of a gin file that `by` names."""
  try:
    if request.run and name == f'{request.run}/config.gin':
      from etils import epath  # a run may be in a bucket

      return name, epath.Path(name).read_text()
    path = find_file(name, request.search_paths)
    return str(path.resolve()), path.read_text()
  except ConfigurationError as error:
    raise ConfigurationError(f'{by}{error}') from None
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigurationError(f'{by}{name} cannot be read: {error}') from None


def _statements(text: str, file: str = '') -> Iterator[Any]:
  """gin's statements; a fault of syntax becomes one line."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except (RecursionError, MemoryError):
    where = f'{file}: ' if file else ''
    raise ConfigurationError(f'{where}a value is nested too deeply') from None
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    lines = text.splitlines() or ['']
    number = getattr(error, 'lineno', None)
    if isinstance(error, tokenize.TokenError):
      number = error.args[1][0]
    number = min(number or len(lines), len(lines))
    line = lines[number - 1].strip()
    name, equals, value = (part.strip() for part in line.partition('='))
    if equals and re.match(r'[A-Za-z./~:]', value) and '(' not in value:
      value = value.split('#')[0].strip()
      fault = f"no quotes around a string: {name} = '{value}'"
    else:
      reason = str(error.args[0] if error.args else error).splitlines()[0]
      fault = f'{line} is not valid gin ({reason.rstrip(".")})'
    where = f'{file}:{number}: ' if file else ''
    raise ConfigurationError(f'{where}{fault}') from None


def _binding(statement: Any, where: str, level: Level) -> Binding:
  scope, name, parameter, value, _ = statement
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigurationError(f'{where}: {value} is no number to bind')
  name = name.removeprefix('prompt_tuning.')
  if (scope, name, parameter) == ('', _T5X_MODULE, ''):
    name = _MODULES
    if value is None or isinstance(value, str):
      value = () if value is None else (value,)
  return Binding(scope, name, parameter, value, where, level)


def _typed_binding(typed: str, level: Level) -> Binding:
  """The binding of '--gin.NAME=VALUE', or of 'NAME=VALUE' without quotes."""
  name, _, text = typed.removeprefix('--gin.').partition('=')
  in_gin = typed.startswith('--gin.')
  # What is no literal is a string; @ and % keep gin's meaning.
  quoted = not in_gin and text[:1] not in ('', '@', '%')
  for reading in (text, repr(text)) if quoted else (text,):
    try:
      where = f'--gin.{name}' if in_gin else typed
      where = {to: flag for flag, to in OF_TASK.items()}.get(name, where)
      (binding,) = bindings_in(f'{name} = {reading}', where, level)
      return binding
    except ValueError:
      fault = 'is not one binding'
    except ConfigurationError as error:
      fault = f'is refused: {error}'
  if 'no quotes' in fault:
    fault += f'; in words it needs none: {name}={text}'
  raise ConfigurationError(f'{typed} {fault}')


def _of_run(run: str, found: Iterable[Binding]) -> Iterator[Binding]:
  """What a run's folder says by itself: where it is and where to write."""
  splits = [b for b in found if str(b) == 'Evaluation.split']
  split = next((b.value for b in holding(splits, False)), 'validation')
  written = f'{run}/eval_{re.sub(r"[^a-zA-Z0-9_.-]+", "_", str(split))}'
  homes = {'MODEL_DIR': run, 'PROMPT_FILE': run, 'EVAL_OUTPUT_DIR': written}
  for macro, home in homes.items():
    yield Binding('', macro, '', home, run, (RUN_FOLDER, 0))


def _import(module: str, where: str) -> None:
  """Imports what a gin file asks for, which may register names with gin."""
  if module.startswith('__gin__'):
    raise ConfigurationError(
      f'{where}: dynamic registration is not supported; remove the line '
      'and use plain names such as @T5Config()'
    )
  # As `python -m` does: a module of the user's working folder is found.
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.append(os.getcwd())
  try:
    importlib.import_module(module)
  except Exception as error:  # of a module of the user's
    kind = '' if isinstance(error, ImportError) else f'{type(error).__name__}: '
    fault = f'{where}: import {module} failed: {kind}{error}'
    raise ConfigurationError(fault.splitlines()[0]) from None
