"""What holds for any T5, on one with small random weights."""

import dataclasses
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import layer_stacks
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import layers
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel

CONFIG = network.T5Config(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
)
P = 3
METHODS = (Prompt(P, num_prompts=2),)
MODEL = EncoderDecoderModel(CONFIG, methods=METHODS)


# Compiling takes the time of these tests: the weights are numpy's, of the sizes
# that T5 starts with, and programs are shared where they can be.
@functools.cache
def variables():
  rng = np.random.default_rng(0)

  def draw(path, like):
    if path[-1].key == 'scale':
      return jnp.ones(like.shape)
    fan_in = like.shape[0] if path[-1].key == 'kernel' else 1
    return jnp.asarray(rng.normal(0, fan_in**-0.5, like.shape), jnp.float32)

  params = network.parameter_shapes(CONFIG)
  table = rng.normal(size=(2, P, CONFIG.emb_dim))
  return {
    'params': jax.tree_util.tree_map_with_path(draw, params),
    'prompt': {'table': jnp.asarray(table, jnp.float32)},
  }


def make_batch(inputs, targets, inputs_length=8, targets_length=5):
  """A batch of unpadded lists of ids."""
  pad = lambda rows, n: np.array(
    [list(row) + [0] * (n - len(row)) for row in rows], np.int32
  )
  target = pad(targets, targets_length)
  return {
    'encoder_input_tokens': pad(inputs, inputs_length),
    'decoder_target_tokens': target,
    'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))),
    'decoder_loss_weights': (target > 0).astype(np.int32),
  }


INPUTS = [[5, 9, 33, 7, 1], [12, 3, 1]]
TARGETS = [[7, 8, 1], [20, 1]]
jit_scores = jax.jit(MODEL.score_batch)


def test_padding_does_not_change_an_examples_loss():
  short = jit_scores(variables(), make_batch(INPUTS, TARGETS))
  long = jit_scores(variables(), make_batch(INPUTS, TARGETS, 13, 9))
  np.testing.assert_allclose(short, long, rtol=1e-6)


def test_the_other_examples_of_a_batch_do_not_change_an_examples_loss():
  both = jit_scores(variables(), make_batch(INPUTS, TARGETS))
  alone = jit_scores(variables(), make_batch(INPUTS[:1], TARGETS[:1]))
  np.testing.assert_allclose(both[:1], alone, rtol=1e-6)


def test_packing_does_not_change_the_loss():
  single = make_batch(INPUTS, TARGETS)
  flat = lambda rows: [[i for row in rows for i in row]]
  packed = make_batch(flat(INPUTS), flat(TARGETS), 10, 7)
  number = lambda rows, n: np.array(
    [
      sum(([i + 1] * len(r) for i, r in enumerate(rows)), [])
      + [0] * (n - sum(map(len, rows)))
    ],
    np.int32,
  )
  packed['encoder_segment_ids'] = number(INPUTS, 10)
  packed['decoder_segment_ids'] = number(TARGETS, 7)
  # Packed decoder inputs start every example with 0, not the last one's EOS.
  packed['decoder_input_tokens'] = np.array([[0, 7, 8, 0, 20, 0, 0]], np.int32)

  @jax.jit
  def losses(variables, batch):
    return [
      dataclasses.replace(MODEL, loss_normalizing_factor=name).loss_fn(
        variables, batch
      )[0]
      for name in (None, 'AVERAGE_PER_SEQUENCE', 'NUM_REAL_TARGET_TOKENS')
    ]

  np.testing.assert_allclose(
    losses(variables(), packed), losses(variables(), single), rtol=2e-6
  )


@functools.cache
def jit_logits(config=CONFIG, methods=METHODS):
  return jax.jit(EncoderDecoderModel(config, methods=methods).logits)


@pytest.mark.parametrize('prompt_index', [0, 1])
def test_virtual_tokens_equal_concatenated_embeddings(prompt_index):
  batch = make_batch(INPUTS, TARGETS)
  table = variables()['prompt']['table'][prompt_index]
  ids = CONFIG.vocab_size + prompt_index * P + np.arange(P, dtype=np.int32)
  virtual = {
    **batch,
    'encoder_input_tokens': np.concatenate(
      [np.tile(ids, (2, 1)), batch['encoder_input_tokens']], axis=1
    ),
  }

  # By hand: the embeddings of the text with the prompt's rows before them, as
  # the first rows of a larger vocabulary's table.
  params = jax.tree.map(lambda x: x, variables()['params'])
  params['token_embedder'] = {
    'embedding': jnp.concatenate([params['token_embedder']['embedding'], table])
  }
  larger = dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + P)
  params['decoder'] = dict(params['decoder'])
  kernel = params['decoder']['logits_dense']['kernel']
  params['decoder']['logits_dense'] = {
    'kernel': jnp.pad(kernel, ((0, 0), (0, P)))
  }
  by_hand = dict(virtual)
  by_hand['encoder_input_tokens'] = np.where(
    virtual['encoder_input_tokens'] >= CONFIG.vocab_size,
    virtual['encoder_input_tokens'] - prompt_index * P,
    virtual['encoder_input_tokens'],
  )
  expected = jit_logits(larger, ())({'params': params}, by_hand)
  got = jit_logits()(variables(), virtual)
  np.testing.assert_allclose(got, expected[..., : CONFIG.vocab_size], atol=1e-5)


def test_examples_of_one_batch_use_prompts_of_their_own():
  batch = make_batch([INPUTS[0]] * 2, [TARGETS[0]] * 2)
  ids = CONFIG.vocab_size + np.arange(2 * P, dtype=np.int32).reshape(2, P)
  batch['encoder_input_tokens'] = np.concatenate(
    [ids, batch['encoder_input_tokens']], axis=1
  )
  together = jit_scores(variables(), batch)
  assert abs(together[0] - together[1]) > 1e-3
  for k in range(2):
    only = {'table': variables()['prompt']['table'][k : k + 1]}
    alone = {n: x[k : k + 1].copy() for n, x in batch.items()}
    alone['encoder_input_tokens'][:, :P] = ids[:1]
    score = jit_scores({**variables(), 'prompt': only}, alone)
    np.testing.assert_allclose(score[0], together[k], rtol=1e-6)


@functools.cache
def gradient(config):
  """Of the loss by all parameters: parameters -> their gradient."""
  model, batch = EncoderDecoderModel(config), make_batch(INPUTS, TARGETS)
  return jax.jit(jax.grad(lambda p: model.loss_fn({'params': p}, batch)[0]))


@pytest.mark.parametrize('remat_policy', ['none', 'minimal', 'full'])
@pytest.mark.parametrize('tied', [False, True])
def test_scanned_layers_equal_unrolled_ones(tied, remat_policy):
  config = dataclasses.replace(CONFIG, logits_via_embedding=tied)
  params = jax.tree.map(lambda x: x, variables()['params'])
  if tied:
    del params['decoder']['logits_dense']
  scanned = dataclasses.replace(
    config, scan_layers=True, remat_policy=remat_policy
  )
  stacked = layer_stacks.stack(params)
  shapes = network.parameter_shapes(scanned)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
    lambda x: x.shape, shapes
  )
  got = layer_stacks.unstack(gradient(scanned)(stacked))
  expected = gradient(config)(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
    got,
    jax.device_get(expected),
  )


def test_stacked_layers_convert_back_without_loss():
  params = variables()['params']
  back = layer_stacks.unstack(layer_stacks.stack(params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scan'])
def test_cached_decoding_equals_uncached(scan):
  config = dataclasses.replace(CONFIG, scan_layers=scan)
  params = variables()['params']
  if scan:
    params = layer_stacks.stack(params)
  batch = make_batch(INPUTS, [[7, 8, 9, 10, 1], [20, 21, 22, 23, 1]])
  inputs = jnp.asarray(batch['encoder_input_tokens'])
  shifted = jnp.asarray(batch['decoder_input_tokens'])
  apply = functools.partial(
    network.Transformer(config).apply, method=network.Transformer.decode
  )
  cached = functools.partial(
    apply, cache_length=shifted.shape[1], mutable=['cache']
  )

  @jax.jit
  def start(params):
    encoded = network.Transformer(config).apply(
      params, inputs, method=network.Transformer.encode
    )
    _, cache = cached(params, encoded, inputs, shifted)
    return encoded, cache, apply(params, encoded, inputs, shifted)

  @jax.jit
  def step(params, encoded, cache, token):
    return cached({**params, **cache}, encoded, inputs, token)

  encoded, cache, whole = start({'params': params})
  for i in range(shifted.shape[1]):
    token = shifted[:, i : i + 1]
    logits, cache = step({'params': params}, encoded, cache, token)
    np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=2e-5)


def test_rank_classification_scores_each_label_as_a_target():
  labels = np.array([[7, 8, 1], [20, 1, 0], [9, 1, 0]], np.int32)
  batch = make_batch(INPUTS, TARGETS)
  got = jax.jit(MODEL.rank_classify)(variables(), batch, labels)
  assert got.shape == (2, 3)
  for c, label in enumerate(labels):
    ids = [i for i in label.tolist() if i]
    one = make_batch(INPUTS, [ids] * 2)
    np.testing.assert_allclose(
      got[:, c], jit_scores(variables(), one), rtol=1e-5
    )


def test_dropout_acts_only_where_it_is_given_a_key():
  config = dataclasses.replace(CONFIG, dropout_rate=0.5)
  model = EncoderDecoderModel(config, methods=METHODS)
  batch = make_batch(INPUTS, TARGETS)

  @jax.jit
  def losses(variables, rng):
    return (
      MODEL.loss_fn(variables, batch)[0],
      model.loss_fn(variables, batch)[0],
      model.loss_fn(variables, batch, rng)[0],
    )

  plain, still, first = losses(variables(), jax.random.key(0))
  np.testing.assert_allclose(still, plain, rtol=1e-6)
  second = losses(variables(), jax.random.key(1))[2]
  assert abs(first - still) > 1e-3 and abs(first - second) > 1e-3
  assert losses(variables(), jax.random.key(0))[2] == first


def test_norm_divides_by_the_root_mean_square():
  x = jnp.array([[3.0, 4.0]])
  norm = layers.RMSNorm()
  got = norm.apply({'params': {'scale': jnp.array([1.0, 2.0])}}, x)
  root = np.sqrt((9 + 16) / 2)
  np.testing.assert_allclose(got, [[3 / root, 8 / root]], rtol=1e-6)


def test_position_buckets_by_hand():
  @functools.partial(jax.jit, static_argnums=1)
  def bucket_of(distances, both):
    return layers.relative_position_bucket(
      distances, bidirectional=both, num_buckets=8, max_distance=16
    )

  bucket = lambda x, both: bucket_of(jnp.asarray(x), both).tolist()
  # A key `d` before the query has relative position -d. Of 8 buckets 4 are
  # exact; the rest grow from 4 to 16 by powers of 4^(1/4).
  assert bucket([0, -1, -2, -3], False) == [0, 1, 2, 3]
  assert bucket([-4, -5, -6, -8, -12, -16, -99], False) == [4, 4, 5, 6, 7, 7, 7]
  assert bucket([1, 5], False) == [0, 0]  # Keys after the query.
  # Both directions: 4 buckets a side, 2 of them exact.
  assert bucket([-1, 1], True) == [1, 5]


def test_settings_that_do_not_exist_are_named():
  with pytest.raises(UserError, match='remat_policy is .all.; known are'):
    dataclasses.replace(CONFIG, remat_policy='all')
  with pytest.raises(UserError, match='gelo'):
    dataclasses.replace(CONFIG, mlp_activations=('gelo',))


def test_frozen_weights_may_be_bfloat16():
  params = variables()['params']
  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  batch = make_batch(INPUTS, TARGETS)
  got = jit_scores({**variables(), 'params': stored}, batch)
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
  # Activations are float32 either way; only the weights were rounded.
  expected = jit_scores({**variables(), 'params': rounded}, batch)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_parameter_paths_are_those_of_t5x():
  paths = traverse_util.flatten_dict(network.parameter_shapes(CONFIG), sep='/')
  assert 'encoder/layers_0/attention/query/kernel' in paths
  assert 'decoder/layers_1/encoder_decoder_attention/out/kernel' in paths
  assert 'decoder/layers_1/pre_cross_attention_layer_norm/scale' in paths
  assert 'encoder/relpos_bias/rel_embedding' in paths
  assert 'token_embedder/embedding' in paths
  assert 'decoder/logits_dense/kernel' in paths
