"""The attention kernel, in Pallas's interpreter, beside plain products.

What it is compared with holds every score at once and is differentiated by JAX.
Whole networks are compared with what T5X and PEFT gave.
"""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_network_golden as network_golden

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.models import attention_kernel
from prompt_tuning.models import layers
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'methods'))
import golden  # noqa: E402

ANY = attention_kernel.ANY_SEGMENT
BACKENDS = pytest.mark.parametrize('backend', attention_kernel.BACKENDS)
kernel = functools.partial(attention_kernel.attention, interpret=True)


def plain(query, key, value, table, query_segments, key_segments, **settings):
  """The same by T5's formula, all [B, N, Q, S] scores at once."""
  settings = {'key_offset': 0, 'causal': False, **settings}
  keys = jnp.arange(key.shape[1]) + settings['key_offset']
  relative = keys[None] - jnp.arange(query.shape[1])[:, None]
  wide = [x.astype(jnp.float32) for x in (query, key, value)]
  scores = jnp.einsum('bqnd,bsnd->bnqs', *wide[:2])
  if table is not None:
    bucket = layers.relative_position_bucket(
      relative,
      bidirectional=not settings['causal'],
      num_buckets=table.shape[1],
      max_distance=settings['max_distance'],
    )
    scores += table[None, :, bucket]
  own, other = query_segments[:, :, None], key_segments[:, None]
  seen = (own > 0) & ((own == other) | (other == ANY))
  if settings['causal']:
    seen &= relative[None] <= 0
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e10))
  return jnp.einsum('bnqs,bsnd->bqnd', weights, wide[2])


def segments(*rows):
  """Rows of (segment, how many) pairs as an array."""
  return jnp.asarray([np.repeat(*zip(*row)) for row in rows], jnp.int32)


PADDED = segments([(1, 21)], [(1, 13), (0, 8)])
PACKED = segments([(1, 9), (2, 12)], [(1, 5), (2, 4), (3, 6), (0, 6)])
# (segments of queries, of keys, heads, head dimension, settings)
CASES = {
  'padded': (PADDED, PADDED, 2, 8, {}),
  'packed': (PACKED, PACKED, 2, 8, {'max_distance': 9}),
  'causal': (PACKED, PACKED, 2, 8, {'causal': True}),
  'cross': (PACKED[:, :10], PACKED, 2, 8, {'table': False}),
  'in_front': (
    PADDED,
    jnp.pad(PADDED, ((0, 0), (3, 0)), constant_values=ANY),
    2,
    8,
    {'key_offset': -3, 'causal': True},
  ),
  'one': (PADDED[:, :1], PADDED[:, :1], 1, 8, {}),
  # Two heads in a block of 128 columns, and two blocks.
  'lanes': (PACKED, PACKED, 4, 64, {'block_q': None, 'block_k': 256}),
  # As many columns as there are, for want of a multiple of 128.
  'odd_heads': (PADDED, PADDED, 3, 16, {}),
}


def case(name, dtype='float32'):
  """(arrays, gradient of real queries, table, segments, settings)."""
  own, other, heads, head_dim, settings = CASES[name]
  settings = {'block_q': 8, 'block_k': 16, 'max_distance': 128} | settings
  random = np.random.RandomState(0)

  def draw(length, scale=1.0):
    shape = (len(own), length, heads, head_dim)
    return jnp.asarray(scale * random.normal(size=shape), dtype)

  query, gradient = draw(own.shape[1], head_dim**-0.5), draw(own.shape[1])
  key, value = draw(other.shape[1]), draw(other.shape[1])
  table = None
  if settings.pop('table', True):
    table = jnp.asarray(random.normal(size=(heads, 16)), jnp.float32)
  gradient *= (own > 0)[:, :, None, None].astype(dtype)
  return (query, key, value), gradient, table, (own, other), settings


def both(name, backend, dtype='float32'):
  """[(outputs of real queries, three gradients)] of kernel and formula."""
  arrays, gradient, table, ids, settings = case(name, dtype)
  real = np.asarray(ids[0] > 0)

  def run(function, given, **settings):
    def step(query, key, value, given):
      mixed, back = jax.vjp(
        lambda *arrays: function(*arrays, table, *ids, **settings),
        *(query, key, value),
      )
      return mixed, *back(given)

    mixed, *gradients = jax.jit(step)(*arrays, given)
    assert all(np.isfinite(np.float32(x)).all() for x in (mixed, *gradients))
    return [np.float32(x) for x in (mixed[real], *gradients)]

  way = {'backend': backend, 'bidirectional': not settings.get('causal')}
  found = run(kernel, gradient, **settings, **way)
  return found, run(plain, gradient.astype(jnp.float32), **settings)


@pytest.mark.parametrize(
  ('name', 'backend'),
  [*((name, 'tpu') for name in CASES), ('packed', 'gpu'), ('in_front', 'gpu')],
)
def test_outputs_and_gradients_equal_the_formulas(name, backend):
  for found, expected in zip(*both(name, backend)):
    largest = np.abs(expected).max()
    # One key gets all the weight whatever its score, which no gradient moves.
    assert largest > 0.1 or name == 'one'
    atol = 1e-5 * max(largest, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@BACKENDS
def test_bfloat16_stays_near_the_formula(backend):
  for found, expected in zip(*both('packed', backend, 'bfloat16')):
    # 8 bits of weights, of what comes back to scores, and of the result.
    error = np.abs(found - expected)
    assert error.max() < 0.02 * np.abs(expected).max()
    assert error.mean() < 0.003 * np.abs(expected).max()


def test_a_query_with_nothing_to_look_at_gets_zeros_and_gives_no_gradient():
  arrays, gradient, table, (own, other), settings = case('padded')
  other = other.at[0].set(0)

  @jax.jit
  def step(*arrays):
    found, back = jax.vjp(
      lambda *arrays: kernel(*arrays, table, own, other, **settings), *arrays
    )
    return found, back(jnp.ones_like(gradient))

  found, gradients = step(*arrays)
  assert not found[0].any() and not found[1, 13:].any() and found[1, :13].all()
  for by in gradients:
    assert np.isfinite(by).all() and not by[0].any() and by[1, :13].any()


def test_no_gradient_of_the_frozen_table_is_computed():
  arrays, _, table, ids, settings = case('padded')
  by_table = jax.grad(lambda t: kernel(*arrays, t, *ids, **settings).sum())
  assert not by_table(table).any()


def test_split_over_devices_it_gives_what_one_device_gives():
  arrays, gradient, table, ids, settings = case('lanes')
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def step(function, *arrays):
    mixed, back = jax.vjp(
      lambda *arrays: function(*arrays, table, *ids, **settings), *arrays
    )
    return mixed, *back(gradient)

  split = functools.partial(
    *(attention_kernel.sharded_attention, mesh, 'data', 'model'), interpret=True
  )
  found = jax.jit(functools.partial(step, split))(*arrays)
  assert found[0].sharding.shard_shape(found[0].shape) == (1, 21, 1, 64)
  expected = jax.jit(functools.partial(step, kernel))(*arrays)
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'backend': 'cuda'}, "one of tpu, gpu, got 'cuda'"),
    ({'block_q': 12}, 'multiples of 8 on a TPU, got 12 and 16'),
    ({'backend': 'gpu', 'block_k': 24}, 'powers of 2 on a GPU, got 24'),
  ],
)
def test_blocks_that_a_backend_cannot_take_are_refused(settings, message):
  arrays, _, table, ids, usual = case('padded')
  with pytest.raises(UserError, match=message):
    kernel(*arrays, table, *ids, **{**usual, **settings})


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_it_can_be_said_in_tritons_language(dtype):
  """`tests/planning` compiles that, where there is a compiler for GPUs."""
  arrays, gradient, table, ids, _ = case('lanes', dtype)

  def step(*arrays):
    mixed, back = jax.vjp(
      lambda *arrays: attention_kernel.attention(
        *arrays, table, *ids, backend='gpu', causal=True
      ),
      *arrays,
    )
    return back(mixed)

  lowered = jax.jit(step).trace(*arrays).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('custom_call @__gpu$xla.gpu.triton') == 3


# Whole networks, of which every attention is made by the kernel.


def gradient_and_logits(config, methods, variables, batch, scalar):
  """Of a network of the kernel; the gradient is of methods' arrays."""
  config = dataclasses.replace(config, attention='interpreted_kernel')
  model = EncoderDecoderModel(config, methods=methods)
  trained = {k: v for k, v in variables.items() if k != 'params'}

  def compute(trained):
    logits = model.logits({**variables, **trained}, batch)
    return scalar(logits), logits

  program = jax.jit(jax.grad(compute, has_aux=True))
  assert 'pallas_call' in str(program.trace(trained).jaxpr)
  by, logits = program(trained)
  return by, np.asarray(logits)


@pytest.mark.parametrize(
  ('group', 'name'),
  [('01_network', 'packed_v11_2x2'), ('02_prompted', 'v11_2x2_p5')],
)
def test_a_network_of_it_gives_t5xs_logits_and_the_public_gradient(
  shared_dir, group, name
):
  config, variables, batch, arrays, _ = network_golden.load(
    shared_dir, group, name
  )

  def loss(logits):
    given = network_golden.Given(config)
    return given.loss_fn({'given': {'logits': logits}}, batch)[0]

  methods = network_golden.methods_of(variables)
  by, logits = gradient_and_logits(config, methods, variables, batch, loss)
  real = arrays['batch/decoder_target_tokens'] > 0
  expected = arrays['logits'][real]
  atol = 2e-5 * np.abs(expected).max()
  np.testing.assert_allclose(logits[real], expected, rtol=0, atol=atol)
  if methods:
    expected = arrays['prompt_grad/lnf_none']
    atol = 1e-4 * np.abs(expected).max()
    found = by['prompt']['table'][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_keys_in_front_of_it_give_the_references_prefix_tuning():
  method = golden.CASES['prefix']
  shapes = jax.eval_shape(
    lambda key, params: method.init(key, params, ANY_TEXT),
    jax.random.key(0),
    network.parameter_shapes(golden.CONFIG),
  )
  flat = golden.arrays(
    {k: v.shape for k, v in parameters.flatten(shapes).items()}
  )
  params = {k: jnp.asarray(v) for k, v in golden.params().items()}
  by, logits = gradient_and_logits(
    golden.CONFIG,
    (method,),
    {'params': parameters.nest(params), 'prefix': parameters.nest(flat)},
    {
      'encoder_input_tokens': jnp.asarray(golden.INPUTS),
      'decoder_input_tokens': jnp.asarray(golden.DECODER),
      'decoder_target_tokens': jnp.ones_like(golden.DECODER),
    },
    lambda logits: jnp.sum(logits * golden.weights()),
  )
  expected = np.load(golden.FILE)
  for path, found in {
    **parameters.flatten(by['prefix']),
    'logits': logits,
  }.items():
    np.testing.assert_allclose(
      found, expected[f'prefix/{path}'], atol=1e-5, err_msg=path
    )
