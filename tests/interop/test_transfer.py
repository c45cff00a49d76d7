"""Which prompt to start from, and prompts of one model on another.

`recycled.npz` holds what recycling/recycle.py of google-research/prompt-tuning
(commit 72285ee, TensorFlow 2.21.0, jax 0.10.2, float32 on a CPU) made of
`a_pair_of_models`: its `tf-lstsq`, `linear-combination` and `jax-nn` recyclers,
fitted on rows 1,000 to 5,000 with the settings of its run_recycle.py. The mean
squared error of the last on the rows from 5,000 on was 0.08766.
"""

import pathlib

import jax
import numpy as np
import pytest

from prompt_tuning import cli
from prompt_tuning.errors import UserError
from prompt_tuning.interop import transfer
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.base_checkpoints import save_base
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import save_prompt

RNG = np.random.default_rng(0)


def test_similarity_is_spots():
  one = np.array([[3.0, 0.0], [0.0, 4.0]])
  other = np.array([[1.0, 0.0]])
  # Mean rows [1.5, 2] and [1, 0]; cosines of the pairs 1 and 0.
  assert transfer.similarity(one, other) == pytest.approx(0.6)
  assert transfer.similarity(one, other, 'pairs') == pytest.approx(0.5)
  assert transfer.similarity(one, -one) == pytest.approx(-1)
  with pytest.raises(UserError, match="'mean_rows' or 'pairs'"):
    transfer.similarity(one, other, 'rows')


def test_the_most_similar_source_comes_first():
  target = RNG.normal(size=(5, 8))
  sources = {
    'far': -target,
    'near': target[::-1] + 0.1 * RNG.normal(size=(5, 8)),
    'other': RNG.normal(size=(7, 8)),
  }
  for by in ('mean_rows', 'pairs'):
    found = transfer.by_similarity(target, sources, by)
    assert [name for name, _ in found] == ['near', 'other', 'far']
    assert found[0][1] == transfer.similarity(target, sources['near'], by)


def test_inspect_names_the_nearest_source(tmp_path, capsys):
  rows = RNG.normal(size=(3, 4, 16)).astype('f')
  rows[2] = rows[0] + 0.1 * rows[1]
  paths = []
  for name, table in zip('abc', (rows[0], rows[1][:2], rows[2])):
    save_prompt(tmp_path / name, table, {})
    paths.append(str(tmp_path / name))
  assert cli.main(['inspect', *paths]) == 0
  out = capsys.readouterr().out
  cosine = transfer.similarity(rows[0], rows[2])
  assert (
    f'{paths[0]}: the nearest source is {paths[2]}, cosine of mean rows'
    f' {cosine:.3f}'
  ) in out
  assert 'are not comparable' in out  # row by row, of other lengths


def embeddings(rows=1600, old=12, new=10):
  """Of two models, the new one's a linear map of the old one's."""
  table = RNG.normal(size=(rows, old)).astype('f')
  matrix = RNG.normal(size=(old, new)).astype('f')
  return table, (table @ matrix).astype('f'), matrix


def test_a_linear_map_is_found_and_kept_to_its_pairs():
  old, new, matrix = embeddings()
  prompt = RNG.normal(size=(1, 5, 12)).astype('f')
  found = transfer.recycled(prompt, old, new)
  np.testing.assert_allclose(found, prompt @ matrix, atol=1e-4)
  # Rows before the first and after the pairs, or no words, are not looked at.
  spoilt = new.copy()
  spoilt[:1000], spoilt[1300:] = 0, 0
  words = np.ones(1600, bool)
  words[1200:1300] = False
  spoilt[1200:1300] = 0
  found = transfer.recycled(
    prompt, old, spoilt[:1500], words=words, first=1000, pairs=200
  )
  np.testing.assert_allclose(found, prompt @ matrix, atol=1e-4)
  with pytest.raises(UserError, match='no pieces are left'):
    transfer.recycled(prompt, old[:1000], new)
  with pytest.raises(UserError, match='has embed 12, the model'):
    transfer.recycled(prompt, new, old)


def wild(phase, *shape):
  """Numbers of a formula: sin(0.731 n^2 + phase), n = 1, 2, ..."""
  n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
  return np.sin(0.731 * n * n + phase).reshape(shape).astype('f')


def a_pair_of_models():
  """Old embeddings, new ones that no linear map gives, and a prompt."""
  old = wild(1, 5200, 12)
  new = old @ wild(2, 12, 10) + 0.3 * np.abs(old) @ wild(3, 12, 10)
  return old, new.astype('f'), wild(4, 5, 12)


LINEAR = ('linear', 'lin_comb')


@pytest.mark.parametrize('kind', LINEAR)
@pytest.mark.parametrize('pairs', [4000, 7])  # 7: fewer than an embedding has
def test_a_linear_recycler_is_least_squares_in_float64(kind, pairs):
  old, new, prompt = a_pair_of_models()
  chosen = np.ones(5200, bool)
  chosen[1:5200:3] = False
  rows = np.flatnonzero(chosen)[1000 : 1000 + pairs]
  inputs, outputs = np.float64(old)[rows], np.float64(new)[rows]
  # The smallest weights W with W inputs nearest to the prompt.
  left, sizes, right = np.linalg.svd(inputs, full_matrices=False)
  weights = np.float64(prompt) @ right.T / sizes @ left.T
  found = transfer.recycled(prompt[None], old, new, kind, chosen, pairs=pairs)
  assert found.shape == (1, 5, 10)
  np.testing.assert_allclose(found[0], weights @ outputs, atol=1e-4)


def test_recyclers_are_the_authors():
  old, new, prompt = a_pair_of_models()
  expected = np.load(pathlib.Path(__file__).with_name('recycled.npz'))
  for kind in LINEAR:
    found = transfer.recycled(prompt, old, new, kind)
    np.testing.assert_allclose(found, expected[kind], atol=1e-5)
  # An MLP starts at random and sees its rows in an order of its own.
  with jax.numpy_dtype_promotion('standard'):  # optax's Adam needs it
    held = np.concatenate([prompt, old[5000:]])
    found = transfer.recycled(held, old, new, 'mlp')
  error = np.mean((found[5:] - new[5000:]) ** 2)
  assert error == pytest.approx(0.08766, rel=0.2)  # linear: 0.231
  distance = np.linalg.norm(found[:5] - expected['mlp'])
  assert distance < 0.25 * np.linalg.norm(expected['mlp'])


def test_an_mlp_is_trained_by_adam_as_by_hand():
  old, new, prompt = wild(5, 20, 3), wild(6, 20, 2), wild(7, 4, 3)
  with jax.numpy_dtype_promotion('standard'):
    found = transfer.recycled(prompt, old, new, 'mlp', first=0)
  key, kernel = jax.random.key(0), jax.nn.initializers.lecun_normal()
  w, v = (
    np.float64(kernel(jax.random.fold_in(key, i), shape))
    for i, shape in enumerate([(3, 8), (8, 2)])
  )
  weights = [w, np.zeros(8), v, np.zeros(2)]
  moments = [[np.zeros_like(x), np.zeros_like(x)] for x in weights]
  # All 20 rows are one batch of each of 25 epochs, whatever their order.
  for step in range(1, 26):
    w, b, v, c = weights
    hidden = old @ w + b
    active = np.maximum(hidden, 0)
    error = (active @ v + c - new) / new.size
    back = (error @ v.T) * (hidden > 0)
    gradients = [old.T @ back, back.sum(0), active.T @ error, error.sum(0)]
    for x, moment, gradient in zip(weights, moments, gradients):
      moment[0] = 0.9 * moment[0] + 0.1 * gradient
      moment[1] = 0.999 * moment[1] + 0.001 * gradient**2
      mean, square = moment[0] / (1 - 0.9**step), moment[1] / (1 - 0.999**step)
      x -= 3e-4 * mean / (np.sqrt(square) + 1e-8)
  w, b, v, c = weights
  by_hand = np.maximum(prompt @ w + b, 0) @ v + c
  np.testing.assert_allclose(found, by_hand, atol=1e-5)


def test_an_mlp_fits_what_no_linear_map_does():
  old = RNG.normal(size=(3000, 6)).astype('f')
  new = np.abs(old) @ RNG.normal(size=(6, 4)).astype('f')
  held = slice(2000, 3000)

  def error(kind):
    found = transfer.recycled(
      old[held], old[:2000], new[:2000], kind, first=0, pairs=2000
    )
    return np.mean((found - new[held]) ** 2)

  with jax.numpy_dtype_promotion('standard'):  # optax's Adam needs it
    linear, mlp = error('linear'), error('mlp')
  assert mlp < 0.7 * linear


def test_a_prompt_is_recycled_by_a_command(tmp_path, capsys):
  mini = load_checkpoint('t5_1_1_mini')
  turn = np.linalg.qr(RNG.normal(size=(192, 192)))[0].astype('f')
  arrays = {path: np.asarray(x[...]) for path, x in mini.arrays.items()}
  arrays['token_embedder/embedding'] = (
    arrays['token_embedder/embedding'].astype('f') @ turn
  )
  save_base(tmp_path / 'new', arrays, 7)
  table = RNG.normal(size=(4, 192)).astype('f')
  facts = {
    'base': 't5_1_1_mini',
    'base_fingerprint': mini.fingerprint(),
    'metric_value': 50.0,
    'task': 'bbc',
  }
  save_prompt(tmp_path / 'old', table, facts)

  def convert(*words):
    return cli.main(
      ['convert', str(tmp_path / 'old'), str(tmp_path / 'out'), *words]
    )

  assert convert('--to=recycled') == 1
  assert 'recycled needs --base' in capsys.readouterr().err
  base = f'--base={tmp_path / "new"}'
  by = '--recycler=lin_comb'
  assert convert('--to=recycled', base, by, '--vocabulary=t5_1_1_mini') == 0
  found, facts = load_prompt(tmp_path / 'out')
  np.testing.assert_allclose(found[0], table @ turn, atol=1e-3)
  assert (
    facts['base_fingerprint']
    == load_checkpoint(str(tmp_path / 'new')).fingerprint()
  )
  assert facts['recycled_from'] == 't5_1_1_mini' and facts['task'] == 'bbc'
  assert facts['recycler'] == 'lin_comb'
  assert 'metric_value' not in facts
