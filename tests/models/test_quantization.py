"""Kernels of 8 bits: what they are, and that a network runs on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models import quantization
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import base as base_lib
from prompt_tuning.training import partitioning
from prompt_tuning.training import reporting

CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=16,
  num_encoder_layers=2,
  num_decoder_layers=2,
)
BATCH = {
  'encoder_input_tokens': np.array([[40, 41, 5, 6, 1], [40, 41, 7, 1, 0]], 'i'),
  'decoder_input_tokens': np.array([[0, 9, 8], [0, 7, 0]], 'i'),
  'decoder_target_tokens': np.array([[9, 8, 1], [7, 1, 0]], 'i'),
}


def base_of(config):
  params = EncoderDecoderModel(config).init_params(jax.random.key(0))
  flat = {k: np.asarray(v) for k, v in parameters.flatten(params).items()}
  return base_lib.BaseCheckpoint('random', 0, flat)


def test_a_number_is_off_by_half_a_step_of_its_channel_at_most():
  kernel = np.array([[1.27, 100.0, 0.0], [-0.634, -50.2, 0.0]], np.float32)
  found = quantization.quantize(jnp.asarray(kernel))
  assert found.values.dtype == jnp.int8
  np.testing.assert_array_equal(found.values, [[127, 127, 0], [-63, -64, 0]])
  steps = np.array([[0.01, 100 / 127, 1 / 127]])
  np.testing.assert_allclose(found.scale, steps, rtol=1e-6)
  error = np.abs(np.asarray(found.astype('float32')) - kernel)
  assert (error <= 0.5 * steps + 1e-6).all()


@pytest.mark.parametrize('scan', [False, True])
def test_a_network_gives_what_its_rounded_kernels_give(scan):
  config = dataclasses.replace(CONFIG, scan_layers=scan)
  model = EncoderDecoderModel(config, methods=(Prompt(2),))
  table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 8)), 'f')
  base = base_of(config)
  stored = base.load(config, dtype='int8')
  is_leaf = quantization.is_quantized
  rounded = jax.tree.map(lambda x: x.astype('float32'), stored, is_leaf=is_leaf)

  @jax.jit
  def loss_and_gradient(params, table):
    loss = lambda table: model.loss_fn(
      {'params': params, 'prompt': {'table': table}}, BATCH
    )[0]
    return jax.value_and_grad(loss)(table)

  found = loss_and_gradient(stored, table)
  jax.tree.map(
    # Of entries near 0, within rounding of the largest.
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=3e-5 * np.abs(b).max()
    ),
    found,
    loss_and_gradient(rounded, table),
  )
  exact, _ = loss_and_gradient(base.load(config, dtype='float32'), table)
  assert 0 < abs(found[0] - exact) < 0.02 * abs(exact)
  flat = parameters.flatten(stored)
  kept = {path for path, array in flat.items() if not is_leaf(array)}
  assert {path.split('/')[-1] for path in kept} == {
    *('embedding', 'rel_embedding', 'scale', 'kernel')
  }
  assert [p for p in kept if p.endswith('kernel')] == [
    'decoder/logits_dense/kernel'
  ]
  sizes = [np.prod(array.shape) for array in base.arrays.values()]
  assert reporting.count_parameters(stored) == sum(sizes)


def test_a_method_that_reads_kernels_reads_rounded_ones():
  model = EncoderDecoderModel(CONFIG, methods=(PerLayerPrompt(2),))
  stored = base_of(CONFIG).load(CONFIG, dtype='int8')
  is_leaf = quantization.is_quantized
  rounded = jax.tree.map(lambda x: x.astype('float32'), stored, is_leaf=is_leaf)
  arrays = jax.tree.map(
    lambda like: jnp.ones(like.shape),
    model.methods[0].init(jax.random.key(0), rounded, ANY_TEXT),
  )
  of = lambda params: model.logits(
    {'params': params, 'per_layer': arrays}, BATCH
  )
  np.testing.assert_allclose(of(stored), of(rounded), rtol=1e-4, atol=1e-5)


def test_split_kernels_have_their_scales_with_them():
  config = dataclasses.replace(CONFIG, scan_layers=True)
  layout = partitioning.Layout(partitioning.make_mesh(2, 2, 2))
  base = base_of(config)
  split = base.load(config, layout, dtype='int8')
  whole = base.load(config, dtype='int8')
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  shapes = network.parameter_shapes(config)
  planned = base_lib.frozen_shapes(shapes, layout.frozen(shapes), 'int8')
  for array, like in zip(*map(jax.tree.leaves, (split, planned)), strict=True):
    assert (array.shape, array.dtype) == (like.shape, like.dtype)
    assert array.sharding.is_equivalent_to(like.sharding, array.ndim)
  kernel = split['encoder']['encoder']['mlp']['wi_0']['kernel']
  assert tuple(kernel.values.sharding.spec) == ('fsdp', None, 'model')
  assert tuple(kernel.scale.sharding.spec) == (None, None, 'model')


def test_files_have_no_kernels_of_8_bits():
  with pytest.raises(UserError, match="float32 or bfloat16, got 'int8'"):
    base_lib.storage_dtype('int8')
  with pytest.raises(UserError, match="bfloat16 or int8, got 'int4'"):
    base_of(CONFIG).load(CONFIG, dtype='int4')
