"""Steps compiled ahead of time, for devices that need not be there.

XLA's compilers for TPUs and GPUs run on any Linux host (`pip install
"prompt_tuning[tpu]"` or `[gpu]`), so whether a model fits a slice, and what a
step costs there, is known before the slice is rented.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import optax

from prompt_tuning.errors import UserError
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.models.prompt import Prompt
from prompt_tuning.training import hlo
from prompt_tuning.training import loop
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training import sizing
from prompt_tuning.training.train_state import TrainState

STEPS = ('train', 'predict', 'score')


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
  """The devices of a TPU slice, or of hosts with GPUs, that need not exist.

  Args:
    name: generation and chips along x, y (and z), as the Cloud writes it:
      'v5e:4x4', 'v4:2x2x4' (a device of v2 and v3 is a core, of later ones a
      chip); or a GPU and how many: 'h100:8', 'h100:2x8' for two hosts.
    num_slices: TPU slices of that shape, joined by the data-centre network.

  Raises:
    UserError: there is no such topology, or no compiler for it.
  """
  if name.partition(':')[0] in GPUS:
    return _gpus(name)
  # Nothing of an attached TPU or of the Cloud's metadata is wanted.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '4')
  match = re.fullmatch(r'(\w+):(\d+)x(\d+)(?:x(\d+))?', name)
  if match is None:
    raise UserError(
      f'TOPOLOGY {name!r} is not a TPU generation and its chips, such as'
      f" 'v5e:4x4' or 'v4:2x2x2', nor a GPU ({', '.join(GPUS)}) and how many,"
      " such as 'h100:8'"
    )
  settings: dict[str, Any] = {'num_slices': num_slices}
  if all(int(part or 1) == 1 for part in match.groups()[1:]):
    settings['chips_per_host_bounds'] = (1, 1, 1)
  if match[1] == 'v4':
    settings['chip_config_name'] = 'megacore'  # a chip is one device
  try:
    found = topologies.get_topology_desc(name, 'tpu', **settings)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).strip().splitlines()[0][:200]
    if 'not installed' in reason:
      reason = 'no TPU compiler here: pip install "prompt_tuning[tpu]"'
    raise UserError(f'TOPOLOGY {name!r}: {reason}') from error
  return list(found.devices)


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """What XLA's GPU compiler wants to know, by NVIDIA's data sheets."""

  kind: str
  capability: int
  multiprocessors: int
  memory: int
  bandwidth: int
  l2_cache: int
  shared_memory: int  # bytes of a multiprocessor
  clock: float  # GHz


GPUS = {
  'a100_40gb': _Gpu(
    'NVIDIA A100-SXM4-40GB', 8, 108, 40 * 10**9, 1555, 40 * 2**20, 167936, 1.41
  ),
  'a100': _Gpu(
    'NVIDIA A100-SXM4-80GB', 8, 108, 80 * 10**9, 2039, 40 * 2**20, 167936, 1.41
  ),
  'h100': _Gpu(
    'NVIDIA H100 80GB HBM3', 9, 132, 80 * 10**9, 3350, 50 * 2**20, 233472, 1.98
  ),
  'h200': _Gpu(
    'NVIDIA H200', 9, 132, 141 * 10**9, 4800, 50 * 2**20, 233472, 1.98
  ),
}


def _gpus(name: str) -> list[Any]:
  """Devices for `topology_devices`."""
  match = re.fullmatch(r'(\w+):(?:(\d+)x)?(\d+)', name)
  if match is None:
    raise UserError(
      f"TOPOLOGY {name!r} is not a GPU and how many, such as 'h100:8' or"
      " 'h100:2x8' for two hosts"
    )
  # The plugin would else refuse a machine without a driver.
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  gpu = GPUS[match[1]]
  # A text-format XLA `GpuTargetConfigProto`.
  target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      threads_per_core_limit: 2048 fpus_per_core: {64 * (gpu.capability - 7)}
      core_count: {gpu.multiprocessors} clock_rate_ghz: {gpu.clock}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {gpu.shared_memory - 1024}
      shared_memory_per_core: {gpu.shared_memory}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 l2_cache_size: {gpu.l2_cache}
      memory_bandwidth: {gpu.bandwidth * 10**9}
      device_memory_size: {gpu.memory}
      cuda_compute_capability {{ major: {gpu.capability} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{gpu.kind}"
  """
  try:
    return topologies.get_topology_desc(
      platform='cuda',
      target_config=target,
      topology=f'1x{match[2] or 1}x{match[3]}',
    ).devices
  except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
    reason = str(error).strip().splitlines()[0][:200]
    raise UserError(
      f'TOPOLOGY {name!r}: {reason}; pip install "prompt_tuning[gpu]"'
    ) from error


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiler says of a step.

  Attributes:
    step: 'train', 'predict' or 'score'.
    device_kind: as JAX calls it.
    mesh: {'data': ..., 'fsdp': ..., 'model': ...}.
    why: why this mesh.
    fits: the compiler found room for it.
    memory: bytes at the fullest moment, on one device.
    limit: bytes of a device; None: not known.
    arguments: bytes of parameters, state and batch.
    temporaries: bytes beside them.
    output: bytes of what the step returns and does not write over its inputs.
    flops: of products, of all devices together.
    memory_traffic: bytes between a device's memory and cores.
    collectives: {kind: (how many, bytes)} on one device.
    sent: bytes that a device sends.
    compile_seconds: how long it took.
  """

  step: str
  device_kind: str
  mesh: dict[str, int]
  why: str
  fits: bool
  memory: int
  limit: int | None = None
  arguments: int = 0
  temporaries: int = 0
  output: int = 0
  flops: float = 0.0
  memory_traffic: int = 0
  collectives: dict[str, tuple[int, int]] = dataclasses.field(
    default_factory=dict
  )
  sent: float = 0.0
  compile_seconds: float = 0.0

  @property
  def devices(self) -> int:
    return math.prod(self.mesh.values())

  @property
  def seconds(self) -> dict[str, float] | None:
    """What products, memory and network take each at the chip's full rates.

    A step takes as long as the longest of them if all overlap, and their sum if
    nothing does. None: the chip's rates are not known.
    """
    chip = sizing.CHIPS.get(self.device_kind)
    if chip is None or not self.fits:
      return None
    return {
      'compute': self.flops / self.devices / chip.flops,
      'memory': self.memory_traffic / chip.memory_bandwidth,
      'network': self.sent / chip.network_bandwidth,
    }

  def __str__(self) -> str:
    head = (
      f'{self.step} on {self.devices} x {self.device_kind}, {self.why}\n'
      f'  {"fits" if self.fits else "does not fit"}:'
      f' {self.memory / sizing.GIB:.2f} GiB'
    )
    if self.limit:
      head += f' of {self.limit / sizing.GIB:.2f}'
    if not self.fits:
      return head
    lines = [
      head + f' (arguments {self.arguments / sizing.GIB:.2f}, temporaries'
      f' {self.temporaries / sizing.GIB:.2f}, output'
      f' {self.output / sizing.GIB:.2f}); compiled in'
      f' {self.compile_seconds:.0f} s',
      f'  {self.flops / 1e12:.2f} TFLOP; a device moves'
      f' {self.memory_traffic / 1e9:.1f} GB in its memory and sends'
      f' {self.sent / 1e9:.2f} GB'
      + ''.join(
        f'; {kind} {count} x, {size / 1e9:.3f} GB'
        for kind, (count, size) in self.collectives.items()
      ),
    ]
    if seconds := self.seconds:
      each = ', '.join(f'{n} {1e3 * s:.1f}' for n, s in seconds.items())
      lines.append(
        f'  at least {1e3 * max(seconds.values()):.1f} ms a step at the full'
        f' rates of the chip, {1e3 * sum(seconds.values()):.1f} ms if nothing'
        f' overlaps ({each})'
      )
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Program:
  """A step and what it is compiled for; attributes as `compile_steps`'s."""

  model: EncoderDecoderModel
  prompt: Prompt | None
  workload: sizing.Workload
  optimizer: Callable[..., optax.GradientTransformation]
  learning_rate: float | optimizers.Schedule
  partitioner: sizing.Partitioner

  def compile(self, step: str, devices: Sequence[Any] | None) -> Report:
    """Compiles one of `STEPS`."""
    workload = self.workload
    if step != 'train':
      workload = dataclasses.replace(
        workload, trained=(), microbatches=1, num_decodes=self.model.num_decodes
      )
    layout, why = self.partitioner.layout(workload, devices)
    function, arguments = self.build(step, layout)
    device = layout.mesh.devices.flat[0]
    known = {
      'step': step,
      'device_kind': device.device_kind,
      'mesh': dict(layout.mesh.shape),
      'why': why,
      'limit': sizing.device_memory(device),
    }
    start = time.monotonic()
    traced = function.trace(*arguments)
    options = {}
    if device.platform in ('gpu', 'cuda') and jax.default_backend() == 'cpu':
      # Triton's tiles are found by trying them on a GPU.
      options['xla_gpu_enable_triton_gemm'] = False
    try:
      compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      needed = _exhausted(str(error))
      if needed is None:
        raise
      return Report(
        **known | {'limit': needed[1]}, fits=False, memory=needed[0]
      )
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    moves = hlo.collectives(text)
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    # TPU's compiler knows what is never alive together; others do not say.
    peak = memory.peak_memory_in_bytes if device.platform == 'tpu' else 0
    peak = peak or whole
    return Report(
      **known,
      fits=known['limit'] is None or peak <= known['limit'],
      memory=peak,
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      output=output,
      flops=count_flops(traced.jaxpr, workload.targets_length),
      memory_traffic=hlo.bytes_accessed(text),
      collectives=hlo.by_kind(moves),
      sent=sum(one.count * one.wire_bytes for one in moves),
      compile_seconds=time.monotonic() - start,
    )

  def build(
    self, step: str, layout: partitioning.Layout
  ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted step of `STEPS` and the shapes of its arguments."""
    if step == 'train':
      return self._train(layout)
    variables, batch = self._variables(layout), self._batch(layout)
    jit = functools.partial(layout.jit, out_shardings=layout.replicated)
    if step == 'score':
      return jit(self.model.score_batch), (variables, batch)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    return jit(self.model.predict_batch), (variables, batch, key)

  def _train(self, layout: partitioning.Layout):
    tx = optimizers.build_optimizer(self.optimizer, self.learning_rate, 0)
    trained = self.workload.trained
    variables = self._variables(layout, trained)
    state = jax.eval_shape(
      functools.partial(TrainState.create, optimizer=tx),
      {name: variables.pop(name) for name in trained},
    )
    shardings = loop.state_shardings(layout, state)
    state = jax.tree.map(_shaped, state, shardings)
    step = loop.step_function(
      self.model,
      tx,
      self.learning_rate,
      jax.random.key(0),
      layout,
      self.workload.microbatches,
      shardings,
    )
    return step, (state, variables, self._batch(layout))

  def _variables(self, layout, trained=()) -> dict[str, Any]:
    shapes = network.parameter_shapes(self.model.config)
    place = layout.params if 'params' in trained else layout.frozen
    dtype = 'float32' if 'params' in trained else self.workload.param_dtype
    variables = {
      'params': jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, jnp.dtype(dtype), sharding=sharding
        ),
        shapes,
        place(shapes),
      )
    }
    if self.prompt is not None:
      shape = (
        self.prompt.num_prompts,
        self.prompt.length,
        self.model.config.emb_dim,
      )
      table = jax.ShapeDtypeStruct(shape, jnp.float32)
      variables['prompt'] = {'table': _shaped(table, layout.replicated)}
    return variables

  def _batch(self, layout) -> dict[str, Any]:
    rows = layout.padded(self.workload.batch_size)
    lengths = {'encoder_input_tokens': self.workload.inputs_length}
    for name in ('input_tokens', 'target_tokens', 'loss_weights'):
      lengths[f'decoder_{name}'] = self.workload.targets_length
    return {
      name: jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=layout.batch
      )
      for name, length in lengths.items()
    }


def _shaped(leaf, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _exhausted(message: str) -> tuple[int, int] | None:
  """(bytes needed, bytes there are) of a compiler's out-of-memory message."""
  size = r'\(?([\d.]+)([KMGT])\)?'
  found = re.search(rf'Used {size} of {size} hbm', message) or re.search(
    rf'HLO temporaries {size} exceeds available HBM {size}', message
  )
  if found is None:
    return None
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  needed, unit, limit, limit_unit = found.groups()
  return (
    int(float(needed) * units[unit]),
    int(float(limit) * units[limit_unit]),
  )


def count_flops(jaxpr: Any, loop_trips: int = 1) -> float:
  """Operations of all matrix products, two for each multiplication.

  Counted in JAX's program, before it is split over devices: what is computed
  again for rematerialisation counts, what XLA fuses or drops does too.

  Args:
    jaxpr: of the step.
    loop_trips: how often a loop runs whose length is not known beforehand
      (decoding: the longest it can take).
  """
  total = 0.0
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      contracted, _ = equation.params['dimension_numbers'][0]
      shape = equation.invars[0].aval.shape
      total += (
        2.0
        * equation.outvars[0].aval.size
        * math.prod(shape[axis] for axis in contracted)
      )
      continue
    runs = {'scan': equation.params.get('length'), 'while': loop_trips}
    inner = sum(
      count_flops(program, loop_trips) for program in _programs(equation)
    )
    total += inner * (runs.get(equation.primitive.name) or 1)
  return total


def _programs(equation) -> Iterator[Any]:
  """The programs that an equation runs."""
  for name, value in equation.params.items():
    if name.startswith(('jvp', 'fwd', 'bwd', 'vjp')):
      continue  # rules of derivatives, not run here
    for one in value if isinstance(value, tuple | list) else (value,):
      if hasattr(one, 'eqns') or hasattr(getattr(one, 'jaxpr', None), 'eqns'):
        yield one


def compile_steps(
  model: EncoderDecoderModel,
  topology: str | None = None,
  *,
  steps: Sequence[str] = STEPS,
  batch_size: int = 32,
  task_feature_lengths: Mapping[str, int] | None = None,
  prompt: Prompt | None = None,
  trained: Sequence[str] = ('prompt',),
  optimizer: Callable[..., optax.GradientTransformation] = optimizers.adafactor,
  learning_rate: float | optimizers.Schedule = 0.3,
  microbatches: int = 1,
  frozen_dtype: str = 'bfloat16',
  partitioner: sizing.Partitioner | None = None,
  num_slices: int = 1,
  advise: bool = True,
  report_file: str | os.PathLike | None = None,
  say: Callable[[str], Any] = print,
) -> list[Report]:
  """Compiles the steps of a run without its weights, data or devices.

  Args:
    model: as the run's.
    topology: see `topology_devices`; None: the devices of this machine.
    steps: of `STEPS`: a training step, decoding a batch, scoring a batch.
    batch_size: B over all devices.
    task_feature_lengths: {'inputs': 512, 'targets': 16} if None; the prompt's
      virtual tokens come on top.
    prompt: None for none.
    trained: as in `loop.train`.
    optimizer: likewise.
    learning_rate: likewise.
    microbatches: likewise.
    frozen_dtype: how frozen parameters are stored.
    partitioner: None chooses a mesh.
    num_slices: see `topology_devices`.
    advise: where a training step does not fit, look for settings with which it
      does, and compile them to be sure.
    report_file: gets all reports as JSON.
    say: takes each report as text.

  Returns:
    A report of each step.

  Raises:
    UserError: unknown step or topology, or a step does not fit; the message
      names the setting with which it does.
  """
  for step in steps:
    if step not in STEPS:
      raise UserError(f'steps has {step!r}; it takes {", ".join(STEPS)}')
  if report_file is not None:
    report_file = pathlib.Path(report_file)
    try:
      report_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(
        f'report_file {report_file} cannot be written: {error.strerror}'
      ) from error
  lengths = {'inputs': 512, 'targets': 16} | dict(task_feature_lengths or {})
  devices = None
  if topology is not None:
    devices = topology_devices(topology, num_slices)
  program = Program(
    model=model,
    prompt=prompt,
    workload=sizing.Workload(
      config=model.config,
      batch_size=batch_size,
      inputs_length=lengths['inputs'] + (prompt.length if prompt else 0),
      targets_length=lengths['targets'],
      trained=tuple(trained),
      microbatches=microbatches,
      param_dtype='float32' if 'params' in trained else frozen_dtype,
    ),
    optimizer=optimizer,
    learning_rate=learning_rate,
    partitioner=partitioner or sizing.Partitioner(),
  )
  reports = []
  for step in steps:
    reports.append(program.compile(step, devices))
    say(str(reports[-1]))
  if report_file is not None:
    rows = [
      dataclasses.asdict(one) | {'topology': topology, 'seconds': one.seconds}
      for one in reports
    ]
    report_file.write_text(json.dumps(rows, indent=1) + '\n')
  unfit = [one for one in reports if not one.fits]
  if unfit:
    raise UserError(_advice(program, unfit[0], devices, topology, advise))
  return reports


def _advice(program, report, devices, topology, advise) -> str:
  """What does not fit, and with which setting it would."""
  where = topology or report.device_kind
  fault = (
    f'the {report.step} step does not fit {where}: it needs'
    f' {report.memory / sizing.GIB:.2f} GiB of'
    f' {(report.limit or 0) / sizing.GIB:.2f}'
  )
  if not advise or report.step != 'train':
    return f'{fault}; take a larger slice, or a smaller BATCH_SIZE'
  for flags, changed in _alternatives(program):
    try:
      layout, _ = changed.partitioner.layout(changed.workload, devices)
    except UserError:
      continue
    # A guess that is far off need not be compiled.
    if changed.workload.memory(layout) > 1.3 * (report.limit or math.inf):
      continue
    tried = changed.compile('train', devices)
    if tried.fits:
      return (
        f'{fault}; {flags} makes it fit, in'
        f' {tried.memory / sizing.GIB:.2f} GiB (compiled)'
      )
  return (
    f'{fault}; no setting of this package makes it fit: take a larger slice'
  )


def _alternatives(program: Program) -> Iterator[tuple[str, Program]]:
  """Settings that need less memory, the cheapest in time first."""
  workload = program.workload
  config = workload.config
  # Each with all that came before it, but for the policy: (flags, changes).
  half = ('', {})
  if workload.param_dtype == 'float32' and 'params' not in workload.trained:
    half = (
      '--gin.compile_steps.frozen_dtype="\'bfloat16\'" (of a run:'
      ' --gin.train.frozen_dtype)',
      {'param_dtype': 'bfloat16'},
    )
  found = [half]
  policies = {'none': ('minimal', 'full'), 'minimal': ('full',)}
  for policy in policies.get(config.remat_policy, ()):
    flags = f'--gin.T5Config.remat_policy="\'{policy}\'"'
    if not config.scan_layers:
      flags += ' --gin.T5Config.scan_layers=True'
    changed = dataclasses.replace(config, remat_policy=policy, scan_layers=True)
    found.append((f'{half[0]} {flags}', {**half[1], 'config': changed}))
  strongest = found[-1]
  for parts in (2, 4, 8):
    number = parts * workload.microbatches
    if workload.batch_size % number == 0:
      found.append(
        (
          f'{strongest[0]} --gin.compile_steps.microbatches={number} (of a run:'
          ' --gin.train.microbatches)',
          {**strongest[1], 'microbatches': number},
        )
      )
  free = dataclasses.replace(
    program.partitioner,
    data=None,
    fsdp=None,
    num_partitions=None,
    model_parallel_submesh=None,
  )
  partitioners = {'': program.partitioner}
  if free != program.partitioner:
    partitioners['no Partitioner bindings'] = free
  for asked, partitioner in partitioners.items():
    for flags, changes in found:
      changed = dataclasses.replace(workload, **changes)
      if changed == workload and partitioner == program.partitioner:
        continue
      yield (
        ' and '.join(part for part in (asked, flags.strip()) if part),
        dataclasses.replace(
          program,
          partitioner=partitioner,
          workload=changed,
          model=dataclasses.replace(program.model, config=changed.config),
        ),
      )
