"""A prefix whose keys and values a network makes, and whom prefixes reach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.dept import ADePT
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel

CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=3,  # N * D is not E
  mlp_dim=12,
  num_encoder_layers=2,
  num_decoder_layers=3,
)
ALL = ('encoder', 'decoder', 'cross')
BATCH = {
  'encoder_input_tokens': np.array([[5, 6, 7, 1], [9, 1, 0, 0]], 'i4'),
  'decoder_input_tokens': np.array([[0, 3, 4], [0, 8, 1]], 'i4'),
  'decoder_target_tokens': np.array([[3, 4, 1], [8, 1, 0]], 'i4'),
}


def params():
  return EncoderDecoderModel(CONFIG).init_params(jax.random.key(0))


def start_of(method):
  init = jax.jit(lambda: method.init(jax.random.key(1), params(), ANY_TEXT))
  return parameters.flatten(init())


def logits_and_gradient(method, arrays, scan=False):
  config = dataclasses.replace(
    CONFIG, scan_layers=scan, remat_policy='full' if scan else 'none'
  )
  model = EncoderDecoderModel(config, methods=(method,))
  flat = parameters.flatten(jax.jit(params)())
  if scan:
    flat, arrays = parameters.scanned(flat), parameters.scanned(arrays, 0)
  as_tree = lambda flat: parameters.nest(
    {k: jnp.asarray(np.asarray(v)) for k, v in flat.items()}
  )

  def loss(arrays):
    variables = {'params': as_tree(flat), 'prefix': arrays}
    logits = model.logits(variables, BATCH)
    return jnp.sum(logits**2), logits

  gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(as_tree(arrays))
  gradient = parameters.unrolled(parameters.flatten(gradient), 0)
  return np.asarray(logits), {k: np.asarray(v) for k, v in gradient.items()}


def test_a_network_of_all_layers_makes_the_keys_and_values():
  """By hand in float64, and with the same logits; of a scanned stack too."""
  method = Prefix(4, ALL, hidden=5)
  arrays = start_of(method)
  plain, made = method.plain(arrays)
  assert plain == Prefix(4, ALL)
  assert {k: v.shape for k, v in made.items()} == {
    k: v.shape for k, v in start_of(plain).items()
  }
  for path, array in made.items():
    place, _, kind = path.rpartition('/')
    stack, _, name = place.split('/')
    net = {
      **{k: arrays[f'{stack}/{name}/{k}'] for k in ('rows', 'down')},
      **{k: arrays[f'{place}/{k}'] for k in ('up', 'up_bias')},
      'down_bias': arrays[f'{stack}/{name}/down_bias'],
    }
    net = {k: np.float64(v) for k, v in net.items()}
    hidden = np.tanh(net['rows'] @ net['down'] + net['down_bias'])
    both = hidden @ net['up'] + net['up_bias']
    want = both[:, :6] if kind == 'keys' else both[:, 6:]
    np.testing.assert_allclose(array, want, atol=1e-6)
  logits, gradient = logits_and_gradient(method, arrays)
  folded, _ = logits_and_gradient(plain, made)
  np.testing.assert_allclose(folded, logits, atol=1e-5)
  scanned, scanned_gradient = logits_and_gradient(method, arrays, scan=True)
  np.testing.assert_allclose(scanned, logits, atol=1e-5)
  assert set(gradient) == set(arrays) == set(scanned_gradient)
  for path, one in gradient.items():
    assert np.abs(one).max() > 1e-3, path
    largest = np.abs(one).max()
    np.testing.assert_allclose(
      scanned_gradient[path], one, atol=1e-5 * largest, err_msg=path
    )


@pytest.mark.parametrize('name', ALL)
def test_only_what_is_named_has_a_prefix(name):
  method = Prefix(2, (name,))
  arrays = start_of(method)
  stack, layers = ('encoder', 2) if name == 'encoder' else ('decoder', 3)
  module = {
    'encoder': 'attention',
    'decoder': 'self_attention',
    'cross': 'encoder_decoder_attention',
  }[name]
  assert set(arrays) == {
    f'{stack}/layers_{i}/{module}/{kind}'
    for i in range(layers)
    for kind in ('keys', 'values')
  }
  for path, gradient in logits_and_gradient(method, arrays)[1].items():
    assert np.abs(gradient).max() > 1e-3, path


def test_settings_that_cannot_be_are_one_line():
  for wrong in (('self_attention',), ()):
    with pytest.raises(
      UserError, match='must be some of encoder, decoder, cro'
    ):
      Prefix(2, wrong)
  for wrong in ({'length': 0}, {'hidden': -1}):
    with pytest.raises(
      UserError, match='length must be 1 or more and Prefix.h'
    ):
      Prefix(**wrong)
  for kind in (DePT, ADePT):
    with pytest.raises(UserError, match='ePT.rank must be 1 or more, got 0'):
      kind(rank=0)
