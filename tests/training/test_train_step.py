"""One step of training: what it changes, and that its parts add up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import train_step

CONFIG = network.T5Config(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
P, B = 4, 8
MODEL = EncoderDecoderModel(CONFIG, methods=(Prompt(P),))
RNG = jax.random.key(7)


@functools.cache
def variables():
  params = jax.jit(MODEL.init_params)(jax.random.key(0))
  table = jax.random.normal(jax.random.key(1), (1, P, CONFIG.emb_dim))
  return {'params': params, 'prompt': {'table': table}}


@functools.cache
def batch():
  rng = np.random.default_rng(0)
  virtual = np.tile(CONFIG.vocab_size + np.arange(P), (B, 1))
  text = rng.integers(2, CONFIG.vocab_size, (B, 6))
  target = rng.integers(2, CONFIG.vocab_size, (B, 3))
  target[:, 2] = rng.integers(0, 2, B)  # Some are padded.
  return {
    'encoder_input_tokens': np.concatenate([virtual, text], 1).astype(np.int32),
    'decoder_target_tokens': target.astype(np.int32),
    'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))).astype(
      np.int32
    ),
    'decoder_loss_weights': (target > 0).astype(np.int32),
  }


def step(trained=('prompt',), model=MODEL, optimizer=None, **settings):
  """(state, frozen, new state, metrics) of one step."""
  optimizer = optimizer or optimizers.adafactor(
    0.3, multiply_by_parameter_scale=False
  )
  trainable = {name: variables()[name] for name in trained}
  frozen = {k: v for k, v in variables().items() if k not in trained}
  state = TrainState.create(trainable, optimizer)
  run = jax.jit(
    lambda s, f, b: train_step(model, optimizer, s, f, b, RNG, **settings)
  )
  return state, frozen, *run(state, frozen, batch())


def test_only_the_prompt_changes():
  state, frozen, new, _ = step()
  assert set(new.trainable) == {'prompt'} and set(frozen) == {'params'}
  moved = np.abs(
    new.trainable['prompt']['table'] - state.trainable['prompt']['table']
  )
  assert (moved > 0).all()
  # Nothing of T5's shapes is in the state: no value, no optimiser state.
  allowed = {(), (1, P, CONFIG.emb_dim)}
  assert {leaf.shape for leaf in jax.tree.leaves(new)} <= allowed
  assert int(new.step) == 1


@pytest.mark.parametrize('trained', [('params',), ('params', 'prompt')])
def test_every_array_of_a_trained_collection_changes(trained):
  state, _, new, _ = step(trained)
  assert set(new.trainable) == set(trained)

  def changed(path, before, after):
    assert (before != after).any(), jax.tree_util.keystr(path)

  jax.tree_util.tree_map_with_path(changed, state.trainable, new.trainable)


@pytest.mark.parametrize(
  'normalizer', [None, 'NUM_REAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE']
)
def test_microbatches_add_up_to_the_whole_batch(normalizer):
  model = dataclasses.replace(MODEL, loss_normalizing_factor=normalizer)
  # Plain descent: the update is the gradient.
  settings = {'model': model, 'optimizer': optax.sgd(1.0)}
  _, _, whole, metrics = step(**settings)
  _, _, parts, summed = step(**settings, microbatches=4)
  np.testing.assert_allclose(
    parts.trainable['prompt']['table'],
    whole.trainable['prompt']['table'],
    rtol=1e-5,
    atol=1e-6,
  )
  for name in metrics:
    np.testing.assert_allclose(summed[name], metrics[name], rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
  _, _, new, metrics = step(optimizer=optax.sgd(1.0))
  start = variables()['prompt']['table']
  gradient = start - new.trainable['prompt']['table']
  direction = jax.random.normal(jax.random.key(3), start.shape)
  loss = jax.jit(
    lambda t: MODEL.loss_fn({**variables(), 'prompt': {'table': t}}, batch())[0]
  )
  slope = (
    loss(start + 1e-2 * direction) - loss(start - 1e-2 * direction)
  ) / 2e-2
  np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=2e-3)
  np.testing.assert_allclose(metrics['loss'], loss(start), rtol=1e-6)
  np.testing.assert_allclose(
    metrics['gradient_norm'], jnp.linalg.norm(gradient), rtol=1e-4
  )


def test_a_step_over_eight_devices_equals_one_on_one_device():
  optimizer = optax.sgd(1.0)
  layout = partitioning.Layout(partitioning.make_mesh(2, 2, 2))
  frozen = {
    'params': jax.device_put(
      variables()['params'], layout.params(variables()['params'])
    )
  }
  state = jax.device_put(
    TrainState.create({'prompt': variables()['prompt']}, optimizer),
    layout.replicated,
  )
  run = layout.jit(lambda s, f, b: train_step(MODEL, optimizer, s, f, b, RNG))
  new, metrics = run(state, frozen, layout.shard_batch(batch()))
  _, _, expected, alone = step(optimizer=optimizer)
  # Sums are taken in another order: float32 rounding, some 1e-7 an addition.
  np.testing.assert_allclose(metrics['loss'], alone['loss'], rtol=1e-6)
  np.testing.assert_allclose(
    new.trainable['prompt']['table'],
    expected.trainable['prompt']['table'],
    atol=1e-5,
  )
  assert new.trainable['prompt']['table'].sharding.is_fully_replicated


def test_dropout_differs_between_steps_and_repeats_with_the_seed():
  model = dataclasses.replace(
    MODEL, config=dataclasses.replace(CONFIG, dropout_rate=0.3)
  )
  optimizer = optax.sgd(0.0)
  frozen = {'params': variables()['params']}
  state = TrainState.create({'prompt': variables()['prompt']}, optimizer)
  run = jax.jit(lambda s: train_step(model, optimizer, s, frozen, batch(), RNG))
  second, first_metrics = run(state)
  _, second_metrics = run(second)
  assert first_metrics['loss'] != second_metrics['loss']
  assert run(state)[1]['loss'] == first_metrics['loss']
