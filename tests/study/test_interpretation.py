import numpy as np
import pytest

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.interop import transfer
from prompt_tuning.study import interpretation

PIECE = 40


@pytest.fixture
def read(tiny_vocabulary):
  """A prompt of four rows: one label, the label again, a piece, nothing."""
  vocabulary = load_vocabulary(tiny_vocabulary)
  whole = [
    piece[1:]
    for piece in map(vocabulary.piece, range(3, 40))
    if piece[0] == '▁' and len(piece) > 2
  ]
  labels = [w for w in whole if len(vocabulary.encode(w)) == 1][:2]
  (first,) = vocabulary.encode(labels[0])
  draw = np.random.default_rng(0)
  embedding = draw.normal(size=(200, 64)).astype(np.float32)
  table = draw.normal(size=(4, 64)).astype(np.float32)
  table[:3] = 5 * embedding[first], embedding[first], 0.9 * embedding[PIECE]
  return interpretation.Read(table, embedding, vocabulary, labels)


def test_nearest_pieces_are_those_that_the_rows_were_made_of(read):
  distances, ids = read.nearest(3)
  label, _ = read.labels
  words = [
    f' {label}',
    f' {label}',
    read.vocabulary.piece(PIECE).replace('▁', ' '),
  ]
  assert read.words(ids[:3, 0]) == words
  np.testing.assert_allclose(distances[:3, 0], 0, atol=1e-6)
  # numpy, by hand, of the row that is near to nothing; no special ids.
  rows = read.embedding[3 : read.vocabulary.size - 100]  # sentinels neither
  cosines = rows @ read.table[3] / np.linalg.norm(rows, axis=-1)
  assert ids[3].tolist() == (3 + np.argsort(-cosines)[:3]).tolist()


def test_a_long_row_is_far_by_distance_and_near_by_cosine(read):
  by_distance, _ = read.nearest(1, 'euclidean')
  length = np.linalg.norm(read.table[1])
  assert by_distance[1, 0] == pytest.approx(0, abs=1e-5)
  assert by_distance[0, 0] == pytest.approx(4 * length, rel=0.2)


def test_labels_persist_that_have_a_piece_near_a_row(read):
  assert read.persisting(1) == [read.labels[0]]


def test_rows_that_are_alike_are_a_cluster(read):
  assert read.clusters() == [[0, 1]]


def test_similarities_of_prompts():
  one = np.array([[1.0, 0.0], [0.0, 1.0]])
  other = np.array([[2.0, 0.0], [2.0, 0.0]])
  of_means = transfer.similarity(one, other)
  of_rows = transfer.similarity(one, other, 'pairs')
  assert of_means == pytest.approx(np.sqrt(0.5))
  assert of_rows == pytest.approx(0.5)  # (1 + 1 + 0 + 0) / 4
