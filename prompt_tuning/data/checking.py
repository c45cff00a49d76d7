"""What may be wrong with a task's data, each told in one line."""

from collections.abc import Mapping
import contextlib
import typing

from prompt_tuning.errors import UserError

if typing.TYPE_CHECKING:
  import seqio


@contextlib.contextmanager
def reading(task: 'seqio.Task | seqio.Mixture', split: str):
  """Makes a file that cannot be read a fault of the input, in one line."""
  import tensorflow as tf

  # Looked up before the body runs: a stream that is dropped when Python exits
  # ends in here when modules are gone.
  unreadable = (
    OSError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.DataLossError,
  )
  try:
    yield
  except unreadable as error:
    first_line = str(error).strip().split('\n')[0]
    raise UserError(
      f'task {task.name}, split {split!r}: the data cannot be read: '
      f'{first_line}'
    ) from error


def first_example(
  task: 'seqio.Task', split: str, feature_lengths: Mapping[str, int]
) -> dict[str, typing.Any]:
  """The features of a split's first example, as numpy has them.

  Raises:
    UserError: its preprocessors fail on it, or there is none.
  """
  import tensorflow as tf

  with reading(task, split):
    first = task.get_dataset(
      feature_lengths, split=split, shuffle=False, num_epochs=1
    ).take(1)
    # seqio repeats the data before it filters them: a task without examples
    # would be an endless loop, not an end.
    try:
      examples = list(first.as_numpy_iterator())
    except tf.errors.InvalidArgumentError as error:
      raise UserError(
        f'task {task.name}, split {split!r}: its preprocessors fail on the'
        f' first example: {str(error).splitlines()[0]}'
      ) from error
    if not examples:
      raise UserError(
        f'task {task.name} has no examples in split {split!r}; look at its'
        ' files and filters'
      )
  return examples[0]


def require_tfds_data(task: 'seqio.Task') -> None:
  """Raises UserError where a TFDS data set is not on this machine."""
  import seqio
  import tensorflow_datasets as tfds

  if not isinstance(task.source, seqio.TfdsDataSource):
    return
  name = task.source.tfds_dataset.name
  try:
    present = bool(task.source.tfds_dataset.info.splits)
  except (tfds.core.DatasetNotFoundError, OSError, ValueError):
    present = False
  if not present:
    folder = task.source.tfds_dataset.data_dir or tfds.core.constants.DATA_DIR
    raise UserError(
      f'task {task.name} reads the TFDS data set {name}, which is not in'
      f' {folder} (--tfds_data_dir or TFDS_DATA_DIR). With internet: tfds build'
      f' {name}. From raw files: scripts/prepare_data.py --data_sets'
      f' {name.partition(":")[0]} --local_data_dir RAW --tfds_data_dir'
      f' {folder}, or read them as they are by LOCAL_DATA_DIR'
    )


def require_vocabulary_of_cache(task: 'seqio.Task', example) -> None:
  """Raises UserError where cached ids are not this vocabulary's.

  Looked at where the cache keeps the text and nothing but EOS comes after it.
  """
  import seqio

  from prompt_tuning.data import sources

  after = (seqio.preprocessors.append_eos_after_trim,)
  is_cached = isinstance(task.source, sources.CachedSource)
  if not is_cached or tuple(task.preprocessors) != after:
    return
  for name, feature in task.output_features.items():
    text = example.get(f'{name}_pretokenized')
    if text is None:
      continue
    ids = feature.vocabulary.encode(text.decode())
    found = example[name].tolist()
    size = min(len(ids), len(found) - 2)  # a sentinel before, EOS behind
    if ids[:size] not in (found[:size], found[1 : size + 1]):
      raise UserError(
        f'task {task.name} was cached with another vocabulary than the'
        " model's; cache it with the model's, or say USE_CACHED_TASKS=False"
      )


def require_shuffling(task: 'seqio.Task | seqio.Mixture') -> None:
  """Raises UserError if a task was registered with shuffling forbidden."""
  import seqio

  for part in seqio.get_subtasks(task):
    if not (
      part.shuffle_buffer_size or part.source.performs_internal_shuffling
    ):
      raise UserError(
        f'task {part.name} was registered with shuffle_buffer_size=None, which'
        ' forbids shuffling; set shuffle=False, or num_examples=None where it'
        ' is evaluated'
      )
