"""What makes a prompt's table, against numpy, and folded into the table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.interop import t5x
from prompt_tuning.interop import t5x_host
from prompt_tuning.interop.t5x_network import Network
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import sampled_vocabulary
from prompt_tuning.methods.prompt import uniform
from prompt_tuning.methods.reparametrization import LowRank
from prompt_tuning.methods.reparametrization import Reparametrization
from prompt_tuning.methods.reparametrization import Residual
from prompt_tuning.methods.reparametrization import Superposition
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training.optimizers import adafactor
from prompt_tuning.training.optimizers import build_optimizer
from prompt_tuning.training.setup import rates_of
from prompt_tuning.training.trained import Trained
from prompt_tuning.training.trained import load_file
from prompt_tuning.training.trained import save_trained

CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=12,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
KINDS = {
  'shared': Residual(6),
  'separate': Residual(6, separate=True, skip=False),
  'low_rank': LowRank(2),
  'superposition': Superposition(5, first=20),
  'all_rows': Superposition(0),
}
KEY = jax.random.key(0)
EMBEDDING = np.random.RandomState(3).normal(size=(40, 8)).astype('f')
PARAMS = {'token_embedder': {'embedding': jnp.asarray(EMBEDDING)}}


def start_of(prompt):
  return jax.jit(lambda: prompt.init(KEY, PARAMS, TaskText()))()


def prompt_of(name, num_prompts=1, initializer=None):
  initializer = initializer or uniform()
  return Prompt(3, num_prompts, initializer, reparametrization=KINDS[name])


def arrays_of(name, num_prompts=2):
  """Arrays that are not those of the start, and the prompt."""
  prompt = prompt_of(name, num_prompts)
  start = start_of(prompt)
  rng = np.random.RandomState(4)
  moved = {
    path: np.asarray(array) + 0.3 * rng.normal(size=array.shape).astype('f')
    for path, array in sorted(start.items())
  }
  return prompt, moved


def by_hand(name, arrays):
  """The tables [K, P, E] in float64, prompt by prompt and row by row."""
  tables = []
  for k in range(2):
    one = {path: np.float64(array[k]) for path, array in arrays.items()}
    if name == 'low_rank':
      tables.append(one['left'] @ one['right'])
    elif name in ('superposition', 'all_rows'):
      tables.append(one['weights'] @ one['rows'])
    else:
      rows = []
      for i, row in enumerate(one['table']):
        net = {path: x[i if len(x) > 1 else 0] for path, x in one.items()}
        hidden = np.maximum(row @ net['down'] + net['down_bias'], 0)
        x = hidden @ net['up'] + net['up_bias']
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x * net['scale'] + net['bias']
        rows.append(x + row if name == 'shared' else x)
      tables.append(np.stack(rows))
  return np.stack(tables)


@pytest.mark.parametrize('name', KINDS)
def test_the_table_is_what_the_definition_makes(name):
  prompt, arrays = arrays_of(name)
  method, made = prompt.plain(arrays)
  assert method == dataclasses.replace(prompt, reparametrization=None)
  assert set(made) == {'table'} and made['table'].dtype == np.float32
  np.testing.assert_allclose(made['table'], by_hand(name, arrays), atol=1e-5)


@pytest.mark.parametrize('name', KINDS)
def test_logits_are_the_same_when_it_is_folded(name, tmp_path):
  """Of the file too, which is a prompt like any other."""
  prompt, arrays = arrays_of(name)
  params = jax.jit(EncoderDecoderModel(CONFIG).init_params)(KEY)
  texts = np.array([[40, 41, 42, 9, 8, 1, 0], [43, 44, 45, 30, 1, 0, 0]], 'i4')
  batch = {
    'encoder_input_tokens': texts,
    'decoder_input_tokens': np.array([[0, 5], [0, 7]], 'i4'),
    'decoder_target_tokens': np.array([[5, 1], [7, 1]], 'i4'),
  }

  def logits(method, arrays):
    model = EncoderDecoderModel(CONFIG, methods=(method,))
    arrays = {path: jnp.asarray(array) for path, array in arrays.items()}
    variables = {'params': params, 'prompt': arrays}
    return jax.jit(model.logits)(variables, batch)

  raw = logits(prompt, arrays)
  save_trained(tmp_path, Trained(prompt, arrays))
  folded = load_file(tmp_path / 'prompt.safetensors')
  assert folded.method.reparametrization is None
  assert folded.arrays['table'].shape == (2, 3, 8)
  np.testing.assert_array_equal(
    np.load(tmp_path / 'prompt.npy'), folded.arrays['table']
  )
  np.testing.assert_allclose(
    logits(folded.method, folded.arrays), raw, atol=1e-6
  )


def test_it_starts_as_near_to_the_initialiser_as_it_can():
  table = np.asarray(start_of(Prompt(3, 1, uniform()))['table'])

  def start(name, initializer=None):
    prompt = prompt_of(name, initializer=initializer)
    arrays = start_of(prompt)
    return arrays, prompt.plain(arrays)[1]['table']

  _, found = start('low_rank')
  left, size, right = np.linalg.svd(table[0])
  nearest = (left[:, :2] * size[:2]) @ right[:2]
  np.testing.assert_allclose(found[0], nearest, atol=1e-5)
  # Five rows span a part of the space, forty all of it.
  arrays, found = start('superposition')
  rows = np.asarray(arrays['rows'][0])
  assert len({row.tobytes() for row in rows}) == 5
  assert all((EMBEDDING[:20] == row).all(axis=1).any() for row in rows)
  weights = np.linalg.lstsq(rows.T, table[0].T, rcond=None)[0].T
  np.testing.assert_allclose(arrays['weights'][0], weights, atol=1e-4)
  arrays, found = start('all_rows')
  np.testing.assert_array_equal(arrays['rows'][0], EMBEDDING)
  np.testing.assert_allclose(found, table, atol=1e-5)
  _, found = start('all_rows', sampled_vocabulary())
  pieces = start_of(Prompt(3, 1, sampled_vocabulary()))
  np.testing.assert_allclose(found, pieces['table'], atol=1e-5)
  arrays, found = start('shared')
  np.testing.assert_array_equal(arrays['table'], table)
  offsets = found[0] - table[0]
  np.testing.assert_allclose(offsets.mean(axis=-1), 0, atol=1e-6)
  np.testing.assert_allclose(offsets.std(axis=-1), 1, atol=1e-3)


def test_frozen_rows_stay_to_the_bit_and_the_network_has_its_own_rate():
  """Under weight decay too, and without a state of the optimiser."""

  def step(prompt):
    arrays = {'prompt': start_of(prompt)}
    rates = rates_of([prompt], arrays)
    decaying = functools.partial(adafactor, weight_decay_rate=0.1)
    tx = build_optimizer(decaying, 0.1, 0, rates=rates)

    @jax.jit
    def update(arrays, state):
      gradient = jax.tree.map(jnp.ones_like, arrays)
      updates, state = tx.update(gradient, state, arrays)
      return optax.apply_updates(arrays, updates), state

    state = jax.jit(tx.init)(arrays)
    for _ in range(2):
      arrays, state = update(arrays, state)
    return arrays['prompt'], state

  prompt = prompt_of('superposition')
  start = start_of(prompt)
  end, state = step(prompt)
  np.testing.assert_array_equal(end['rows'], start['rows'])
  assert np.abs(end['weights'] - start['weights']).min() > 1e-3
  sizes = [leaf.size for leaf in jax.tree.leaves(state)]
  assert max(sizes) == start['weights'].size

  fast = dataclasses.replace(KINDS['shared'], learning_rate_scale=10.0)
  ends = []
  for kind in (KINDS['shared'], fast):
    prompt = Prompt(3, 1, uniform(), reparametrization=kind)
    start, (end, _) = start_of(prompt), step(prompt)
    ends.append({k: np.asarray(end[k] - start[k]) for k in start})
  np.testing.assert_array_equal(ends[0]['table'], ends[1]['table'])
  ratio = ends[1]['up_bias'] / ends[0]['up_bias']
  assert ratio.min() > 2  # its scale enters the second step's too


def test_what_it_is_comes_back_from_the_settings_of_a_checkpoint():
  for kind in KINDS.values():
    prompt = Prompt(3, 2, reparametrization=kind, placement='suffix')
    again = Prompt.with_settings(prompt.settings())
    assert again.reparametrization == kind
    assert (again.length, again.placement) == (3, 'suffix')
  with pytest.raises(UserError, match='by way of Unheard, which this version'):
    Reparametrization.with_settings({'is': 'Unheard'})


@pytest.mark.parametrize(
  'kind, message',
  [
    (LowRank(4), 'must be from 1 to 3, the smaller of PROMPT_LENGTH'),
    (LowRank(0), 'LowRank.rank must be from 1'),
    (Residual(0), 'Residual.width must be 1 or more, got 0'),
    (Superposition(-1), 'without replacement among 40'),
    (Superposition(41), 'without replacement among 40'),
    (Superposition(21, first=20), 'without replacement among 20'),
  ],
)
def test_what_cannot_be_is_one_line(kind, message):
  with pytest.raises(UserError, match=message):
    Prompt(3, 1, uniform(), reparametrization=kind).init(
      KEY, PARAMS, TaskText()
    )


def test_t5x_trains_its_arrays_and_gets_the_table_as_a_file(tmp_path):
  """T5X's rules hold the frozen rows; the public numpy file is the table."""
  prompt = prompt_of('superposition')
  module = Network(CONFIG, (prompt,))
  params = parameters.flatten(jax.jit(module.init)(KEY)['params'])
  trained = t5x_host.is_trained((prompt,))
  assert trained('/prompt/weights', None) and 'prompt/weights' in params
  assert not trained('/prompt/rows', None) and 'prompt/rows' in params
  assert not trained('/encoder/encoder_norm/scale', None)
  assert t5x.PROMPT not in params
  collections = module.variables(parameters.nest(params))
  want = prompt.plain(collections['prompt'])[1]['table']
  state = {'target': parameters.nest(params), 'state': {'step': np.int32(7)}}
  t5x_host.save_trained((prompt,), tmp_path)(state, None)
  folder = tmp_path / 'numpy_checkpoints' / 'checkpoint_7'
  np.testing.assert_array_equal(
    np.load(folder / t5x.PROMPT.replace('/', '.')), want[0]
  )
  np.testing.assert_array_equal(np.load(folder / 'prompt.npy'), want[0])
  slow = dataclasses.replace(prompt, learning_rate_scale=0.5)
  with pytest.raises(UserError, match="T5X's optimiser has one learning rate"):
    Network(CONFIG, (slow,)).init(KEY)
