"""The network, the prompt and the loss against T5X's own numbers."""

import dataclasses
import functools
import json

from flax import traverse_util
import jax
import jax.numpy as jnp
import layer_stacks
import numpy as np
import pytest

from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import layers
from prompt_tuning.models import losses
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.models.model import Outputs

PLAIN = ['v11_2x2', 'v10_tied_relu', 'v11_3x2', 'v11_long', 'packed_v11_2x2']
PROMPTED = ['v11_2x2_p5', 'v11_3x2_p5', 'v11_long_p20']
SCAN = pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scan'])


def load(shared_dir, group, name):
  """(config, variables, batch, arrays, losses) of one golden case."""
  folder = shared_dir / 'golden' / group
  arrays = dict(np.load(folder / f'{name}.npz'))
  facts = json.loads((folder / f'{name}.json').read_text())
  settings = facts['config']
  settings['mlp_activations'] = tuple(settings['mlp_activations'])
  with_params = arrays
  if not any(key.startswith('params/') for key in arrays):
    with_params = np.load(folder / f'{name.removeprefix("packed_")}.npz')
  flat = {
    tuple(key.split('/')[1:]): jnp.asarray(with_params[key])
    for key in with_params
    if key.startswith('params/')
  }
  prompt = flat.pop(('encoder', 'prompt', 'prompt', 'prompt'), None)
  variables = {'params': traverse_util.unflatten_dict(flat)}
  batch = {
    key.removeprefix('batch/'): jnp.asarray(value)
    for key, value in arrays.items()
    if key.startswith('batch/')
  }
  if prompt is not None:
    variables['prompt'] = {'table': prompt[None]}
    text = batch['encoder_input_tokens']
    ids = settings['vocab_size'] + np.arange(prompt.shape[0], dtype=text.dtype)
    virtual = np.broadcast_to(ids, (text.shape[0], ids.size))
    batch['encoder_input_tokens'] = jnp.concatenate([virtual, text], axis=1)
  config = network.T5Config(**settings)
  return config, variables, batch, arrays, facts['losses']


def methods_of(variables):
  return (Prompt(),) if 'prompt' in variables else ()


class Given(EncoderDecoderModel):
  """Gets logits for variables: what comes after the network, without it."""

  def outputs(self, variables, batch, dropout_rng=None):
    logits = variables['given']['logits']
    return Outputs(logits, jnp.zeros_like(logits))


@functools.cache
def computed(shared_dir, group, name):
  """All that is compared of a golden case, and the case's arrays and losses.

  One program, since compiling takes the time: 'losses' are made of its logits,
  'whole' is the first of them with the network in it.
  """
  config, variables, batch, arrays, cases = load(shared_dir, group, name)
  model = EncoderDecoderModel(config, methods=methods_of(variables))

  @jax.jit
  def compute(variables, batch):
    logits = model.logits(variables, batch)
    after = {'given': {'logits': logits}}
    found = {}
    for case, expected in cases.items():
      given = Given(
        config,
        z_loss=expected.get('z_loss_coef', 1e-4),
        label_smoothing=expected.get('label_smoothing', 0.0),
        loss_normalizing_factor=expected.get('loss_normalizing_factor'),
      )
      seen = dict(batch)
      if case == 'no_weights':
        del seen['decoder_loss_weights']
      found[case] = given.loss_fn(after, seen)
    return {
      'logits': logits,
      'losses': found,
      'whole': model.loss_fn(variables, batch)[0],
      'scores': Given(config).score_batch(after, batch),
    }

  return compute(variables, batch), arrays, cases


def scanned_logits(shared_dir, group, name):
  config, variables, batch, _, _ = load(shared_dir, group, name)
  model = EncoderDecoderModel(
    dataclasses.replace(config, scan_layers=True),
    methods=methods_of(variables),
  )
  stacked = layer_stacks.stack(variables['params'])
  return jax.jit(model.logits)({**variables, 'params': stacked}, batch)


@SCAN
@pytest.mark.parametrize('name', PLAIN)
def test_logits_equal_those_of_t5x(shared_dir, name, scan):
  found, arrays, _ = computed(shared_dir, '01_network', name)
  logits = found['logits']
  if scan:
    logits = scanned_logits(shared_dir, '01_network', name)
  np.testing.assert_allclose(
    logits, arrays['logits'], rtol=0, atol=2e-5 * np.abs(arrays['logits']).max()
  )


@SCAN
@pytest.mark.parametrize('name', PROMPTED)
def test_virtual_tokens_equal_the_public_prompt(shared_dir, name, scan):
  found, arrays, _ = computed(shared_dir, '02_prompted', name)
  logits = found['logits']
  if scan:
    logits = scanned_logits(shared_dir, '02_prompted', name)
  real = arrays['batch/decoder_target_tokens'] > 0
  expected = arrays['logits'][real]
  np.testing.assert_allclose(
    np.asarray(logits)[real],
    expected,
    rtol=0,
    atol=2e-5 * np.abs(expected).max(),
  )


@pytest.mark.parametrize(
  'group, name',
  [('01_network', n) for n in PLAIN] + [('02_prompted', n) for n in PROMPTED],
)
def test_losses_equal_those_of_t5x(shared_dir, group, name):
  found, _, cases = computed(shared_dir, group, name)
  np.testing.assert_allclose(
    found['whole'], cases['lnf_none']['loss'], rtol=2e-6
  )
  for case, expected in cases.items():
    loss, sums = found['losses'][case]
    np.testing.assert_allclose(loss, expected['loss'], rtol=2e-6, err_msg=case)
    if 'z_loss' in expected:
      np.testing.assert_allclose(sums['z_loss'], expected['z_loss'], rtol=2e-6)


@pytest.mark.parametrize('name', PROMPTED)
def test_prompt_gradients_equal_the_public_codes(shared_dir, name):
  config, variables, batch, arrays, _ = load(shared_dir, '02_prompted', name)
  model = EncoderDecoderModel(config, methods=methods_of(variables))

  @jax.jit
  def gradient(prompt, variables, weights):
    loss = lambda prompt: model.loss_fn(
      {**variables, 'prompt': prompt}, batch, None, weights
    )[0]
    return jax.grad(loss)(prompt)['table'][0]

  for normalizer in (None, 'NUM_REAL_TARGET_TOKENS'):
    weights = losses.token_weights(batch, normalizer)
    got = gradient(variables['prompt'], variables, weights)
    expected = arrays[f'prompt_grad/lnf_{normalizer or "none"}']
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize('name', ['v11_2x2', 'v10_tied_relu'])
def test_parameter_gradients_equal_those_of_t5x(shared_dir, name):
  config, variables, batch, arrays, _ = load(shared_dir, '01_network', name)
  model = EncoderDecoderModel(config, methods=methods_of(variables))
  gradients = traverse_util.flatten_dict(
    jax.jit(jax.grad(lambda p: model.loss_fn({'params': p}, batch)[0]))(
      variables['params']
    ),
    sep='/',
  )
  compared = [key for key in arrays if key.startswith('grads/')]
  assert compared
  for key in compared:
    expected = arrays[key]
    np.testing.assert_allclose(
      gradients[key.removeprefix('grads/')],
      expected,
      rtol=0,
      atol=1e-4 * np.abs(expected).max(),
      err_msg=key,
    )


@pytest.mark.parametrize('name', PLAIN[:4])
def test_scores_equal_those_of_t5x(shared_dir, name):
  found, arrays, _ = computed(shared_dir, '01_network', name)
  np.testing.assert_allclose(found['scores'], arrays['score_batch'], rtol=2e-6)


@pytest.mark.parametrize(
  'group, name',
  [('01_network', 'v11_2x2_bf16'), ('02_prompted', 'v11_2x2_p5_bf16')],
)
def test_bfloat16_activations_stay_near_t5x(shared_dir, group, name):
  # Softmax is float32 here and bfloat16 in T5X: equal to bfloat16's precision
  # (8 bits, some 0.4% an operation), not to the bit.
  config, variables, batch, arrays, _ = load(shared_dir, group, name)
  logits = np.asarray(
    jax.jit(EncoderDecoderModel(config, methods=methods_of(variables)).logits)(
      variables, batch
    )
  )
  real = np.asarray(batch['decoder_target_tokens']) > 0
  expected = arrays['logits'][real]
  error = np.abs(logits[real] - expected)
  assert error.max() < 0.03 * np.abs(expected).max()
  assert error.mean() < 0.01 * np.abs(expected).max()


def test_position_buckets_equal_those_of_t5x(shared_dir):
  tables = np.load(shared_dir / 'golden/01_network/relpos_buckets.npz')
  compared = 0
  for name in tables:
    if name == 'relative_position' or name.count('_') < 2:
      continue
    direction, buckets, distance = name.split('_')[-3:]
    positions = tables['relative_position']
    got = layers.relative_position_bucket(
      jnp.asarray(positions),
      bidirectional=direction.startswith('bi'),
      num_buckets=int(buckets),
      max_distance=int(distance),
    )
    np.testing.assert_array_equal(got, tables[name], err_msg=name)
    compared += 1
  assert compared


def test_logical_axes_equal_those_of_t5x(shared_dir):
  folder = shared_dir / 'golden/01_network'
  axes = json.loads((folder / 'v11_2x2.json').read_text())['axes']
  for path, expected in axes.items():
    path = path.removesuffix('_axes')
    assert list(parameters.logical_axes(path)) == expected
