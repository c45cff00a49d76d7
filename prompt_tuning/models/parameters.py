"""Paths of a network's arrays: what their axes are called, where layers stand.

The layers of a stack are unrolled, each with arrays of its own
('encoder/layers_3/mlp/wo/kernel'), or scanned: one array holds them all
('encoder/encoder/mlp/wo/kernel'), on axis 1 in the collection `params`, as
T5X's, and on axis 0 in the collections of methods. Paths are written without
their collection. Arrays may still be on disk (`LazyArray`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from flax import traverse_util
import numpy as np

from prompt_tuning.errors import UserError

# The collection of T5's own parameters, as Flax and T5X call it, and the axis
# that its scanned arrays have their layers on.
PARAMS = 'params'
LAYERS_AXIS = 1

_SCANNED = re.compile(r'(encoder|decoder)/\1/(.+)')
_UNROLLED = re.compile(r'(encoder|decoder)/layers_(\d+)/(.+)')

# The axes of a parameter by the end of its path.
_AXES = (
  (r'token_embedder/embedding', ('vocab', 'embed')),
  (r'logits_dense/kernel', ('embed', 'vocab')),
  (r'(query|key|value)/kernel', ('embed', 'joined_kv')),
  (r'out/kernel', ('joined_kv', 'embed')),
  (r'wi(_\d)?/kernel', ('embed', 'mlp')),
  (r'wo/kernel', ('mlp', 'embed')),
  (r'rel_embedding', ('heads', 'relpos_buckets')),
  (r'scale', ('embed',)),
)


def is_scanned(path: str) -> bool:
  """Whether an array holds all layers of a stack."""
  return _SCANNED.fullmatch(path) is not None


def logical_axes(path: str) -> tuple[str, ...] | None:
  """T5X's names for the axes of a parameter; None: no parameter of T5."""
  for ending, axes in _AXES:
    if re.search(rf'(^|/){ending}$', path):
      if is_scanned(path):
        axes = (*axes[:LAYERS_AXIS], 'layers', *axes[LAYERS_AXIS:])
      return axes
  return None


def require_projections(who: str, names: Sequence[str]) -> None:
  """UserError where a name is that of no projection of any T5."""
  for name in names:
    if logical_axes(f'{name}/kernel') is None:
      raise UserError(
        f'{who} has {name!r}; projections are query, key, value, out, wi, wi_0,'
        ' wi_1, wo and logits_dense'
      )


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """By path; flat mappings pass through."""
  return traverse_util.flatten_dict(dict(tree), sep='/')


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """What `flatten` made flat."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array on disk, read when asked for: `x[...]`, `x[:8]`, np.asarray(x).

  Attributes:
    shape: its shape.
    dtype: as stored.
    read: a function of the index.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Any], np.ndarray]

  def __getitem__(self, index: Any) -> np.ndarray:
    return np.asarray(self.read(index))

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    array = self[...]
    return array if dtype is None else array.astype(dtype)

  @property
  def ndim(self) -> int:
    return len(self.shape)


def unrolled(
  flat: Mapping[str, Any], axis: int = LAYERS_AXIS
) -> dict[str, Any]:
  """Arrays by path, every scanned one split into its layers, lazily.

  Args:
    flat: arrays by path.
    axis: that scanned arrays have their layers on.
  """
  found = {}
  for path, array in flat.items():
    match = _SCANNED.fullmatch(path)
    if match is None:
      found[path] = array
      continue
    for i in range(array.shape[axis]):
      found[f'{match[1]}/layers_{i}/{match[2]}'] = _layer(array, i, axis)
  return found


def scanned(flat: Mapping[str, Any], axis: int = LAYERS_AXIS) -> dict[str, Any]:
  """Arrays by path, the layers of each stack in one array, lazily."""
  found: dict[str, Any] = {}
  stacks: dict[str, dict[int, Any]] = {}
  for path, array in flat.items():
    match = _UNROLLED.fullmatch(path)
    if match is None:
      found[path] = array
    else:
      name = f'{match[1]}/{match[1]}/{match[3]}'
      stacks.setdefault(name, {})[int(match[2])] = array
  for path, layers in stacks.items():
    found[path] = _stack([layers[i] for i in sorted(layers)], axis)
  return found


def in_form_of(
  wanted: Mapping[str, Any], found: Mapping[str, Any], axis: int = LAYERS_AXIS
) -> dict[str, Any]:
  """`found`, its layers unrolled or scanned as those of `wanted` are."""
  if set(wanted) == set(found):
    return dict(found)
  found = unrolled(found, axis)
  return scanned(found, axis) if any(map(is_scanned, wanted)) else found


def _layer(array: Any, i: int, axis: int) -> LazyArray:
  """Layer i of an array that has its layers on an axis."""

  def read(index):
    index = _slices(index, len(shape))
    if index is None:
      raise TypeError('a layer on disk is read by slices')
    index = (*index[:axis], slice(i, i + 1), *index[axis:])
    return np.squeeze(np.asarray(array[index]), axis)

  shape = (*array.shape[:axis], *array.shape[axis + 1 :])
  return LazyArray(shape, array.dtype, read)


def _stack(layers: Sequence[Any], axis: int) -> LazyArray:
  """Arrays of layers as one array with its layers on an axis."""

  def read(index):
    index = _slices(index, len(shape))
    if index is None:
      raise TypeError('a stack of layers on disk is read by slices')
    within = (*index[:axis], *index[axis + 1 :])
    chosen = layers[index[axis]]
    return np.stack([np.asarray(one[within]) for one in chosen], axis)

  first = layers[0]
  shape = (*first.shape[:axis], len(layers), *first.shape[axis:])
  return LazyArray(shape, first.dtype, read)


def _slices(index: Any, ndim: int) -> tuple[slice, ...] | None:
  """An index as a slice of every axis; None for one that is none."""
  parts = index if isinstance(index, tuple) else (index,)
  if parts == (Ellipsis,):
    parts = ()
  if not all(isinstance(part, slice) for part in parts):
    return None
  return (*parts, *[slice(None)] * (ndim - len(parts)))
