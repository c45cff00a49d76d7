"""From bindings to one call of one plain function.

Nothing below the commands knows gin: the names a gin file may use stand in
`CONFIGURABLES` and in the files of `methods/`, and their modules are imported
only when a file names them. What holds (see `gin_files`) is checked as a whole
before anything runs, and handed to gin.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import functools
import importlib
import inspect
import operator
import os
import re
import sys
import types
import typing
from typing import Any

import gin

from prompt_tuning import files
from prompt_tuning import gin_files
from prompt_tuning.gin_files import Binding
from prompt_tuning.gin_files import ConfigurationError
from prompt_tuning.gin_files import Request
from prompt_tuning.gin_files import nearest
from prompt_tuning.gin_files import references
from prompt_tuning.training import identity

# Where the functions and classes that gin may name live. Methods and their
# initialisers are found in `methods`, `@optax.<name>` in optax.
CONFIGURABLES = {
  'train': 'prompt_tuning.training.loop',
  'evaluate': 'prompt_tuning.serving.jobs',
  'infer': 'prompt_tuning.serving.jobs',
  'export': 'prompt_tuning.training.trained',
  'compile_steps': 'prompt_tuning.planning.compilation',
  'T5Config': 'prompt_tuning.models.network',
  'EncoderDecoderModel': 'prompt_tuning.models.model',
  'temperature_sample': 'prompt_tuning.models.decoding',
  'beam_search': 'prompt_tuning.models.decoding',
  'Task': 'prompt_tuning.data.task',
  'Demonstrations': 'prompt_tuning.data.demonstrations',
  'TaskData': 'prompt_tuning.data.task_data',
  'classification_task': 'prompt_tuning.data.classification',
  'TokenArrayData': 'prompt_tuning.data.token_array_data',
  'Evaluation': 'prompt_tuning.training.evaluator',
  'Partitioner': 'prompt_tuning.training.mesh_choice',
  'adafactor': 'prompt_tuning.training.optimizers',
  'create_learning_rate_scheduler': 'prompt_tuning.training.optimizers',
  'load_checkpoint': 'prompt_tuning.interop.base_checkpoints',
  'load_trained': 'prompt_tuning.interop.prompts',
  'from_file': 'prompt_tuning.interop.prompts',
  'source_prompts': 'prompt_tuning.interop.prompts',
  'multitask_source': 'prompt_tuning.interop.prompts',
  'attempt_attention': 'prompt_tuning.interop.prompts',
  'study': 'prompt_tuning.study.study',
  'Grid': 'prompt_tuning.study.grid',
  **dict.fromkeys(
    ('table', 'compare', 'every_metric', 'tries', 'ensembles', 'published'),
    'prompt_tuning.study.views',
  ),
  **dict.fromkeys(
    ('figure', 'bars', 'tradeoff', 'parameters'),
    'prompt_tuning.study.figures',
  ),
  **dict.fromkeys(
    (
      *('interpretation', 'row_neighbours', 'similarity', 'prompt_map'),
      'waywardness',
    ),
    'prompt_tuning.study.interpretation',
  ),
}


def configure(function: str, request: Request) -> Callable[..., Any]:
  """Checks everything that is bound and hands it to gin.

  Returns:
    The function with its bindings: call it without further arguments. If it
    takes `resolved_config` it gets the function of that name, and decides
    when the text is complete.

  Raises:
    ConfigurationError: names that do not exist, parameters without a value,
      values of a wrong type, bindings that nothing uses.
  """
  gin.clear_config()
  usage, imports = checked(function, request)
  for binding in usage.bindings:
    if isinstance(binding.value, str) and binding.value in usage.macros:
      near = f'did you mean {binding}=%{binding.value}?'
      print(f'note: {binding.where} binds a text: {near}', file=sys.stderr)
  lines = [f'{b} = {b.value!r}' for b in usage.bindings if str(b) in usage.used]
  gin.parse_config('\n'.join([*imports, *lines]))
  gin.finalize()
  _note_bound(usage.bindings)
  call = gin.get_configurable(f'prompt_tuning.{function}')
  if 'resolved_config' in parameters_of(function):
    return functools.partial(call, resolved_config=resolved_config)
  return call


def checked(function: str, request: Request) -> tuple['Usage', list[str]]:
  """What a call of the function uses, and gin's import statements.

  Raises:
    ConfigurationError: as `configure`.
  """
  found, imports = gin_files.read_bindings(request)
  for binding in found:
    # What a run bound may be another command's, or an older version's.
    if binding.level[0] != gin_files.RUN_CONFIG:
      _check_names(binding)
  held = gin_files.holding(found)
  trusted = gin_files.trusted_modules(found, request.allowed_imports)
  gin_files.check_modules(held, trusted)
  usage = Usage(function, held)
  # What is typed may cut off what a file binds: `train.evaluation=None` leaves
  # Evaluation without a user, which is no fault of the file.
  # The same holds for what one file binds in place of another.
  of_files = [b for b in found if b.level[0] != gin_files.TYPED]
  alone = Usage(function, of_files, all_bindings=True)
  usage.check(excused=alone.used)
  return usage, imports


def _note_bound(bindings: Sequence[Binding]) -> None:
  """Lets functions that are handed on uncalled say what gin binds of them."""
  for binding in bindings:
    for reference in references(binding.value):
      if reference.startswith('@') and not reference.endswith('()'):
        *scopes, name = reference.path
        full = name if '.' in name else f'prompt_tuning.{name}'
        if not scopes and name in _KNOWN_TO_GIN:
          bound = gin.get_bindings(full)
          setattr(gin.get_configurable(full), identity.BOUND, bound)


def resolved_config() -> str:
  """The whole configuration as gin, defaults of what has been called included.

  A run writes this to MODEL_DIR/config.gin; the file given back as a gin file
  is the same run.
  """
  called = gin.operative_config_str()
  known = {str(binding) for binding in gin_files.bindings_in(called)}
  later = [
    f'{binding} = {binding.value!r}'
    for binding in gin_files.bindings_in(gin.config_str())
    if str(binding) not in known
  ]
  if later:
    called += '\n'.join(['\n# Bound, not called so far:', *later, ''])
  for name in _KNOWN_TO_GIN:
    _, is_optax, short = name.rpartition('.')
    if is_optax:  # which gin leaves out, and another process needs
      called = re.sub(rf'(?m)^((\w+/)*){short}\.', rf'\1{name}.', called)
  return called


class Usage:
  """What a call of a function uses, along @references and %macros.

  Attributes:
    used: what is bound and used.
    missing: macros without a value, and who needs them.
    faults: other faults, in the order met.
  """

  def __init__(
    self,
    function: str,
    bindings: Sequence[Binding],
    all_bindings: bool = False,
  ):
    """Looks; of several bindings of a thing at the strongest, or at all."""
    self._all_bindings = all_bindings
    self.function = function
    self.bindings = bindings
    self.macros = {str(b): b for b in bindings if not b.parameter}
    self.used: set[str] = set()
    self.missing: dict[str, str] = {}
    self.faults: list[str] = []
    self._visited: set[tuple] = set()
    self._open: list[str] = []  # macros that are being followed
    self._visit([function], called=True, by='')

  def check(self, excused: set[str]) -> None:
    """Raises ConfigurationError for what is missing, wrong or unused.

    Everything typed must be used, and all of a file named there but macros. A
    misspelt macro is missing and unused, and gets one message that says so.
    """
    unused = [b for b in self.bindings if str(b) not in self.used]
    spare = {str(b): b.where for b in unused if not b.parameter}
    for macro, by in sorted(self.missing.items()):
      for close in difflib.get_close_matches(macro, spare, n=1, cutoff=0.7):
        raise ConfigurationError(
          f'{close} is bound by {spare[close]} but nothing uses it, and '
          f'%{macro}, needed by {by}, is not bound: did you mean {macro}?'
        )
    for macro, by in sorted(self.missing.items()):
      raise ConfigurationError(
        f'%{macro} is not bound, needed by {by}: give {macro}=...'
        + gin_files.shipped_with(macro)
      )
    for fault in self.faults:
      raise ConfigurationError(fault)
    for binding in unused:
      named = binding.level == (gin_files.FILE, 0) and binding.parameter
      typed = binding.level[0] == gin_files.TYPED
      if typed or (named and str(binding) not in excused):
        near = nearest(str(binding), self.macros.keys() - spare.keys())
        if binding.parameter:
          near = self._longer_name(binding)
        raise ConfigurationError(
          f'{binding} is bound by {binding.where} but nothing that '
          f'{self.function} calls uses it{near}: remove it'
        )

  def _longer_name(self, binding: Binding) -> str:
    """' (did you mean optax.lion.b1?)' for lion.b1, where that is used."""
    for path in self._visited:
      name = path[-2]
      if name.endswith(f'.{binding.name}'):
        return f' (did you mean {name}.{binding.parameter}?)'
    return ''

  def _visit(self, path: Sequence[str], called: bool, by: str) -> None:
    if (*path, called) in self._visited:
      return
    self._visited.add((*path, called))
    *scopes, name = path
    prefixes = ['/'.join(scopes[:n]) for n in range(len(scopes) + 1)]
    bindings = [b for b in self.bindings if b.parameter and b.name == name]
    bindings = [b for b in bindings if b.scope in prefixes]
    self.used.update(map(str, bindings))
    # An inner scope's holds.
    bindings.sort(key=lambda b: len(b.scope))
    bound = {binding.parameter: binding for binding in bindings}
    hints = _type_hints(_resolve(name))
    for binding in bindings if self._all_bindings else bound.values():
      _check_names(binding)
      self._check_type(binding, hints.get(binding.parameter, Any))
      self._follow(binding, scopes)
    for parameter in parameters_of(name).values() if called else ():
      open_ended = parameter.kind in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
      )
      needed = parameter.default is parameter.empty and not open_ended
      if needed and parameter.name not in bound:
        full = f'{name}.{parameter.name}'
        files = gin_files.shipped_with(full)
        self.faults.append(f'{by}{full} is not bound: give {full}=...{files}')

  def _follow(self, binding: Binding, scopes: Sequence[str]) -> None:
    for reference in references(binding.value):
      path, macro = reference.path, reference[1:]
      if reference.startswith('@'):
        path = path if len(path) > 1 else [*scopes, *path]
        self._visit(path, reference.endswith('()'), f'{binding.where}: ')
      elif macro in self._open:
        raise ConfigurationError(
          f'{self.macros[macro].where}: %{macro} leads back to itself, by way'
          f' of {", ".join(f"%{name}" for name in self._open)}'
        )
      elif macro not in self.macros:
        self.missing.setdefault(macro, f'{binding} ({binding.where})')
      elif macro not in self.used:
        self.used.add(macro)
        _check_names(self.macros[macro])
        # gin evaluates a macro's value in the scope of the macro's name.
        self._open.append(macro)
        self._follow(self.macros[macro], path)
        self._open.pop()

  def _check_type(self, binding: Binding, hint: Any) -> None:
    origin = binding
    for _ in self.macros:  # of which one may be another
      if isinstance(origin.value, gin_files.Reference):
        origin = self.macros.get(origin.value[1:], origin)
    value, takes = origin.value, _takes(hint)
    if any(references(value)) or any(fits(value) for _, fits in takes):
      return
    near = ''
    if isinstance(value, str) and value in self.macros:
      near = f': did you mean %{value}?'
    elif isinstance(value, str) and value in _names():
      near = (
        f': did you mean @{value}() (what it returns) or @{value} (itself)?'
      )
    words = ' or '.join(dict.fromkeys(word for word, _ in takes))
    self.faults.append(
      f'{binding} must be {words}, got {value!r} ({origin.where}){near}'
    )


def _methods() -> Mapping[str, Any]:
  from prompt_tuning import methods

  return methods.configurables()


def _names() -> list[str]:
  return [*CONFIGURABLES, *_methods(), 'optax.adamw']


_KNOWN_TO_GIN: dict[str, Any] = {}


def _resolve(name: str) -> Any:
  """The plain Python object of a name, which gin knows from then on.

  Raises:
    ConfigurationError: no such name.
  """
  if name in _KNOWN_TO_GIN:
    return _KNOWN_TO_GIN[name]
  if name in CONFIGURABLES:
    with files.stderr_closed():  # some bring TensorFlow along
      found = getattr(importlib.import_module(CONFIGURABLES[name]), name)
  elif name.startswith('optax.'):
    found = _of_optax(name)
  elif name in _methods():
    found = _methods()[name]
  else:
    try:
      # Registered by a module that a gin file imports.
      return inspect.unwrap(gin.get_configurable(name))
    except ValueError:
      near = nearest(name, _names())
      raise ConfigurationError(f'{name} is not a configurable{near}') from None
  module, _, short = name.rpartition('.')
  with gin.unlock_config():  # a study looks at commands while it runs
    gin.external_configurable(found, short, module=module or 'prompt_tuning')
  _KNOWN_TO_GIN[name] = found
  return found


def _of_optax(name: str) -> Any:
  """A public function or class that optax itself defines.

  A run's config.gin may be a stranger's: what optax imports is out of reach.
  """
  import optax

  def public(value: Any) -> bool:
    home = value if inspect.ismodule(value) else inspect.getmodule(value)
    return getattr(home, '__name__', '').split('.')[0] == 'optax'

  found: Any = optax
  for part in name.split('.')[1:]:
    parts = vars(found) if inspect.ismodule(found) else {}
    parts = {k: v for k, v in parts.items() if k[0] != '_' and public(v)}
    if part not in parts:
      raise ConfigurationError(f'@{name} is not in optax{nearest(part, parts)}')
    found = parts[part]
  if not callable(found):
    raise ConfigurationError(f'@{name} is no function of optax')
  return found


def _check_names(binding: Binding) -> None:
  """Raises ConfigurationError, with the nearest name, for one that is none."""
  try:
    for reference in references(binding.value):
      if reference.startswith('@'):
        _resolve(reference.path[-1])
    names = parameters_of(binding.name) if binding.parameter else {'': None}
  except ConfigurationError as error:
    raise ConfigurationError(f'{binding.where}: {error}') from None
  open_ended = any(p and p.kind == p.VAR_KEYWORD for p in names.values())
  if binding.parameter not in names and not open_ended:
    raise ConfigurationError(
      f'{binding.where}: {binding.name} has no parameter {binding.parameter}'
      f'{nearest(binding.parameter, names)}; it has {", ".join(names)}'
    )


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
  """Of a configurable, by its name."""
  return _signature(_resolve(name)).parameters


# A study looks at the same ones for each of its cells.
_signature = functools.cache(inspect.signature)


@functools.cache
def _type_hints(target: Any) -> dict[str, Any]:
  if inspect.isclass(target) and not dataclasses.is_dataclass(target):
    target = target.__init__
  try:
    return typing.get_type_hints(target)
  except (NameError, TypeError, AttributeError):
    return {}


# What a person calls a type, and the classes of literals that fit it.
_WORDS = {
  types.NoneType: ('None', types.NoneType),
  bool: ('True or False', bool),
  int: ('a whole number', int),
  float: ('a number', int | float),
  str: ('a string', str),
  os.PathLike: ('a path', ()),
  Callable: ('a function (@name)', ()),
  Mapping: ('a dictionary', dict),
  Sequence: ('a list', list | tuple),
}


def _takes(hint: Any) -> list[tuple[str, Callable[[Any], bool]]]:
  """What a type takes, in words, each with a test of a literal."""
  kind = typing.get_origin(hint) or hint
  if kind in (typing.Union, types.UnionType):
    return [entry for part in typing.get_args(hint) for entry in _takes(part)]
  if kind is typing.Literal:
    words = typing.get_args(hint)
    return [
      (repr(word), functools.partial(operator.eq, word)) for word in words
    ]
  if not inspect.isclass(kind):
    return [('anything', lambda value: True)]
  for base in (Mapping, Sequence):
    kind = base if issubclass(kind, base) and kind is not str else kind
  if kind not in _WORDS:
    # A class of ours is given by @reference, never by a literal.
    ours = kind.__module__.startswith('prompt_tuning.')
    return [(f'@{kind.__name__}()', lambda value: not ours)]
  words, classes = _WORDS[kind]
  wrong = bool if kind in (int, float) else ()
  return [
    (words, lambda x: isinstance(x, classes) and not isinstance(x, wrong))
  ]
