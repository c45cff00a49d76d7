"""Steps compiled for devices that are here, and for some that are not.

The TPU part needs libtpu (`pip install "prompt_tuning[tpu]"`) and is skipped
without; `.ci/run` runs it in an environment of its own. So does the GPU part
need `prompt_tuning[gpu]`, some gigabytes that CI does without.
"""

import dataclasses
import functools
import importlib.util
import json
import mmap
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.reparametrization import Superposition
from prompt_tuning.models import attention_kernel
from prompt_tuning.models import layers
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.planning import compilation
from prompt_tuning.planning import hlo
from prompt_tuning.planning import topologies
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training import setup
from prompt_tuning.training.train_state import TrainState

CONFIG = network.T5Config(256, 32, 4, 8, 64, 1, 1)
LENGTHS = {'inputs': 8, 'targets': 4}


def compiled(config=CONFIG, **settings):
  settings = {
    'feature_lengths': LENGTHS,
    'batch_size': 8,
    'methods': (Prompt(3),),
    'frozen_dtype': 'float32',
    'say': lambda text: None,
    **settings,
  }
  return compilation.compile_steps(EncoderDecoderModel(config), **settings)


@pytest.fixture(scope='module')
def reports():
  return {report.step: report for report in compiled()}


def test_memory_of_a_step_is_that_of_its_arguments_and_more(reports):
  report = reports['train']
  params = sum(
    4 * leaf.size for leaf in jax.tree.leaves(network.parameter_shapes(CONFIG))
  )
  prompt = 3 * 32 * 4
  # Parameters, the table and its moments (v, and a scalar or two), the batch.
  batch = 8 // 8 * (8 + 3 + 3 * 4) * 4
  assert params + 2 * prompt + batch <= report.arguments
  assert report.arguments < params + 2 * prompt + batch + 64
  assert report.fits and report.limit is None  # of a CPU nobody knows
  # A prompt's gradient and six sums.
  assert report.collectives == {'all-reduce': (1, prompt + 6 * 4)}
  # Of the state nothing is copied: it is written over. Some metrics remain.
  assert report.output < 256
  assert report.memory >= report.arguments


def test_flops_of_scoring_are_those_worked_out_by_hand(reports):
  embed, heads, mlp, rows, inputs, targets = 32, 4 * 8, 64, 8, 8 + 3, 4
  table = 2 * rows * inputs * 3 * embed  # the prompt's one-hot product

  def attention(queries, keys):
    projections = 2 * rows * embed * heads * (2 * queries + 2 * keys)
    return projections + 2 * 2 * rows * heads * queries * keys

  def feed_forward(tokens):
    return 3 * 2 * rows * tokens * embed * mlp

  encoder = attention(inputs, inputs) + feed_forward(inputs)
  # Four queries of 8 numbers a head: keys and values are projected from the
  # queries' side, and each of the 4 heads looks at the whole width.
  crossed = 2 * rows * embed * heads * 4 * targets
  crossed += 2 * 2 * rows * 4 * targets * inputs * embed
  decoder = attention(targets, targets) + crossed + feed_forward(targets)
  logits = 2 * rows * targets * embed * 256
  assert reports['score'].flops == table + encoder + decoder + logits
  # Back through the same products, to inputs alone: the weights are frozen.
  ratio = reports['train'].flops / reports['score'].flops
  assert 1.9 < ratio < 2.3


def test_a_report_is_written_and_can_be_read(tmp_path):
  said = []
  compiled(steps=('score',), report_file=tmp_path / 'a/b.json', say=said.append)
  (row,) = json.loads((tmp_path / 'a/b.json').read_text())
  assert row['step'] == 'score' and row['fits']
  assert row['mesh'] == {'data': 8, 'fsdp': 1, 'model': 1}
  assert said[0].startswith('score on 8 x cpu, mesh data 8')


def test_what_runs_is_what_was_compiled():
  """The loop's step for the same settings is the program reported here."""
  program = compilation.Program(
    EncoderDecoderModel(CONFIG, methods=(Prompt(3),)),
    mesh_choice.Workload(CONFIG, 8, 11, 4),
    optax.sgd,
    0.1,
    mesh_choice.Partitioner(),
  )
  layout, _ = program.partitioner.layout(program.workload)
  step, (state, frozen, batch) = program.build('train', layout)
  made = jax.tree.map(
    lambda leaf: jax.device_put(
      jax.numpy.ones(leaf.shape, leaf.dtype), leaf.sharding
    ),
    (state, frozen, batch),
  )
  new, metrics = step(*made)
  assert metrics['loss'].sharding.is_fully_replicated
  assert new.trainable['prompt']['table'].shape == (1, 3, 32)
  assert new.trainable['prompt']['table'].sharding.is_fully_replicated


def test_adam_of_a_trained_model_is_split_as_its_parameters():
  """Moments of a parameter's shape go where it is; factored ones stay whole."""
  layout = partitioning.Layout(partitioning.make_mesh(1, 2, 4))
  shapes = {parameters.PARAMS: network.parameter_shapes(CONFIG)}
  axes = {name: ModelTuning().axes(arrays) for name, arrays in shapes.items()}
  for optimizer, moments in (
    (optax.adam(1e-3), 'mu'),
    (optimizers.adafactor(1e-3), 'v_row'),
  ):
    state = jax.eval_shape(
      lambda tree, tx=optimizer: TrainState.create(tree, tx), shapes
    )
    shardings = setup.state_shardings(layout, state, axes)
    found = [
      sharding
      for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
      if moments in jax.tree_util.keystr(path)
      and 'wi_0' in jax.tree_util.keystr(path)
    ]
    if moments == 'mu':
      assert {s.spec for s in found} == {
        jax.sharding.PartitionSpec('fsdp', 'model')
      }
    else:
      assert all(s.is_fully_replicated for s in found)
    kernel = shardings.trainable['params']['encoder']['layers_0']['mlp']
    assert not kernel['wi_0']['kernel'].is_fully_replicated


class Small(compilation.Program):
  """Stands in for a compiler with `LIMIT` bytes a device."""

  LIMIT = 0

  def compile(self, step, devices):
    report = super().compile(step, devices)
    fits = report.memory <= self.LIMIT
    return dataclasses.replace(report, fits=fits, limit=self.LIMIT)


def test_what_does_not_fit_comes_with_a_setting_that_does(monkeypatch):
  config = network.T5Config(256, 32, 4, 8, 64, 2, 2, scan_layers=True)
  lengths = {'inputs': 64, 'targets': 4}
  settings = {'steps': ('train',), 'feature_lengths': lengths}
  (roomy,) = compiled(config, **settings)
  (tight,) = compiled(
    dataclasses.replace(config, remat_policy='full'), **settings
  )
  assert tight.memory < roomy.memory
  monkeypatch.setattr(compilation, 'Program', Small)
  monkeypatch.setattr(Small, 'LIMIT', (tight.memory + roomy.memory) // 2)
  with pytest.raises(UserError) as caught:
    compiled(config, **settings)
  said = str(caught.value)
  assert 'the train step does not fit' in said
  assert 'T5Config.remat_policy=' in said and 'makes it fit' in said
  assert '(compiled)' in said
  monkeypatch.setattr(Small, 'LIMIT', 1000)
  with pytest.raises(UserError, match='take a larger slice'):
    compiled(config, **settings)


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v5e', 'is not a TPU generation and its chips'),
    ('h100', 'is not a GPU and how many'),
    ('h100:2x', 'is not a GPU and how many'),
  ],
)
def test_a_topology_that_cannot_be_read_is_refused(topology, message):
  with pytest.raises(UserError, match=message):
    topologies.topology_devices(topology)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize(
  'method',
  [
    Prompt(3),
    Prompt(3, reparametrization=Superposition(4)),
    Lora(2),
    IA3(),
    PerLayerPrompt(3),
    Prefix(3, hidden=4),
    DePT(3),
    ModelTuning(),
  ],
)
def test_a_method_says_what_is_trained(method, scan):
  """What it brings along is among the arguments, and what it replaces not."""
  config = dataclasses.replace(CONFIG, scan_layers=scan)
  program = compilation.Program(
    EncoderDecoderModel(config, methods=(method,)),
    mesh_choice.Workload.of(
      config, [method], LENGTHS, param_dtype='bfloat16', batch_size=8
    ),
    optimizers.adafactor,
    0.3,
    mesh_choice.Partitioner(),
  )
  layout, _ = program.partitioner.layout(program.workload)
  step, (state, frozen, batch) = program.build('train', layout)
  assert set(state.trainable) == {method.collection}
  assert {str(x.dtype) for x in jax.tree.leaves(state.trainable)} == {'float32'}
  virtual = 0 if method.virtual_tokens(config) is None else 3
  assert batch['encoder_input_tokens'].shape == (8, 8 + virtual)
  if isinstance(method, ModelTuning):
    assert not frozen and program.workload.trains_base
  else:
    assert set(frozen) == {parameters.PARAMS}
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {'bfloat16'}
  new, _ = jax.eval_shape(step, state, frozen, batch)
  assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(
    lambda x: x.shape, state
  )


def test_a_training_step_without_methods_is_refused():
  with pytest.raises(UserError, match='nothing is trained; give methods'):
    compiled(methods=())


def test_an_unknown_step_is_refused():
  with pytest.raises(UserError, match="steps has 'trian'"):
    compiled(steps=('trian',))


def test_without_its_compiler_a_topology_is_one_line():
  if importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is installed here')
  with pytest.raises(UserError, match=r'pip install "prompt_tuning\[tpu\]"'):
    topologies.topology_devices('v5e:2x2')


def test_no_other_shortage_is_taken_for_one_of_memory():
  # Not a size of the workload: nothing the user sets would mend it.
  message = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.'
  assert compilation._exhausted(message) is None


# For TPUs and GPUs that are not here.

needs_cuda = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason='no GPU compiler is installed: pip install "prompt_tuning[gpu]"',
)
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is not installed: pip install "prompt_tuning[tpu]"',
)


def compiled_for(tmp_path, size, topology, *bindings):
  """(report, exit code, what was said) of `prompt-tuning compile`."""
  path = tmp_path / 'report.json'
  env = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': os.pathsep.join(sys.path)}
  # It is for the command itself to leave this machine's accelerators alone.
  del env['JAX_PLATFORMS']
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'prompt_tuning', 'compile'),
      f'--gin_file=models/t5_1_1_{size}.gin',
      '--gin_file=runs/compile.gin',
      f"--gin.TOPOLOGY='{topology}'",
      "--gin.compile_steps.steps=('train',)",
      f"--gin.compile_steps.report_file='{path}'",
      *bindings,
    ],
    env=env,
    capture_output=True,
    text=True,
  )
  assert path.exists(), done.stderr[-2000:]
  return json.loads(path.read_text())[0], done.returncode, done.stderr


@needs_libtpu
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v4:2x2x1'])
def test_t5_small_fits_four_chips_and_sends_its_prompts_gradient(
  tmp_path, topology
):
  report, code, _ = compiled_for(tmp_path, 'small', topology)
  assert code == 0 and report['fits']
  assert report['mesh'] == {'data': 4, 'fsdp': 1, 'model': 1}
  assert report['memory'] < 2 * mesh_choice.GIB
  # 100 x 512 floats and six metrics, in one all-reduce or two.
  (kind, (count, size)), *none = report['collectives'].items()
  assert kind == 'all-reduce' and count <= 2 and not none
  assert size == 100 * 512 * 4 + 6 * 4


@needs_libtpu
def test_the_compilers_words_for_too_little_memory_are_read():
  """Pins the text of libtpu: an upgrade that changes it fails here."""
  (device, *_) = topologies.topology_devices('v5e:1x1')
  x = jax.ShapeDtypeStruct(
    (9 * 2**28,),
    'float32',
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  lowered = jax.jit(lambda x: x + 1).trace(x).lower()
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    lowered.compile()
  needed, limit = compilation._exhausted(str(caught.value))
  # What comes in and what goes out, 9 GiB each, of a chip of 16.
  assert needed == 18 * mesh_choice.GIB
  assert 15 * mesh_choice.GIB < limit <= 16 * mesh_choice.GIB
  # Its other text, of a shortage found late, as it stands in the library.
  words = 'Ran out of memory in memory space hbm. Used $1 of $2 hbm.'
  (folder,) = importlib.util.find_spec('libtpu').submodule_search_locations
  with (
    open(os.path.join(folder, 'libtpu.so'), 'rb') as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
  ):
    assert library.find(words.encode()) > 0
  sizes = words.replace('$1', '17.50G').replace('$2', '15.75G')
  assert compilation._exhausted(sizes) == (35 * 2**29, 63 * 2**28)


@needs_libtpu
@pytest.mark.parametrize('topology', ['v5e:3x7', 'v9:2x2'])
def test_a_slice_that_is_not_sold_is_one_line(topology):
  with pytest.raises(UserError, match=f"TOPOLOGY '{topology}': INVALID") as one:
    topologies.topology_devices(topology)
  assert 'pip install' not in str(one.value)


@needs_libtpu
def test_xxl_fits_the_papers_slice_split_in_two(tmp_path):
  """16 chips of v3 (32 cores of 16 GiB), on which the paper tuned XXL."""
  report, code, _ = compiled_for(tmp_path, 'xxl', 'v3:4x4')
  assert code == 0 and report['fits']
  assert report['mesh'] == {'data': 16, 'fsdp': 1, 'model': 2}
  weights = 2 * 11_135_332_352 / 2 / mesh_choice.GIB
  memory = report['memory'] / mesh_choice.GIB
  assert weights < memory < 14
  # No second copy of the weights in the order of the scan.
  assert report['temporaries'] < 0.4 * report['arguments']
  count, size = report['collectives']['all-reduce']
  # Two sums a layer of the encoder, three of the decoder, each way; the
  # decoder's layers hand what they looked at back; rows of tokens; prompt.
  encoder, decoder = 2 * 612 * 4096 * 2, 2 * 16 * 4096 * 2
  layers = 24 * (2 * 2 * encoder + encoder + 2 * 3 * decoder) + encoder
  assert size == pytest.approx(layers, rel=0.05)
  assert count < 24 * 12


@needs_libtpu
def test_xxl_on_four_small_chips_is_told_what_makes_it_fit(tmp_path):
  # Copies of the model do not fit 16 GiB; halves and quarters do.
  report, code, said = compiled_for(
    tmp_path,
    'xxl',
    'v5e:2x2',
    '--gin.Partitioner.data=4',
    "--gin.T5Config.remat_policy='none'",
  )
  assert code == 1 and not report['fits']
  assert report['memory'] > report['limit']
  last = said.strip().splitlines()[-1]
  assert last.startswith('error: the train step does not fit v5e:2x2: it needs')
  assert 'no Partitioner bindings' in last and 'makes it fit' in last


@functools.cache
def compiled_attention(topology, heads, length, batch=1, kernel=True):
  """Attention and its gradient by queries, keys and values, for a device.

  D is 64, types bfloat16; (memory analysis, text, FLOPs, bytes moved).
  """
  (device, *_) = topologies.topology_devices(topology)

  def shaped(*shape, dtype='bfloat16'):
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def attend(query, key, value, table, segments):
    query, key, value = (
      x.reshape(batch, length, heads, 64) for x in (query, key, value)
    )
    if kernel:
      mixed = attention_kernel.attention(
        *(query, key, value, table, segments, segments),
        backend='gpu' if device.platform != 'tpu' else 'tpu',
      )
    else:
      places = jnp.arange(length)
      bucket = layers.relative_position_bucket(
        places[None] - places[:, None],
        bidirectional=True,
        num_buckets=32,
        max_distance=128,
      )
      product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32
      )
      scores = product('bqnd,bsnd->bnqs', query, key) + table[None, :, bucket]
      seen = segments[:, None, :, None] == segments[:, None, None]
      weights = jax.nn.softmax(jnp.where(seen, scores, -1e10))
      mixed = product('bnqs,bsnd->bqnd', weights.astype('bfloat16'), value)
      mixed = mixed.astype('bfloat16')
    return mixed.reshape(batch, length, heads * 64)

  def step(given, query, key, value, *others):
    mixed, back = jax.vjp(
      lambda *arrays: attend(*arrays, *others), query, key, value
    )
    return mixed, *back(given)

  wide = shaped(batch, length, heads * 64)
  traced = jax.jit(step).trace(
    *(wide,) * 4,
    shaped(heads, 32, dtype='float32'),
    shaped(batch, length, dtype='int32'),
  )
  options = {}
  if device.platform != 'tpu':
    options['xla_gpu_enable_triton_gemm'] = False
  done = traced.lower().compile(compiler_options=options)
  text = done.as_text()
  return (
    done.memory_analysis(),
    text,
    hlo.count_flops(traced.jaxpr),
    hlo.bytes_accessed(text),
  )


@needs_libtpu
@pytest.mark.parametrize(
  ('topology', 'heads', 'length', 'batch'),
  [
    ('v4:1x1x1', 64, 612, 4),
    ('v5e:1x1', 64, 612, 1),
    ('v5p:1x1x1', 32, 612, 1),
    ('v6e:1x1', 64, 2048, 1),
  ],
)
def test_the_attention_kernel_compiles_and_keeps_no_scores(
  topology, heads, length, batch
):
  memory, text, flops, _ = compiled_attention(topology, heads, length, batch)
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  whole = -(-length // 128) * 128
  assert not re.search(
    rf'\[[\d,]*\b({length},{length}|{whole},{whole})\b', text
  )
  # Beside what comes and goes: that in whole blocks, and some numbers for each
  # query and head.
  arrays = 4 * 2 * batch * whole * heads * 64
  assert memory.temp_size_in_bytes < 1.6 * arrays
  # Two products forward, three and four in the kernels of the gradient.
  assert flops == 9 * 2 * batch * heads * whole * whole * 64


@needs_libtpu
def test_the_attention_kernel_moves_less_than_plain_products():
  case = 'v5p:1x1x1', 32, 612, 1
  memory, _, _, moved = compiled_attention(*case)
  plain, _, _, plain_moved = compiled_attention(*case, kernel=False)
  assert 3 * moved < plain_moved
  assert 3 * memory.temp_size_in_bytes < plain.temp_size_in_bytes


@needs_cuda
@pytest.mark.parametrize('topology', ['h100:1', 'a100:1'])
def test_the_attention_kernel_compiles_for_gpus(topology):
  memory, text, _, _ = compiled_attention(topology, 64, 612)
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
  assert memory.temp_size_in_bytes < 2 * 64 * 612 * 612


@needs_cuda
@pytest.mark.parametrize(
  ('settings', 'gibibytes'),
  [
    ([], 75),
    (['--gin.compile_steps.microbatches=4'], 40),
    (["--gin.T5Config.remat_policy='full'"], 40),
  ],
)
def test_xxl_fits_one_gpu_of_80_gb_in_bfloat16(tmp_path, settings, gibibytes):
  report, code, _ = compiled_for(tmp_path, 'xxl', 'h100:1', *settings)
  assert code == 0 and report['fits']
  weights = 2 * 11_135_332_352 / mesh_choice.GIB
  assert weights < report['memory'] / mesh_choice.GIB < gibibytes
  assert not report['collectives']
