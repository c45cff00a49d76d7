"""Token arrays on disk, windows, span corruption and prefix LM in numpy."""

import itertools
import json

import numpy as np
import pytest
import sentencepiece

from prompt_tuning.data import objectives
from prompt_tuning.data import token_array_data
from prompt_tuning.data import token_arrays
from prompt_tuning.data import vocabularies
from prompt_tuning.data.token_array_data import TokenArrayData
from prompt_tuning.data.token_arrays import TokenArrays
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError

LENGTHS = {'inputs': 32, 'targets': 16}


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """At least 40 pieces and 100 sentinels."""
  folder = tmp_path_factory.mktemp('vocabulary')
  text = 'the quick brown fox jumps over a lazy dog while it sleeps'
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter([text] * 50),
    model_prefix=str(folder / 'spiece'),
    vocab_size=60,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return vocabularies.load_vocabulary(folder / 'spiece.model')


@pytest.fixture(scope='module')
def documents():
  """120 documents of 20 to 79 ids, none of them special."""
  rng = np.random.default_rng(5)
  return [
    rng.integers(3, 30, size=rng.integers(20, 80)).tolist() for _ in range(120)
  ]


@pytest.fixture
def folder(tmp_path, documents, vocabulary):
  path = tmp_path / 'arrays'
  token_arrays.write_token_arrays(path, documents, vocabulary)
  return path


def first(data, number, **kwargs):
  return list(itertools.islice(data.batches(**kwargs), number))


def tokens_of(arrays, split, fraction):
  documents = arrays.split(split, fraction)
  return arrays.tokens[documents[0] : documents[-1]]


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name])


def uncorrupted(inputs, targets, first_sentinel):
  """Puts each noise span back in the place of its sentinel."""
  spans, current = {}, None
  for token in targets[:-1]:
    if token > first_sentinel - 100:
      current = spans[int(token)] = []
    else:
      current.append(token)
  text = []
  for token in inputs[:-1]:
    text.extend(spans.get(int(token), [token]))
  return text


# On disk.


def test_documents_come_back_and_each_ends_with_eos(folder, documents):
  arrays = TokenArrays.open(folder)
  assert arrays.tokens.dtype == np.uint16
  assert isinstance(arrays.tokens, np.memmap)
  for i, document in enumerate(documents):
    begin, end = arrays.documents[i : i + 2]
    assert arrays.tokens[begin:end].tolist() == [*document, 1]
  assert arrays.meta['tokens'] == sum(map(len, documents)) + len(documents)
  arrays.verify()


def test_the_folder_brings_its_vocabulary(folder, vocabulary):
  found = TokenArrays.open(folder).vocabulary
  assert found.digest == vocabulary.digest
  assert found.size == vocabulary.size


def test_a_failed_write_leaves_nothing(tmp_path, vocabulary):
  def failing():
    yield [5, 6, 7]
    raise RuntimeError('the disk of the source is gone')

  with pytest.raises(RuntimeError):
    token_arrays.write_token_arrays(tmp_path / 'arrays', failing(), vocabulary)
  assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(folder, vocabulary):
  with pytest.raises(UserError, match='exists'):
    token_arrays.write_token_arrays(folder, [[5]], vocabulary)
  TokenArrays.open(folder).verify()


def test_ids_past_the_vocabulary_are_refused(tmp_path, vocabulary):
  with pytest.raises(UserError, match=f'{vocabulary.size - 1}'):
    token_arrays.write_token_arrays(
      tmp_path / 'arrays', [[5], [vocabulary.size]], vocabulary
    )


def test_no_text_is_refused(tmp_path, vocabulary):
  with pytest.raises(UserError, match='at least one document'):
    token_arrays.write_token_arrays(tmp_path / 'arrays', [[]], vocabulary)


def _remove(folder):
  (folder / 'documents.npy').unlink()


def _truncate(folder):
  data = (folder / 'tokens.npy').read_bytes()
  (folder / 'tokens.npy').write_bytes(data[:-100])


def _widen(folder):
  tokens = np.load(folder / 'tokens.npy')
  np.save(folder / 'tokens.npy', tokens.astype(np.int64))


def _shorten(folder):
  np.save(folder / 'tokens.npy', np.load(folder / 'tokens.npy')[:-3])


def _shift(folder):
  np.save(folder / 'documents.npy', np.load(folder / 'documents.npy') + 1)


def _garble(folder):
  (folder / 'meta.json').write_text('{"tokens": ')


def _empty(folder):
  (folder / 'tokens.npy').write_bytes(b'')


@pytest.mark.parametrize(
  ('damage', 'said'),
  [
    (_remove, 'documents.npy'),
    (_truncate, 'tokens.npy'),
    (_empty, 'tokens.npy'),
    (_widen, 'uint16'),
    (_shorten, 'tokens'),
    (_shift, 'documents.npy'),
    (_garble, 'meta.json'),
  ],
)
def test_a_damaged_folder_is_one_line(folder, damage, said):
  damage(folder)
  with pytest.raises(UserError, match=said) as error:
    TokenArrays.open(folder)
  assert '\n' not in str(error.value)


def test_another_vocabulary_in_the_folder_is_noticed(folder):
  meta = json.loads((folder / 'meta.json').read_text())
  meta['vocabulary_sha256'] = '0' * 64
  (folder / 'meta.json').write_text(json.dumps(meta))
  with pytest.raises(UserError, match='digest'):
    _ = TokenArrays.open(folder).vocabulary


def test_a_changed_token_is_found_by_verify(folder):
  tokens = np.load(folder / 'tokens.npy', mmap_mode='r+')
  tokens[7] += 1
  tokens.flush()
  with pytest.raises(UserError, match='sha256'):
    TokenArrays.open(folder).verify()


# Span corruption.


def test_window_lengths_are_those_published_for_t5():
  # Raffel et al. pre-train with inputs of 512: 568 tokens, targets of 114.
  assert objectives.span_corruption_window(512, 114) == 568
  assert objectives.span_corruption_lengths(568) == (512, 114)


def test_the_shorter_side_bounds_the_window():
  window = objectives.span_corruption_window(512, 60)
  inputs, targets = objectives.span_corruption_lengths(window)
  assert inputs <= 512 and targets <= 60
  assert objectives.span_corruption_lengths(window + 1)[1] > 60


def test_segmentation_divides_into_non_empty_runs():
  rng = np.random.default_rng(0)
  for items, segments in [(1, 1), (5, 5), (85, 28), (10, 1)]:
    lengths = objectives.random_segmentation(rng, items, segments)
    assert lengths.shape == (segments,)
    assert lengths.min() >= 1 and lengths.sum() == items


def test_all_divisions_are_equally_likely():
  # 4 items in 2 runs: 1+3, 2+2 and 3+1, each a third of the time.
  rng = np.random.default_rng(0)
  firsts = [objectives.random_segmentation(rng, 4, 2)[0] for _ in range(3000)]
  np.testing.assert_allclose(np.bincount(firsts)[1:] / 3000, 1 / 3, atol=0.03)


def test_a_window_of_twenty_by_hand():
  # 20 tokens: 3 of noise in 1 span. Kept runs come first, so the text is 17
  # kept ids, then the span.
  inputs, targets = objectives.span_corruption(
    np.random.default_rng(0), np.arange(10, 30), 999
  )
  assert inputs.tolist() == [*range(10, 27), 999, 1]
  assert targets.tolist() == [999, 27, 28, 29, 1]


@pytest.mark.parametrize('length', [2, 3, 10, 57, 568])
def test_span_corruption_can_be_undone(length):
  window = np.random.default_rng(1).integers(3, 500, length)
  for seed in range(5):
    inputs, targets = objectives.span_corruption(
      np.random.default_rng(seed), window, 999
    )
    assert (len(inputs), len(targets)) == objectives.span_corruption_lengths(
      length
    )
    assert inputs[-1] == targets[-1] == 1 and targets[0] == 999
    assert uncorrupted(inputs, targets, 999) == window.tolist()
    marks = [t for t in inputs.tolist() if t > 899]
    assert marks == list(range(999, 999 - len(marks), -1))
    assert [t for t in targets.tolist() if t > 899] == marks


def test_without_sentinels_the_ids_are_the_same_but_for_the_marks():
  window = np.arange(10, 110)
  marked = objectives.span_corruption(np.random.default_rng(3), window, 999)
  bare = objectives.span_corruption(
    np.random.default_rng(3), window, 999, sentinels=False
  )
  for with_marks, without in zip(marked, bare):
    assert with_marks[with_marks < 900].tolist() == without.tolist()


# Prefix LM.


@pytest.mark.parametrize('lengths', [(32, 32), (8, 32), (32, 8), (16, 16)])
def test_prefix_lm_loses_no_token(lengths):
  window = np.arange(100, 132) if sum(lengths) > 32 else np.arange(100, 130)
  points = set()
  for seed in range(400):
    inputs, targets = objectives.prefix_lm(
      np.random.default_rng(seed), window, *lengths
    )
    assert inputs[-1] == targets[-1] == 1
    assert [*inputs[:-1], *targets[:-1]] == window.tolist()
    assert 2 <= len(inputs) <= lengths[0]
    assert 2 <= len(targets) <= lengths[1]
    points.add(len(inputs) - 1)
  size = len(window)
  assert points == set(
    range(max(1, size - lengths[1] + 1), min(lengths[0], size))
  )


# Batches.


@pytest.mark.parametrize('objective', ['span_corruption', 'prefix_lm'])
def test_batches_have_t5xs_features(folder, objective):
  data = TokenArrayData(str(folder), objective, 4, LENGTHS)
  for batch in first(data, 5, seed=0):
    assert {name: array.shape for name, array in batch.items()} == {
      'encoder_input_tokens': (4, 32),
      'decoder_input_tokens': (4, 16),
      'decoder_target_tokens': (4, 16),
      'decoder_loss_weights': (4, 16),
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    targets = batch['decoder_target_tokens']
    np.testing.assert_array_equal(batch['decoder_loss_weights'], targets > 0)
    np.testing.assert_array_equal(batch['decoder_input_tokens'][:, 0], 0)
    np.testing.assert_array_equal(
      batch['decoder_input_tokens'][:, 1:], targets[:, :-1]
    )


def test_span_corruption_marks_no_border_of_documents(folder):
  data = TokenArrayData(str(folder), 'span_corruption', 8, LENGTHS)
  for batch in first(data, 20, seed=0):
    for name in ('encoder_input_tokens', 'decoder_target_tokens'):
      np.testing.assert_array_equal((batch[name] == 1).sum(axis=1), 1)


@pytest.mark.parametrize('objective', ['span_corruption', 'prefix_lm'])
@pytest.mark.parametrize('start', [1, 7, 200])
def test_resuming_is_skipping(folder, objective, start):
  data = TokenArrayData(str(folder), objective, 4, LENGTHS)
  whole = first(data, start + 3, seed=3)
  resumed = first(
    TokenArrayData(str(folder), objective, 4, LENGTHS), 3, seed=3, start=start
  )
  for left, right in zip(whole[start:], resumed, strict=True):
    assert_same(left, right)


def test_another_seed_gives_other_batches(folder):
  data = TokenArrayData(str(folder), 'prefix_lm', 4, LENGTHS)
  one, two = first(data, 1, seed=0)[0], first(data, 1, seed=1)[0]
  assert (one['encoder_input_tokens'] != two['encoder_input_tokens']).any()


def windows_of_epoch(data, epoch, seed=0):
  """The windows as they were cut, from prefix LM's two sides."""
  count = data.examples_per_epoch
  start = epoch * count
  found = []
  for batch in first(data, count, seed=seed, start=start):
    source, target = (
      batch['encoder_input_tokens'][0],
      batch['decoder_target_tokens'][0],
    )
    found.append(
      (*source[source > 0].tolist()[:-1], *target[target > 0].tolist()[:-1])
    )
  return found


def test_an_epoch_has_each_window_once_and_borders_move(folder):
  data = TokenArrayData(str(folder), 'prefix_lm', 1, LENGTHS)
  train = tokens_of(data.arrays, 'train', data.validation_fraction).tolist()
  text = ' '.join(map(str, train))
  epochs = [windows_of_epoch(data, epoch) for epoch in (0, 1)]
  for windows in epochs:
    assert len(set(windows)) == len(windows)
    assert len(train) - sum(map(len, windows)) < 2 * data.window_length
    assert all(' '.join(map(str, window)) in text for window in windows)
  assert set(epochs[0]) != set(epochs[1])


def test_validation_documents_are_not_trained_on(folder, documents):
  fraction = 0.1
  arrays = TokenArrays.open(folder)
  train = tokens_of(arrays, 'train', fraction)
  validation = tokens_of(arrays, 'validation', fraction)
  assert len(train) + len(validation) == len(arrays.tokens)
  assert train[-1] == 1 and len(validation) > 0
  assert len(validation) <= fraction * len(arrays.tokens)
  assert validation[-len(documents[-1]) - 1 : -1].tolist() == documents[-1]
  data = TokenArrayData(
    str(folder),
    'prefix_lm',
    2,
    LENGTHS,
    split='validation',
    validation_fraction=fraction,
  )
  held_out = ' '.join(map(str, validation.tolist()))
  for batch in first(data, 4):
    source, target = (
      batch['encoder_input_tokens'][0],
      batch['decoder_target_tokens'][0],
    )
    window = [*source[source > 0][:-1], *target[target > 0][:-1]]
    assert ' '.join(map(str, window)) in held_out


@pytest.mark.parametrize('placement', ['prefix', 'suffix'])
def test_virtual_tokens_are_placed_in_each_row(folder, placement):
  data = TokenArrayData(str(folder), 'span_corruption', 4, LENGTHS)
  virtual = VirtualTokens(first_id=200, length=5, placement=placement)
  plain = first(data, 1, seed=0)[0]['encoder_input_tokens']
  rows = first(data, 1, seed=0, virtual_tokens=virtual)[0][
    'encoder_input_tokens'
  ]
  assert rows.shape == (4, 37)
  for row, without in zip(rows, plain):
    text = without[without > 0].tolist()
    ids = list(range(200, 205))
    expected = (
      ids + text if placement == 'prefix' else text[:-1] + ids + text[-1:]
    )
    assert row[row > 0].tolist() == expected


def test_the_data_says_what_the_protocol_asks(folder):
  data = TokenArrayData(str(folder), 'prefix_lm', 4, LENGTHS)
  assert data.class_labels() is data.name is data.num_shards is None
  assert (data.batch_size, data.feature_lengths) == (4, LENGTHS)
  assert vocabularies.load_vocabulary(data.vocabulary).size > 0


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'objective': 'span_corruptoin'}, 'span_corruption, prefix_lm'),
    ({'split': 'test'}, 'train, validation'),
    ({'batch_size': 0}, 'batch_size'),
    ({'feature_lengths': {'inputs': 32}}, 'inputs and targets'),
    ({'feature_lengths': {'inputs': 2, 'targets': 9}}, '3 or more'),
    ({'window': 60}, 'does not fit'),
    ({'noise_density': 1.0}, 'noise_density'),
    ({'validation_fraction': 1.0}, 'validation_fraction'),
    ({'folder': '/nowhere'}, 'lacks'),
    (
      {'feature_lengths': {'inputs': 2048, 'targets': 512}},
      '100 sentinels',
    ),
  ],
)
def test_wrong_settings_are_one_line_before_the_first_batch(
  folder, settings, said
):
  with pytest.raises(UserError, match=said) as error:
    TokenArrayData(
      **{'folder': str(folder), 'feature_lengths': LENGTHS, **settings}
    )
  assert '\n' not in str(error.value)


def test_too_little_text_is_one_line(folder):
  data = TokenArrayData(
    str(folder), 'prefix_lm', 1, LENGTHS, split='validation'
  )
  with pytest.raises(UserError, match='an example needs 31') as error:
    first(data, 1)
  assert '\n' not in str(error.value)


# Pairs.


@pytest.fixture
def pair_folder(tmp_path, documents, vocabulary):
  """60 pairs, inputs and targets of 20 to 79 ids."""
  path = tmp_path / 'pairs'
  token_arrays.write_token_arrays(path, documents, vocabulary, layout='pairs')
  return path


def pairs_of(data, number, seed=0):
  """The first pairs, without padding."""
  return [
    tuple(
      tuple(batch[name][0][batch[name][0] > 0].tolist())
      for name in ('encoder_input_tokens', 'decoder_target_tokens')
    )
    for batch in first(data, number, seed=seed)
  ]


def test_pairs_are_whole_or_cut_before_eos(pair_folder, documents):
  lengths = {'inputs': 32, 'targets': 100}
  data = TokenArrayData(
    str(pair_folder), 'text_to_text', 1, lengths, validation_fraction=0.0
  )
  expected = {
    ((*source[:31], 1), (*target, 1))
    for source, target in zip(documents[::2], documents[1::2], strict=True)
  }
  assert data.examples_per_epoch == 60
  assert set(pairs_of(data, 60)) == expected
  assert pairs_of(data, 60) != pairs_of(data, 60, seed=1)


def test_pairs_have_no_pair_in_two_splits(pair_folder):
  pairs = []
  for split in token_array_data.SPLITS:
    data = TokenArrayData(
      str(pair_folder),
      'text_to_text',
      1,
      LENGTHS,
      split=split,
      validation_fraction=0.21,
    )
    pairs += pairs_of(data, data.examples_per_epoch)
  assert len(pairs) == len(set(pairs)) == 60


def test_pairs_resume_at_any_batch(pair_folder):
  data = TokenArrayData(str(pair_folder), 'text_to_text', 4, LENGTHS)
  for left, right in zip(
    first(data, 40)[33:], first(data, 7, start=33), strict=True
  ):
    assert_same(left, right)


@pytest.mark.parametrize('objective', ['prefix_lm', 'span_corruption'])
def test_text_is_no_pairs(pair_folder, folder, objective):
  with pytest.raises(UserError, match='needs token arrays of text.*--texts'):
    TokenArrayData(str(pair_folder), objective, 1, LENGTHS)
  with pytest.raises(UserError, match='needs token arrays of pairs.*--pairs'):
    TokenArrayData(str(folder), 'text_to_text', 1, LENGTHS)


@pytest.mark.parametrize(
  ('some', 'reason'), [([[5]] * 3, 'odd'), ([[5], []], 'document 1 is empty')]
)
def test_half_a_pair_is_refused(tmp_path, vocabulary, some, reason):
  with pytest.raises(UserError, match=reason):
    token_arrays.write_token_arrays(
      tmp_path / 'a', some, vocabulary, layout='pairs'
    )
  assert not (tmp_path / 'a').exists()
