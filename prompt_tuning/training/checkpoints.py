"""What a run keeps on disk, and the base checkpoint it starts from.

A run's checkpoint is a folder named by its step. Orbax writes the arrays (step,
trained collections, optimiser state: kilobytes for a prompt) into `state`;
then `manifest.json` is put beside them in one rename. It lists every file and
its size, the arrays' shapes, the metrics, and what the loop needs to go on
(data position, seed, the base's fingerprint). A folder that its manifest does
not describe to the byte was left half-written, or lost a file since, and is
passed over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from prompt_tuning.errors import UserError
from prompt_tuning.training import hosts
from prompt_tuning.training.train_state import TrainState

_MANIFEST = 'manifest.json'
_STATE = 'state'

logger = logging.getLogger(__name__)

STORAGE_DTYPES = ('float32', 'bfloat16')


def frozen_dtype(dtype: str | None = None) -> str:
  """How frozen weights are stored: as asked, else as the backend likes it.

  bfloat16 on accelerators, float32 on CPU, where bfloat16 is slow.

  Raises:
    UserError: neither of `STORAGE_DTYPES`.
  """
  if dtype is not None:
    if dtype not in STORAGE_DTYPES:
      raise UserError(
        f'weights are stored as {" or ".join(STORAGE_DTYPES)}, got {dtype!r}'
      )
    return dtype
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


class Checkpoints:
  """The checkpoints of one run, under one folder.

  Saving returns when the checkpoint is complete on disk; the state may be
  donated right after. The newest `keep` stay, and the best one by
  `best_metric`; an older one goes only once a newer one is complete.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int | None = 3,
    best_metric: str | None = None,
    best_mode: str = 'max',
    read_only: bool = False,
  ):
    """Opens the folder, and creates it unless `read_only`.

    Args:
      directory: local, or any place where etils.epath can write.
      keep: how many of the newest checkpoints stay; None: all.
      best_metric: the metric, as named in `save`, whose best checkpoint stays
        as well; None: none.
      best_mode: 'max' or 'min'.
      read_only: only look; the folder need not exist.

    Raises:
      UserError: if the folder cannot be made or written.
    """
    if best_mode not in ('max', 'min'):
      raise UserError(f"best_mode needs 'max' or 'min', got {best_mode!r}")
    if keep is not None and keep < 1:
      raise UserError(f'keep needs at least 1 checkpoint, got {keep}')
    self.directory = epath.Path(directory).expanduser().absolute()
    self._keep = keep
    self._best_metric = best_metric
    self._best_mode = best_mode
    self._writer = None
    if read_only:
      return
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      process = f'{jax.process_index()}-{os.getpid()}'
      probe = self.directory / f'.writable-{process}'
      probe.write_text('')
      probe.unlink()
    except OSError as error:
      raise UserError(
        f'cannot write checkpoints to {self.directory}: {_reason(error)}; '
        'choose another MODEL_DIR'
      ) from error
    # Not orbax's manager: its asynchronous writing gains nothing on
    # kilobytes, and it deletes old checkpoints before our manifest stands.
    self._writer = ocp.Checkpointer(ocp.StandardCheckpointHandler())

  def save(
    self,
    step: int,
    state: TrainState,
    extra: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes a checkpoint; what was complete before stays so until then.

    At a step that is already on disk only `extra` and `metrics` are renewed:
    the state of a step does not change within a run.

    Of a job every process takes part, and returns when all is on disk.

    Args:
      step: the state's step.
      state: what to save.
      extra: JSON values that `restore` gives back.
      metrics: numbers by name, of an evaluation at this step.

    Raises:
      UserError: if it cannot be written (a full disk, say).
    """
    if self._writer is None:
      raise ValueError('these checkpoints are closed or read_only')
    step = int(step)
    folder = self.directory / str(step)
    try:
      manifest = self._manifest(step)
      if hosts.agree(manifest is None):
        manifest = self._write_arrays(step, state)
      if hosts.is_primary():
        manifest['extra'] = dict(extra)
        manifest['metrics'].update(
          {name: float(value) for name, value in (metrics or {}).items()}
        )
        text = json.dumps(manifest, indent=1, default=_to_json)
        _write_atomically(folder / _MANIFEST, text.encode())
        self._delete_old(step)
      hosts.wait_for_all(f'saved step {step}')
    except Exception as error:
      if not _is_storage_fault(error):
        raise
      self._remove_if_incomplete(step)
      raise UserError(
        f'cannot write checkpoint {folder}: {_reason(error)}; earlier '
        'checkpoints are intact; free the disk or choose another MODEL_DIR'
      ) from error

  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    return [step for step in self._folders() if self._manifest(step)]

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step; None without one."""
    for step in reversed(self._folders()):
      if self._manifest(step):
        return step
      logger.warning(
        'passing over %s/%d: the checkpoint is incomplete', self.directory, step
      )
    return None

  def best_step(self) -> int | None:
    """The step with the best `best_metric`, the earliest of equals."""
    sign = 1 if self._best_mode == 'max' else -1
    found = []
    for step in self.steps():
      value = self.metrics(step).get(self._best_metric)
      if value is not None and math.isfinite(value):
        found.append((sign * value, -step))
    return -max(found)[1] if found else None

  def metrics(self, step: int) -> dict[str, float]:
    """The metrics saved with a step."""
    return self._required_manifest(step)['metrics']

  def extra(self, step: int) -> dict[str, Any]:
    """The `extra` saved with a step, without reading any array."""
    return self._required_manifest(step)['extra']

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint of a step.

    Args:
      step: one of `steps()`.
      like: a TrainState of the same structure, of arrays or ShapeDtypeStructs.
        Leaves that carry a sharding come back as jax.Arrays with it, the
        others as numpy arrays.

    Returns:
      (state, extra).

    Raises:
      UserError: no such checkpoint, or it is of another shape or damaged.
    """
    manifest = self._required_manifest(step)
    folder = self.directory / str(step)
    flat = _flatten(like)
    _check_arrays(folder, manifest['arrays'], flat)
    target = {path: _abstract(leaf) for path, leaf in flat.items()}
    try:
      with (
        _orbax_at_work(),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader,
      ):
        saved = reader.restore(
          folder / _STATE,
          args=ocp.args.StandardRestore(_nest(target)),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
      raise UserError(
        f'checkpoint {folder} is damaged ({_reason(error)}); delete that '
        'folder to go on from an earlier one'
      ) from error
    saved = traverse_util.flatten_dict(saved, sep='/')
    leaves = [saved[path] for path in flat]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return state, manifest['extra']

  def trained(self, step: int) -> dict[str, Any]:
    """The trained collections of a checkpoint, whatever optimiser made it."""
    like: dict[str, Any] = {}
    for path, array in self._required_manifest(step)['arrays'].items():
      *parents, last = path.split('/')
      node = like
      for name in parents:
        node = node.setdefault(name, {})
      node[last] = jax.ShapeDtypeStruct(array['shape'], array['dtype'])
    return self.restore(step, like)[0]['trainable']

  def close(self) -> None:
    """Releases orbax's threads."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def _write_arrays(self, step: int, state: TrainState) -> dict[str, Any]:
    folder = self.directory / str(step)
    flat = _flatten(state)
    folder.mkdir(exist_ok=True)
    with _orbax_at_work():
      self._writer.save(
        folder / _STATE,
        args=ocp.args.StandardSave(
          _nest({path: _savable(leaf) for path, leaf in flat.items()})
        ),
        force=True,  # over what a killed run left at this step
      )
    return {
      'step': step,
      'metrics': {},
      'arrays': {
        path: {'shape': list(np.shape(leaf)), 'dtype': str(leaf.dtype)}
        for path, leaf in flat.items()
      },
      'files': _sizes(folder),
    }

  def _folders(self) -> list[int]:
    if not self.directory.is_dir():
      return []
    names = [path.name for path in self.directory.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch(r'\d+', name))

  def _manifest(self, step: int) -> dict[str, Any] | None:
    return _read_manifest(self.directory / str(step))

  def _required_manifest(self, step: int) -> dict[str, Any]:
    manifest = self._manifest(step)
    if manifest is None:
      raise UserError(
        f'no complete checkpoint of step {step} in {self.directory}; there '
        f'are {self.steps() or "none"}'
      )
    return manifest

  def _delete_old(self, newest: int) -> None:
    """Removes checkpoints past their time, and what killed runs left."""
    steps = self.steps()
    kept = {newest, self.best_step()}
    kept.update(steps if self._keep is None else steps[-self._keep :])
    for step in self._folders():
      if step not in kept:
        folder = self.directory / str(step)
        # The manifest first: half a deletion leaves no complete checkpoint.
        (folder / _MANIFEST).unlink(missing_ok=True)
        folder.rmtree()

  def _remove_if_incomplete(self, step: int) -> None:
    """Gives the space of a failed save back, as far as the disk lets us."""
    if not hosts.is_primary():
      return
    folder = self.directory / str(step)
    if self._manifest(step) is None and folder.exists():
      try:
        folder.rmtree()
      except OSError:
        logger.warning('cannot remove %s', folder)


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


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """Frozen weights on disk, and the step they were trained to.

  Attributes:
    path: what the user named.
    step: from which the count of a run on it goes on.
    arrays: by T5X path, such as 'encoder/layers_0/mlp/wo/kernel'.
    metadata: what the file says about itself.
  """

  path: str
  step: int
  arrays: Mapping[str, Any]
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def fingerprint(self) -> str:
    """As `fingerprint` of the loaded parameters, reading a few rows only."""
    return fingerprint(self.arrays)


def fingerprint(params: Any) -> str:
  """Tells one set of weights from another, from a few of its values.

  A digest of all parameter paths and shapes and of the first values of eight
  matrices. Values are rounded to bfloat16 first and the stored type is left
  out, so a float32 checkpoint and its bfloat16 copy have one fingerprint;
  likewise the scanned and the unrolled form of one model.

  Args:
    params: nested dict, or a mapping of paths to arrays (lazy ones too).

  Returns:
    16 hexadecimal digits.
  """
  flat = unrolled(_flatten_params(params))
  digest = hashlib.sha256()
  for path in sorted(flat):
    digest.update(f'{path} {list(flat[path].shape)}\n'.encode())
  # Norm scales tell little: they are all ones before training.
  matrices = [path for path in sorted(flat) if len(flat[path].shape) > 1]
  for path in matrices[:: max(1, len(matrices) // 8)][:8]:
    digest.update(_first_values(flat[path]).tobytes())
  return digest.hexdigest()[:16]


def load_params(
  base: BaseCheckpoint,
  like: Any,
  *,
  dtype: Any = None,
  shardings: Any = None,
) -> dict[str, Any]:
  """The model's parameters from a base checkpoint, one array at a time.

  A scanned model loads an unrolled checkpoint, and the other way round.

  Args:
    base: where from.
    like: nested dict of ShapeDtypeStructs: what the model needs.
    dtype: of the result; None: as `like` says. This is where frozen weights
      become bfloat16, if they do.
    shardings: tree of shardings like `like`; None: the default device.

  Returns:
    Nested dict of jax.Arrays.

  Raises:
    UserError: arrays are missing, unexpected or of another shape; all faults
      in one line.
  """
  wanted = _flatten_params(like)
  found = dict(base.arrays)
  if set(found) != set(wanted):
    found = dict(_in_form_of(wanted, found))
  _check_params(base.path, wanted, found)
  flat_shardings = None
  if shardings is not None:
    flat_shardings = _flatten_params(shardings)
  loaded = {}
  if dtype is not None:
    dtype = frozen_dtype(dtype)
  for path, spec in wanted.items():
    # One host copy at a time: each array is on its device before the next.
    wanted_dtype = jnp.dtype(spec.dtype if dtype is None else dtype)
    sharding = None if flat_shardings is None else flat_shardings[path]
    loaded[path] = _placed(found.pop(path), wanted_dtype, sharding)
  return _nest(loaded)


def _placed(array: Any, dtype: np.dtype, sharding: Any) -> jax.Array:
  """An array on its devices, of which a host reads its own slices alone."""
  if sharding is None:
    return jax.device_put(np.asarray(array).astype(dtype))
  parts = {}

  def part(index):
    key = str(index)
    if key not in parts:  # devices that hold the same slice share one read
      parts[key] = np.asarray(array[index]).astype(dtype)
    return parts[key]

  return jax.make_array_from_callback(tuple(array.shape), sharding, part)


def open_run(
  path: str | os.PathLike, step: int | None = None
) -> BaseCheckpoint | None:
  """The parameters that one of our own runs trained, as a base checkpoint.

  Args:
    path: a run's MODEL_DIR, its `checkpoints` folder, or one checkpoint.
    step: which one; None: the newest complete one.

  Returns:
    The base checkpoint, its step kept; None if no run of ours is there.

  Raises:
    UserError: the run has no such checkpoint, or did not train `params`.
  """
  folder = epath.Path(path).expanduser().absolute()
  if (folder / _MANIFEST).exists():
    checkpoint = folder
  else:
    root = folder
    if (folder / 'checkpoints').is_dir():
      root = folder / 'checkpoints'
    checkpoints = Checkpoints(root, read_only=True)
    if step is None:
      step = checkpoints.latest_step()
    if step is None:
      return None
    checkpoint = root / str(step)
  manifest = _read_manifest(checkpoint)
  if manifest is None:
    raise UserError(
      f'{checkpoint} is not a complete checkpoint; give the folder above it '
      'to take the newest complete one'
    )
  prefix = 'trainable/params/'
  arrays = {
    name.removeprefix(prefix): _run_array(checkpoint, name, spec)
    for name, spec in manifest['arrays'].items()
    if name.startswith(prefix)
  }
  if not arrays:
    trained = sorted(
      {n.split('/')[1] for n in manifest['arrays'] if n.startswith('trainable')}
    )
    raise UserError(
      f'{path} trained {", ".join(trained)}, a base checkpoint needs params: '
      'give the base that run started from'
    )
  return BaseCheckpoint(
    path=str(path),
    step=manifest['step'],
    arrays=arrays,
    metadata={'extra': manifest['extra'], 'metrics': manifest['metrics']},
  )


def _run_array(folder: epath.Path, name: str, spec: Mapping) -> LazyArray:
  def read(index):
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    try:
      with (
        _orbax_at_work(),
        # Alone: processes read different slices, a different number of times.
        ocp.Checkpointer(
          ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()),
          multiprocessing_options=_alone(),
        ) as reader,
      ):
        tree = reader.restore(
          folder / _STATE,
          args=ocp.args.PyTreeRestore(
            item=_nest({name: 0}),
            restore_args=_nest({name: as_numpy}),
            partial_restore=True,
          ),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
      raise UserError(
        f'checkpoint {folder} is damaged at {name} ({_reason(error)}); give '
        'another base checkpoint'
      ) from error
    for key in name.split('/'):
      tree = tree[key]
    return tree[index]

  return LazyArray(tuple(spec['shape']), jnp.dtype(spec['dtype']), read)


def _alone() -> ocp.options.MultiprocessingOptions:
  """Orbax without the other processes of the job."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=process,
    active_processes={process},
    barrier_sync_key_prefix=f'process_{process}',
  )


@contextlib.contextmanager
def _orbax_at_work() -> Iterator[None]:
  """Lets orbax move arrays to the host, which the loop forbids, and keeps it
  from logging the traceback of a fault that it raises as well."""
  orbax_logger = logging.getLogger('absl')

  def drop(record):
    return False

  orbax_logger.addFilter(drop)
  try:
    with jax.transfer_guard('allow'):
      yield
  finally:
    orbax_logger.removeFilter(drop)


# Trees and paths.


def _flatten(tree: Any) -> dict[str, Any]:
  """{'opt_state/moments/prompt/table/v': leaf} of any tree, in its order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def _flatten_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """By path; flat mappings pass through. Leaves may be lazy arrays."""
  return traverse_util.flatten_dict(dict(params), sep='/')


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def _abstract(leaf: Any) -> Any:
  """What orbax restores a leaf as: sharded like a jax.Array, else numpy."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return np.empty(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _savable(leaf: Any) -> Any:
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


# 'encoder/layers_0/mlp/...' of unrolled layers is number 0, on axis 1, of the
# scanned 'encoder/encoder/mlp/...'.
_SCANNED = re.compile(r'(encoder|decoder)/\1/(.+)')


def unrolled(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Arrays by path, every scanned one split into its layers."""
  return dict(_unrolled(flat))


def _unrolled(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for path, array in flat.items():
    match = _SCANNED.fullmatch(path)
    if match is None:
      yield path, array
      continue
    for i in range(array.shape[1]):
      yield f'{match[1]}/layers_{i}/{match[2]}', _layer(array, i)


def _layer(array: Any, i: int) -> LazyArray:
  """Layer i of a scanned array [E, layers, ...]."""

  def read(index):
    if not _is_slices(index):
      return np.asarray(array)[:, i][index]
    rows, *rest = index if isinstance(index, tuple) else (index,)
    return array[(rows, slice(i, i + 1), *rest)][:, 0]

  shape = (array.shape[0], *array.shape[2:])
  return LazyArray(shape, array.dtype, read)


def _in_form_of(
  wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
  """`found`, its layers unrolled or stacked as `wanted` has them."""
  found = dict(_unrolled(found))
  for path in wanted:
    match = _SCANNED.fullmatch(path)
    if match is None:
      continue
    layers = []
    while (name := f'{match[1]}/layers_{len(layers)}/{match[2]}') in found:
      layers.append(found.pop(name))
    if layers:
      yield path, _stack(layers)
  yield from found.items()


def _stack(layers: list[Any]) -> LazyArray:
  """Arrays of layers [E, ...] as one [E, layers, ...]."""

  def read(index):
    if not _is_slices(index):
      return np.stack([np.asarray(layer) for layer in layers], axis=1)[index]
    rows, *rest = index if isinstance(index, tuple) else (index,)
    chosen = layers[rest[0]] if rest else layers
    return np.stack([layer[(rows, *rest[1:])] for layer in chosen], axis=1)

  first = layers[0]
  shape = (first.shape[0], len(layers), *first.shape[1:])
  return LazyArray(shape, first.dtype, read)


def _is_slices(index: Any) -> bool:
  """True for a slice, or a tuple of them, as a shard's index is."""
  parts = index if isinstance(index, tuple) else (index,)
  return all(isinstance(part, slice) for part in parts)


def _first_values(array: Any, count: int = 1024) -> np.ndarray:
  """Up to `count` leading values, rounded to bfloat16."""
  rows = math.ceil(count / max(1, math.prod(array.shape[1:])))
  head = array[:rows] if array.shape else array[...]
  with jax.transfer_guard('allow'):
    if isinstance(head, jax.Array) and not head.is_fully_addressable:
      head = multihost_utils.process_allgather(head, tiled=True)
    head = np.asarray(head).reshape(-1)[:count]
  return head.astype(np.float32).astype(ml_dtypes.bfloat16)


# Faults.

# The axes of a parameter in the words of an error, by the end of its path.
_AXES = (
  (r'token_embedder/embedding$', ('vocabulary rows', 'embed')),
  (r'logits_dense/kernel$', ('embed', 'vocabulary rows')),
  (r'(query|key|value)/kernel$', ('embed', 'heads x head_dim')),
  (r'out/kernel$', ('heads x head_dim', 'embed')),
  (r'wi(_\d)?/kernel$', ('embed', 'mlp')),
  (r'wo/kernel$', ('mlp', 'embed')),
  (r'rel_embedding$', ('heads', 'buckets')),
  (r'prompt/table$', ('prompts', 'prompt length', 'embed')),
  (r'scale$', ('embed',)),
)


def _shape_fault(
  path: str, got: Sequence[int], needed: Sequence[int], who: str = 'the model'
) -> str | None:
  """'path has embed 512, the model needs 768', or None."""
  got, needed = tuple(got), tuple(needed)
  if got == needed:
    return None
  for pattern, axes in _AXES:
    if re.search(pattern, path) and len(axes) == len(got) == len(needed):
      faults = [
        f'{axis} {a}, {who} needs {b}'
        for axis, a, b in zip(axes, got, needed)
        if a != b
      ]
      return f'{path} has ' + ' and '.join(faults)
  return f'{path} has shape {list(got)}, {who} needs {list(needed)}'


def _shorten(items: list[str], shown: int = 3) -> str:
  more = len(items) - shown
  return ', '.join(items[:shown]) + (f' and {more} more' if more > 0 else '')


def _path_faults(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
  """'missing …' and 'unexpected …', where there are such paths."""
  faults = {
    'missing': sorted(set(wanted) - set(found)),
    'unexpected': sorted(set(found) - set(wanted)),
  }
  return [
    f'{name} {_shorten(paths)}' for name, paths in faults.items() if paths
  ]


def _check_params(
  source: str, wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
  faults = []
  shapes = [
    fault
    for path in sorted(wanted, key=lambda p: ('embedding' not in p, p))
    if path in found
    and (fault := _shape_fault(path, found[path].shape, wanted[path].shape))
  ]
  if shapes:
    faults.append(_shorten(shapes))
  faults += _path_faults(wanted, found)
  if faults:
    raise UserError(
      f'{source} does not fit the model: {"; ".join(faults)}; give the '
      "checkpoint of this model, or the checkpoint's model"
    )


def _check_arrays(
  folder: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises UserError where a checkpoint is not of the run's shape."""
  faults = []
  for path in sorted(wanted, key=lambda p: (not p.startswith('trainable'), p)):
    if path in saved:
      fault = _shape_fault(
        path, saved[path]['shape'], wanted[path].shape, 'the run'
      )
      if not fault and saved[path]['dtype'] != str(wanted[path].dtype):
        fault = (
          f'{path} is {saved[path]["dtype"]}, the run needs '
          f'{wanted[path].dtype}'
        )
      if fault:
        faults.append(fault.removeprefix('trainable/'))
  faults += _path_faults(wanted, saved)
  if faults:
    raise UserError(
      f'checkpoint {folder} is of another run: {_shorten(faults)}; restore '
      'its settings or choose another MODEL_DIR'
    )


def _is_storage_fault(error: Exception) -> bool:
  """Whether the disk is to blame; tensorstore reports that as ValueError."""
  if isinstance(error, OSError):
    return True
  marks = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'FAILED_PRECONDITION')
  return any(mark in str(error) for mark in (*marks, *_STORAGE_WORDS))


_STORAGE_WORDS = tuple(
  os.strerror(code)
  for code in (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
  )
)


def _reason(error: Exception) -> str:
  """The fault in one short line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  for words in _STORAGE_WORDS:
    if words in text:
      return words
  return ' '.join(text.split())[:160] or type(error).__name__


# The manifest.


def _sizes(folder: epath.Path) -> dict[str, int]:
  """Bytes of every file below, by relative path, but for the manifest."""
  sizes = {}
  stack = [folder]
  while stack:
    for path in stack.pop().iterdir():
      if path.is_dir():
        stack.append(path)
      elif not path.name.startswith(_MANIFEST):
        name = str(path.relative_to(folder))
        sizes[name] = path.stat().length
  return dict(sorted(sizes.items()))


def _read_manifest(folder: epath.Path) -> dict[str, Any] | None:
  """The manifest if every file it names is there in full, else None."""
  try:
    manifest = json.loads((folder / _MANIFEST).read_text())
    files = manifest['files']
    complete = all((folder / n).stat().length == s for n, s in files.items())
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return manifest if complete else None


def _write_atomically(path: epath.Path, content: bytes) -> None:
  """Either the whole file or none, also when the machine goes down."""
  unfinished = path.parent / f'{path.name}.unfinished'
  with unfinished.open('wb') as file:
    file.write(content)
    file.flush()
    try:
      os.fsync(file.fileno())
    except (AttributeError, OSError):  # not a file of this machine
      pass
  unfinished.replace(path)


def _to_json(value: Any) -> Any:
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return np.asarray(value).tolist()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f'{type(value).__name__} is not a JSON value')
