"""The mesh that a run chooses, and the words it says it with."""

import dataclasses

import jax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import partitioning

# T5 1.1 XXL and base, as in configs/models.
XXL = network.T5Config(
  *(32128, 4096, 64, 64, 10240, 24, 24),
  dtype='bfloat16',
  scan_layers=True,
  remat_policy='minimal',
)
BASE = network.T5Config(*(32128, 768, 12, 64, 2048, 12, 12), dtype='bfloat16')


def workload(config, **changes):
  return dataclasses.replace(
    mesh_choice.Workload(config, 32, 612, 16, param_dtype='bfloat16'), **changes
  )


def test_methods_bring_virtual_tokens_and_say_if_the_base_is_trained():
  lengths = {'inputs': 512, 'targets': 16}
  settings = {'param_dtype': 'bfloat16', 'batch_size': 32}
  prompt = mesh_choice.Workload.of(BASE, [Prompt(100)], lengths, **settings)
  assert prompt == workload(BASE)
  model = mesh_choice.Workload.of(BASE, [ModelTuning()], lengths, **settings)
  assert model == workload(
    BASE, inputs_length=512, trains_base=True, param_dtype='float32'
  )
  infer = mesh_choice.Workload.of(
    BASE, [ModelTuning()], lengths, trains=False, **settings
  )
  assert infer == workload(BASE, inputs_length=512, trains=False)


@pytest.fixture
def devices(monkeypatch):
  """Eight devices that pass for a chip with so much memory."""

  def make(kind, count=8):
    monkeypatch.setattr(
      mesh_choice,
      'device_memory',
      lambda device: kind and int(mesh_choice.CHIPS[kind].memory),
    )
    return jax.devices()[:count]

  return make


def choose(step, devices, **settings):
  return mesh_choice.Partitioner(**settings).layout(step, devices)


def mesh_of(layout):
  return tuple(layout.mesh.shape.values())


def test_a_model_that_fits_every_device_is_copied_and_not_split(devices):
  layout, reason = choose(workload(BASE), devices('TPU v3'))
  assert mesh_of(layout) == (8, 1, 1)
  assert 'the one that fits and moves least' in reason
  assert 'GiB a device of 16.0' in reason


def test_a_model_that_does_not_fit_is_split_no_more_than_it_must(devices):
  layout, _ = choose(workload(XXL), devices('TPU v4'))
  assert mesh_of(layout) == (8, 1, 1)  # 20.7 GiB of weights, 32 GiB
  layout, _ = choose(workload(XXL, batch_size=8), devices('TPU v3'))
  assert mesh_of(layout) == (4, 1, 2)  # 16 GiB
  # Where nothing fits, what needs least is taken, and said.
  layout, reason = choose(workload(XXL, batch_size=64), devices('TPU v2'))
  assert 'none of' in reason and 'needs least' in reason


def test_what_is_asked_for_is_done(devices):
  eight = devices('TPU v4')
  for asked, wanted in (
    ({'num_partitions': 4}, (2, 1, 4)),
    ({'fsdp': 8}, (1, 8, 1)),
    ({'data': 2, 'num_partitions': 2}, (2, 2, 2)),
    ({'model_parallel_submesh': (1, 2)}, (4, 1, 2)),
  ):
    layout, reason = choose(workload(XXL), eight, **asked)
    assert mesh_of(layout) == wanted, asked
  layout, reason = choose(workload(XXL), eight, num_partitions=8)
  assert '(as asked)' in reason


def test_heads_and_rows_that_do_not_divide_leave_other_meshes(devices):
  # Twelve heads on eight devices, four rows: four times two.
  layout, _ = choose(workload(BASE, batch_size=4), devices(None))
  assert mesh_of(layout) == (4, 1, 2)


@pytest.mark.parametrize(
  ('partitioner', 'changes', 'message'),
  [
    ({'num_partitions': 8}, {}, 'has 12 heads, which 8 devices'),
    ({'data': 8}, {'batch_size': 12}, 'BATCH_SIZE 12 does not divide by the 8'),
    ({'data': 8}, {'microbatches': 8}, '8 devices .* times 8 microbatches'),
    ({'data': 3}, {}, 'no mesh of 8 devices .* with data=3'),
    ({}, {'batch_size': 5}, 'no mesh of 8 devices does for BATCH_SIZE 5'),
  ],
)
def test_what_cannot_be_is_named(devices, partitioner, changes, message):
  with pytest.raises(UserError, match=message):
    choose(workload(BASE, **changes), devices(None), **partitioner)


def test_microbatches_are_the_fewest_that_do(devices, monkeypatch):
  layout = partitioning.single_device()
  asked = workload(BASE, microbatches=None)
  # 32 rows of 312: a CPU takes three, or two that divide them, at once.
  assert dataclasses.replace(asked, inputs_length=312).parts(layout, None) == 16
  assert dataclasses.replace(asked, inputs_length=16).parts(layout, None) == 1
  assert (
    dataclasses.replace(asked, inputs_length=5000).parts(layout, None) == 32
  )
  assert workload(BASE, microbatches=5).parts(layout, None) == 5
  monkeypatch.setattr(partitioning.Layout, 'on_cpu', False)
  whole = workload(BASE).memory(layout)
  half = workload(BASE, microbatches=2).memory(layout)
  assert half < whole
  assert asked.parts(layout, None) == asked.parts(layout, 2 * whole) == 1
  assert asked.parts(layout, int(1.1 * half)) == 2
  assert asked.parts(layout, 0) == 32


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'num_partitions': 0}, 'num_partitions must be 1 or more'),
    (
      {'num_partitions': 2, 'model_parallel_submesh': (1, 2)},
      'say the same thing',
    ),
    ({'model_parallel_submesh': (0, 2)}, 'needs positive sizes'),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    mesh_choice.Partitioner(**settings)


def test_inference_fills_its_last_batch_and_takes_any_size(devices):
  layout, _ = choose(workload(BASE, batch_size=5, trains=False), devices(None))
  assert layout.mesh.size == 8


# Bytes on one device that XLA's compiler for that chip came to for a training
# step (`prompt-tuning compile`, jax 0.10.2, libtpu 0.0.42.1).
COMPILED = [
  (XXL, (16, 1, 2), 32, 12.08),
  (XXL, (8, 1, 1), 32, 26.92),
  (dataclasses.replace(XXL, remat_policy='full'), (16, 1, 2), 32, 10.84),
  (dataclasses.replace(XXL, remat_policy='full'), (8, 1, 2), 32, 11.17),
]


def estimate(config, mesh, **changes):
  """GiB on one device."""
  abstract = jax.sharding.AbstractMesh(mesh, partitioning.MESH_AXES)
  layout = partitioning.Layout(abstract)
  return workload(config, **changes).memory(layout) / mesh_choice.GIB


def test_so_it_is_for_decoding():
  # 16 chips of v5e.
  assert 13.69 < estimate(XXL, (8, 1, 2), trains=False) < 1.25 * 13.69


@pytest.mark.parametrize(('config', 'mesh', 'batch', 'gibibytes'), COMPILED)
def test_the_estimate_is_near_what_the_compiler_needs(
  config, mesh, batch, gibibytes
):
  found = estimate(config, mesh, batch_size=batch)
  assert gibibytes < found * 1.02
  assert found < 1.25 * gibibytes


def test_the_parameters_of_every_device_are_counted():
  layout = partitioning.Layout(partitioning.make_mesh(2, 2, 2))
  small = network.T5Config(256, 16, 2, 8, 32, 1, 1)
  whole = mesh_choice.Workload(small, 8, 8, 4, trains=False)
  split = whole.memory(layout) - whole._activations(layout.mesh)
  bytes_of = sum(
    4 * leaf.size for leaf in jax.tree.leaves(network.parameter_shapes(small))
  )
  # A fourth of each, but for norms and the tables of positions' heads.
  assert bytes_of / 4 < split < bytes_of / 4 * 1.1
