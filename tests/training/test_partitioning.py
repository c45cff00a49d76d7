"""Meshes, rules, and what a step sends between devices, from its program."""

import types

import jax
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.planning import compilation
from prompt_tuning.planning import hlo
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning

B, T, L, P, E, LAYERS = 8, 16 + 5, 4, 5, 64, 2
METRICS = 6 * 4  # loss, z-loss, weights, cross entropy, correct, tokens


def collectives(data, fsdp, model, scan=False, microbatches=1):
  """Those of a compiled training step on the eight devices of the tests."""
  config = network.T5Config(
    *(256, E, 8, 8, 128, LAYERS, LAYERS), scan_layers=scan
  )
  program = compilation.Program(
    EncoderDecoderModel(config, methods=(Prompt(P),)),
    mesh_choice.Workload(config, B, T, L, microbatches=microbatches),
    optimizers.adafactor,
    0.3,
    mesh_choice.Partitioner(data, fsdp, model),
  )
  layout, _ = program.partitioner.layout(program.workload)
  step, arguments = program.build('train', layout)
  found = hlo.collectives(step.lower(*arguments).compile().as_text())
  return found, mesh_choice.Workload(config, B, T, L)


def parameter_bytes(workload):
  shapes = network.parameter_shapes(workload.config)
  return sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize('scan', [False, True])
def test_copies_of_the_model_exchange_the_prompts_gradient_alone(scan):
  found, _ = collectives(8, 1, 1, scan)
  (only,) = found
  assert only.kind == 'all-reduce' and only.group == 8
  assert only.bytes == P * E * 4 + METRICS


def test_microbatches_keep_every_row_on_its_device():
  found, _ = collectives(4, 1, 2, microbatches=2)
  prompt = [one for one in found if one.group == 4]
  # The gradient once for each part, and nothing else between copies.
  assert [(one.kind, one.bytes, one.count) for one in prompt] == [
    ('all-reduce', P * E * 4 + METRICS, 2)
  ]


@pytest.mark.parametrize('mesh', [(1, 8, 1), (2, 4, 1)])
def test_fsdp_gathers_weights_and_reduces_the_prompts_gradient_alone(mesh):
  found, workload = collectives(*mesh, scan=True)
  kinds = hlo.by_kind(found)
  assert set(kinds) == {'all-reduce', 'all-gather'}
  assert kinds['all-reduce'] == (1, P * E * 4 + METRICS)
  # Every weight for the way forward and again for the way back, none thrice;
  # the token table's rows and their ids come on top.
  _, gathered = kinds['all-gather']
  size = parameter_bytes(workload)
  assert size < gathered <= 2 * size
  groups = {one.group for one in found if one.kind == 'all-gather'}
  assert groups == {mesh[1]}


@pytest.mark.parametrize('mesh', [(1, 1, 8), (4, 1, 2), (2, 2, 2)])
def test_the_model_axis_sums_activations_and_nothing_of_the_weights(mesh):
  found, _ = collectives(*mesh)
  data, fsdp, model = mesh
  rows = B // (data * fsdp)
  encoder, decoder = rows * T * E * 4, rows * L * E * 4
  softmax = 2 * rows * L * 4
  summed = [one for one in found if one.kind == 'all-reduce']
  prompt = [one for one in summed if one.group == data * fsdp]
  if data * fsdp > 1:
    assert [one.bytes for one in prompt] == [P * E * 4 + METRICS]
  over_model = [
    one for one in summed if one.group == model and one not in prompt
  ]
  forward = sum(one.bytes for one in over_model if 'transpose' not in one.name)
  # Attention and mlp of every layer, and the tokens' rows.
  layers = LAYERS * (2 * encoder + 3 * decoder) + encoder + decoder
  # A way back that XLA joins with the last of these counts there.
  assert layers <= forward + softmax <= layers + 2 * softmax + 2 * decoder
  backward = sum(one.bytes for one in over_model) - forward
  # One sum for each projection: q, k, v and the two of the gate; what the
  # decoder looks at is projected twice in each of its layers. XLA for TPU and
  # GPU adds those of one input first: 2, 1 and 3 + 1 sums.
  most = LAYERS * (5 * encoder + 2 * encoder + 6 * decoder) + 2 * decoder
  assert 0 < backward <= most + softmax
  others = {one.kind for one in found} - {'all-reduce'}
  assert others <= {'all-gather'}
  if fsdp == 1:  # the largest logit of each part of the vocabulary
    assert (
      sum(one.bytes for one in found if one.kind == 'all-gather')
      == 2 * rows * L * 4 * model
    )


def test_rules_are_data_and_say_which_axis_is_split():
  mesh = partitioning.make_mesh(2, 2, 2)
  layout = partitioning.Layout(mesh)
  spec = jax.sharding.PartitionSpec
  assert layout.sharding('embed', 'mlp').spec == spec('fsdp', 'model')
  # The batch has taken fsdp: the activation's embed stays whole.
  assert layout.sharding('batch', 'length', 'embed').spec == spec(
    ('data', 'fsdp'), None, None
  )
  assert layout.batch_shards == 4
  t5x = partitioning.Layout(
    mesh, (('batch', 'data'), ('embed', 'data'), ('mlp', 'model'))
  )
  assert t5x.sharding('embed', 'mlp').spec == spec('data', 'model')
  assert t5x.batch_shards == 2
  with pytest.raises(UserError, match="'modle'; mesh axes are data, fsdp"):
    partitioning.Layout(mesh, (('mlp', 'modle'),))


def test_norms_are_whole_and_scanned_layers_come_first_in_memory():
  layout = partitioning.Layout(partitioning.make_mesh(1, 4, 2))
  config = network.T5Config(256, 16, 2, 8, 32, 2, 2, scan_layers=True)
  shapes = network.parameter_shapes(config)
  shardings = layout.frozen(shapes)
  layers = shardings['encoder']['encoder']
  scale = layers['pre_mlp_layer_norm']['scale']
  assert scale.sharding.is_fully_replicated
  kernel = layers['mlp']['wi_0']['kernel']
  assert kernel.layout.major_to_minor == (1, 0, 2)
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(
    'fsdp', None, 'model'
  )
  # Tables and final norms have no layers.
  assert shardings['token_embedder']['embedding'].spec == (
    jax.sharding.PartitionSpec('model', 'fsdp')
  )


def test_the_arrays_of_methods_are_whole_unless_their_axes_have_a_rule():
  layout = partitioning.Layout(partitioning.make_mesh(1, 4, 2))
  spec = jax.sharding.PartitionSpec
  for scan in (False, True):
    config = network.T5Config(256, 16, 2, 8, 32, 2, 2, scan_layers=scan)
    lora = Lora(2)
    arrays = jax.eval_shape(
      lambda key, params, lora=lora: lora.init(key, params, ANY_TEXT),
      jax.random.key(0),
      network.parameter_shapes(config),
    )
    found = layout.shardings(lora.axes(arrays), arrays)
    assert jax.tree.structure(found) == jax.tree.structure(arrays)
    assert all(one.is_fully_replicated for one in jax.tree.leaves(found))
  table = {'table': jax.ShapeDtypeStruct((3, 10, 16), 'float32')}
  found = layout.shardings({'table': ('prompts', None, 'embed')}, table)
  assert found['table'].spec == spec(None, None, 'fsdp')
  with pytest.raises(UserError, match='table has 10 embed, which 4 devices'):
    layout.shardings({'table': ('prompts', 'embed', None)}, table)
  with pytest.raises(ValueError, match='no logical axes are known for table'):
    layout.shardings({'table': None}, table)


def test_a_dimension_that_does_not_divide_is_named():
  config = network.T5Config(256, 16, 2, 8, 32, 1, 1)
  layout = partitioning.Layout(partitioning.make_mesh(2, 1, 4))
  with pytest.raises(UserError, match='rel_embedding has 2 heads, which 4'):
    layout.params(network.parameter_shapes(config))


def test_every_row_of_a_batch_goes_where_its_device_is():
  layout = partitioning.Layout(partitioning.make_mesh(2, 2, 2))
  batch = {'ids': np.arange(24).reshape(8, 3)}
  placed = layout.shard_batch(batch)['ids']
  np.testing.assert_array_equal(placed, batch['ids'])
  assert placed.addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(layout.rows(8), np.arange(8))
  assert layout.reading_parts(8) == 1
  table = layout.replicate({'table': np.ones((2, 2))})['table']
  assert table.sharding.is_fully_replicated


def chips(x, y, z, cores):
  """Stand-ins for the devices of a TPU slice."""
  return [
    types.SimpleNamespace(
      id=((i * y + j) * z + k) * cores + core,
      coords=(i, j, k),
      core_on_chip=core,
      process_index=0,
    )
    for i in range(x)
    for j in range(y)
    for k in range(z)
    for core in range(cores)
  ]


def test_a_submesh_is_a_block_of_neighbouring_chips():
  """(2, 1, 1, 2), as T5X takes it: two chips along x, both cores of each."""
  tiles = partitioning._tiled(chips(4, 4, 1, 2), (2, 1, 1, 2))
  assert tiles.shape == (8, 4)
  for tile in tiles:
    places = [(*device.coords, device.core_on_chip) for device in tile]
    x = {place[0] for place in places}
    assert len(x) == 2 and max(x) - min(x) == 1 and min(x) % 2 == 0
    assert len({place[1:3] for place in places}) == 1
    assert {place[3] for place in places} == {0, 1}
  assert len({device.id for device in tiles.flat}) == 32


def test_a_submesh_elsewhere_is_of_processes_and_their_devices():
  devices = [
    types.SimpleNamespace(id=10 * process + i, process_index=process)
    for process in range(2)
    for i in range(4)
  ]
  tiles = partitioning._tiled(devices, (1, 2))
  assert [[device.id for device in tile] for tile in tiles] == [
    [0, 1],
    [2, 3],
    [10, 11],
    [12, 13],
  ]
  with pytest.raises(UserError, match='does not tile devices that stand as 2'):
    partitioning._tiled(devices, (2, 3))


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((3, 1, 1), 'does not fit 8 devices'),
    ((-1, -1, 1), 'at most one -1'),
    ((0, 1, 8), 'positive sizes'),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
  with pytest.raises(UserError, match=message):
    partitioning.make_mesh(*sizes)
