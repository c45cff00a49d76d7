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
import jax.numpy as jnp
import optax

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.planning import hlo
from prompt_tuning.planning.topologies import topology_devices
from prompt_tuning.training import base as base_lib
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training import setup
from prompt_tuning.training import stepping
from prompt_tuning.training.train_state import TrainState

STEPS = ('train', 'predict', 'score')


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
    chip = mesh_choice.CHIPS.get(self.device_kind)
    if chip is None or not self.fits:
      return None
    return {
      'compute': self.flops / self.devices / chip.flops,
      'memory': self.memory_traffic / chip.memory_bandwidth,
      'network': self.sent / chip.network_bandwidth,
    }

  def __str__(self) -> str:
    text = (
      f'{self.step} on {self.devices} x {self.device_kind}, {self.why}\n'
      f'  {"fits" if self.fits else "does not fit"}: {_gib(self.memory)} GiB'
    )
    if self.limit:
      text += f' of {_gib(self.limit)}'
    if not self.fits:
      return text
    text += (
      f' (arguments {_gib(self.arguments)}, temporaries'
      f' {_gib(self.temporaries)}, output {_gib(self.output)}); compiled in'
      f' {self.compile_seconds:.0f} s\n'
      f'  {self.flops / 1e12:.2f} TFLOP; a device moves'
      f' {self.memory_traffic / 1e9:.1f} GB in its memory and sends'
      f' {self.sent / 1e9:.2f} GB'
    )
    for kind, (count, size) in self.collectives.items():
      text += f'; {kind} {count} x, {size / 1e9:.3f} GB'
    if seconds := self.seconds:
      each = ', '.join(f'{n} {1e3 * s:.1f}' for n, s in seconds.items())
      text += (
        f'\n  at least {1e3 * max(seconds.values()):.1f} ms a step at the full'
        f' rates of the chip, {1e3 * sum(seconds.values()):.1f} ms if nothing'
        f' overlaps ({each})'
      )
    return text


def _gib(size: float) -> str:
  return f'{size / mesh_choice.GIB:.2f}'


@dataclasses.dataclass(frozen=True)
class Program:
  """A step and what it is compiled for; attributes as `compile_steps`'s.

  The model has its methods; a training step trains their arrays.
  """

  model: EncoderDecoderModel
  workload: mesh_choice.Workload
  optimizer: Callable[..., optax.GradientTransformation]
  learning_rate: float | optimizers.Schedule
  partitioner: mesh_choice.Partitioner

  def compile(self, step: str, devices: Sequence[Any] | None) -> Report:
    """Compiles one of `STEPS`."""
    workload = self.workload
    if step != 'train':
      workload = dataclasses.replace(
        workload,
        trains=False,
        trains_base=False,
        microbatches=1,
        num_decodes=self.model.num_decodes,
      )
    layout, why = self.partitioner.layout(workload, devices)
    function, arguments = self.build(step, layout)
    device = layout.mesh.devices.flat[0]
    limit = mesh_choice.device_memory(device)
    known = {
      'step': step,
      'device_kind': device.device_kind,
      'mesh': dict(layout.mesh.shape),
      'why': why,
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
      sizes = _exhausted(str(error))
      if sizes is None:
        raise
      return Report(**known, fits=False, memory=sizes[0], limit=sizes[1])
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    moves = hlo.collectives(text)
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    # TPU's compiler knows what is never alive together; others do not say.
    peak = device.platform == 'tpu' and memory.peak_memory_in_bytes
    peak = peak or whole
    return Report(
      **known,
      fits=limit is None or peak <= limit,
      memory=peak,
      limit=limit,
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      output=output,
      flops=hlo.count_flops(traced.jaxpr, workload.targets_length),
      memory_traffic=hlo.bytes_accessed(text),
      collectives=hlo.by_kind(moves),
      sent=sum(one.count * one.wire_bytes for one in moves),
      compile_seconds=time.monotonic() - start,
    )

  def build(
    self, step: str, layout: partitioning.Layout
  ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted step of `STEPS` and the shapes of its arguments."""
    shapes = network.parameter_shapes(self.model.config)
    base = base_lib.frozen_shapes(
      shapes, layout.frozen(shapes), self.workload.param_dtype
    )
    frozen, batch = {parameters.PARAMS: base}, self._batch(layout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, axes = self._arrays(key, shapes)
    if step != 'train':
      places = {k: layout.shardings(axes[k], trained[k]) for k in trained}
      arguments = (jax.tree.map(_shaped, trained, places) | frozen, batch)
      function = self.model.score_batch
      if step == 'predict':
        function, arguments = self.model.predict_batch, (*arguments, key)
      return layout.jit(function, out_shardings=layout.replicated), arguments
    rates = setup.rates_of(self.model.methods, trained)
    tx = optimizers.build_optimizer(
      self.optimizer, self.learning_rate, 0, axes, rates
    )
    create = functools.partial(TrainState.create, optimizer=tx)
    state = jax.eval_shape(create, trained)
    shardings = setup.state_shardings(layout, state, axes)
    function = stepping.step_function(
      self.model,
      tx,
      self.learning_rate,
      jax.random.key(0),
      layout,
      self.workload.microbatches,
      shardings,
    )
    frozen = {k: v for k, v in frozen.items() if k not in trained}
    return function, (jax.tree.map(_shaped, state, shardings), frozen, batch)

  def _arrays(self, key: Any, shapes: Any) -> tuple[dict, dict]:
    """{collection: shapes} and {collection: axes} of the methods' arrays."""
    text = TaskText(encode=lambda text: [0], labels=('any',))
    arrays, axes = {}, {}
    for method in self.model.methods:
      init = functools.partial(method.init, text=text)
      arrays[method.collection] = jax.eval_shape(init, key, shapes)
      axes[method.collection] = method.axes(arrays[method.collection])
    return arrays, axes

  def _batch(self, layout) -> dict[str, jax.ShapeDtypeStruct]:
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
  for words in (
    f'Used {size} of {size} hbm',
    f'HLO temporaries {size} exceeds available HBM {size}',
  ):
    if found := re.search(words, message):
      needed, unit, limit, limit_unit = found.groups()
      units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
      return (
        int(float(needed) * units[unit]),
        int(float(limit) * units[limit_unit]),
      )
  return None


def compile_steps(
  model: EncoderDecoderModel,
  topology: str | None = None,
  *,
  steps: Sequence[str] = STEPS,
  batch_size: int = 32,
  feature_lengths: Mapping[str, int] | None = None,
  methods: Sequence[Method] = (),
  optimizer: Callable[..., optax.GradientTransformation] = optimizers.adafactor,
  learning_rate: float | optimizers.Schedule = 0.3,
  microbatches: int = 1,
  frozen_dtype: str = 'bfloat16',
  partitioner: mesh_choice.Partitioner | None = None,
  num_slices: int = 1,
  advise: bool = True,
  report_file: str | os.PathLike | None = None,
  say: Callable[[str], Any] = print,
) -> list[Report]:
  """Compiles the steps of a run without its weights, data or devices.

  Args:
    model: as the run's.
    topology: see `topologies.topology_devices`, with which JAX itself works on
      the CPU for the rest of the process; None: the devices of this machine.
    steps: of `STEPS`: a training step, decoding a batch, scoring a batch.
    batch_size: B over all devices.
    feature_lengths: {'inputs': 512, 'targets': 16} if None; virtual tokens come
      on top.
    methods: what is trained; a training step needs one.
    optimizer: as in `loop.train`.
    learning_rate: likewise.
    microbatches: likewise.
    frozen_dtype: how frozen parameters are stored.
    partitioner: None chooses a mesh.
    num_slices: see `topologies.topology_devices`.
    advise: where a training step does not fit, look for settings with which it
      does, and compile them to be sure.
    report_file: gets all reports as JSON.
    say: takes each report as text.

  Returns:
    A report of each step.

  Raises:
    UserError: unknown step or topology, nothing to train, or a step does not
      fit; the message names the setting with which it does.
  """
  for step in steps:
    if step not in STEPS:
      raise UserError(f'steps has {step!r}; it takes {", ".join(STEPS)}')
  if 'train' in steps and not methods:
    raise UserError("steps has 'train' and nothing is trained; give methods")
  if report_file is not None:
    report_file = pathlib.Path(report_file)
    try:
      report_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(
        f'report_file {report_file} cannot be written: {error.strerror}'
      ) from error
  devices = None
  if topology is not None:
    # The compiler needs no accelerator, and a machine's own is left alone. JAX
    # pays no heed where it has devices already.
    jax.config.update('jax_platforms', 'cpu')
    devices = topology_devices(topology, num_slices)
  program = Program(
    model=dataclasses.replace(model, methods=tuple(methods)),
    workload=mesh_choice.Workload.of(
      model.config,
      methods,
      {'inputs': 512, 'targets': 16} | dict(feature_lengths or {}),
      param_dtype=frozen_dtype,
      batch_size=batch_size,
      microbatches=microbatches,
    ),
    optimizer=optimizer,
    learning_rate=learning_rate,
    partitioner=partitioner or mesh_choice.Partitioner(),
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
  for one in reports:
    if not one.fits:
      where = topology or one.device_kind
      raise UserError(_advice(program, one, devices, where, advise))
  return reports


def _advice(program, report, devices, where: str, advise: bool) -> str:
  """What does not fit, and with which setting it would."""
  limit = report.limit or 0
  fault = (
    f'the {report.step} step does not fit {where}: it needs'
    f' {_gib(report.memory)} GiB of {_gib(limit)}'
  )
  if not advise or report.step != 'train':
    return f'{fault}; take a larger slice, or a smaller BATCH_SIZE'
  for flags, changed in _alternatives(program):
    try:
      layout, _ = changed.partitioner.layout(changed.workload, devices)
    except UserError:
      continue
    # A guess that is far off need not be compiled.
    if limit and changed.workload.memory(layout) > 1.3 * limit:
      continue
    tried = changed.compile('train', devices)
    if tried.fits:
      needed = f'{_gib(tried.memory)} GiB (compiled)'
      return f'{fault}; {flags} makes it fit, in {needed}'
  fault += '; no setting of this package makes it fit'
  return f'{fault}: take a larger slice'


def _alternatives(program: Program) -> Iterator[tuple[str, Program]]:
  """Settings that need less memory, the cheapest in time first."""
  flags, workload = '', program.workload
  if workload.param_dtype == 'float32' and not workload.trains_base:
    flags = (
      '--gin.compile_steps.frozen_dtype="\'bfloat16\'" (of a run:'
      ' --gin.train.frozen_dtype)'
    )
    workload = dataclasses.replace(workload, param_dtype='bfloat16')
  found = [(flags, workload)]
  config = workload.config
  policies = {'none': ('minimal', 'full'), 'minimal': ('full',)}
  for policy in policies.get(config.remat_policy, ()):
    more = f' --gin.T5Config.remat_policy="\'{policy}\'"'
    if not config.scan_layers:
      more += ' --gin.T5Config.scan_layers=True'
    changed = dataclasses.replace(config, remat_policy=policy, scan_layers=True)
    found.append((flags + more, dataclasses.replace(workload, config=changed)))
  flags, workload = found[-1]  # with the strongest policy
  for parts in (2, 4, 8):
    number = parts * workload.microbatches
    if workload.batch_size % number == 0:
      more = (
        f' --gin.compile_steps.microbatches={number} (of a run:'
        ' --gin.train.microbatches)'
      )
      changed = dataclasses.replace(workload, microbatches=number)
      found.append((flags + more, changed))
  asked = program.partitioner
  free = mesh_choice.Partitioner(logical_axis_rules=asked.logical_axis_rules)
  choices = [('', asked)]
  if free != asked:
    choices.append(('no Partitioner bindings', free))
  for words, partitioner in choices:
    for flags, workload in found:
      model = dataclasses.replace(program.model, config=workload.config)
      changed = dataclasses.replace(
        program, model=model, workload=workload, partitioner=partitioner
      )
      if changed != program:
        yield ' and '.join(filter(None, (words, flags.strip()))), changed
