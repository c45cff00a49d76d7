"""Adafactor, schedules and the choice of an optimiser."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training.optimizers import adafactor
from prompt_tuning.training.optimizers import build_optimizer
from prompt_tuning.training.optimizers import create_learning_rate_scheduler


def run(optimizer, params, grads_per_step):
  """Parameters after every step, and the last optimiser state."""
  state = optimizer.init(params)
  history = []
  for grads in grads_per_step:
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    history.append(jax.tree.map(np.asarray, params))
  return history, state


def assert_as_t5x(got, want):
  """Within 2e-6 of the largest entry, and of each that rounding allows.

  An update is added to the old value in float32, so an entry that lands next
  to zero keeps the rounding of where it came from.
  """
  got, want = np.asarray(got), np.asarray(want)
  largest = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * largest)
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1.2e-7 * largest)


def numpy_adafactor(param, grads, steps, lr, *, decay_rate=0.8):
  """Unfactored, no parameter scale, clipping 1: by the paper, in float64."""
  param, v = np.float64(param), np.zeros_like(param, np.float64)
  for step, grad in zip(steps, np.float64(grads)):
    beta = 1 - (step + 1.0) ** -decay_rate
    v = beta * v + (1 - beta) * (grad**2 + 1e-30)
    update = grad / np.sqrt(v)
    update /= max(1.0, np.sqrt(np.mean(update**2)))
    param = param - lr * update
  return param


# By hand: small cases that need no golden data.


def test_first_step_from_zero_moves_every_entry_by_the_learning_rate():
  # decay is 0 at step 0, so the update is sign(g), whose RMS is 1.
  param = jnp.asarray([[1.0, -2.0], [3.0, 0.5]])
  grad = jnp.asarray([[0.1, -7.0], [1e-3, 2.0]])
  opt = adafactor(0.25, multiply_by_parameter_scale=False)
  [after], _ = run(opt, param, [grad])
  np.testing.assert_allclose(after, [[0.75, -1.75], [2.75, 0.25]], rtol=1e-6)


def test_several_steps_follow_the_paper_s_formula():
  rng = np.random.default_rng(0)
  param = rng.normal(size=(3, 4)).astype(np.float32)
  grads = rng.normal(size=(5, 3, 4)).astype(np.float32)
  for start in (0, 7):
    opt = adafactor(0.1, initial_step=start, multiply_by_parameter_scale=False)
    history, state = run(opt, jnp.asarray(param), jnp.asarray(grads))
    want = numpy_adafactor(param, grads, range(start, start + 5), 0.1)
    np.testing.assert_allclose(history[-1], want, rtol=2e-5)
    assert int(state.count) == start + 5


def test_count_includes_the_base_checkpoint_s_steps():
  # At step 1,100,000 the second moment starts at 0 and hardly mixes: g/sqrt(v)
  # is about 261 and the clipping sets the update's RMS to 1.
  rng = np.random.default_rng(1)
  param = jnp.zeros((5, 8))
  grads = jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.float32)
  opt = adafactor(
    0.3, initial_step=1_100_000, multiply_by_parameter_scale=False
  )
  history, state = run(opt, param, grads)
  previous = np.zeros((5, 8))
  for after in history:
    rms = np.sqrt(np.mean((after - previous) ** 2))
    np.testing.assert_allclose(rms, 0.3, rtol=1e-5)
    previous = after
  assert int(state.count) == 1_100_004


def test_step_offset_restores_the_behaviour_of_step_zero():
  rng = np.random.default_rng(2)
  param = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
  grads = jnp.asarray(rng.normal(size=(4, 3, 4)), jnp.float32)
  fresh, _ = run(adafactor(0.1), param, grads)
  shifted, _ = run(
    adafactor(0.1, initial_step=1000, step_offset=1000), param, grads
  )
  np.testing.assert_array_equal(fresh[-1], shifted[-1])


def test_weight_decay_is_not_scaled_by_the_learning_rate():
  param = jnp.asarray([[2.0, -4.0]])
  opt = adafactor(0.0, weight_decay_rate=0.1)
  [after], _ = run(opt, param, [jnp.ones((1, 2))])
  np.testing.assert_allclose(after, [[1.8, -3.6]], rtol=1e-6)


def test_weight_decay_can_follow_a_power_of_the_learning_rate():
  param = jnp.asarray([[2.0, -4.0]])
  opt = adafactor(
    0.1,
    weight_decay_rate=0.5,
    weight_decay_rate_lr_exponent=2.0,
    multiply_by_parameter_scale=False,
  )
  [after], _ = run(opt, param, [jnp.ones((1, 2))])
  kept = 1 - 0.5 * 0.1**2
  np.testing.assert_allclose(
    after, [[2 * kept - 0.1, -4 * kept - 0.1]], rtol=1e-6
  )


def test_parameter_scale_has_a_floor_and_a_ceiling():
  grad = {'a': jnp.ones((2,)), 'b': jnp.ones((2,)), 'c': jnp.ones((2,))}
  param = {
    'a': jnp.zeros((2,)),
    'b': jnp.full((2,), 3.0),
    'c': jnp.full((2,), 50.0),
  }
  opt = adafactor(0.1, max_parameter_scale=10.0)
  [after], _ = run(opt, param, [grad])
  np.testing.assert_allclose(after['a'], -0.1 * 1e-3, rtol=1e-6)
  np.testing.assert_allclose(after['b'], 3 - 0.1 * 3, rtol=1e-6)
  np.testing.assert_allclose(after['c'], 50 - 0.1 * 10, rtol=1e-6)


def test_factored_second_moment_is_the_outer_product_of_means():
  rng = np.random.default_rng(3)
  param = rng.normal(size=(4, 6)).astype(np.float32)
  grad = rng.normal(size=(4, 6)).astype(np.float32)
  opt = adafactor(
    1.0,
    min_dim_size_to_factor=4,
    multiply_by_parameter_scale=False,
    clipping_threshold=None,
  )
  [after], state = run(opt, jnp.asarray(param), [jnp.asarray(grad)])
  rows = np.mean(np.float64(grad) ** 2, axis=1)
  columns = np.mean(np.float64(grad) ** 2, axis=0)
  v = np.outer(rows, columns) / rows.mean()
  np.testing.assert_allclose(after, param - grad / np.sqrt(v), rtol=2e-5)
  np.testing.assert_allclose(state.moments['v_row'], rows, rtol=1e-6)
  np.testing.assert_allclose(state.moments['v_col'], columns, rtol=1e-6)


@pytest.mark.parametrize(
  'path, shape, moments',
  [
    ('prompt/table', (1, 127, 512), {'v': (1, 127, 512)}),
    ('prompt/table', (1, 128, 512), {'v_row': (1, 128), 'v_col': (1, 512)}),
    ('prompt/table', (3, 600, 512), {'v_row': (3, 512), 'v_col': (3, 600)}),
    ('wo/kernel', (256, 128), {'v_row': (128,), 'v_col': (256,)}),
    ('wo/kernel', (128, 128), {'v_row': (128,), 'v_col': (128,)}),
    ('norm/scale', (512,), {'v': (512,)}),
    ('relpos_bias/rel_embedding', (12, 32), {'v': (12, 32)}),
    (
      'encoder/encoder/wi/kernel',
      (256, 12, 512),
      {'v_row': (256, 12), 'v_col': (12, 512)},
    ),
    ('decoder/decoder/norm/scale', (256, 130), {'v': (256, 130)}),
  ],
)
def test_matrices_with_two_large_dimensions_are_factored(path, shape, moments):
  params = jnp.zeros(shape)
  for name in reversed(path.split('/')):
    params = {name: params}
  state = jax.eval_shape(adafactor(0.1).init, params)
  leaf = state.moments
  for name in path.split('/'):
    leaf = leaf[name]
  assert {k: x.shape for k, x in leaf.items()} == moments


def test_factoring_of_long_prompts_can_be_switched_off():
  params = {'prompt': {'table': jnp.zeros((1, 150, 160))}}
  opt = adafactor(0.1, never_factor=('prompt/',))
  moments = opt.init(params).moments['prompt']['table']
  assert {k: x.shape for k, x in moments.items()} == {'v': (1, 150, 160)}


def test_prompts_of_a_table_train_as_each_would_alone():
  rng = np.random.default_rng(4)
  table = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
  scale = jnp.asarray([1.0, 10.0, 0.1])[:, None, None]
  grads = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32) * scale[None]
  opt = adafactor(0.3, initial_step=5, min_dim_size_to_factor=4)
  together, _ = run(
    opt,
    {'prompt': {'table': table}},
    [{'prompt': {'table': g}} for g in grads],
  )
  for k in range(3):
    alone, _ = run(opt, table[k], grads[:, k])
    np.testing.assert_allclose(
      together[-1]['prompt']['table'][k], alone[-1], rtol=1e-6, atol=1e-6
    )


def layer_of(tree, layer):
  one = {name: x[:, layer] for name, x in tree.items()}
  return {'encoder': {f'layers_{layer}': one}}


def test_scanned_layers_train_as_unrolled_ones():
  rng = np.random.default_rng(5)
  shapes = {'kernel': (8, 2, 5), 'scale': (8, 2)}

  def draw():
    return {
      k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }

  params, grads = draw(), [draw() for _ in range(3)]
  opt = adafactor(0.1, min_dim_size_to_factor=5)
  scanned, _ = run(
    opt,
    {'encoder': {'encoder': params}},
    [{'encoder': {'encoder': g}} for g in grads],
  )
  for layer in range(2):
    alone, _ = run(
      opt, layer_of(params, layer), [layer_of(g, layer) for g in grads]
    )
    for name in shapes:
      np.testing.assert_allclose(
        scanned[-1]['encoder']['encoder'][name][:, layer],
        alone[-1]['encoder'][f'layers_{layer}'][name],
        rtol=1e-6,
        atol=1e-6,
      )


def test_global_norm_is_bounded_before_the_moments_see_it():
  params = {'a': jnp.zeros((1,)), 'b': jnp.zeros((1,))}
  grads = {'a': jnp.asarray([3.0]), 'b': jnp.asarray([4.0])}
  _, state = run(
    adafactor(0.1, global_norm_clip_threshold=1.0), params, [grads]
  )
  np.testing.assert_allclose(state.moments['a']['v'], [0.36], rtol=1e-6)
  np.testing.assert_allclose(state.moments['b']['v'], [0.64], rtol=1e-6)


def test_momentum_averages_the_scaled_updates():
  # Both updates are sign(g) * lr at first: m = 0.1 lr, then 0.9 m + 0.1 lr.
  opt = adafactor(1.0, beta1=0.9, multiply_by_parameter_scale=False)
  history, _ = run(opt, jnp.zeros((2,)), [jnp.ones((2,))] * 2)
  np.testing.assert_allclose(history[0], -0.1, rtol=1e-5)
  np.testing.assert_allclose(history[1], -0.29, rtol=1e-5)


def test_nan_gradients_can_leave_values_alone():
  param = jnp.asarray([1.0, 2.0])
  bad = jnp.asarray([jnp.nan, jnp.nan])
  [after], state = run(adafactor(0.1, skip_nan_updates=True), param, [bad])
  np.testing.assert_array_equal(after, param)
  np.testing.assert_array_equal(state.moments['v'], [0.0, 0.0])


def test_update_without_parameters_is_refused():
  opt = adafactor(0.1)
  with pytest.raises(ValueError, match='needs the parameters'):
    opt.update(jnp.ones(2), opt.init(jnp.ones(2)))


# Schedules.


def test_schedule_factors_by_hand():
  make = functools.partial(
    create_learning_rate_scheduler, base_learning_rate=2.0, warmup_steps=100
  )
  cases = [
    (make('constant'), 7, 2.0),
    (make('constant * linear_warmup'), 25, 0.5),
    (make('constant * rsqrt_decay'), 400, 2.0 / 20),
    (make('constant * rsqrt_normalized_decay'), 400, 1.0),
    (make('linear_decay', decay_factor=0.01), 50, 1.0),
    (make('linear_decay', decay_factor=0.01), 150, 1.0),
    (make('constant * decay_every', steps_per_decay=10), 29, 0.5),
    (make('constant * cosine_decay', steps_per_cycle=40), 110, 1.0 + 0.5**0.5),
    (make('constant * linear_warmup', step_offset=1000), 1050, 1.0),
    (make('linear_decay', min_learning_rate=0.125), 10_000, 0.125),
  ]
  for schedule, step, want in cases:
    got = schedule(step)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(step), want, rtol=1e-6)


def test_unknown_factor_is_named():
  with pytest.raises(UserError, match="'linear_warmpu' is unknown"):
    create_learning_rate_scheduler('constant * linear_warmpu')


# Any optimiser.


def test_schedules_count_from_the_run_s_start():
  def linear(step):
    return jnp.asarray(step, jnp.float32)

  opt = build_optimizer(optax.sgd, linear, initial_step=100)
  history, _ = run(opt, jnp.zeros(()), [jnp.ones(())] * 3)
  np.testing.assert_allclose(history, [0.0, -1.0, -3.0])
  fn = functools.partial(
    adafactor, multiply_by_parameter_scale=False, clipping_threshold=None
  )
  from_zero = build_optimizer(fn, linear, initial_step=100)
  plain = fn(lambda count: linear(count - 100), initial_step=100)
  for opt in (from_zero, plain):
    history, _ = run(opt, jnp.zeros(()), [jnp.ones(())] * 3)
    assert history[0] == 0 and history[2] < history[1] < 0


def test_axes_of_methods_say_what_is_averaged_apart():
  """Layers and prompts that stack are trained as each would be alone."""
  rng = np.random.default_rng(0)
  arrays = {
    'prompt': {'table': rng.normal(size=(2, 3, 4))},
    'lora': {'a': rng.normal(size=(2, 3, 4))},
  }
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
  axes = {
    'prompt': {'table': ('prompts', None, None)},
    'lora': {'a': (None, 'layers', None)},
  }
  grads = [jax.tree.map(lambda x: 2 * x, arrays)] * 2
  opt = build_optimizer(adafactor, 0.1, 0, axes)
  history, _ = run(opt, arrays, grads)
  alone = build_optimizer(adafactor, 0.1, 0, None)
  for i in range(2):
    row = arrays['prompt']['table'][i]
    one, _ = run(alone, row, [2 * row] * 2)
    np.testing.assert_allclose(
      history[-1]['prompt']['table'][i], one[-1], rtol=1e-6
    )
  for i in range(3):
    row = arrays['lora']['a'][:, i]
    one, _ = run(alone, row, [2 * row] * 2)
    np.testing.assert_allclose(
      history[-1]['lora']['a'][:, i], one[-1], rtol=1e-6
    )


def test_arrays_have_rates_of_their_own_and_rate_0_changes_nothing():
  """By hand for SGD on a falling rate; weight decay follows each rate."""
  arrays = {'prompt': {'table': jnp.ones(3)}, 'lora': {'a': jnp.ones(3)}}
  arrays['lora']['held'] = jnp.ones(3)
  rates = {'prompt/table': 1.0, 'lora/a': 0.5, 'lora/held': 0.0}
  fn = functools.partial(optax.chain, optax.add_decayed_weights(0.1))
  optimizer = lambda learning_rate: fn(optax.sgd(learning_rate))
  falling = lambda step: 0.4 - 0.1 * jnp.float32(step)
  opt = build_optimizer(optimizer, falling, rates=rates)
  state = opt.init(arrays)
  grads = jax.tree.map(jnp.ones_like, arrays)
  want = dict.fromkeys(rates, 1.0)
  for rate in (0.4, 0.3):
    updates, state = opt.update(grads, state, arrays)
    arrays = optax.apply_updates(arrays, updates)
    for path, factor in rates.items():
      want[path] -= factor * rate * (1 + 0.1 * want[path])
  for path, value in want.items():
    collection, name = path.split('/')
    np.testing.assert_allclose(arrays[collection][name], value, rtol=1e-6)
  for wrong in (-1.0, np.inf):
    with pytest.raises(
      UserError, match='0 or more, and finite, got .* for a/b'
    ):
      build_optimizer(optax.sgd, 0.1, rates={'a/b': wrong})


def test_adafactor_is_given_the_base_s_step():
  fn = functools.partial(adafactor, multiply_by_parameter_scale=False)
  opt = build_optimizer(fn, 0.3, initial_step=1_100_000)
  assert int(opt.init(jnp.zeros(2)).count) == 1_100_000


def test_optimiser_without_learning_rate_is_refused():
  with pytest.raises(UserError, match='identity takes no learning_rate'):
    build_optimizer(optax.identity, 0.1)


# Golden data.


def test_schedules_equal_t5x_s(shared_dir):
  path = shared_dir / 'golden/03_optimizer/lr_schedules.json'
  for case in json.loads(path.read_text()):
    schedule = create_learning_rate_scheduler(**case['kwargs'])
    got = [float(schedule(step)) for step in case['steps']]
    assert got == case['values'], case['kwargs']
    compiled = jax.jit(schedule)
    np.testing.assert_allclose(
      [compiled(step) for step in case['steps']], case['values'], rtol=2e-7
    )


def as_table(prompt):
  return {'prompt': {'table': jnp.asarray(prompt)[None]}}


def hyper_parameters(record):
  return {k: v for k, v in record.items() if k != 'learning_rate'}


@pytest.mark.parametrize(
  'case',
  [
    'a_step0',
    'b_step1100000',
    'b2_step1100000_offset1100000',
    'd_step1000_lr0.05',
  ],
)
def test_prompt_trace_equals_t5x_s(shared_dir, case):
  folder = shared_dir / 'golden/03_optimizer'
  data = np.load(folder / 'prompt_adafactor.npz')
  record = json.loads((folder / 'prompt_adafactor.json').read_text())[case]
  rates = jnp.asarray(data[f'{case}/learning_rate'])
  start = record['start_step']
  opt = adafactor(
    lambda step: rates[step - start],
    initial_step=start,
    **hyper_parameters(record['hyper_params']),
  )
  update = optax.GradientTransformation(opt.init, jax.jit(opt.update))
  history, state = run(
    update, as_table(data['param0']), [as_table(g) for g in data['grads']]
  )
  for after, want in zip(history, data[f'{case}/params']):
    assert_as_t5x(after['prompt']['table'][0], want)
  np.testing.assert_allclose(
    state.moments['prompt']['table']['v'][0], data[f'{case}/v'][-1], rtol=2e-6
  )
  assert int(state.count) == data[f'{case}/step_after'][-1]


def test_factored_long_prompt_equals_t5x_s(shared_dir):
  path = shared_dir / 'golden/03_optimizer'
  data = np.load(path / 'prompt_adafactor_long_prompt_factored.npz')
  opt = adafactor(
    0.3,
    initial_step=int(data['step_after'][0]) - 1,
    multiply_by_parameter_scale=False,
    weight_decay_rate=1e-5,
  )
  history, state = run(
    opt, as_table(data['param0']), [as_table(g) for g in data['grads']]
  )
  for after, want in zip(history, data['params']):
    assert_as_t5x(after['prompt']['table'][0], want)
  moments = state.moments['prompt']['table']
  for name in ('v_row', 'v_col'):
    np.testing.assert_allclose(moments[name][0], data[name][-1], rtol=2e-6)


@pytest.mark.parametrize('case, start', [('c', 0), ('c_step1000000', 1000000)])
def test_model_tuning_trace_equals_t5x_s(shared_dir, case, start):
  path = shared_dir / 'golden/03_optimizer/model_tuning_adafactor.npz'
  data = np.load(path)
  names = ('w', 'scale')
  params = {k: jnp.asarray(data[f'param0/{k}']) for k in names}
  grads = [
    {k: jnp.asarray(data[f'grads/{k}'][i]) for k in names} for i in range(5)
  ]
  opt = adafactor(0.001, initial_step=start)
  history, state = run(opt, params, grads)
  for i, after in enumerate(history):
    assert_as_t5x(after['scale'], data[f'{case}/scale/params'][i])
  assert_as_t5x(history[0]['w'], data[f'{case}/w/params'][0])
  assert_as_t5x(history[4]['w'], data[f'{case}/w/params'][1])
  for name in ('v_row', 'v_col'):
    np.testing.assert_allclose(
      state.moments['w'][name], data[f'{case}/w/{name}_final'], rtol=2e-6
    )
  np.testing.assert_allclose(
    state.moments['scale']['v'], data[f'{case}/scale/v_final'], rtol=2e-6
  )
