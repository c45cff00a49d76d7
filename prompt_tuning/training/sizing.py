"""What a step of T5 needs of a device, and which mesh to take for it.

Estimates by formula, in milliseconds, for the automatic choice of a mesh
before anything is compiled; `prompt-tuning compile` asks the compiler itself.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.models import network
from prompt_tuning.training import hosts
from prompt_tuning.training import partitioning

GIB = 2**30
# Of a device's memory: the rest is for the runtime, for what the allocator
# cannot fill, and for what the formulas leave out.
_USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Chip:
  """A JAX device, by its maker's data sheet.

  Attributes:
    memory: main memory, bytes.
    flops: dense bfloat16 products, FLOP/s.
    memory_bandwidth: main memory, bytes/s.
    network_bandwidth: to the devices of its slice or host, bytes/s a direction,
      all links together.
  """

  memory: float
  flops: float
  memory_bandwidth: float
  network_bandwidth: float


# By `device_kind`. A device of v2 and v3 is a core, half a chip.
CHIPS = {
  'TPU v2': Chip(8 * GIB, 23e12, 350e9, 62e9),
  'TPU v3': Chip(16 * GIB, 61.5e12, 450e9, 82e9),
  'TPU v4': Chip(32 * GIB, 275e12, 1228e9, 150e9),
  'TPU v5 lite': Chip(16 * GIB, 197e12, 819e9, 100e9),
  'TPU v5': Chip(95 * GIB, 459e12, 2765e9, 300e9),
  'TPU v6 lite': Chip(32 * GIB, 918e12, 1640e9, 224e9),
  'NVIDIA A100-SXM4-40GB': Chip(40e9, 312e12, 1555e9, 300e9),
  'NVIDIA A100-SXM4-80GB': Chip(80e9, 312e12, 2039e9, 300e9),
  'NVIDIA H100 80GB HBM3': Chip(80e9, 989e12, 3350e9, 450e9),
  'NVIDIA H200': Chip(141e9, 989e12, 4800e9, 450e9),
}


def device_memory(device: Any) -> int | None:
  """Bytes that arrays may take on a device; None where nobody says (CPU)."""
  if device.platform == 'cpu':
    return None
  try:
    stats = device.memory_stats()
  except (AttributeError, NotImplementedError, RuntimeError):
    stats = None  # of a topology that is not attached
  if stats and 'bytes_limit' in stats:
    return int(stats['bytes_limit'])
  chip = CHIPS.get(device.device_kind)
  return None if chip is None else int(chip.memory)


def _memory_of_job() -> int | None:
  """`device_memory` of this job's devices, the same in all its processes.

  A device tells its memory to its own process alone.
  """
  limit = device_memory(jax.local_devices()[0])
  # In MiB: what processes agree on travels as 32 bits.
  agreed = hosts.agree(-1 if limit is None else limit // 2**20)
  return None if agreed < 0 else agreed * 2**20


@dataclasses.dataclass(frozen=True)
class Workload:
  """A step, as far as its size goes.

  Attributes:
    config: of the network.
    batch_size: B over all devices.
    inputs_length: T, virtual tokens included.
    targets_length: L.
    trained: collections that get gradients; () for inference.
    microbatches: parts of a batch.
    param_dtype: how the parameters are stored.
    num_decodes: sequences that a decoding step follows for each example.
  """

  config: network.T5Config
  batch_size: int
  inputs_length: int
  targets_length: int
  trained: Sequence[str] = ('prompt',)
  microbatches: int = 1
  param_dtype: str = 'float32'
  num_decodes: int = 1

  def memory(self, layout: partitioning.Layout) -> int:
    """Bytes that a step takes on one device, about."""
    shapes = network.parameter_shapes(self.config)
    width = jnp.dtype(self.param_dtype).itemsize
    params = sum(
      width * math.prod(sharding.shard_shape(leaf.shape))
      for leaf, sharding in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(layout.params(shapes))
      )
    )
    if 'params' in self.trained:
      params *= 2  # gradients; Adafactor's moments are small
    return int(params + self._activations(layout.mesh))

  def _activations(self, mesh: jax.sharding.Mesh) -> float:
    config = self.config
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    model = mesh.shape['model']
    width = jnp.dtype(config.dtype).itemsize
    rows = math.ceil(self.batch_size / parts / self.microbatches)
    inputs = rows * self.inputs_length
    targets = rows * self.targets_length
    embed = config.emb_dim
    heads = config.num_heads * config.head_dim / model
    mlp = len(config.mlp_activations) * config.mlp_dim / model
    # Scores and softmax are float32, the weights they become of the dtype.
    scores = rows * config.num_heads / model * (4 + width)
    if config.scan_layers:
      scores *= 2  # the scan keeps the exponentials and their sums too
    encoder = width * inputs * (4 * embed + 4 * heads + 2 * mlp)
    encoder += scores * self.inputs_length**2
    decoder = width * (
      targets * (6 * embed + 6 * heads + 2 * mlp) + 2 * inputs * heads
    )
    decoder += (
      scores * self.targets_length * (self.inputs_length + self.targets_length)
    )
    logits = 12 * targets * config.vocab_size / model
    transient = max(encoder, decoder, logits)
    if mesh.shape['fsdp'] > 1:  # a layer's weights, this one's and the next's
      gathered = 2
      if self.trained and not config.scan_layers:
        # XLA gathers once, and keeps them from the way forward to the way back.
        gathered = config.num_encoder_layers + 1.5 * config.num_decoder_layers
      transient += gathered * width * embed * (4 * heads + 1.5 * mlp)
    if not self.trained:
      cached = 2 * width * heads * (inputs + targets) * self.num_decodes
      # XLA holds several buffers of each: the loop over layers, inside of that
      # over tokens, hands its caches on.
      return 2 * transient + 5 * config.num_decoder_layers * cached
    match config.remat_policy:
      case 'full':
        kept = (width * inputs * embed, width * targets * embed)
      case 'minimal':
        kept = (
          width * inputs * (3 * embed + 3 * heads + mlp),
          width
          * (targets * (4 * embed + 4 * heads + mlp) + 2 * inputs * heads),
        )
      case _:
        kept = (encoder, decoder)
    return (
      transient
      + config.num_encoder_layers * kept[0]
      + config.num_decoder_layers * kept[1]
    )

  def moved(self, mesh: jax.sharding.Mesh) -> float:
    """Bytes that a device sends to others in a step, about.

    The model axis sums activations, twice a layer of the encoder and three
    times one of the decoder, forwards and backwards; fsdp gathers the weights
    of every layer, forwards and backwards, and in decoding those of the decoder
    for every token; what is left is the gradient.
    """
    config = self.config
    data, fsdp, model = (mesh.shape[axis] for axis in partitioning.MESH_AXES)
    width = jnp.dtype(config.dtype).itemsize
    passes = 1
    if self.trained:
      passes = 2 if config.remat_policy == 'none' else 2.5
    rows = math.ceil(self.batch_size / (data * fsdp))
    sums = 2 * config.num_encoder_layers * rows * self.inputs_length
    sums += 3 * config.num_decoder_layers * rows * self.targets_length
    if self.trained:  # of the gradient of what every decoder layer looks at
      sums += config.num_decoder_layers * rows * self.inputs_length / passes
    moved = passes * sums * config.emb_dim * width * 2 * (model - 1) / model
    shapes = network.parameter_shapes(config)
    size = _count(shapes)
    gathered = math.ceil(passes) * self.microbatches * size
    if not self.trained:
      gathered += (self.targets_length - 1) * _count(shapes['decoder'])
    moved += gathered / model * width * (fsdp - 1) / fsdp
    if 'params' in self.trained:
      parts = data * fsdp
      moved += 4 * size / model * 2 * (parts - 1) / parts
    return moved


def _count(shapes: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """How a job's devices are shared out; what is None is chosen.

  Chosen is the mesh that moves the fewest bytes between devices among those
  that fit their memory: `data` alone where every device can hold the model.

  Attributes:
    data: devices along `data`, copies of the model.
    fsdp: devices along `fsdp`, which share out weights and examples.
    num_partitions: devices along `model`, T5X's name for it.
    model_parallel_submesh: T5X's: the block of the machine that one model
      stretches over, in place of num_partitions (see
      `partitioning.make_mesh`).
    logical_axis_rules: see `partitioning.Layout`.
  """

  data: int | None = None
  fsdp: int | None = None
  num_partitions: int | None = None
  model_parallel_submesh: Sequence[int] | None = None
  logical_axis_rules: partitioning.Rules = partitioning.DEFAULT_RULES

  def __post_init__(self):
    if self.model_parallel_submesh is not None:
      if self.num_partitions is not None:
        raise UserError(
          'num_partitions and model_parallel_submesh say the same thing; give'
          ' one of them'
        )
      if min(self.model_parallel_submesh, default=0) < 1:
        raise UserError(
          'model_parallel_submesh needs positive sizes, got'
          f' {tuple(self.model_parallel_submesh)}'
        )
    for name in ('data', 'fsdp', 'num_partitions'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f'Partitioner.{name} must be 1 or more, got {value}')

  @property
  def _model(self) -> int | None:
    if self.model_parallel_submesh is not None:
      return math.prod(self.model_parallel_submesh)
    return self.num_partitions

  def layout(
    self, workload: Workload, devices: Sequence[Any] | None = None
  ) -> tuple[partitioning.Layout, str]:
    """The layout for a step, and why it is this one.

    Args:
      workload: the step.
      devices: None takes all of the job.

    Raises:
      UserError: no mesh of these devices does for the batch and the model.
    """
    if devices is None:
      devices, limit = jax.devices(), _memory_of_job()
    else:
      limit = device_memory(devices[0])
    devices = list(devices)
    candidates = list(self._candidates(len(devices)))
    layouts, faults = [], []
    for sizes in candidates:
      try:
        mesh = partitioning.make_mesh(
          *sizes, devices, self.model_parallel_submesh
        )
        layout = partitioning.Layout(mesh, self.logical_axis_rules)
        parts = layout.batch_shards * workload.microbatches
        # What is left of a last batch in inference is filled up.
        if workload.trained and workload.batch_size % parts:
          raise UserError(
            f'BATCH_SIZE {workload.batch_size} does not divide by the'
            f' {layout.batch_shards} devices that share a batch times'
            f' {workload.microbatches} microbatches'
          )
        layouts.append((layout, workload.memory(layout), workload.moved(mesh)))
      except UserError as error:
        faults.append(error)
    if not layouts:
      if len(faults) == 1:
        raise faults[0]
      raise UserError(
        f'no mesh of {len(devices)} devices does for BATCH_SIZE'
        f' {workload.batch_size} and this model'
        + (f': {faults[0]}' if faults else f' with {self._given()}')
      )
    fitting = [
      one for one in layouts if limit is None or one[1] <= _USABLE * limit
    ]
    if fitting:
      layout, memory, moved = min(
        fitting, key=lambda one: (one[2], one[0].mesh.shape['model'])
      )
    else:
      layout, memory, moved = min(layouts, key=lambda one: one[1])
    return layout, self._reason(
      layout, memory, moved, limit, len(layouts), bool(fitting)
    )

  def _given(self) -> str:
    given = {'data': self.data, 'fsdp': self.fsdp, 'model': self._model}
    named = [f'{name}={size}' for name, size in given.items() if size]
    return ', '.join(named) or 'any sizes'

  def _candidates(self, devices: int) -> Iterator[tuple[int, int, int]]:
    """All (data, fsdp, model) of that many devices that are as asked."""
    for fsdp in range(1, devices + 1):
      for model in range(1, devices // fsdp + 1):
        data, rest = divmod(devices, fsdp * model)
        sizes = (data, fsdp, model)
        asked = (self.data, self.fsdp, self._model)
        if not rest and all(a in (None, s) for a, s in zip(asked, sizes)):
          yield sizes

  def _reason(self, layout, memory, moved, limit, choices, fits) -> str:
    sizes = ' x '.join(
      f'{name} {size}' for name, size in layout.mesh.shape.items()
    )
    text = f'mesh {sizes}'
    if layout.mesh.size == 1:
      text += ' (one device)'
    elif choices == 1:
      text += ' (as asked)'
    elif fits:
      text += f' (of {choices} that do for this batch, the one'
      text += (
        ' that moves least' if limit is None else ' that fits and moves least'
      )
      text += ')'
    else:
      text += f' (none of {choices} fits; this one needs least)'
    text += f': about {memory / GIB:.2f} GiB a device'
    if limit is not None:
      text += f' of {limit / GIB:.1f}'
    if layout.mesh.size > 1:
      text += f', {moved / 1e9:.2f} GB a step between devices'
    return text
