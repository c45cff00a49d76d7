"""Prompts read as text."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods import nearest_pieces

MINI = 't5_1_1_mini'
EMBEDDING = np.array(
  [[9, 0], [9, 9], [0, 9], [1, 0], [0, 5], [3, 3], [-1, -1]], np.float32
)


def ids_of(rows, **settings):
  found = nearest_pieces.nearest_ids(
    jnp.asarray(rows, jnp.float32), jnp.asarray(EMBEDDING), **settings
  )
  return found.tolist()


def test_nearest_by_angle_or_by_distance():
  rows = [[5, 4.9], [0.9, 0.8], [-7, -6]]
  assert ids_of(rows) == [5, 5, 6]  # padding, EOS and unknown are never near
  assert ids_of(rows, measure='euclidean') == [5, 3, 6]
  allowed = np.array([0, 0, 0, 1, 1, 0, 0], bool)
  assert ids_of(rows, allowed=allowed) == [3, 3, 4]
  distances = np.linalg.norm(np.array(rows)[:, None] - EMBEDDING, axis=-1)
  everything = np.ones(len(EMBEDDING), bool)
  assert ids_of(rows, allowed=everything, measure='euclidean') == (
    distances.argmin(-1).tolist()
  )
  with pytest.raises(UserError, match="'cosine' or 'euclidean'"):
    ids_of(rows, measure='dot')


def test_rules_look_at_the_vocabularys_pieces():
  vocabulary = load_vocabulary(MINI)
  words = nearest_pieces.word_pieces(MINI)(8192)
  chosen = {vocabulary.piece(i) for i in np.flatnonzero(words)}
  assert '▁the' in chosen and len(chosen) > 3000
  for piece in chosen:
    assert piece[0] == '▁' and len(piece) > 2
    assert piece[1:].isalpha() and piece[1:].isascii()
  written = nearest_pieces.written_pieces(MINI)(8192)
  assert not written[:3].any() and written[3:2000].all()
  assert not written[vocabulary.sentinel(99) :].any()
  longer = nearest_pieces.word_pieces(MINI, shortest=5)(8192)
  assert words.sum() > longer.sum() > 0
  with pytest.raises(UserError, match='is a whole word'):
    nearest_pieces.word_pieces('byt5')(384)


def test_a_text_says_which_pieces_it_gives_back():
  vocabulary = load_vocabulary(MINI)
  ids = vocabulary.encode('Name the topic')
  reading = nearest_pieces.Reading.of(np.array(ids), vocabulary)
  assert reading.comes_back and reading.kept == len(ids)
  assert str(reading) == f"'Name the topic' (all {len(ids)} pieces come back)"
  # Parts of a word are read as the word, which has a piece of its own.
  pieces = {vocabulary.piece(i): i for i in range(3, 8092)}
  split = np.array([pieces['▁t'], pieces['he'], pieces['▁topic']])
  reading = nearest_pieces.Reading.of(split, vocabulary)
  assert reading.text == 'the topic' and not reading.comes_back
  assert reading.kept == 1
  assert '2 pieces, 1 of these 3' in str(reading)


def test_a_prompt_of_rows_reads_as_the_text_they_are_of():
  vocabulary = load_vocabulary(MINI)
  rng = np.random.default_rng(0)
  embedding = rng.normal(size=(8192, 24)).astype('f')
  texts = ['Name the topic of this', 'What is the news']
  tables = [embedding[vocabulary.encode(text)] for text in texts]
  table = np.stack([3 * x + 0.1 for x in tables])
  found = nearest_pieces.read_as_text(table, embedding, vocabulary)
  assert [reading.text for reading in found] == texts
