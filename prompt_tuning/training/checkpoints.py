"""What a run keeps on disk, and the base checkpoint it starts from.

A run's checkpoint is a folder named by its step. Orbax writes the arrays (step,
trained collections, optimiser state: kilobytes for a prompt) into `state`;
then `manifest.json` is put beside them in one rename. It lists every file with
its size and digest, the arrays' shapes, the metrics, and what the loop needs to
go on (data position, seed, the base's fingerprint). A folder whose files have
not those sizes was left half-written, or lost one since, and is passed over;
one whose contents have changed is passed over with a warning.
"""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
import logging
import os
import re
import typing
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.models import parameters
from prompt_tuning.training import base
from prompt_tuning.training import hosts
from prompt_tuning.training.train_state import TrainState

# orbax is imported by the functions: who only reads files of prompts needs
# none of it.
if typing.TYPE_CHECKING:
  import orbax.checkpoint as ocp

MANIFEST = 'manifest.json'
_STATE = 'state'
_TRAINED = 'trainable'  # the attribute of `TrainState`

# In a bucket larger files are not read again for a digest.
_DIGESTED = 64 * 2**20

logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run, under one folder.

  Saving returns when the checkpoint is complete on disk; the state may be
  donated right after. The newest `keep` stay, and the best one; an older one
  goes only once a newer one is complete.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int | None = 3,
    read_only: bool = False,
  ):
    """Opens the folder, and creates it unless `read_only`.

    Args:
      directory: local, or any place where etils.epath can write.
      keep: how many of the newest checkpoints stay; None: all.
      read_only: only look; the folder need not exist.

    Raises:
      UserError: if the folder cannot be made or written.
    """
    if keep is not None and keep < 1:
      raise UserError(f'keep needs at least 1 checkpoint, got {keep}')
    self.directory = files.place(directory).absolute()
    self._keep = keep
    self._writer = None
    self._unchanged: dict[int, bool] = {}
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
        f'cannot write checkpoints to {self.directory}: {files.reason(error)}; '
        'choose another MODEL_DIR'
      ) from error
    import orbax.checkpoint as ocp

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

    At a step that is already on disk, as it was written, only `extra` and
    `metrics` are renewed: the state of a step does not change within a run.

    Of a job every process takes part, and returns when all is on disk.

    Args:
      step: the state's step.
      state: what to save.
      extra: JSON values that `restore` gives back: the fields of a run's
        `RunRecord`, which has the best step.
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
      if manifest is not None and not self._is_unchanged(step):
        manifest = None  # Damaged since; a resumed run has made it again.
      if hosts.agree(manifest is None):
        manifest = self._write_arrays(step, state)
      if hosts.is_primary():
        manifest['extra'] = dict(extra)
        manifest['metrics'].update(
          {name: float(value) for name, value in (metrics or {}).items()}
        )
        with files.replacing(folder / MANIFEST) as file:
          json.dump(manifest, file, indent=1, default=_to_json)
        self._delete_old(step)
        self._unchanged.pop(step, None)
      hosts.wait_for_all(f'saved step {step}')
    except Exception as error:
      if not files.is_storage_fault(error):
        raise
      self._remove_if_incomplete(step)
      raise UserError(
        f'cannot write checkpoint {folder}: {files.reason(error)}; earlier '
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

  def newest_unchanged_step(self) -> int | None:
    """The newest step to go on from: complete, and as it was written."""
    for step in reversed(self.steps()):
      if self._is_unchanged(step):
        return step
      logger.warning(
        'passing over %s/%d: its contents have changed since it was written',
        *(self.directory, step),
      )
    return None

  def best_step(self) -> int | None:
    """The step that the newest checkpoint's run calls its best, if it is kept.

    Without one it is the newest; None without any checkpoint.
    """
    newest = self.latest_step()
    if newest is None:
      return None
    best = (self.extra(newest).get('best') or {}).get('step')
    return newest if best is None or not self._manifest(best) else best

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
    import orbax.checkpoint as ocp

    manifest = self._unchanged_manifest(step)
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
          args=ocp.args.StandardRestore(parameters.nest(target)),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
      raise UserError(
        f'checkpoint {folder} is damaged ({files.reason(error)}); delete that '
        'folder to go on from an earlier one'
      ) from error
    saved = parameters.flatten(saved)
    leaves = [saved[path] for path in flat]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return state, manifest['extra']

  def trained(self, step: int) -> dict[str, dict[str, parameters.LazyArray]]:
    """The trained collections of a checkpoint: arrays by path, read when asked.

    Any process of a job may read them, by itself.
    """
    found: dict[str, dict[str, parameters.LazyArray]] = {}
    folder = self.directory / str(step)
    for name, spec in self._unchanged_manifest(step)['arrays'].items():
      parent, _, rest = name.partition('/')
      if parent == _TRAINED:
        collection, _, path = rest.partition('/')
        array = _saved_array(folder, name, spec)
        found.setdefault(collection, {})[path] = array
    return found

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
    import orbax.checkpoint as ocp

    folder = self.directory / str(step)
    flat = _flatten(state)
    folder.mkdir(exist_ok=True)
    with _orbax_at_work():
      self._writer.save(
        folder / _STATE,
        args=ocp.args.StandardSave(
          parameters.nest({path: _savable(leaf) for path, leaf in flat.items()})
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
      # Read again for their digests by the one process that writes them down.
      **(_contents(folder) if hosts.is_primary() else {}),
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

  def _is_unchanged(self, step: int) -> bool:
    """Whether the files have the digests that were written; looks once."""
    if step not in self._unchanged:
      folder = self.directory / str(step)
      digests = (self._manifest(step) or {}).get('digests', {})
      self._unchanged[step] = all(
        _digest(folder / name) == digest for name, digest in digests.items()
      )
    return self._unchanged[step]

  def _unchanged_manifest(self, step: int) -> dict[str, Any]:
    manifest = self._required_manifest(step)
    if not self._is_unchanged(step):
      others = [other for other in self.steps() if other != step]
      raise UserError(
        f'checkpoint {self.directory / str(step)} is damaged: its contents have'
        f' changed since it was written; other steps are {others or "none"}'
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
        (folder / MANIFEST).unlink(missing_ok=True)
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


def _saved_array(
  folder: epath.Path, name: str, spec: Mapping[str, Any]
) -> parameters.LazyArray:
  def read(index):
    import orbax.checkpoint as ocp

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
            item=parameters.nest({name: 0}),
            restore_args=parameters.nest({name: as_numpy}),
            partial_restore=True,
          ),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
      raise UserError(
        f'checkpoint {folder} is damaged at {name} ({files.reason(error)});'
        ' give another one'
      ) from error
    for key in name.split('/'):
      tree = tree[key]
    return tree[index]

  return parameters.LazyArray(
    tuple(spec['shape']), jnp.dtype(spec['dtype']), read
  )


def _alone() -> 'ocp.options.MultiprocessingOptions':
  """Orbax without the other processes of the job."""
  import orbax.checkpoint as ocp

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


def _flatten(tree: Any) -> dict[str, Any]:
  """{'opt_state/moments/prompt/table/v': leaf} of any tree, in its order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def _abstract(leaf: Any) -> Any:
  """What orbax restores a leaf as: sharded like a jax.Array, else numpy."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return np.empty(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _savable(leaf: Any) -> Any:
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _check_arrays(
  folder: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises UserError where a checkpoint is not of the run's shape."""
  faults = []
  for path in sorted(wanted, key=lambda p: (not p.startswith('trainable'), p)):
    if path in saved:
      fault = base.shape_fault(
        path, saved[path]['shape'], wanted[path].shape, 'the run'
      )
      if not fault and saved[path]['dtype'] != str(wanted[path].dtype):
        fault = (
          f'{path} is {saved[path]["dtype"]}, the run needs '
          f'{wanted[path].dtype}'
        )
      if fault:
        faults.append(fault.removeprefix('trainable/'))
  faults += base.path_faults(wanted, saved)
  if faults:
    raise UserError(
      f'checkpoint {folder} is of another run: {base.shorten(faults)}; restore '
      'its settings or choose another MODEL_DIR'
    )


# The manifest.


def _contents(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """Bytes and digests of every file below, by path, but for the manifest."""
  sizes = {}
  stack = [folder]
  while stack:
    for path in stack.pop().iterdir():
      if path.is_dir():
        stack.append(path)
      elif not path.name.startswith(MANIFEST):
        name = str(path.relative_to(folder))
        sizes[name] = path.stat().length
  local = '://' not in os.fspath(folder)
  digests = {
    name: _digest(folder / name)
    for name, size in sizes.items()
    if local or size <= _DIGESTED
  }
  return {
    'files': dict(sorted(sizes.items())),
    'digests': dict(sorted(digests.items())),
  }


def _digest(path: epath.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _read_manifest(folder: epath.Path) -> dict[str, Any] | None:
  """The manifest if every file it names is there in full, else None."""
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest['files']
    complete = all((folder / n).stat().length == s for n, s in files.items())
    for part in ('extra', 'metrics', 'arrays'):
      complete = complete and isinstance(manifest[part], dict)
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None
  return manifest if complete else None


def _to_json(value: Any) -> Any:
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return np.asarray(value).tolist()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f'{type(value).__name__} is not a JSON value')
