"""Methods beside their reference implementations: logits and gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel

sys.path.insert(0, __file__.rpartition('/')[0])
import golden  # noqa: E402

TOLERANCE = 1e-5


def shapes_of(method):
  shapes = jax.eval_shape(
    lambda key, params: method.init(key, params, ANY_TEXT),
    jax.random.key(0),
    network.parameter_shapes(golden.CONFIG),
  )
  return {k: v.shape for k, v in parameters.flatten(shapes).items()}


@pytest.mark.parametrize('name', golden.CASES)
def test_a_method_gives_its_references_logits_and_gradients(name):
  method = golden.CASES[name]
  arrays = golden.arrays(shapes_of(method))
  tokens = method.virtual_tokens(golden.CONFIG)
  inputs = golden.INPUTS
  if tokens is not None:
    virtual = np.repeat(tokens.ids()[None], len(inputs), axis=0)
    inputs = np.concatenate([virtual, inputs], axis=1)
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': golden.DECODER,
    'decoder_target_tokens': np.ones_like(golden.DECODER),
  }
  model = EncoderDecoderModel(golden.CONFIG, methods=(method,))
  params = {k: jnp.asarray(v) for k, v in golden.params().items()}
  frozen = {'params': parameters.nest(params)}

  def weighted(arrays):
    logits = model.logits({**frozen, method.collection: arrays}, batch)
    return jnp.sum(logits * golden.weights()), logits

  gradient = jax.jit(jax.grad(weighted, has_aux=True))
  gradients, logits = gradient(parameters.nest(arrays))
  expected = np.load(golden.FILE)
  close(logits, expected[f'{name}/logits'], 'logits')
  for path, found in parameters.flatten(gradients).items():
    close(found, expected[f'{name}/{path}'], path)


def close(found, expected, what):
  largest = np.abs(expected).max()
  assert largest > 0.01, what
  np.testing.assert_allclose(
    found, expected, atol=TOLERANCE * max(largest, 1), err_msg=what
  )
