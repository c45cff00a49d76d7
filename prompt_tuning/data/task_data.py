"""Training batches from a seqio task or mixture.

seqio and TensorFlow are imported by the functions, not by this module, so that
a configuration naming a task costs nothing until its data is read.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
import sys
import typing

from jaxtyping import Int
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError

if typing.TYPE_CHECKING:
  import seqio

# Importing one of these registers its tasks.
TASK_MODULES = tuple(
  f'prompt_tuning.data.{name}'
  for name in (
    'bbc',
    'glue',
    'super_glue',
    'transfer',
    'question_answering',
    'pretraining',
  )
)


@dataclasses.dataclass(frozen=True)
class TaskData:
  """A seqio task or mixture as an endless stream of training batches.

  Attributes:
    mixture_or_task_name: a registered name.
    task_feature_lengths: {'inputs': ids of text per example, 'targets': ...},
      EOS included, virtual tokens not.
    batch_size: rows of a batch.
    split: the task's split to read.
    pack: several examples in one row.
    vocabulary: path or name of a vocabulary to use instead of the task's own.
    modules: Python modules that register further tasks when imported.
    prompt_indices: which prompt of the table each task's examples get,
      {task name: index}; None gives all of them prompt 0, or that of their own
      feature `prompt_index`.
    local_data_dir: a folder with raw files (see `local_files`) to read instead
      of TFDS data sets.
    target_sentinel: puts <extra_id_0> in front of the targets, as a model that
      knows span corruption alone expects them (Lester et al. 2021, 3.2).
    shuffle: whether examples come in a random order (drawn from the seed).
    num_shards: parts the data are read in (see `batches`); None leaves it to
      the run: as many as its processes need. The order of examples depends on
      it.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  split: str = 'train'
  pack: bool = False
  vocabulary: str | None = None
  modules: Sequence[str] = ()
  prompt_indices: Mapping[str, int] | None = None
  local_data_dir: str | None = None
  target_sentinel: bool = False
  shuffle: bool = True
  num_shards: int | None = None

  def task(self) -> 'seqio.Task | seqio.Mixture':
    """The task or mixture, changed as the attributes say."""
    return get_task(
      self.mixture_or_task_name,
      vocabulary=self.vocabulary,
      modules=self.modules,
      prompt_indices=self.prompt_indices,
      local_data_dir=self.local_data_dir,
      target_sentinel=self.target_sentinel,
    )

  def class_labels(self) -> list[str] | None:
    """The labels of a classification task, in the order of their ids."""
    return class_labels(self.task())

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None,
    seed: int,
    start: int = 0,
    rows: Int[np.ndarray, 'r'] | None = None,
    num_shards: int | None = None,
  ) -> Iterator[dict[str, Int[np.ndarray, 'r length']]]:
    """The batches from number `start` on, without end.

    The order is seqio's for this seed, epoch after epoch, so batch i is a
    function of (seed, num_shards, i), whoever reads it. A resumed run reads and
    drops what the earlier one consumed: seqio's shuffling and random
    preprocessors have no other way to the same state, and examples are dropped
    before they are converted.

    Args:
      virtual_tokens: placed in the inputs; None for none.
      seed: of the order.
      start: batches to skip.
      rows: numbers of the rows of each batch that are wanted; None: all.
      num_shards: S parts of the data (seqio's `ShardInfo`), each of which gives
        B / S rows of every batch, one after the other; only those that `rows`
        asks for are read. None: the attribute, else 1.

    Raises:
      UserError: for an unknown task or split, missing lengths, a data set that
        has no examples or cannot be read. Raised here, not at the first batch.
    """
    import seqio

    from prompt_tuning.data import feature_converter
    from prompt_tuning.data import lengths as lengths_lib

    num_shards = num_shards or self.num_shards or 1
    if self.batch_size % num_shards:
      raise UserError(
        f'BATCH_SIZE {self.batch_size} does not divide by the {num_shards}'
        ' parts that the data are read in (TaskData.num_shards)'
      )
    task = self.task()
    size = None if virtual_tokens is None else virtual_tokens.first_id
    lengths = check_task(task, self.split, self.task_feature_lengths, size)
    lengths_lib.check_truncation(task, self.split, lengths)
    if virtual_tokens is not None:
      for index in (self.prompt_indices or {}).values():
        virtual_tokens.ids(index)  # raises where there is no such prompt
    options = {
      'sequence_length': lengths,
      'split': self.split,
      'shuffle': self.shuffle,
      'seed': seed,
      'num_epochs': None,
      # A cache would keep the first epoch's order of a source that shuffles.
      'try_in_mem_cache': not any(
        part.source.performs_internal_shuffling
        for part in seqio.get_subtasks(task)
      ),
    }
    if isinstance(task, seqio.Mixture):  # drops what it does not know
      options['passthrough_features'] = (feature_converter.PROMPT_INDEX,)
    converter = feature_converter.VirtualTokensFeatureConverter(
      virtual_tokens, pack=self.pack
    )
    if self.shuffle:
      require_shuffling(task)
    share = self.batch_size // num_shards
    wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
    parts = []  # (data set, which rows of its batches)
    for index in np.unique(wanted // share).tolist():
      if num_shards > 1:
        options['shard_info'] = seqio.ShardInfo(index, num_shards)
      with reading(task, self.split):
        dataset = task.get_dataset(**options)
        if not self.pack:
          dataset = dataset.skip(start * share)
        dataset = converter(dataset, lengths)
        dataset = dataset.batch(share, drop_remainder=True)
        if self.pack:
          # How many examples a packed row takes depends on their lengths.
          dataset = dataset.skip(start)
        dataset = dataset.prefetch(2)
      parts.append((dataset, wanted[wanted // share == index] % share))
    return self._read(parts, task, num_shards)

  def _read(self, parts, task, num_shards):
    with reading(task, self.split):
      for batches in zip(*(part.as_numpy_iterator() for part, _ in parts)):
        yield {
          name: np.concatenate(
            [batch[name][rows] for batch, (_, rows) in zip(batches, parts)]
          )
          for name in batches[0]
        }
    raise UserError(
      f'task {task.name}, split {self.split!r}: one of {num_shards} parts of'
      ' the data has no examples; bind a smaller TaskData.num_shards'
    )


def get_task(
  name: str,
  *,
  modules: Sequence[str] = (),
  vocabulary: str | None = None,
  prompt_indices: Mapping[str, int] | None = None,
  local_data_dir: str | None = None,
  target_sentinel: bool = False,
) -> 'seqio.Task | seqio.Mixture':
  """A registered task or mixture, changed where something else is asked for.

  What is registered stays as it is: a changed task is a new object of the same
  name, with what is not changed from the old.

  Args:
    name: of a task or mixture of seqio's registries.
    modules: imported first, since importing them registers tasks.
    vocabulary: a path or name for `vocabularies.load_vocabulary`.
    prompt_indices: see `TaskData`, like the following.
    local_data_dir: for tasks on TFDS data sets; others read what they read.
    target_sentinel: predictions lose the sentinel before they are scored.

  Raises:
    UserError: if there is no such task, module, vocabulary or file, or if
      prompt_indices leaves out a task of the mixture.
  """
  import seqio

  _import_task_modules((*TASK_MODULES, *modules))
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name not in names:
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.4)
    hint = f'nearest: {", ".join(near)}' if near else 'none is near'
    raise UserError(
      f'no task or mixture is called {name!r} ({hint}); a module that'
      ' registers more can be named in modules'
    )
  found = seqio.get_mixture_or_task(name)
  change = functools.partial(
    _with_changes,
    vocabulary=vocabulary,
    prompt_indices=prompt_indices,
    local_data_dir=local_data_dir,
    target_sentinel=target_sentinel,
  )
  if isinstance(found, seqio.Task):
    return change(found)
  return seqio.Mixture(
    found.name,
    # `tasks` and `get_rate` are those of nested mixtures too.
    [(change(task), found.get_rate(task)) for task in found.tasks],
    sample_fn=found._sample_fn,  # has no public name
  )


def _import_task_modules(modules: Sequence[str]) -> None:
  # As `python -m` does: a module of the user's working folder is found.
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.append(os.getcwd())
  for module in modules:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name and module.startswith(error.name):
        raise UserError(
          f'modules names {module!r}, which is not installed and not in this'
          ' folder'
        ) from error
      raise


def _with_changes(
  task: 'seqio.Task',
  *,
  vocabulary: str | None,
  prompt_indices: Mapping[str, int] | None,
  local_data_dir: str | None,
  target_sentinel: bool,
) -> 'seqio.Task':
  import seqio
  import tensorflow as tf

  from prompt_tuning.data import local_files
  from prompt_tuning.data import postprocessors
  from prompt_tuning.data import preprocessors
  from prompt_tuning.data.feature_converter import PROMPT_INDEX

  changes = {}
  steps = list(task.preprocessors)
  if local_data_dir is not None and isinstance(
    task.source, seqio.TfdsDataSource
  ):
    changes['source'] = local_files.source(
      task.source.tfds_dataset.name,
      local_data_dir,
      task.source.tfds_dataset._split_map,  # has no public name
    )
  if vocabulary is not None:
    replacement = load_vocabulary(vocabulary).seqio()
    changes['output_features'] = {
      key: feature
      # These are ids or numbers already; no vocabulary made them.
      if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
      else dataclasses.replace(feature, vocabulary=replacement)
      for key, feature in task.output_features.items()
    }
  if target_sentinel:
    if seqio.preprocessors.tokenize not in steps:
      raise UserError(
        f'target_sentinel needs a task that tokenizes its text, {task.name}'
        ' does not'
      )
    steps.insert(
      steps.index(seqio.preprocessors.tokenize) + 1,
      functools.partial(
        preprocessors.add_sentinel, feature='targets', number=0
      ),
    )
    if task.postprocessor is not None:
      changes['postprocess_fn'] = postprocessors.WithoutSentinel(
        task.postprocessor
      )
  if prompt_indices is not None:
    if task.name not in prompt_indices:
      raise UserError(
        f'prompt_indices needs an index for task {task.name!r}, '
        f'got {dict(prompt_indices)}'
      )
    index = prompt_indices[task.name]

    def choose_prompt(dataset):
      return dataset.map(
        lambda example: {**example, PROMPT_INDEX: tf.constant(index, tf.int32)}
      )

    steps.append(choose_prompt)
  if len(steps) > len(task.preprocessors):
    changes['preprocessors'] = steps
  return task.replace(**changes) if changes else task


def check_task(
  task: 'seqio.Task | seqio.Mixture',
  split: str,
  task_feature_lengths: Mapping[str, int],
  rows: int | None = None,
) -> dict[str, int]:
  """Finds what is wrong with a task's data before a run starts.

  Args:
    task: its data are opened.
    split: of the task.
    task_feature_lengths: see `TaskData`.
    rows: V, which the vocabulary must fit into; None does not check that.

  Returns:
    The lengths as plain ints.

  Raises:
    UserError: if a length is missing or unknown, the task is not one of text to
      text or has ids that stand for virtual tokens, the split does not exist,
      has no examples or cannot be read.
  """
  import seqio

  for name in ('inputs', 'targets'):
    if name not in task.output_features:
      raise UserError(
        f'an encoder-decoder needs the features inputs and targets, task'
        f' {task.name} has {", ".join(task.output_features)}'
      )
  for name in ('inputs', 'targets'):
    if name not in task_feature_lengths:
      raise UserError(
        f'TASK_FEATURE_LENGTHS needs a length for {name!r}, '
        f'got {dict(task_feature_lengths)}'
      )
  for name, length in task_feature_lengths.items():
    if name not in ('inputs', 'targets'):
      raise UserError(
        f'TASK_FEATURE_LENGTHS takes inputs and targets, got also {name!r}'
      )
    if int(length) != length or length < 1:
      raise UserError(
        f'TASK_FEATURE_LENGTHS[{name!r}] must be an integer of 1 or more, '
        f'got {length!r}'
      )
  with reading(task, split):
    size = task.output_features['inputs'].vocabulary.vocab_size
  if rows is not None and size > rows:
    raise UserError(
      f'the vocabulary of task {task.name} has {size} pieces, the model'
      f' {rows} rows; give the vocabulary of the model'
    )
  for part in seqio.get_subtasks(task):
    _require_tfds_data(part)
  if split not in task.splits:
    raise UserError(
      f'task {task.name} has no split {split!r}; '
      f'it has {", ".join(sorted(task.splits))}'
    )
  lengths = {name: int(length) for name, length in task_feature_lengths.items()}
  for part in seqio.get_subtasks(task):
    if split not in part.splits:  # a mixture leaves such a task out
      continue
    with reading(part, split):
      first = part.get_dataset(
        sequence_length=lengths, split=split, shuffle=False, num_epochs=1
      ).take(1)
      # seqio repeats the data before it filters them: a task without examples
      # would be an endless loop, not an end.
      if not list(first.as_numpy_iterator()):
        raise UserError(
          f'task {part.name} has no examples in split {split!r}; look at its'
          ' files and filters'
        )
  return lengths


def _require_tfds_data(task: 'seqio.Task') -> None:
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
      f' {folder} (TFDS_DATA_DIR). With internet: tfds build {name}. From raw'
      f' files: scripts/prepare_data.py --data_sets {name.partition(":")[0]}'
      f' --local_data_dir RAW --tfds_data_dir {folder}, or read them as they'
      ' are by LOCAL_DATA_DIR'
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


def class_labels(task: 'seqio.Task | seqio.Mixture') -> list[str] | None:
  """The answers of a classification task, None if it is none.

  They are the `words` of its postprocessor (see `postprocessors`). A mixture
  has its tasks' words, each once.
  """
  import seqio

  labels = {}
  for part in seqio.get_subtasks(task):
    labels.update(dict.fromkeys(getattr(part.postprocessor, 'words', ())))
  return list(labels) or None
