"""Tasks that seqio cached: their files are written here as its format says."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError

LENGTHS = {'inputs': 12, 'targets': 6}
ROWS = {'train': range(5), 'validation': range(5, 8)}
WORDS = 'film good bad fine dull bright saw twice friend review'.split()


@pytest.fixture(scope='module')
def folder(tiny_vocabulary, tmp_path_factory):
  """A task of four steps, cached after two, and one without a cache."""
  vocabulary = load_vocabulary(str(tiny_vocabulary)).seqio()

  def read(split, shuffle_files, seed=None):
    texts = [f'review: {WORDS[i]} {WORDS[i + 1]}' for i in ROWS[split]]
    labels = [('bad', 'good')[i % 2] for i in ROWS[split]]
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': texts, 'targets': labels}
    )

  steps = [
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
  ]
  for name in ('kept:apart', 'kept_nowhere', 'kept_without_a_place'):
    seqio.TaskRegistry.add(
      name,
      seqio.FunctionDataSource(read, splits=list(ROWS)),
      preprocessors=steps if 'without' not in name else steps[::2],
      output_features=dict.fromkeys(LENGTHS, seqio.Feature(vocabulary)),
    )
  folder = tmp_path_factory.mktemp('caches')
  (folder / 'kept' / 'apart').mkdir(parents=True)
  for split in ROWS:
    write(folder / 'kept' / 'apart', split)
  (folder / 'kept' / 'apart' / 'COMPLETED').touch()
  yield str(folder)
  for name in ('kept:apart', 'kept_nowhere', 'kept_without_a_place'):
    seqio.TaskRegistry.remove(name)


def write(folder, split):
  """What seqio_cache_tasks writes, two files a split, in its own words."""
  task = seqio.TaskRegistry.get('kept:apart')
  rows = list(task.preprocess_precache(task.source.get_dataset(split)))
  for shard in range(2):
    name = f'{split}.tfrecord-{shard:05}-of-00002'
    with tf.io.TFRecordWriter(str(folder / name)) as file:
      for row in rows[shard::2]:
        example = seqio.utils.dict_to_tfexample(row)
        file.write(example.SerializeToString())
  features = {
    name: {'shape': [None] * value.ndim, 'dtype': value.dtype.name}
    for name, value in rows[0].items()
  }
  info = {'num_shards': 2, 'features': features, 'seqio_version': '0.0.20'}
  (folder / f'info.{split}.json').write_text(json.dumps(info))
  stats = json.dumps({'examples': len(rows)})
  (folder / f'stats.{split}.json').write_text(stats)


def kept(folder, tiny_vocabulary, name='kept:apart', **settings):
  settings = {'use_cached': True, 'cache_dirs': (folder,)} | settings
  return Task(name, LENGTHS, str(tiny_vocabulary), **settings)


def rows_of(dataset):
  found = [
    {name: np.asarray(value).tolist() for name, value in row.items()}
    for row in dataset.as_numpy_iterator()
  ]
  return sorted(found, key=lambda row: str(sorted(row.items())))


@pytest.mark.parametrize('split', list(ROWS))
def test_a_cache_gives_what_seqio_reads_of_it_and_no_source_is_read(
  folder, tiny_vocabulary, split, monkeypatch
):
  registered = seqio.TaskRegistry.get('kept:apart')
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [folder])
  how = {'sequence_length': LENGTHS, 'split': split, 'shuffle': False}
  expected = rows_of(registered.get_dataset(use_cached=True, **how))
  assert len(expected) == len(ROWS[split])
  on_the_fly = rows_of(registered.get_dataset(**how))
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [])
  monkeypatch.setattr(registered.source, 'get_dataset', None)
  task = kept(folder, tiny_vocabulary).checked(split)
  assert set(task.splits) == set(ROWS)
  assert rows_of(task.get_dataset(**how)) == expected == on_the_fly


def test_training_reads_a_cache_split_over_hosts(folder, tiny_vocabulary):
  task = kept(folder, tiny_vocabulary)
  plain = dataclasses.replace(task, use_cached=False, cache_dirs=())
  both = []
  for one in (task, plain):
    data = TaskData(one, 5, shuffle=False)
    (batch,) = itertools.islice(data.batches(virtual_tokens=None, seed=0), 1)
    both.append(sorted(batch['encoder_input_tokens'].tolist()))
  assert both[0] == both[1]
  data = TaskData(task, 4, shuffle=False)
  options = {'virtual_tokens': None, 'seed': 0, 'num_shards': 2}
  whole = next(iter(data.batches(**options)))
  half = next(iter(data.batches(**options, rows=np.arange(2, 4))))
  for name in whole:
    np.testing.assert_array_equal(whole[name][2:], half[name])


def test_another_cache_is_told_by_its_digest(folder, tiny_vocabulary):
  task = kept(folder, tiny_vocabulary)
  assert task.digest('train') == kept(folder, tiny_vocabulary).digest('train')
  assert task.digest('train') != task.digest('validation')


def test_a_task_without_a_place_for_a_cache_is_read_as_it_is(
  folder, tiny_vocabulary
):
  task = kept(folder, tiny_vocabulary, 'kept_without_a_place')
  assert len(list(task.checked('train').get_dataset(LENGTHS))) == 5


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'name': 'kept_nowhere'}, 'kept_nowhere is not cached in .*caches'),
    ({'cache_dirs': ('/no/such',)}, 'cache_dirs: there is no folder /no/such'),
    ({'use_cached': False}, 'of use with USE_CACHED_TASKS=True'),
    ({'target_sentinel': True}, 'does not once it is cached'),
    ({'local_data_dir': 'a'}, 'LOCAL_DATA_DIR and USE_CACHED_TASKS say where'),
    ({'tfds_data_dir': '/no/such'}, '--tfds_data_dir and USE_CACHED_TASKS'),
  ],
)
def test_what_cannot_be_cached_is_a_line(
  folder, tiny_vocabulary, settings, words
):
  with pytest.raises(UserError, match=words) as error:
    kept(folder, tiny_vocabulary, **settings).checked('train')
  assert '\n' not in str(error.value)


def test_a_cache_of_another_vocabulary_is_refused(folder):
  task = Task(
    'kept:apart', LENGTHS, 't5_1_1_mini', use_cached=True, cache_dirs=[folder]
  )
  with pytest.raises(UserError, match='cached with another vocabulary'):
    task.checked('train')


def test_a_folder_of_tfds_that_is_not_there_is_a_line():
  task = Task('glue_cola_v002', LENGTHS, tfds_data_dir='/no/such')
  with pytest.raises(UserError, match='--tfds_data_dir: there is no folder'):
    task.checked('train')
