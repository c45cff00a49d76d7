"""seqio sources: rows that fit in memory, and what seqio cached of a task.

The schema of rows is that of a TFDS data set, {field: type}: str, int, float,
[str] for a list of strings, or another schema.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import hashlib
import os

from etils import epath
import seqio
import tensorflow as tf

Schema = Mapping[str, object]

DTYPES = {str: tf.string, int: tf.int32, float: tf.float32}


def columns(rows: Sequence[Mapping], schema: Schema) -> dict[str, object]:
  """The rows as a (nested) dict of tensors, lists as ragged ones."""
  result = {}
  for name, kind in schema.items():
    values = [row[name] for row in rows]
    if isinstance(kind, Mapping):
      result[name] = columns(values, kind)
    elif isinstance(kind, list):
      result[name] = tf.RaggedTensor.from_row_lengths(
        tf.constant([v for row in values for v in row], DTYPES[kind[0]]),
        tf.constant([len(row) for row in values], tf.int64),
      )
    else:
      result[name] = tf.constant(values, DTYPES[kind], [len(values)])
  return result


class RowsSource(seqio.DataSource):
  """Rows that are read when their split is first used.

  Where shuffling is asked for, an epoch is a new permutation of all of them, so
  files sorted by label do no harm.
  """

  def __init__(
    self,
    read_split: Callable[[str], Sequence[Mapping]],
    splits: Iterable[str],
    schema: Schema,
  ):
    """read_split gives the rows of a split, as the schema says."""
    self._read_split = read_split
    self._schema = schema
    self._splits_read = {}
    super().__init__(splits=tuple(splits), performs_internal_shuffling=True)

  def rows(self, split: str) -> Sequence[Mapping]:
    """All rows of a split, in the order of the data."""
    if split not in self._splits_read:
      self._splits_read[split] = self._read_split(split)
    return self._splits_read[split]

  def digest(self, split: str) -> str:
    """Of all rows of a split, in their order."""
    digest = hashlib.sha256()
    for row in self.rows(split):
      digest.update(f'{sorted(row.items())}\n'.encode())
    return digest.hexdigest()

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def num_input_examples(self, split: str) -> int:
    return len(self.rows(split))

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    rows = self.rows(split)
    if shard_info is not None:
      rows = rows[shard_info.index :: shard_info.num_shards]
    values = columns(rows, self._schema)
    order = tf.data.Dataset.range(len(rows))
    if shuffle and rows:
      order = order.shuffle(len(rows), seed=seed)
    return order.map(
      lambda i: tf.nest.map_structure(lambda column: column[i], values)
    )


class CachedSource(seqio.DataSource):
  """What seqio's cache_tasks_main wrote of a task, its splits from there too.

  Its rows are the task's as of its CacheDatasetPlaceholder.
  """

  def __init__(self, folder: str, file_shuffle_buffer_size: int | None):
    names = (path.name for path in epath.Path(folder).glob('info.*.json'))
    super().__init__(splits=[name.split('.', 1)[1][:-5] for name in names])
    self._read = functools.cache(
      lambda split: seqio.dataset_providers._CachedDataSource(
        folder, split, file_shuffle_buffer_size
      )
    )

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> Sequence[str]:
    return self._read(split).list_shards(split)

  def num_input_examples(self, split: str) -> int:
    return self._read(split).num_input_examples(split)

  def get_dataset(self, split: str = 'train', **how) -> tf.data.Dataset:
    return self._read(split).get_dataset(split, **how)


def digest(source: seqio.DataSource, split: str) -> str:
  """Tells one version of a source's data from another, without reading much.

  Rows are read. Of a TFDS data set it is the version and the sizes, of other
  files the sizes; what a function makes is taken on trust.
  """
  if isinstance(source, RowsSource):
    return source.digest(split)
  if isinstance(source, seqio.TfdsDataSource):
    info = source.tfds_dataset.info
    known = {name: one.shard_lengths for name, one in info.splits.items()}
    return (
      f'{info.full_name} {known.get(split, source.tfds_dataset.size(split))}'
    )
  files = filter(os.path.isfile, source.list_shards(split))
  return ' '.join(f'{os.path.basename(f)}:{os.path.getsize(f)}' for f in files)
