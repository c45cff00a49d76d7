"""Which mesh a job takes: what a step of T5 needs of devices, estimated.

By formula, in milliseconds, before anything is compiled; `prompt-tuning
compile` asks the compiler itself.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.training import hosts
from prompt_tuning.training import partitioning

GIB = 2**30
# Tokens of a microbatch on a CPU. T5 1.1 small on two cores of an AMD EPYC is
# as fast with 512 to 2,048, a tenth slower with more or with 256; with these
# its activations take 0.3 GB. Slices (see `slices`) are called one by one,
# which costs something of its own, and have twice as many.
CPU_TOKENS = 1024
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


def memory_of_job() -> int | None:
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
    trains: there is a way back, whoever gets the gradients.
    trains_base: T5's own parameters get some.
    microbatches: parts of a batch; None: as many as it takes (see `parts`).
    param_dtype: how T5's parameters are stored.
    num_decodes: sequences that a decoding step follows for each example.
  """

  config: network.T5Config
  batch_size: int
  inputs_length: int
  targets_length: int
  trains: bool = True
  trains_base: bool = False
  microbatches: int | None = 1
  param_dtype: str = 'float32'
  num_decodes: int = 1

  @classmethod
  def of(
    cls,
    config: network.T5Config,
    methods: Sequence[Method],
    feature_lengths: Mapping[str, int],
    *,
    param_dtype: str,
    trains: bool = True,
    **sizes: int | None,
  ) -> 'Workload':
    """A step of a T5 with methods, which bring virtual tokens along.

    Args:
      config: of the network.
      methods: those that act on it, or are trained.
      feature_lengths: ids of 'inputs' (of the text alone) and of 'targets'.
      param_dtype: of T5's parameters where they are frozen.
      trains: False for inference.
      **sizes: batch_size, and the others that the class has.
    """
    tokens = [method.virtual_tokens(config) for method in methods]
    collections = {method.collection for method in methods}
    trains_base = trains and parameters.PARAMS in collections
    return cls(
      config=config,
      inputs_length=feature_lengths['inputs']
      + sum(one.length for one in tokens if one is not None),
      targets_length=feature_lengths['targets'],
      trains=trains,
      trains_base=trains_base,
      param_dtype='float32' if trains_base else param_dtype,
      **sizes,
    )

  def parts(self, layout: partitioning.Layout, limit: int | None) -> int:
    """Microbatches: the given ones, or the fewest that do.

    On a CPU a part has `CPU_TOKENS` at most, since activations that stay in its
    caches are faster; elsewhere it is as large as the memory allows.

    Args:
      layout: of the step.
      limit: bytes that a device has; None: nobody knows.
    """
    if self.microbatches is not None:
      return self.microbatches
    rows = self.batch_size // layout.batch_shards
    for parts in range(1, rows + 1):
      if rows % parts:
        continue
      if layout.on_cpu:
        fits = rows // parts * self.inputs_length <= CPU_TOKENS
      else:
        one = dataclasses.replace(self, microbatches=parts)
        fits = limit is None or one.memory(layout) <= _USABLE * limit
      if fits:
        return parts
    return max(rows, 1)

  def memory(self, layout: partitioning.Layout) -> int:
    """Bytes that a step takes on one device, about."""
    shapes = network.parameter_shapes(self.config)
    shardings = jax.tree.leaves(layout.params(shapes))
    params = jnp.dtype(self.param_dtype).itemsize * sum(
      math.prod(sharding.shard_shape(leaf.shape))
      for leaf, sharding in zip(jax.tree.leaves(shapes), shardings)
    )
    if self.trains_base:
      params *= 2  # gradients; Adafactor's moments are small
    return int(params + self._activations(layout.mesh))

  def _activations(self, mesh: jax.sharding.Mesh) -> float:
    config = self.config
    data, fsdp, model = (mesh.shape[axis] for axis in partitioning.MESH_AXES)
    width = jnp.dtype(config.dtype).itemsize
    rows = math.ceil(self.batch_size / (data * fsdp) / self.microbatches)
    inputs = rows * self.inputs_length
    targets = rows * self.targets_length
    embed = config.emb_dim
    heads = config.num_heads * config.head_dim / model
    mlp = len(config.mlp_activations) * config.mlp_dim / model
    # Scores and softmax are float32, the weights they become of the dtype; a
    # scan keeps the exponentials and their sums too.
    scores = rows * config.num_heads / model * (4 + width)
    scores *= 2 if config.scan_layers else 1
    both = self.inputs_length + self.targets_length
    crossed = 2 * inputs * heads  # keys and values of what is looked at
    encoder = width * inputs * (4 * embed + 4 * heads + 2 * mlp)
    encoder += scores * self.inputs_length**2
    decoder = width * (targets * (6 * embed + 6 * heads + 2 * mlp) + crossed)
    decoder += scores * self.targets_length * both
    logits = 12 * targets * config.vocab_size / model
    transient = max(encoder, decoder, logits)
    layers = (config.num_encoder_layers, config.num_decoder_layers)
    if fsdp > 1:  # a layer's weights, this one's and the next's
      gathered = 2
      if self.trains and not config.scan_layers:
        # XLA gathers once, and keeps them from the way forward to the way back.
        gathered = layers[0] + 1.5 * layers[1]
      transient += gathered * width * embed * (4 * heads + 1.5 * mlp)
    if not self.trains:
      cached = 2 * width * heads * (inputs + targets) * self.num_decodes
      # XLA holds several buffers of each: the loop over layers, inside of that
      # over tokens, hands its caches on.
      return 2 * transient + 5 * layers[1] * cached
    if config.remat_policy == 'full':
      encoder, decoder = width * inputs * embed, width * targets * embed
    elif config.remat_policy == 'minimal':
      encoder = width * inputs * (3 * embed + 3 * heads + mlp)
      decoder = width * (targets * (4 * embed + 4 * heads + mlp) + crossed)
    return transient + layers[0] * encoder + layers[1] * decoder

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
    copies = data * fsdp
    passes = 1
    if self.trains:
      passes = 2 if config.remat_policy == 'none' else 2.5
    rows = math.ceil(self.batch_size / copies)
    sums = 2 * config.num_encoder_layers * rows * self.inputs_length
    sums += 3 * config.num_decoder_layers * rows * self.targets_length
    if self.trains:  # of the gradient of what every decoder layer looks at
      sums += config.num_decoder_layers * rows * self.inputs_length / passes
    moved = passes * sums * config.emb_dim * width * 2 * (model - 1) / model
    shapes = network.parameter_shapes(config)
    size = _count(shapes)
    gathered = math.ceil(passes) * self.microbatches * size
    if not self.trains:
      gathered += (self.targets_length - 1) * _count(shapes['decoder'])
    moved += gathered / model * width * (fsdp - 1) / fsdp
    if self.trains_base:
      moved += 4 * size / model * 2 * (copies - 1) / copies
    return moved


def _count(shapes: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


class _Choice(NamedTuple):
  """A layout, and the bytes a device that it holds and sends, about."""

  layout: partitioning.Layout
  memory: int
  moved: float


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
    of_job = devices is None
    if of_job:
      devices, limit = jax.devices(), memory_of_job()
    else:
      limit = device_memory(devices[0])
    choices, faults = [], []
    for sizes in self._candidates(len(devices)):
      try:
        choices.append(self._choice(sizes, workload, devices, limit))
      except UserError as error:
        faults.append(error)
    if not choices:
      if len(faults) == 1:
        raise faults[0]
      given = [f'{name}={size}' for name, size in self._given().items() if size]
      raise UserError(
        f'no mesh of {len(devices)} devices does for BATCH_SIZE'
        f' {workload.batch_size} and this model'
        + (
          f': {faults[0]}'
          if faults
          else f' with {", ".join(given) or "any sizes"}'
        )
      )
    fitting = [
      one for one in choices if limit is None or one.memory <= _USABLE * limit
    ]
    if fitting:
      chosen = min(
        fitting, key=lambda one: (one.moved, one.layout.mesh.shape['model'])
      )
    else:
      chosen = min(choices, key=lambda one: one.memory)
    if of_job:
      _refuse_hopeless(chosen.memory, limit)
    if len(choices) == 1:
      why = 'as asked'
    elif fitting:
      why = f'of {len(choices)} that do for this batch, the one that'
      why += ' moves least' if limit is None else ' fits and moves least'
    else:
      why = f'none of {len(choices)} fits; this one needs least'
    return chosen.layout, _reason(chosen, why, limit)

  def _given(self) -> dict[str, int | None]:
    """The sizes asked for, by mesh axis."""
    model = self.num_partitions
    if self.model_parallel_submesh is not None:
      model = math.prod(self.model_parallel_submesh)
    return dict(zip(partitioning.MESH_AXES, (self.data, self.fsdp, model)))

  def _candidates(self, devices: int) -> Iterator[tuple[int, int, int]]:
    """All (data, fsdp, model) of that many devices that are as asked."""
    asked = self._given().values()
    for fsdp in range(1, devices + 1):
      for model in range(1, devices // fsdp + 1):
        data, rest = divmod(devices, fsdp * model)
        sizes = (data, fsdp, model)
        if not rest and all(a in (None, s) for a, s in zip(asked, sizes)):
          yield sizes

  def _choice(self, sizes, workload, devices, limit) -> _Choice:
    """What a mesh of these sizes would take, where it does."""
    mesh = partitioning.make_mesh(*sizes, devices, self.model_parallel_submesh)
    layout = partitioning.Layout(mesh, self.logical_axis_rules)
    microbatches = workload.parts(layout, limit)
    workload = dataclasses.replace(workload, microbatches=microbatches)
    parts = layout.batch_shards * microbatches
    # What is left of a last batch in inference is filled up.
    if workload.trains and workload.batch_size % parts:
      raise UserError(
        f'BATCH_SIZE {workload.batch_size} does not divide by the'
        f' {layout.batch_shards} devices that share a batch times'
        f' {workload.microbatches} microbatches'
      )
    return _Choice(layout, workload.memory(layout), workload.moved(mesh))


# The estimate is up to 1.7 times what compilers say.
_HOPELESS = 2


def _refuse_hopeless(memory: int, limit: int | None) -> None:
  """Raises UserError for what these devices cannot hold, by far."""
  if limit is None:  # CPU devices share the machine's
    there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limit = there // jax.local_device_count()
  if memory > _HOPELESS * limit:
    raise UserError(
      f'this takes about {memory / GIB:.4g} GiB a device, which has'
      f' {limit / GIB:.1f}: a smaller BATCH_SIZE, PROMPT_LENGTH or'
      ' TASK_FEATURE_LENGTHS, more devices or train.microbatches take less'
      ' (prompt-tuning compile says how much)'
    )


def _reason(chosen: _Choice, why: str, limit: int | None) -> str:
  """'mesh data 8 x fsdp 1 x model 1 (why): about 3.10 GiB a device ...'."""
  mesh = chosen.layout.mesh
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  why = 'one device' if mesh.size == 1 else why
  text = f'mesh {sizes} ({why}): about {chosen.memory / GIB:.2f} GiB a device'
  if limit is not None:
    text += f' of {limit / GIB:.1f}'
  if mesh.size > 1:
    text += f', {chosen.moved / 1e9:.2f} GB a step between devices'
  return text
