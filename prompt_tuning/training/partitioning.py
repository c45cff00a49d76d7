"""Where arrays live: the mesh, and rules from names of axes to mesh axes.

Parameters and activations have T5X's logical axes (`batch`, `length`, `embed`,
`mlp`, `heads`, `kv`, `joined_kv`, `vocab`, `relpos_buckets`, `layers`). A rule
gives a logical axis to mesh axes; XLA's partitioner derives the program of
each device from the shardings of parameters, batch and activations.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and the frozen
weights (gathered layer by layer where they are used), `model` splits heads,
mlp and vocabulary (T5X's model parallelism).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DeviceLayout
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Int
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.models import parameters

MESH_AXES = ('data', 'fsdp', 'model')

Rules = Sequence[tuple[str, str | Sequence[str] | None]]
# An array uses a mesh axis once: activations, whose batch has taken `fsdp`,
# keep `embed` whole; parameters have no batch and split it.
DEFAULT_RULES: Rules = (
  ('batch', ('data', 'fsdp')),
  ('vocab', 'model'),
  ('mlp', 'model'),
  ('heads', 'model'),
  ('joined_kv', 'model'),
  ('embed', 'fsdp'),
  ('kv', None),
  ('length', None),
  ('relpos_buckets', None),
  ('layers', None),
)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
  submesh: Sequence[int] | None = None,
) -> Mesh:
  """A mesh with the axes data, fsdp and model; one -1 takes what is left.

  Axes further right lie closer together in the machine: `model` on
  neighbouring chips of a TPU's network or inside a host, `data` across hosts
  and slices.

  Args:
    data: devices along `data`.
    fsdp: devices along `fsdp`.
    model: devices along `model`.
    devices: None takes all of the job.
    submesh: T5X's `model_parallel_submesh`: the block of hardware that one
      model stretches over, (x, y, z, cores of a chip) on a TPU and
      (processes, devices of a process) elsewhere. Its product is `model`.

  Raises:
    UserError: the sizes do not fit the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, model]
  fixed = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
    raise UserError(
      f'a mesh has positive sizes and at most one -1, got data={data},'
      f' fsdp={fsdp}, model={model}'
    )
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // fixed
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'a mesh of data={data}, fsdp={fsdp}, model={model} does not fit'
      f' {len(devices)} devices'
    )
  if submesh is not None:
    return Mesh(_tiled(devices, submesh).reshape(sizes), MESH_AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices > 1 and sizes[0] % slices == 0:
    # Between slices of a TPU there is a slow network: only `data` crosses it.
    within = (sizes[0] // slices, *sizes[1:])
    placed = mesh_utils.create_hybrid_device_mesh(
      within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    try:
      placed = mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=True
      )
    except (NotImplementedError, ValueError):
      # A shape that JAX finds no good place for works all the same.
      placed = np.asarray(devices).reshape(sizes)
  return Mesh(placed, MESH_AXES)


def _tiled(devices: Sequence[jax.Device], submesh: Sequence[int]) -> np.ndarray:
  """Devices [tiles, devices of a tile]; a tile is a block of the machine."""
  where: dict[tuple[int, ...], jax.Device] = {}
  for device in sorted(devices, key=lambda device: device.id):
    if hasattr(device, 'core_on_chip'):  # of a TPU
      where[*device.coords, device.core_on_chip] = device
    else:
      process = device.process_index
      seat = sum(place[0] == process for place in where)
      where[process, seat] = device
  # From zero on: a job may own a corner of a larger machine.
  first = np.min(list(where), axis=0)
  bounds = np.max(list(where), axis=0) - first + 1
  if (
    len(submesh) != len(bounds)
    or min(submesh) < 1
    or (bounds % np.asarray(submesh)).any()
    or math.prod(bounds) != len(devices)
  ):
    raise UserError(
      f'model_parallel_submesh {tuple(submesh)} does not tile devices that'
      f' stand as {" x ".join(map(str, bounds))}'
    )
  grid = np.empty(bounds, object)
  for place, device in where.items():
    grid[tuple(place - first)] = device
  # [X / x, x, Y / y, y, ...] -> [X / x, Y / y, ..., x, y, ...]
  split = [n for b, s in zip(bounds, submesh, strict=True) for n in (b // s, s)]
  grid = grid.reshape(split)
  rank = len(bounds)
  grid = grid.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)])
  return grid.reshape(-1, math.prod(submesh))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which part of every array each device holds.

  Attributes:
    mesh: devices along `MESH_AXES`.
    rules: (logical axis, mesh axis or axes or None); where a logical axis has
      several, the first whose mesh axes are free in that array counts.
  """

  mesh: Mesh
  rules: Rules = DEFAULT_RULES

  def __post_init__(self):
    for name, axes in self.rules:
      for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in self.mesh.shape:
          raise UserError(
            f'logical_axis_rules gives {name!r} to mesh axis {axis!r}; mesh'
            f' axes are {", ".join(self.mesh.shape)}'
          )

  def sharding(self, *names: str | None) -> NamedSharding:
    """Of an array with these logical axes; axes past them are whole."""
    spec = nn.logical_to_mesh_axes(names, self.rules)
    return NamedSharding(self.mesh, spec)

  @property
  def batch(self) -> NamedSharding:
    """Examples split, all else whole."""
    return self.sharding('batch')

  @property
  def replicated(self) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch_shards(self) -> int:
    """Parts that a batch is split into."""
    return self._size(self.batch.spec[0])

  @property
  def platform(self) -> str:
    """Of its devices: 'cpu', 'gpu' or 'tpu'."""
    return self.mesh.devices.flat[0].platform

  @property
  def on_cpu(self) -> bool:
    """Of CPU devices."""
    return self.platform == 'cpu'

  def padded(self, batch_size: int) -> int:
    """The next number of rows that can be split."""
    return -(-batch_size // self.batch_shards) * self.batch_shards

  def _size(self, axes: str | Sequence[str] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def shardings(
    self, axes: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict:
    """The tree of shardings for a tree of arrays.

    Args:
      axes: a tuple of logical names in place of each array, as a method's
        `axes(arrays)`; None among the names, and names without a rule, are
        whole on every device.
      arrays: or their shapes.

    Raises:
      UserError: a dimension does not divide by its mesh axis.
    """
    axes, found = parameters.flatten(axes), {}
    for path, array in parameters.flatten(arrays).items():
      names = axes[path]
      if names is None:
        raise ValueError(f'no logical axes are known for {path}')
      if set(names) <= {'embed', 'layers'}:
        # A norm's few kilobytes cost more to gather than to keep.
        names = (None,) * len(names)
      found[path] = self.sharding(*names)
      for name, size, mesh_axes in zip(names, array.shape, found[path].spec):
        if size % self._size(mesh_axes):
          raise UserError(
            f'{path} has {size} {name}, which {self._size(mesh_axes)} devices'
            f' on mesh axis {mesh_axes} do not divide; choose a smaller'
            f' {mesh_axes} or bind another rule for {name}'
          )
    return parameters.nest(found)

  def params(self, shapes: Mapping[str, Any]) -> dict:
    """`shardings` of T5's own parameters."""
    paths = parameters.flatten(shapes)
    axes = {path: parameters.logical_axes(path) for path in paths}
    return self.shardings(axes, shapes)

  def frozen(self, shapes: Mapping[str, Any]) -> dict:
    """As `params`, for parameters that a step only reads.

    Scanned layers stand on axis 1 of their arrays; in memory they come first
    here, as a loop over them reads them. A step would else make a copy of all
    weights in that order, as large as they are.
    """
    found = parameters.flatten(self.params(shapes))
    for path, array in parameters.flatten(shapes).items():
      if parameters.is_scanned(path):
        order = list(range(len(array.shape)))
        order.insert(0, order.pop(parameters.LAYERS_AXIS))
        layout = DeviceLayout(major_to_minor=tuple(order))
        found[path] = Format(layout, found[path])
    return parameters.nest(found)

  def reading_parts(self, batch_size: int) -> int:
    """Parts of a batch of which each process needs one or more in whole."""
    parts: dict[int, set] = {}
    for device, index in self.batch.devices_indices_map((batch_size,)).items():
      first, last, _ = index[0].indices(batch_size)
      parts.setdefault(device.process_index, set()).add((first, last))
    return len({frozenset(part) for part in parts.values()})

  def rows(self, batch_size: int) -> Int[np.ndarray, 'r']:
    """Numbers of the rows of a batch that this process's devices hold.

    Processes whose devices hold parts of one model hold the same rows.
    """
    held = self.batch.addressable_devices_indices_map((batch_size,))
    numbers = np.arange(batch_size)
    return np.unique(np.concatenate([numbers[i] for i in held.values()]))

  def shard_batch(
    self, batch: Mapping[str, np.ndarray], batch_size: int | None = None
  ) -> dict[str, jax.Array]:
    """Global arrays out of what each process has.

    Args:
      batch: arrays of the whole batch, or of this process's rows alone, in
        order (see `rows`).
      batch_size: B of the whole batch; None where it is given.
    """
    given = len(next(iter(batch.values())))
    size = batch_size or given
    rows = np.arange(size) if given == size else self.rows(size)
    sharding = self.batch

    def place(value):
      def part(index):
        first, last = np.searchsorted(rows, np.arange(size)[index[0]][[0, -1]])
        return value[first : last + 1]

      shape = (size, *value.shape[1:])
      return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(value) for name, value in batch.items()}

  def replicate(self, tree: Any) -> Any:
    """Host values, the same in every process, on every device."""

    def place(value):
      value = np.asarray(value)
      return jax.make_array_from_callback(
        value.shape, self.replicated, lambda index: value[index]
      )

    return jax.tree.map(place, tree)

  def jit(self, function: Callable, **settings: Any) -> Callable:
    """`jax.jit` of a function whose activations follow the rules."""
    if self.mesh.size == 1:
      return jax.jit(function, **settings)

    @functools.wraps(function)
    def with_rules(*args, **kwargs):
      with (
        nn.logical_axis_rules(self.rules),
        jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh),
      ):
        return function(*args, **kwargs)

    return jax.jit(with_rules, **settings)


def single_device() -> Layout:
  """Everything on this process's first device."""
  return Layout(make_mesh(1, 1, 1, jax.local_devices()[:1]))
