"""Attention against its formula, with keys and values or without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import attention
from prompt_tuning.models import decoding
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel

B, N, Q, S, D = 2, 3, 4, 5, 6


def drawn(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def formula(query, key, value, bias, mask, keep):
  """What `mix` is to give, left to JAX's own differentiation."""
  scores = jnp.einsum('bnqd,bnsd->bnqs', query, key)
  if bias is not None:
    scores += bias
  if mask is not None:
    scores += jnp.where(mask, 0.0, -1e10)
  weights = jax.nn.softmax(scores)
  if keep is not None:
    weights *= keep
  return jnp.einsum('bnqs,bnsd->bnqd', weights, value)


@pytest.mark.parametrize('extras', ['none', 'bias and mask', 'all'])
def test_values_and_gradients_are_those_of_the_formula(extras):
  arrays = [drawn(B, N, n, D, seed=n) for n in (Q, S, S + 1)]
  arrays[2] = arrays[2][:, :, :S]
  bias = None if extras == 'none' else drawn(1, N, Q, S)
  mask = None if extras == 'none' else drawn(B, 1, Q, S, seed=3) < 0.5
  keep = None
  if extras == 'all':
    keep = jnp.where(drawn(B, N, 1, S) > 0, 2.0, 0.0)
  weights = drawn(B, N, Q, D)

  def loss(function, *args):
    return jnp.sum(weights * function(*args, mask, keep))

  args = (*arrays, bias)
  wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
  of = lambda f: jax.value_and_grad(loss, tuple(i + 1 for i in wanted))
  found = of(attention.mix)(attention.mix, *args)
  expected = of(formula)(formula, *args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )


def test_narrow_activations_keep_scores_and_sums_wide():
  arrays = [drawn(1, 1, n, 64, seed=n) for n in (Q, 200, 201)]
  arrays[2] = arrays[2][:, :, :200]
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  mixed = attention.mix(*narrow, None, None, None)
  assert mixed.dtype == jnp.bfloat16
  expected = formula(*[x.astype('f') for x in narrow], None, None, None)
  # Weights and results have 8 bits, scores have more: of those with 8 bits the
  # error is 8 times as large.
  np.testing.assert_allclose(mixed.astype('f'), expected, atol=1e-2)


CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=6,
  mlp_dim=12,
  num_encoder_layers=1,
  num_decoder_layers=2,
)
BATCH = {
  'encoder_input_tokens': np.array([[40, 41, 5, 6, 1], [40, 41, 7, 1, 0]], 'i'),
  'decoder_input_tokens': np.array([[0, 9, 8], [0, 7, 0]], 'i'),
  'decoder_target_tokens': np.array([[9, 8, 1], [7, 1, 0]], 'i'),
}
PACKED = BATCH | {
  'encoder_segment_ids': np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]], 'i'),
  'decoder_segment_ids': np.array([[1, 1, 2], [1, 1, 0]], 'i'),
}


def variables_of(model):
  params = model.init_params(jax.random.key(0))
  # Larger than T5's start: what attention does is to be seen.
  params = jax.tree.map(lambda x: 2.0 * x, params)
  return {'params': params, 'prompt': {'table': drawn(1, 2, 8)}}


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('case', ['plain', 'packed', 'dropout'])
def test_few_queries_need_no_keys_and_values(case, scan):
  dropout_rate = 0.5 if case == 'dropout' else 0.0
  config = dataclasses.replace(
    CONFIG, scan_layers=scan, dropout_rate=dropout_rate
  )
  model = EncoderDecoderModel(config, methods=(Prompt(2),))
  variables = variables_of(model)
  batch = PACKED if case == 'packed' else BATCH
  key = jax.random.key(1) if dropout_rate else None

  def found(absorb):
    model = EncoderDecoderModel(config, methods=(Prompt(2),))
    vars(model)['module'] = network.Transformer(config, absorb)
    loss = lambda table, params: model.loss_fn(
      {'params': params, 'prompt': {'table': table}}, batch, key
    )[0]
    args = (variables['prompt']['table'], variables['params'])
    program = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return program(*args), str(jax.make_jaxpr(loss)(*args))

  (absorbed, its_program), (projected, its) = found(True), found(False)
  for a, b in zip(*map(jax.tree.leaves, (absorbed, projected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
  assert its_program != its
  assert model.module.absorb


def test_decoding_without_keys_has_no_cache_of_them():
  model = EncoderDecoderModel(
    CONFIG, methods=(Prompt(2),), decode_fn=decoding.temperature_sample
  )
  variables = variables_of(model)
  with_keys = EncoderDecoderModel(
    CONFIG, methods=(Prompt(2),), decode_fn=decoding.temperature_sample
  )
  vars(with_keys)['module'] = network.Transformer(CONFIG)

  def decoded(model):
    return model.predict_batch_with_aux(
      variables,
      {**BATCH, 'decoder_input_tokens': np.zeros((2, 5), 'i')},
      decoder_params={'rescale_log_probs': False},
    )

  (ids, aux), (expected, its_aux) = decoded(model), decoded(with_keys)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(aux['scores'], its_aux['scores'], rtol=1e-4)

  def cached(model):
    ids = jnp.asarray(BATCH['encoder_input_tokens'])
    args = (jnp.ones((2, 5, 8)), ids, jnp.zeros((2, 5), jnp.int32))
    method = network.Transformer.decode
    _, found = jax.eval_shape(
      lambda: model.module.apply(
        {'params': variables['params']},
        *args,
        cache_length=5,
        method=method,
        mutable=['cache'],
      )
    )
    return parameters.flatten(found['cache'])

  crossed = [k for k in cached(with_keys) if 'encoder_decoder' in k]
  assert len(crossed) == 4
  assert not any('encoder_decoder' in path for path in cached(model))


def test_many_beams_share_keys_that_are_made_once():
  def decode(start, cache, tokens_to_logits, *, num_decodes, **_):
    seen.append(parameters.flatten(cache))
    decodes = jnp.zeros((2, num_decodes, 3), jnp.int32)
    return decodes, jnp.zeros((2, num_decodes))

  seen = []
  model = EncoderDecoderModel(CONFIG, methods=(Prompt(2),), decode_fn=decode)
  variables = variables_of(model)
  batch = {**BATCH, 'decoder_input_tokens': np.zeros((2, 3), 'i')}
  for beams in (1, 2):  # 3 and 6 tokens; heads are of 6
    model.predict_batch_with_aux(variables, batch, num_decodes=beams)
  crossed = [sum('encoder_decoder' in k for k in cache) for cache in seen]
  assert crossed == [0, 4]


def test_keys_are_there_for_methods_that_act_on_them():
  def absorbs(*methods):
    return EncoderDecoderModel(CONFIG, methods=methods).module.absorb

  assert absorbs(Prompt(2)) and absorbs(Lora(targets=('query', 'wo')))
  assert not absorbs(Prompt(2), Lora(targets=('query', 'value')))
  assert absorbs(Prefix(2)) and not absorbs(Prefix(2, ('cross',)))


def test_a_segment_is_looked_at_by_its_own_and_padding_by_nobody():
  segments = jnp.array([[1, 1, 2, 0]])
  at = jnp.arange(4)
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  mask = attention.Mask(segments, segments, at, at).array()
  np.testing.assert_array_equal(mask[0, 0], expected)
  anywhere = attention.Mask(segments, segments).array()[0, 0]
  np.testing.assert_array_equal(anywhere[0], [1, 1, 0, 0])
