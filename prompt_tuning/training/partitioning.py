"""Where arrays live: the mesh, and rules from names of axes to mesh axes.

The parameters' logical axes are T5X's (`embed`, `mlp`, `joined_kv`, `vocab`,
`heads`, `relpos_buckets`, `layers`). A rule gives a logical axis to a mesh
axis; XLA's partitioner (GSPMD) derives the rest of the program from the
shardings of parameters and batch.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from flax import traverse_util
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from prompt_tuning.errors import UserError

MESH_AXES = ('data', 'fsdp', 'model')
# A batch is split over both of these.
BATCH_AXES = ('data', 'fsdp')

Rules = Sequence[tuple[str, str | None]]
DEFAULT_RULES: Rules = (
  ('vocab', 'model'),
  ('mlp', 'model'),
  ('joined_kv', 'model'),
  ('heads', 'model'),
  ('embed', 'fsdp'),
  ('relpos_buckets', None),
  ('layers', None),
)

_KERNEL_AXES = {
  'query': ('embed', 'joined_kv'),
  'key': ('embed', 'joined_kv'),
  'value': ('embed', 'joined_kv'),
  'out': ('joined_kv', 'embed'),
  'wi': ('embed', 'mlp'),
  'wi_0': ('embed', 'mlp'),
  'wi_1': ('embed', 'mlp'),
  'wo': ('mlp', 'embed'),
  'logits_dense': ('embed', 'vocab'),
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with the axes data, fsdp and model; one -1 takes what is left."""
  devices = jax.devices() if devices is None else devices
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
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def logical_axes(path: Sequence[str], ndim: int) -> tuple[str, ...]:
  """Logical names of the axes of the parameter at `path`, as T5X's."""
  if path[-1] == 'embedding':
    axes = ('vocab', 'embed')
  elif path[-1] == 'rel_embedding':
    axes = ('heads', 'relpos_buckets')
  elif path[-1] == 'scale':
    axes = ('embed',)
  elif path[-1] == 'kernel' and path[-2] in _KERNEL_AXES:
    axes = _KERNEL_AXES[path[-2]]
  else:
    raise ValueError(f'no logical axes are known for {"/".join(path)}')
  if ndim == len(axes) + 1:  # Scanned layers stand on axis 1.
    axes = (axes[0], 'layers', *axes[1:])
  return axes


def param_shardings(
  mesh: Mesh, shapes: Mapping[str, Any], rules: Rules = DEFAULT_RULES
) -> dict:
  """The tree of shardings for a tree of parameters or their shapes.

  Raises:
    UserError: a dimension does not divide by its mesh axis.
  """
  mesh_axis = dict(rules)
  shardings = {}
  for path, value in traverse_util.flatten_dict(shapes).items():
    spec = []
    for name, size in zip(
      logical_axes(path, len(value.shape)), value.shape, strict=True
    ):
      axis = mesh_axis.get(name)
      if axis is not None and size % mesh.shape[axis]:
        raise UserError(
          f'{"/".join(path)} has {size} {name}, which {mesh.shape[axis]}'
          f' devices on mesh axis {axis} do not divide; choose a smaller'
          f' {axis} or bind another rule for {name}'
        )
      spec.append(axis)
    shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
  return traverse_util.unflatten_dict(shardings)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples split over data and fsdp, whole otherwise."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """This process's examples as its part of global arrays."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }
