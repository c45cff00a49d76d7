"""How a prompt's table starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.methods import prompt as prompt_lib
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Prompt

EMBEDDING = jnp.arange(40 * 4, dtype=jnp.float32).reshape(40, 4)
PARAMS = {'token_embedder': {'embedding': EMBEDDING}}
KEY = jax.random.key(0)
PIECES = {'good': [3], 'not good': [9, 3], 'a b c d e f': [2, 3, 4, 5, 6, 7]}


def encode(text):
  return PIECES[text]


def start(length=4, num_prompts=1, *, initializer, labels=()):
  prompt = Prompt(length, num_prompts, initializer)
  table = prompt.init(KEY, PARAMS, TaskText(encode, labels))['table']
  assert table.dtype == jnp.float32
  assert table.shape == (num_prompts, length, 4)
  return np.asarray(table)


def rows_of(table):
  """The row of the embedding that each row of the table equals."""
  matches = (table[..., None, :] == np.asarray(EMBEDDING)).all(-1)
  assert (matches.sum(-1) == 1).all()
  return matches.argmax(-1)


def test_uniform_fills_the_papers_range():
  table = start(length=1000, initializer=prompt_lib.uniform())
  assert -0.5 <= table.min() < -0.49 and 0.49 < table.max() < 0.5
  assert abs(table.mean()) < 0.02
  public = start(length=1000, initializer=prompt_lib.uniform(low=0.0))
  assert public.min() >= 0


def test_sampled_vocabulary_takes_different_common_pieces():
  init = prompt_lib.sampled_vocabulary(first=10)
  rows = rows_of(start(length=10, num_prompts=2, initializer=init))
  for of_prompt in rows:
    assert sorted(of_prompt) == list(range(10))
  assert (rows[0] != rows[1]).any()


def test_sampled_vocabulary_repeats_where_it_must():
  init = prompt_lib.sampled_vocabulary(first=3)
  rows = rows_of(start(length=20, initializer=init))
  assert set(rows[0]) == {0, 1, 2}


def test_sampled_vocabulary_of_zero_takes_the_whole_table():
  init = prompt_lib.sampled_vocabulary(first=0)
  rows = rows_of(start(length=40, initializer=init))
  assert sorted(rows[0]) == list(range(40))


def test_a_class_label_is_the_mean_of_its_pieces():
  init = prompt_lib.class_labels(fallback=prompt_lib.sampled_vocabulary(2))
  table = start(num_prompts=2, initializer=init, labels=('good', 'not good'))
  for of_prompt in table:
    np.testing.assert_array_equal(of_prompt[0], EMBEDDING[3])
    np.testing.assert_array_equal(
      of_prompt[1], (EMBEDDING[9] + EMBEDDING[3]) / 2
    )
    assert set(rows_of(of_prompt[2:])) <= {0, 1}


def test_given_words_stand_in_for_the_tasks_labels():
  init = prompt_lib.class_labels(words=['not good'])
  table = start(length=1, initializer=init, labels=('good',))
  np.testing.assert_array_equal(table[0, 0], (EMBEDDING[9] + EMBEDDING[3]) / 2)


def test_labels_past_the_length_are_left_out():
  init = prompt_lib.class_labels()
  table = start(length=1, initializer=init, labels=('good', 'not good'))
  np.testing.assert_array_equal(table[0], EMBEDDING[3:4])


def test_a_string_fills_the_first_rows_piece_by_piece():
  init = prompt_lib.from_string('not good', prompt_lib.uniform())
  table = start(initializer=init)
  np.testing.assert_array_equal(table[0, :2], EMBEDDING[jnp.array([9, 3])])
  assert np.abs(table[0, 2:]).max() <= 0.5
  cut = start(initializer=prompt_lib.from_string('a b c d e f'))
  assert rows_of(cut[0]).tolist() == [2, 3, 4, 5]


def test_missing_labels_and_vocabulary_are_named():
  with pytest.raises(UserError, match='class_labels.words'):
    start(initializer=prompt_lib.class_labels())
  with pytest.raises(UserError, match='needs a vocabulary'):
    Prompt(4, 1, prompt_lib.from_string('good')).init(KEY, PARAMS, TaskText())


def test_the_embedding_may_be_bfloat16():
  stored = EMBEDDING.astype(jnp.bfloat16)
  for init in (
    prompt_lib.sampled_vocabulary(),
    prompt_lib.class_labels(['good']),
    prompt_lib.from_string('good'),
  ):
    params = {'token_embedder': {'embedding': stored}}
    table = Prompt(4, 1, init).init(KEY, params, TaskText(encode))['table']
    assert table.dtype == jnp.float32
