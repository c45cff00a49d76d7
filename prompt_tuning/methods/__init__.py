"""Methods: what is trained beside T5 or instead of it, a file each.

`method.py` is the protocol. A file that is put here is found by itself: its
`Method` by its class's name or its collection, its other public names by gin. A
`Method` may also stand in a module of the user's, which is then to be imported
wherever its files are read.
"""

import functools
import importlib
import inspect
import pkgutil
from typing import Any

from prompt_tuning.methods.method import Method


@functools.cache
def configurables() -> dict[str, Any]:
  """Public classes and functions of this folder's modules, by name."""
  found = {}
  for info in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f'{__name__}.{info.name}')
    for name, value in vars(module).items():
      own = getattr(value, '__module__', None) == module.__name__
      known = inspect.isfunction(value) or inspect.isclass(value)
      if own and known and not name.startswith('_'):
        found[name] = value
  return found


def by_collection() -> dict[str, type[Method]]:
  """The methods that there are, by the names of their collections.

  A method of the user's own module is one from its import on.
  """
  configurables()  # imports this folder's
  found, waiting = {}, [Method]
  while waiting:
    kind = waiting.pop(0)
    waiting += kind.__subclasses__()
    if 'collection' in vars(kind):  # others are what some have in common
      found.setdefault(kind.collection, kind)
  return found


def of_collection(collection: str) -> type[Method] | None:
  """The method whose collection has this name."""
  return by_collection().get(collection)
