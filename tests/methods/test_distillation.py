"""Prompts of single tasks teach a multitask prompt: what they add to a loss."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.interop.t5x_host import is_trained
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import uniform
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import setup
from prompt_tuning.training.train_step import gradients

sys.path.insert(0, __file__.rpartition('/')[0])
import numpy_t5  # noqa: E402
import tiny_t5  # noqa: E402

NUMBERS = (1, 0)  # of the rows' prompts
TEXTS = ([5, 6, 7, 8, 1], [9, 30, 1])
TARGETS = ([11, 12, 1], [13, 1])
METHOD = MultitaskPrompt(
  Prompt(3, 2),
  rank=2,
  teachers=uniform(),
  distillation=0.7,
  temperature=2.0,
)


def padded(rows, length):
  return np.array([[*row, *[0] * (length - len(row))] for row in rows], 'i4')


def batch():
  """Rows of two tasks, of other lengths, whose tokens weigh differently."""
  tokens = METHOD.virtual_tokens(tiny_t5.CONFIG)
  rows = [[*tokens.ids(k), *text] for k, text in zip(NUMBERS, TEXTS)]
  targets = padded(TARGETS, 3)
  return {
    'encoder_input_tokens': padded(rows, 8),
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.array([[1, 0.5, 2], [3, 1, 0]], 'f4'),
  }


def model(method=METHOD, **settings):
  return EncoderDecoderModel(tiny_t5.CONFIG, methods=(method,), **settings)


def variables():
  params = jax.tree.map(jnp.asarray, parameters.nest(tiny_t5.params()))
  start = METHOD.init(jax.random.key(0), params, ANY_TEXT)
  arrays = {
    k: jnp.asarray(tiny_t5.seeded(k, x.shape)) for k, x in start.items()
  }
  return {'params': params}, {'multitask_prompt': arrays}


@functools.cache
def gradients_of(method, **settings):
  given = model(method, **settings)
  return jax.jit(lambda *args: gradients(given, *args, jax.random.key(0)))


def of_batch(method, trained, part=None, weights=None, **settings):
  """The sums and gradients of the batch, or of a part of it."""
  if weights is None:
    part = batch()
    weights = model(**settings).token_weights(part)
  frozen, _ = variables()
  return gradients_of(method, **settings)(trained, frozen, part, weights)


def by_hand(arrays):
  """Of each row's tokens in float64, by an example alone."""
  arrays = {name: np.float64(array) for name, array in arrays.items()}
  tables = arrays['shared'] * (arrays['columns'] @ arrays['rows'])
  found = []
  for number, text, target in zip(NUMBERS, TEXTS, TARGETS):
    (z, h), (teachers_z, teachers_h) = (
      numpy_t5.logits_and_states(
        tiny_t5.params(), tiny_t5.CONFIG, text, target, prompts[number]
      )
      for prompts in (tables, arrays['teachers'])
    )
    p, wanted = (
      np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True)
      for x in (z, teachers_z)
    )
    divergence = (wanted * np.log(wanted / p)).sum(-1)
    distance = ((h - teachers_h) ** 2).mean(-1)
    found.append(0.7 * (divergence + distance))
  return found


def test_the_penalty_is_divergence_and_distance_of_each_token():
  _, trained = variables()
  one, other = by_hand(trained['multitask_prompt'])
  expected = one @ [1, 0.5, 2] + other @ [3, 1]
  sums, grads = of_batch(METHOD, trained)
  assert expected > 0.1
  np.testing.assert_allclose(sums['penalty'], expected, rtol=1e-5)
  # The loss by itself is the plain one's; teachers learn nothing.
  plain, without = of_batch(dataclasses.replace(METHOD, teachers=None), trained)
  assert 'penalty' not in plain
  np.testing.assert_allclose(sums['loss'], plain['loss'], rtol=1e-6)
  of_teachers = grads['multitask_prompt'].pop('teachers')
  np.testing.assert_array_equal(of_teachers, 0)
  for name, gradient in grads['multitask_prompt'].items():
    assert np.abs(gradient - without['multitask_prompt'][name]).max() > 1e-3

  # Its gradient is that of finite differences, in float64 by hand.
  arrays = trained['multitask_prompt']
  direction = np.float64(tiny_t5.seeded('direction', arrays['shared'].shape))
  ends = []
  for step in (1e-5, -1e-5):
    moved = np.float64(arrays['shared']) + step * direction
    one, other = by_hand(arrays | {'shared': moved})
    ends.append(one @ [1, 0.5, 2] + other @ [3, 1])
  added = (
    grads['multitask_prompt']['shared'] - without['multitask_prompt']['shared']
  )
  slope = (ends[0] - ends[1]) / 2e-5
  np.testing.assert_allclose(np.vdot(added, direction), slope, rtol=1e-3)


def test_who_is_as_the_teacher_has_nothing_to_learn_from_it():
  _, trained = variables()
  arrays = trained['multitask_prompt']
  same = arrays | {'teachers': METHOD.table(arrays)}
  sums, grads = of_batch(METHOD, {'multitask_prompt': same})
  plain, without = of_batch(dataclasses.replace(METHOD, teachers=None), trained)
  np.testing.assert_allclose(sums['penalty'], 0, atol=1e-6)
  for name, gradient in without['multitask_prompt'].items():
    found = grads['multitask_prompt'][name]
    np.testing.assert_allclose(found, gradient, atol=1e-4)


def test_a_weight_of_0_is_the_plain_loss_to_the_bit():
  _, trained = variables()
  nothing = dataclasses.replace(METHOD, distillation=0.0)
  plain = dataclasses.replace(METHOD, teachers=None)
  for one, other in zip(
    jax.tree.leaves(of_batch(nothing, trained)),
    jax.tree.leaves(of_batch(plain, trained)),
  ):
    np.testing.assert_array_equal(one, other)


def test_rows_cut_to_their_lengths_add_up_to_the_batch():
  """As slices do; each token counts for what it counts in the whole."""
  settings = {'loss_normalizing_factor': 'NUM_REAL_TARGET_TOKENS'}
  _, trained = variables()
  whole, weights = batch(), np.asarray(model(**settings).token_weights(batch()))
  sums, grads = of_batch(METHOD, trained, whole, weights, **settings)
  parts = []
  for row, (inputs, targets) in enumerate([(8, 3), (6, 2)]):
    part = {
      k: x[row : row + 1, : inputs if k.startswith('encoder') else targets]
      for k, x in whole.items()
    }
    of_part = weights[row : row + 1, :targets]
    parts.append(of_batch(METHOD, trained, part, of_part, **settings))
  (first, of_first), (second, of_second) = parts
  for name in ('loss', 'penalty'):
    np.testing.assert_allclose(
      first[name] + second[name], sums[name], rtol=1e-5
    )
  added = jax.tree.map(jnp.add, of_first, of_second)
  for one, other in zip(jax.tree.leaves(added), jax.tree.leaves(grads)):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_validation_has_the_loss_alone():
  frozen, trained = variables()
  loss = model().loss_fn
  found = jax.eval_shape(lambda: loss({**frozen, **trained}, batch())[1])
  assert 'penalty' not in found


def test_states_are_found_in_scanned_layers_too():
  config = dataclasses.replace(
    tiny_t5.CONFIG, scan_layers=True, remat_policy='full'
  )
  scanned = EncoderDecoderModel(config)
  params = parameters.nest(
    {
      path: jnp.asarray(x)
      for path, x in parameters.scanned(tiny_t5.params()).items()
    }
  )
  found = jax.jit(scanned.outputs)({'params': params}, tiny_t5.batch()).states
  for row, (text, target) in enumerate(zip(TEXTS, TARGETS)):
    _, expected = numpy_t5.logits_and_states(
      tiny_t5.params(), tiny_t5.CONFIG, text, target, np.zeros((0, 8))
    )
    got = found[row, : len(target)]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_shared_prompt_and_the_factors_have_rates_of_their_own():
  """0.3 and 0.4; teachers stay."""
  arrays = variables()[1]
  method = dataclasses.replace(METHOD, learning_rate_scale=0.5)
  assert setup.rates_of((method,), arrays) == {
    'multitask_prompt/shared': 0.5,
    'multitask_prompt/columns': pytest.approx(0.5 * 0.4 / 0.3),
    'multitask_prompt/rows': pytest.approx(0.5 * 0.4 / 0.3),
    'multitask_prompt/teachers': 0.0,
  }


def test_files_have_no_teachers():
  arrays = variables()[1]['multitask_prompt']
  method, kept = METHOD.plain(arrays)
  assert method.teachers is None and set(kept) == {'shared', 'columns', 'rows'}
  restored = MultitaskPrompt.with_settings(METHOD.settings())
  assert set(restored.plain(arrays)[1]) == set(kept)


def test_what_cannot_teach_is_refused():
  for settings in ({'temperature': 0.0}, {'distillation': -1.0}):
    with pytest.raises(UserError, match='its temperature above 0'):
      dataclasses.replace(METHOD, **settings)
  with pytest.raises(UserError, match='train step with its token_penalty'):
    is_trained((METHOD,))
  assert is_trained((dataclasses.replace(METHOD, teachers=None),))
