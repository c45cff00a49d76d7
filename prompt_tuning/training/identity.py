"""What decides a run's result: its settings as plain values, and differences.

A run's folder belongs to one run. Its checkpoints hold what `describe` makes of
everything that `train` was given, and a run that is started again in the same
folder must be given the same. What may change stands in `MAY_CHANGE`.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import inspect
import os
from typing import Any

import numpy as np

# Arguments of `train`, and attributes of what they are, that may differ when a
# run goes on: how long it is, how often it looks and writes, where it computes,
# and names of things that are known by their contents.
MAY_CHANGE = frozenset(
  {
    'train_steps',
    'train_steps_relative',
    'early_stopping_patience',
    'eval_period',
    'checkpoint_period',
    'keep_checkpoints',
    'log_period',
    'progress',
    'partitioner',
    'remat_policy',
    'attention',
    'microbatches',
    'row_lengths',
    'model_dir',
    # Digests of these are compared in their place.
    'vocabulary',
    'local_data_dir',
    'tfds_data_dir',
    'cache_dirs',
    'modules',
    'folder',
  }
)
_PLAIN = (bool, int, float, str, type(None))


def describe(value: Any, depth: int = 12) -> Any:
  """A setting as JSON has it: equal settings give equal values.

  A dataclass gives its attributes, a function its name and what it was made
  with (its closure, or the arguments of functools.partial), so that an
  optimiser or a schedule is known by its numbers; an array gives a digest.
  """
  if isinstance(value, _PLAIN):
    return value
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if depth == 0 or inspect.ismodule(value):
    return type(value).__name__
  below = functools.partial(describe, depth=depth - 1)
  if isinstance(value, Mapping):
    kept = {str(k): v for k, v in value.items() if k not in MAY_CHANGE}
    return {name: below(kept[name]) for name in sorted(kept)}
  if isinstance(value, set | frozenset):
    return sorted(map(str, value))
  if isinstance(value, list | tuple):
    return [below(entry) for entry in value]
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {'is': type(value).__name__, **below(fields)}
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:16]
    return f'{value.dtype}{list(value.shape)} {digest}'
  if isinstance(value, functools.partial):
    made_with = {**value.keywords, **dict(enumerate(value.args))}
    return _function(value.func, made_with, below)
  if inspect.isfunction(value):
    return _function(value, {}, below)
  return getattr(value, '__qualname__', type(value).__qualname__)


def _function(
  function: Callable, made_with: Mapping[Any, Any], below: Callable
) -> Any:
  """A function by its name, what it closes over, and what it was given."""
  function = getattr(function, 'func', function)
  name = getattr(function, '__qualname__', type(function).__qualname__)
  inner = inspect.unwrap(function)
  closed = {}
  if inspect.isfunction(inner):
    closed = dict(inspect.getclosurevars(inner).nonlocals)
    # A wrapper's bound arguments are its caller's to say (see `Bound`).
    closed |= dict(getattr(function, BOUND, {}))
  closed |= made_with
  short = name.partition('.<locals>')[0]
  if not closed:
    return short
  return {'is': short, **below(closed)}


# An attribute of a function: {argument: value} that it will be called with.
BOUND = '_bound_arguments'


def differences(
  here: Any, there: Any, same_code: bool, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
  """(setting, here, there) of all that two descriptions do not agree on.

  Args:
    here: of this run.
    there: of the run that the folder holds.
    same_code: both are of one version; of others a setting that only one of
      them has is no difference.
    path: of the setting.
  """
  if isinstance(here, Mapping) and isinstance(there, Mapping):
    kinds = here.get('is'), there.get('is')
    if kinds[0] != kinds[1]:
      yield _name(path), *kinds
      return
    for name in sorted((here.keys() | there.keys()) - MAY_CHANGE):
      if name in here and name in there or same_code:
        below = here.get(name, _ABSENT), there.get(name, _ABSENT)
        yield from differences(*below, same_code, (*path, name))
  elif (
    isinstance(here, list)
    and isinstance(there, list)
    and len(here) == len(there)
    and any(isinstance(entry, Mapping | list) for entry in (*here, *there))
  ):
    for number, (one, other) in enumerate(zip(here, there)):
      yield from differences(one, other, same_code, (*path, str(number)))
  elif here != there:
    yield (
      _name(path),
      *(
        entry.get('is', entry) if isinstance(entry, Mapping) else entry
        for entry in (here, there)
      ),
    )


_ABSENT = 'nothing'


def _name(path: tuple[str, ...]) -> str:
  """'prompt length', 'optimizer weight_decay_rate': functions are made of
  functions, and between the first and the last name nobody knows them."""
  names = [name for name in path if not name.isdigit() and name != 'methods']
  if path[0] in ('optimizer', 'learning_rate') and len(names) > 2:
    names = [names[0], names[-1]]
  return ' '.join(names)
