"""The base's parameters: loading, scanned or not, fingerprints, runs."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import check_vocabulary
from prompt_tuning.training.base import fingerprint
from prompt_tuning.training.base import load_params
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.optimizers import adafactor
from prompt_tuning.training.train_state import TrainState


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stacked(params):
  """T5X's form of a scanned model: layers on axis 1."""
  found = {}
  flat = parameters.flatten(params)
  for path, array in flat.items():
    stack, layer, *rest = path.split('/')
    if layer == 'layers_0':
      layers = [
        np.asarray(flat['/'.join([stack, f'layers_{i}', *rest])])
        for i in range(flat_layers(flat, stack))
      ]
      found['/'.join([stack, stack, *rest])] = np.stack(layers, axis=1)
    elif not layer.startswith('layers_'):
      found[path] = array
  return parameters.nest(found)


def flat_layers(flat, stack):
  return len(
    {p.split('/')[1] for p in flat if p.startswith(f'{stack}/layers_')}
  )


def config(**settings):
  return network.T5Config(
    **{
      'vocab_size': 64,
      'emb_dim': 8,
      'num_heads': 2,
      'head_dim': 4,
      'mlp_dim': 16,
      'num_encoder_layers': 2,
      'num_decoder_layers': 3,
      **settings,
    }
  )


def draw(like, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), like
  )


def flat(params):
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def base_of(params, path='base'):
  return BaseCheckpoint(path, 100, flat(params))


def test_parameters_are_loaded_as_they_are_or_rounded():
  like = network.parameter_shapes(config())
  params = draw(like)
  assert_same(load_params(base_of(params), like), params)
  rounded = load_params(base_of(params), like, dtype='bfloat16')
  assert_same(
    rounded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  )


def test_parameters_are_put_where_the_shardings_say():
  like = network.parameter_shapes(config())
  mesh = jax.make_mesh((8,), ('x',))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shardings = jax.tree.map(lambda _: everywhere, like)
  loaded = load_params(base_of(draw(like)), like, shardings=shardings)
  assert {x.sharding for x in jax.tree.leaves(loaded)} == {everywhere}


def test_scanned_and_unrolled_models_load_each_other_s_checkpoints():
  unrolled_like = network.parameter_shapes(config())
  scanned_like = network.parameter_shapes(config(scan_layers=True))
  unrolled = draw(unrolled_like)
  scanned = load_params(base_of(unrolled), scanned_like)
  assert_same(scanned, stacked(unrolled))
  again = load_params(base_of(scanned), unrolled_like)
  assert_same(again, unrolled)


def test_wrong_size_is_named_by_its_axis():
  params = draw(network.parameter_shapes(config(emb_dim=4)))
  with pytest.raises(UserError) as fault:
    load_params(base_of(params), network.parameter_shapes(config()))
  message = str(fault.value)
  assert 'token_embedder/embedding has embed 4, the model needs 8' in message
  assert 'more' in message and '\n' not in message and len(message) < 500


def test_missing_and_unexpected_arrays_are_listed():
  params = draw(network.parameter_shapes(config()))
  tied = network.parameter_shapes(config(logits_via_embedding=True))
  with pytest.raises(UserError, match='unexpected decoder/logits_dense/kernel'):
    load_params(base_of(params), tied)
  fewer = base_of(draw(tied))
  with pytest.raises(UserError, match='missing decoder/logits_dense/kernel'):
    load_params(fewer, network.parameter_shapes(config()))


def test_fingerprint_ignores_storage_but_not_values():
  like = network.parameter_shapes(config())
  params = draw(like)
  found = fingerprint(params)
  assert found == fingerprint(flat(params))
  assert found == base_of(params).fingerprint()
  assert found == fingerprint(stacked(params))
  bfloat16 = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  assert found == fingerprint(bfloat16)
  assert found != fingerprint(draw(like, seed=1))
  moved = jax.tree.map(lambda x: x * np.float32(1.01), params)
  assert found != fingerprint(moved)
  # What folds into one kind of kernel, or the norms, is seen too; files of
  # earlier versions say what eight matrices are.
  for kind in ('query/kernel', 'layer_norm/scale'):
    changed = {
      path: x * 2 if path.endswith(kind) else x
      for path, x in flat(params).items()
    }
    assert found != fingerprint(changed), kind
  base = base_of(params)
  earlier = fingerprint(params, of_each_kind=False)
  assert earlier != found
  assert base.has_fingerprint(earlier) and base.has_fingerprint(found)
  assert not base_of(moved).has_fingerprint(earlier)


def test_run_that_trained_params_is_a_base_checkpoint(tmp_path):
  like = network.parameter_shapes(config())
  params = draw(like)
  state = TrainState.create({'params': params}, adafactor(0.1), 500)
  with Checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(500, state, {'seed': 1}, {'loss': 2.0})
    saved.save(600, state.replace(step=jnp.asarray(600, jnp.int32)), {})
  for path, step, want in (
    (tmp_path, None, 600),
    (tmp_path / 'checkpoints', 500, 500),
    (tmp_path / 'checkpoints' / '500', None, 500),
  ):
    base = load_checkpoint(path, step)
    assert base.step == want
    assert base.fingerprint() == fingerprint(params)
  assert_same(load_params(base, like), params)


def test_run_that_trained_a_prompt_is_no_base_checkpoint(tmp_path):
  trainable = {'prompt': {'table': jnp.ones((1, 5, 32))}}
  with Checkpoints(tmp_path) as saved:
    saved.save(7, TrainState.create(trainable, adafactor(0.3), 7), {})
  with pytest.raises(UserError, match='trained prompt, .* needs params'):
    load_checkpoint(tmp_path)


def test_the_network_is_known_by_its_parameters():
  for settings in (
    {},
    {'logits_via_embedding': True, 'mlp_activations': ('relu',)},
    {'scan_layers': True},
  ):
    wanted = config(**settings)
    found = base_of(draw(network.parameter_shapes(wanted))).config()
    assert found == dataclasses.replace(wanted, scan_layers=False)
  with pytest.raises(UserError, match='other is no T5: it lacks'):
    BaseCheckpoint('other', 0, {'a': np.zeros(3)}).config()


def test_weights_that_are_no_numbers_are_refused_by_name():
  like = network.parameter_shapes(config())
  params = parameters.flatten(draw(like))
  path = 'encoder/layers_1/mlp/wo/kernel'
  for bad in (np.nan, np.inf):
    params[path] = np.array(params[path])
    params[path][3, 2] = bad
    for dtype in ('float32', 'bfloat16'):
      base = BaseCheckpoint('one', 5, params)
      with pytest.raises(
        UserError, match=f'one has weights .* finite in {path}'
      ):
        load_params(base, like, dtype=dtype)


def test_a_vocabulary_is_known_by_its_digest(caplog, tmp_path):
  mini = load_vocabulary('t5_1_1_mini')
  base = load_checkpoint('t5_1_1_mini')
  check_vocabulary(mini, base)
  with pytest.raises(UserError, match='another vocabulary than byt5'):
    check_vocabulary(load_vocabulary('byt5'), base)
  check_vocabulary(load_vocabulary('byt5'), base, strict=False)
  assert 'another vocabulary' in caplog.text
  caplog.clear()
  moved = dataclasses.replace(base, path=str(tmp_path))
  check_vocabulary(mini, moved)
  assert not caplog.text
  check_vocabulary(load_vocabulary('byt5'), moved)  # nobody knows: a loud line
  assert "259 pieces, the model 8192 rows: is it the model's" in caplog.text
  with pytest.raises(UserError, match='the prompt was trained with another'):
    check_vocabulary(mini, moved, {'the prompt': 'f' * 64})
