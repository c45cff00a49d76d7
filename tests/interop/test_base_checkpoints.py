"""Base models by name, file, folder or run."""

import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning.errors import UserError
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.base_checkpoints import save_base
from prompt_tuning.training import base as base_lib
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.optimizers import adafactor
from prompt_tuning.training.train_state import TrainState


def parameters():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  return {
    'token_embedder': {'embedding': draw(64, 8)},
    'encoder': {
      'layers_0': {'mlp': {'wo': {'kernel': draw(16, 8)}}},
      'encoder_norm': {'scale': draw(8)},
    },
  }


def shapes_of(params):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def refused(path, *words):
  with pytest.raises(UserError) as fault:
    load_checkpoint(path)
  message = str(fault.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


@pytest.mark.parametrize('name', ['base', 'base.safetensors'])
def test_saved_weights_come_back_with_their_step(tmp_path, name):
  params = parameters()
  file = save_base(tmp_path / name, params, 1_100_000, {'model': 'tiny'})
  base = load_checkpoint(tmp_path / name)
  assert base.step == 1_100_000
  assert base.metadata['model'] == 'tiny'
  assert base.metadata['fingerprint'] == base_lib.fingerprint(params)
  assert set(safetensors.numpy.load_file(file)) == {
    'token_embedder/embedding',
    'encoder/layers_0/mlp/wo/kernel',
    'encoder/encoder_norm/scale',
  }
  assert_same(base_lib.load_params(base, shapes_of(params)), params)


def test_bfloat16_storage_halves_the_file_and_keeps_the_fingerprint(tmp_path):
  params = parameters()
  save_base(tmp_path, params, 3, dtype='bfloat16')
  base = load_checkpoint(tmp_path)
  array = base.arrays['token_embedder/embedding']
  assert array.dtype == ml_dtypes.bfloat16 and array.shape == (64, 8)
  assert base.fingerprint() == base_lib.fingerprint(params)
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params
  )
  loaded = base_lib.load_params(base, shapes_of(params), dtype='float32')
  assert_same(loaded, rounded)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype('float32')}


def test_arrays_are_read_by_rows_when_asked_for(tmp_path):
  params = parameters()
  save_base(tmp_path, params, 3)
  array = load_checkpoint(tmp_path).arrays['token_embedder/embedding']
  want = params['token_embedder']['embedding']
  np.testing.assert_array_equal(array[:3], want[:3])
  np.testing.assert_array_equal(array[:1000], want)
  np.testing.assert_array_equal(array[5], want[5])
  np.testing.assert_array_equal(np.asarray(array), want)


def test_bundled_models_are_found_by_name(tmp_path, monkeypatch):
  monkeypatch.setattr(base_checkpoints, 'bundled_folder', lambda: tmp_path)
  save_base(tmp_path / 't5_1_1_mini', parameters(), 20_000)
  monkeypatch.chdir(tmp_path.parent)
  base = load_checkpoint('t5_1_1_mini')
  assert (base.path, base.step) == ('t5_1_1_mini', 20_000)
  refused('t5_1_1_mni', 'bundled models are t5_1_1_mini', 'did you mean')


def test_run_that_trained_params_is_taken_with_its_step(tmp_path):
  params = jax.tree.map(jnp.asarray, parameters())
  state = TrainState.create({'params': params}, adafactor(0.1), 500)
  with Checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(500, state, {})
  base = load_checkpoint(tmp_path)
  assert base.step == 500
  assert_same(base_lib.load_params(base, shapes_of(params)), params)


def test_file_without_a_step_needs_one_from_the_user(tmp_path):
  arrays = {'token_embedder/embedding': np.zeros((4, 2), np.float32)}
  safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
  refused(tmp_path, 'does not say to which step', 'load_checkpoint.step')
  assert load_checkpoint(tmp_path, step=7).step == 7


def test_damaged_files_are_named(tmp_path):
  file = save_base(tmp_path, parameters(), 3)
  content = file.read_bytes()
  for cut in (0, 5, 100, len(content) - 1):
    file.write_bytes(content[:cut])
    refused(tmp_path, 'model.safetensors', 'damaged')
  file.write_bytes(b'\xff' * len(content))
  refused(tmp_path, 'model.safetensors', 'damaged')


def test_file_that_vanishes_before_it_is_read_is_named(tmp_path):
  params = parameters()
  file = save_base(tmp_path, params, 3)
  base = load_checkpoint(tmp_path)
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match='model.safetensors .*damaged'):
    base_lib.load_params(base, shapes_of(params))


def test_formats_that_are_not_read_are_said_so(tmp_path):
  t5x = tmp_path / 't5x'
  (t5x / 'target').mkdir(parents=True)
  (t5x / 'checkpoint').write_bytes(b'')
  refused(t5x, 'the T5X checkpoint', 'damaged')
  hf = tmp_path / 'hf'
  hf.mkdir()
  (hf / 'config.json').write_text('{}')
  refused(hf, 'model_type None', 'this package reads t5')
  arrays = {'shared.weight': np.zeros((4, 2), np.float32)}
  safetensors.numpy.save_file(arrays, hf / 'model.safetensors')
  (hf / 'config.json').write_text('{"model_type": "t5"}')
  refused(hf, 'does not say to which step')
  (tmp_path / 'weights.bin').write_bytes(b'')
  refused(tmp_path / 'weights.bin', 'weights.bin', 'is required')
  (tmp_path / 'nothing').mkdir()
  refused(tmp_path / 'nothing', 'no checkpoint')


def test_missing_path_is_named(tmp_path):
  refused(
    tmp_path / 'absent', 'no checkpoint', 'absent', 'not a file or folder'
  )


def test_full_disk_keeps_the_earlier_file(tmp_path):
  params = parameters()
  save_base(tmp_path, params, 3)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    with pytest.raises(UserError, match='cannot write') as fault:
      save_base(tmp_path, params, 4)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(fault.value)
  assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
  assert load_checkpoint(tmp_path).step == 3
