import dataclasses
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_tuning.data.classification import register_classification_task
from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError

LENGTHS = {'inputs': 40, 'targets': 6}
VIRTUAL = VirtualTokens(first_id=500, length=3, num_prompts=2)
WORDS = 'film good bad fine dull bright saw twice friend review'.split()


def rows(count, offset=0):
  """Texts that all differ."""
  return [
    {
      'text': ' '.join(WORDS[int(digit)] for digit in str(100 + offset + i)),
      'label': ('negative', 'positive')[i % 2],
    }
    for i in range(count)
  ]


def register(name, vocabulary, **splits):
  register_classification_task(
    name,
    splits or {'train': rows(10), 'validation': rows(6, 50)},
    labels=('negative', 'positive'),
    vocabulary=vocabulary,
  )


@pytest.fixture(scope='module', autouse=True)
def tasks(tiny_vocabulary):
  register('stream_a', tiny_vocabulary)
  register('stream_b', tiny_vocabulary, train=rows(7, 300))
  register('stream_empty', tiny_vocabulary, train=[])
  register('stream_unreadable', tiny_vocabulary, train='/no/such/file.csv')
  seqio.TaskRegistry.add(
    'stream_all_filtered',
    source=seqio.TaskRegistry.get('stream_a').source,
    preprocessors=[
      lambda ds: ds.filter(lambda _: False),
      seqio.preprocessors.tokenize,
    ],
    output_features=seqio.TaskRegistry.get('stream_a').output_features,
  )
  seqio.TaskRegistry.add_provider(
    'stream_in_order',
    seqio.Task(
      'stream_in_order',
      source=seqio.TextLineDataSource({'train': __file__}),
      preprocessors=[
        lambda ds: ds.map(lambda t: {'inputs': t, 'targets': t}),
        seqio.preprocessors.tokenize,
      ],
      output_features=seqio.TaskRegistry.get('stream_a').output_features,
      shuffle_buffer_size=None,
    ),
  )
  seqio.MixtureRegistry.add(
    'stream_mixed', [('stream_a', 2.0), ('stream_b', 1.0)]
  )
  yield
  for name in [*seqio.TaskRegistry.names()]:
    if name.startswith('stream_'):
      seqio.TaskRegistry.remove(name)
  seqio.MixtureRegistry.remove('stream_mixed')


OF_TASK = {field.name for field in dataclasses.fields(Task)}


def data(name='stream_a', **changes):
  of_task = {k: changes.pop(k) for k in list(changes) if k in OF_TASK}
  return TaskData(Task(name, LENGTHS, **of_task), batch_size=4, **changes)


def first_batches(
  source, count, seed=0, start=0, virtual_tokens=VIRTUAL, **settings
):
  batches = source.batches(
    virtual_tokens=virtual_tokens, seed=seed, start=start, **settings
  )
  return list(itertools.islice(batches, count))


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('name', ['stream_a', 'stream_mixed'])
def test_a_resumed_stream_continues_the_uninterrupted_one(name, pack):
  # Ten examples and batches of four: the starts are in the first epoch, at a
  # batch across two epochs and some epochs later.
  source = data(name, pack=pack)
  whole = first_batches(source, 14, seed=3)
  for start in (1, 2, 13):
    assert_same(first_batches(source, 14 - start, 3, start), whole[start:])


def test_rows_are_as_long_as_they_are_said_to_be():
  for source in (
    data(),
    data(pack=True),
    data(pack=True, packed_targets_length=40),
  ):
    (batch,) = first_batches(source, 1, seed=0)
    said = source.targets_length(None)
    assert batch['decoder_target_tokens'].shape[1] == said
  assert said == 40
  with pytest.raises(UserError, match='packed_targets_length must be .* 1$'):
    data(pack=True, packed_targets_length=1).targets_length(None)


def test_the_order_depends_on_the_seed_alone():
  assert_same(
    first_batches(data(), 5, seed=1), first_batches(data(), 5, seed=1)
  )
  one, other = (
    first_batches(data(), 1, seed=1),
    first_batches(data(), 1, seed=2),
  )
  assert (
    one[0]['encoder_input_tokens'] != other[0]['encoder_input_tokens']
  ).any()


def test_every_epoch_has_each_example_once_and_its_own_order():
  batches = first_batches(data(), 5, virtual_tokens=None)
  ids = np.concatenate([b['encoder_input_tokens'] for b in batches])
  for epoch in (ids[:10], ids[10:]):
    assert len(np.unique(epoch, axis=0)) == 10
  assert (ids[:10] != ids[10:]).any()


def test_without_shuffling_examples_come_in_order_and_start_again():
  batches = first_batches(data(shuffle=False), 5, virtual_tokens=None)
  ids = np.concatenate([b['encoder_input_tokens'] for b in batches])
  np.testing.assert_array_equal(ids[:10], ids[10:])
  assert len(np.unique(ids, axis=0)) == 10


def test_a_batch_has_the_model_s_names_and_lengths():
  (batch,) = first_batches(data(), 1)
  shapes = {name: (v.shape, v.dtype.name) for name, v in batch.items()}
  assert shapes == {
    'encoder_input_tokens': ((4, 3 + 40), 'int32'),
    'decoder_input_tokens': ((4, 6), 'int32'),
    'decoder_target_tokens': ((4, 6), 'int32'),
    'decoder_loss_weights': ((4, 6), 'int32'),
  }
  np.testing.assert_array_equal(
    batch['encoder_input_tokens'][:, :3], [[500, 501, 502]] * 4
  )


def test_processes_share_the_examples_and_no_example_is_read_twice():
  parts = [
    first_batches(
      data(shuffle=False),
      5,
      virtual_tokens=None,
      rows=np.arange(2) + 2 * process,
      num_shards=2,
    )
    for process in (0, 1)
  ]
  rows_of = [
    {row.tobytes() for b in part for row in b['encoder_input_tokens']}
    for part in parts
  ]
  assert all(b['encoder_input_tokens'].shape[0] == 2 for b in parts[0])
  assert [len(rows) for rows in rows_of] == [5, 5]
  assert not rows_of[0] & rows_of[1]


@pytest.mark.parametrize(('pack', 'num_shards'), [(False, 2), (True, 4)])
def test_what_processes_read_together_is_what_one_reads(pack, num_shards):
  """A process may need a part, half of one, or the halves of two."""
  source = data(pack=pack)
  whole = first_batches(source, 4, seed=2, start=1, num_shards=num_shards)
  for shares in ([[0, 1], [2, 3]], [[0], [1, 2], [3]]):
    parts = [
      first_batches(source, 4, 2, 1, rows=np.array(rows), num_shards=num_shards)
      for rows in shares
    ]
    together = [
      {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
      for batches in zip(*parts, strict=True)
    ]
    assert_same(together, whole)


def test_each_task_of_a_mixture_can_have_its_own_prompt():
  source = data('stream_mixed', prompt_indices={'stream_a': 0, 'stream_b': 1})
  ids = np.concatenate(
    [b['encoder_input_tokens'] for b in first_batches(source, 6)]
  )
  seen = {(row[0], row[2]) for row in ids.tolist()}
  assert seen == {(500, 502), (503, 505)}
  with pytest.raises(UserError, match="index for task 'stream_b'"):
    first_batches(data('stream_mixed', prompt_indices={'stream_a': 0}), 1)
  with pytest.raises(UserError, match='asks for prompt 2'):
    first_batches(data(prompt_indices={'stream_a': 2}), 1)


def test_a_process_left_without_examples_is_told_so():
  source = dataclasses.replace(data(num_shards=12), batch_size=12)
  with pytest.raises(UserError, match='one of 12 parts of the data has no'):
    first_batches(source, 1, rows=np.array([11]))


def test_another_vocabulary_changes_the_ids_and_not_what_is_registered(
  tiny_vocabulary, tmp_path
):
  registered = seqio.TaskRegistry.get('stream_a')
  before = registered.output_features
  other = tmp_path / 'other.model'
  other.write_bytes(open(tiny_vocabulary, 'rb').read())
  for name in ('stream_a', 'stream_mixed'):
    task = Task(name, LENGTHS, vocabulary=str(other)).seqio()
    for part in seqio.get_subtasks(task):
      for feature in part.output_features.values():
        assert str(other) in repr(feature.vocabulary.__dict__)
  assert task.get_rate(task.tasks[0]) == 2.0
  assert seqio.TaskRegistry.get('stream_a') is registered
  assert registered.output_features is before


def test_labels_survive_a_change_of_vocabulary(tiny_vocabulary):
  assert data().class_labels() == ['negative', 'positive']
  changed = data('stream_mixed', vocabulary=tiny_vocabulary)
  assert changed.class_labels() == ['negative', 'positive']


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    (data('stream_aa'), "'stream_aa' .nearest: stream_a"),
    (data('stream_a', split='test'), "no split 'test'; it has train, valid"),
    (data('stream_empty'), "no examples in split 'train'"),
    (data('stream_all_filtered'), "no examples in split 'train'"),
    (data('stream_unreadable'), '/no/such/file.csv: cannot be read'),
    (data(modules=('no_such_module',)), "'no_such_module', which is not"),
    (data('stream_in_order'), 'forbids shuffling; set shuffle=False'),
    (data(num_shards=3), 'BATCH_SIZE 4 does not divide by the 3 parts'),
  ],
)
def test_faults_are_one_line_before_the_first_batch(source, message):
  with pytest.raises(UserError, match=message) as caught:
    source.batches(virtual_tokens=None, seed=0, start=0)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('lengths', 'message'),
  [
    ({'inputs': 8}, "TASK_FEATURE_LENGTHS needs a length for 'targets'"),
    ({**LENGTHS, 'target': 8}, "got also 'target'"),
    ({'inputs': 8, 'targets': 0}, 'must be an integer of 1 or more, got 0'),
    ({'inputs': 8.5, 'targets': 1}, 'must be an integer of 1 or more, got 8.5'),
  ],
)
def test_lengths_are_checked_where_they_are_said(lengths, message):
  with pytest.raises(UserError, match=message):
    Task('stream_a', lengths)


def test_what_we_use_of_seqio_without_a_public_name_is_there():
  mixture = seqio.MixtureRegistry.get('stream_mixed')
  assert callable(mixture._sample_fn)
  source = seqio.TfdsDataSource('glue/rte:1.0.0', splits={'a': 'train'})
  assert source.tfds_dataset._split_map == {'a': 'train'}


def test_text_ids_are_never_taken_for_virtual_tokens():
  with pytest.raises(UserError, match='pieces, the model 50 rows'):
    data().batches(virtual_tokens=VirtualTokens(50, 3), seed=0, start=0)


def test_a_file_that_tensorflow_cannot_read_is_the_user_s_fault(
  tiny_vocabulary,
):
  features = seqio.TaskRegistry.get('stream_a').output_features
  seqio.TaskRegistry.add(
    'stream_text_file',
    source=seqio.TextLineDataSource({'train': '/no/such/lines.txt'}),
    preprocessors=[
      lambda ds: ds.map(lambda t: {'inputs': t, 'targets': t}),
      seqio.preprocessors.tokenize,
    ],
    output_features=features,
  )
  with pytest.raises(UserError, match='/no/such/lines.txt'):
    data('stream_text_file').batches(virtual_tokens=None, seed=0, start=0)


def test_tensorflow_leaves_accelerators_to_jax():
  assert not tf.config.get_visible_devices('GPU')
