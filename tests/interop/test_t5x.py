"""T5X checkpoints read and written."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

from flax import serialization
from flax import traverse_util
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.interop import t5x
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import base as base_lib

CONFIG = network.T5Config(
  vocab_size=48,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=24,
  num_encoder_layers=2,
  num_decoder_layers=1,
)


@pytest.fixture(scope='module')
def params():
  tree = EncoderDecoderModel(CONFIG).init_params(jax.random.key(0))
  return {
    name: np.asarray(array)
    for name, array in traverse_util.flatten_dict(tree, sep='/').items()
  }


@pytest.fixture
def written(tmp_path, params):
  prompt = np.arange(3 * 16, dtype=np.float32).reshape(3, 16) * 100
  t5x.write_checkpoint(tmp_path / 'model', params, 1_100_000, prompt)
  return tmp_path / 'model', prompt


def test_what_is_written_comes_back_with_its_step(written, params):
  folder, prompt = written
  for path in (folder, folder / 'checkpoint_1100000'):
    base = load_checkpoint(path)
    assert base.step == 1_100_000
    assert base.arrays.keys() == params.keys()
    for name, array in params.items():
      np.testing.assert_array_equal(np.asarray(base.arrays[name]), array)
  assert base.fingerprint() == base_lib.fingerprint(params)
  np.testing.assert_array_equal(t5x.read_array(folder), prompt)
  table, facts = load_prompt(folder)
  np.testing.assert_array_equal(table[0], prompt)
  assert facts['step'] == 1_100_000
  name = 'target/token_embedder/embedding'
  table, _ = load_prompt(folder, variable=name)
  np.testing.assert_array_equal(table[0], params['token_embedder/embedding'])
  with pytest.raises(UserError, match='has no array encoder/other'):
    load_prompt(folder, variable='encoder/other')


def test_the_prompt_lies_where_the_public_code_puts_it(written):
  folder, prompt = written
  arrays = t5x.open_state(folder)
  assert 'target/encoder/prompt/prompt/prompt' in arrays
  file = (
    folder / 'numpy_checkpoints/checkpoint_1100000/encoder.prompt.prompt.prompt'
  )
  np.testing.assert_array_equal(load_prompt(file)[0][0], prompt)


def test_bfloat16_rounds_the_model_and_not_the_prompt(tmp_path, params):
  prompt = np.full((2, 16), 1.0 + 2**-12, np.float32)
  t5x.write_checkpoint(tmp_path, params, 5, prompt, dtype='bfloat16')
  base = load_checkpoint(tmp_path)
  for name, array in params.items():
    found = base.arrays[name]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      np.asarray(found), array.astype(ml_dtypes.bfloat16)
    )
  np.testing.assert_array_equal(t5x.read_array(tmp_path), prompt)


def test_slices_are_those_of_numpy(written, params):
  array = load_checkpoint(written[0]).arrays['encoder/layers_0/mlp/wo/kernel']
  expected = params['encoder/layers_0/mlp/wo/kernel']
  for index in (
    slice(2, 5),
    slice(0, 999),
    (slice(None), slice(3, 4)),
    (slice(4, None), slice(None, 7)),
    (1, 2),
    ...,
  ):
    np.testing.assert_array_equal(array[index], expected[index])


def test_the_newest_complete_checkpoint_is_taken(tmp_path, params):
  for step in (5, 20, 100):
    t5x.write_checkpoint(tmp_path, params, step)
  (tmp_path / 'checkpoint_300').mkdir()
  (tmp_path / 'checkpoint_400.tmp-12').mkdir()
  assert load_checkpoint(tmp_path).step == 100


@pytest.mark.parametrize('zarr3', [False, True])
@pytest.mark.parametrize('ocdbt', [False, True])
@pytest.mark.parametrize('below', ['', 'state'])
def test_orbaxs_layouts_are_read(tmp_path, params, ocdbt, zarr3, below):
  tree = {
    'target': traverse_util.unflatten_dict(params, sep='/'),
    'state': {
      'step': np.asarray(77, np.int32),
      'param_states': {'token_embedder': {'embedding': {'v': np.ones(3)}}},
    },
  }
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  checkpointer = ocp.Checkpointer(handler)
  folder = tmp_path / 'checkpoint_77'
  checkpointer.save(folder / below if below else folder, tree)
  base = load_checkpoint(tmp_path)
  assert base.step == 77
  assert base.arrays.keys() == params.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(np.asarray(base.arrays[name]), array)
    if array.ndim == 2:
      np.testing.assert_array_equal(base.arrays[name][:2], array[:2])


def test_inline_arrays_and_old_placeholders_are_read(written, params):
  folder = written[0] / 'checkpoint_1100000'
  tree = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  target = tree['optimizer']['target']
  scale = params['encoder/encoder_norm/scale']
  target['encoder']['encoder_norm']['scale'] = scale
  target['token_embedder']['embedding'] = (
    'PLACEHOLDER://target/token_embedder/embedding'
  )
  # A machine's own path and file system, as public checkpoints have them.
  kernel = target['decoder']['logits_dense']['kernel']
  kernel['kvstore'] = {
    'driver': 'gfile',
    'path': '/cns/elsewhere/target.decoder.logits_dense.kernel',
  }
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  base = load_checkpoint(folder)
  for name in (
    'encoder/encoder_norm/scale',
    'token_embedder/embedding',
    'decoder/logits_dense/kernel',
  ):
    np.testing.assert_array_equal(np.asarray(base.arrays[name]), params[name])


def test_a_scanned_model_loads_it_too(written, params):
  config = network.T5Config(**{**vars(CONFIG), 'scan_layers': True})
  loaded = base_lib.load_params(
    load_checkpoint(written[0]), network.parameter_shapes(config)
  )
  np.testing.assert_array_equal(
    loaded['encoder']['encoder']['mlp']['wo']['kernel'][:, 1],
    params['encoder/layers_1/mlp/wo/kernel'],
  )


@pytest.mark.parametrize('scan', [False, True])
def test_a_shard_reads_its_slice_alone(written, params, scan):
  config = network.T5Config(**{**vars(CONFIG), 'scan_layers': scan})
  like = network.parameter_shapes(config)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('model',))
  shardings = jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(
      mesh,
      jax.sharding.PartitionSpec(*[None] * (len(spec.shape) - 1), 'model')
      if spec.shape[-1] % 2 == 0
      else jax.sharding.PartitionSpec(),
    ),
    like,
  )
  base = load_checkpoint(written[0])
  largest = 0

  def counted(array):
    def read(index):
      nonlocal largest
      found = array[index]
      if found.ndim > 1:  # scales are stacked layer by layer
        largest = max(largest, found.size / np.prod(array.shape))
      return found

    return parameters.LazyArray(array.shape, array.dtype, read)

  arrays = {name: counted(array) for name, array in base.arrays.items()}
  base = dataclasses.replace(base, arrays=arrays)
  loaded = base_lib.load_params(base, like, shardings=shardings)
  whole = base_lib.load_params(load_checkpoint(written[0]), like)
  jax.tree.map(np.testing.assert_array_equal, loaded, whole)
  assert largest == 0.5


def test_mismatches_are_listed_by_path(written):
  other = network.T5Config(**{**vars(CONFIG), 'mlp_dim': 32})
  with pytest.raises(UserError) as error:
    base_lib.load_params(
      load_checkpoint(written[0]), network.parameter_shapes(other)
    )
  message = str(error.value)
  assert 'layers_0/mlp/wi_0/kernel has mlp 24, the model needs 32' in message
  assert '\n' not in message


_PEAK = """
import resource, sys
import jax
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.models import network
from prompt_tuning.training import base as base_lib

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

like = network.parameter_shapes(
  network.T5Config(32128, 2048, 32, 64, 5120, 24, 24)
)
base = load_checkpoint(sys.argv[1])
jax.block_until_ready(jax.numpy.zeros(3))
before = peak()
params = base_lib.load_params(base, like, dtype='bfloat16')
jax.block_until_ready(params)
kept = sum(array.nbytes for array in jax.tree.leaves(params))
print(kept, (peak() - before) / kept)
"""


@pytest.mark.slow
def test_an_xl_checkpoint_is_streamed(tmp_path):
  if shutil.disk_usage(tmp_path).free < 8e9:
    pytest.skip('XL in bfloat16 needs 6 GB of disk')
  config = network.T5Config(32128, 2048, 32, 64, 5120, 24, 24)
  shapes = traverse_util.flatten_dict(network.parameter_shapes(config), sep='/')
  block = np.random.default_rng(0).normal(size=2**20)
  block = block.astype(ml_dtypes.bfloat16)

  def made(shape):
    return parameters.LazyArray(
      shape, block.dtype, lambda index: np.resize(block, shape)[index]
    )

  arrays = {name: made(spec.shape) for name, spec in shapes.items()}
  t5x.write_checkpoint(tmp_path, arrays, 1_100_000, dtype='bfloat16')
  done = subprocess.run(
    [sys.executable, '-c', _PEAK, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  kept, ratio = done.stdout.split()
  assert int(kept) == 2 * 2_849_757_184
  assert float(ratio) < 1.15


# Faults.


def refused(path, *words):
  with pytest.raises(UserError) as fault:
    base = load_checkpoint(path)
    for array in base.arrays.values():
      np.asarray(array)
  message = str(fault.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def test_damaged_checkpoints_are_one_line(written):
  folder = written[0] / 'checkpoint_1100000'
  index = (folder / 'checkpoint').read_bytes()
  (folder / 'checkpoint').write_bytes(index[: len(index) // 2])
  refused(folder, 'damaged')
  (folder / 'checkpoint').write_bytes(index)
  array = folder / 'target.token_embedder.embedding'
  (array / '.zarray').write_text('{"zarr_format": 2}')
  refused(folder, 'damaged')
  (array / '.zarray').unlink()
  refused(folder, 'damaged')


def test_a_truncated_chunk_is_one_line(written):
  chunk = written[0] / 'checkpoint_1100000/target.token_embedder.embedding/0.0'
  chunk.write_bytes(chunk.read_bytes()[:100])
  refused(written[0], 'damaged')


def test_another_shape_than_the_index_says_is_one_line(written):
  folder = written[0] / 'checkpoint_1100000'
  file = folder / 'target.token_embedder.embedding/.zarray'
  described = json.loads(file.read_text())
  described['shape'][0] += 1
  file.write_text(json.dumps(described))
  refused(written[0], 'the index says [48, 16]')


def test_nothing_is_overwritten_and_no_half_checkpoint_taken(
  written, params, monkeypatch
):
  with pytest.raises(UserError, match='exists'):
    t5x.write_checkpoint(written[0], params, 1_100_000)
  monkeypatch.setattr(
    t5x, '_write_array', lambda *_: (_ for _ in ()).throw(OSError(28, 'full'))
  )
  with pytest.raises(UserError, match='cannot write'):
    t5x.write_checkpoint(written[0], params, 2_000_000)
  assert load_checkpoint(written[0]).step == 1_100_000


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_crash_the_reader_of_an_index(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('fuzz')
  (folder / 'checkpoint').write_bytes(data)
  try:
    load_checkpoint(folder)
  except UserError as error:
    assert '\n' not in str(error)


TREES = st.recursive(
  st.none() | st.integers(-9, 9) | st.text(max_size=4) | st.binary(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        ['optimizer', 'target', 'state', 'step', 'driver', 'kvstore', 'path']
      ),
      inner,
      max_size=4,
    )
  ),
  max_leaves=8,
)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_no_tree_crashes_the_reader_of_an_index(tmp_path_factory, tree):
  folder = tmp_path_factory.mktemp('fuzz')
  data = serialization.msgpack_serialize({'optimizer': tree})
  (folder / 'checkpoint').write_bytes(data)
  try:
    load_checkpoint(folder)
  except UserError as error:
    assert '\n' not in str(error)


# T5X's own files.


@pytest.fixture(scope='session')
def golden(shared_dir):
  return shared_dir / 'golden/07_checkpoint'


def test_saved_checkpoints_are_read_to_the_bit(golden):
  folders = sorted(golden.glob('t5x_saved_*/'))
  folders = [folder for folder in folders if folder.is_dir()]
  assert folders
  for folder in folders:
    expected = np.load(golden / f'{folder.name}_expected.npz')
    facts = json.loads((golden / f'{folder.name}_expected.json').read_text())
    arrays = t5x.open_state(folder)
    assert arrays.keys() == set(expected.files)
    for name in expected.files:
      found = np.asarray(arrays[name]).astype(np.float32)
      np.testing.assert_array_equal(found, expected[name], err_msg=name)
    for name, dtype in facts['stored_dtypes'].items():
      assert np.dtype(arrays[name].dtype).name == dtype
    assert load_checkpoint(folder).step == facts['step']


def test_saved_checkpoints_give_t5xs_logits(golden):
  for file in sorted(golden.glob('t5x_saved_*_logits.npz')):
    name = file.name.removesuffix('_logits.npz')
    facts = json.loads((golden / f'{name}_expected.json').read_text())['config']
    facts['mlp_activations'] = tuple(facts['mlp_activations'])
    config = network.T5Config(
      **{k: v for k, v in facts.items() if hasattr(CONFIG, k) and k != 'dtype'}
    )
    data = np.load(file)
    variables = {
      'params': base_lib.load_params(
        load_checkpoint(golden / name),
        network.parameter_shapes(config),
        dtype='float32',
      )
    }
    batch = {
      key.removeprefix('batch/'): jnp.asarray(data[key])
      for key in data.files
      if key != 'logits'
    }
    logits = EncoderDecoderModel(config).logits(variables, batch)
    error = np.abs(np.asarray(logits) - data['logits']).max()
    assert error <= 2e-5 * np.abs(data['logits']).max()


def test_the_public_test_checkpoint_is_read_to_the_bit(golden):
  facts = json.loads((golden / 't5x_checkpoint_tiny_params.json').read_text())
  arrays = t5x.open_state(golden / 't5x_checkpoint_tiny')
  assert arrays.keys() == facts['arrays'].keys()
  for name, expected in facts['arrays'].items():
    dtype = np.int32 if name == 'state/step' else np.float32
    data = np.ascontiguousarray(np.asarray(arrays[name]).astype(dtype))
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    assert digest == next(v for k, v in expected.items() if 'sha256' in k)


def array_folder(folder, name='token_embedder.embedding'):
  return folder / 'checkpoint_1100000' / f'target.{name}'


def test_a_missing_chunk_is_no_array_of_zeros(written):
  folder, _ = written
  (chunk,) = (f for f in array_folder(folder).iterdir() if f.name != '.zarray')
  chunk.unlink()
  base = load_checkpoint(folder)
  with pytest.raises(
    UserError, match='cannot read the T5X checkpoint.*missing'
  ):
    np.asarray(base.arrays['token_embedder/embedding'])


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'dtype': '<f8'}, 'of float64, the index says .* of float32'),
    ({'shape': [48, 17]}, r'has shape \[48, 17\]'),
    ({'shape': [-1, 16]}, 'cannot read'),
    ({'chunks': [10**9, 10**9]}, 'GiB, this machine has'),
  ],
)
def test_an_array_that_is_not_what_the_index_says_is_damaged(
  written, changes, said
):
  folder, _ = written
  file = array_folder(folder) / '.zarray'
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
  base = load_checkpoint(folder)
  with pytest.raises(UserError, match=said):
    np.asarray(base.arrays['token_embedder/embedding'])
