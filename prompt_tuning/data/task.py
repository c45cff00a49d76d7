"""What a task is, said once for training, evaluation and reports.

seqio and TensorFlow are imported by the functions, not by this module, so that
a configuration naming a task costs nothing until its data is read.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import os
import sys
import typing

from prompt_tuning import files
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


# The inputs of tasks that are made of a row's fields by a template alone.
TEMPLATES: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Task:
  """A seqio task or mixture, with all that changes what it is.

  Attributes:
    name: of a registered task or mixture.
    feature_lengths: {'inputs': ids of text per example, 'targets': ...}, EOS
      included, virtual tokens not.
    vocabulary: path or name of a vocabulary to use instead of the task's own,
      or seqio's object of one.
    modules: Python modules that register further tasks when imported.
    local_data_dir: a folder with raw files (see `local_files`) to read instead
      of TFDS data sets; tasks on others read what they read.
    target_sentinel: puts <extra_id_0> in front of the targets, as a model that
      knows span corruption alone expects them, and takes it off predictions
      before they are scored (Lester et al. 2021, 3.2).
    prompt_indices: which prompt of the table each task's examples get,
      {task name: index}; None gives all of them prompt 0, or that of their own
      feature `prompt_index`.
    text_prompt: put in front of each example's inputs, with a space, before
      they are read as pieces: a prompt in words. It takes room of the length
      of the inputs.
  """

  name: str
  feature_lengths: Mapping[str, int]
  vocabulary: typing.Any = None
  modules: Sequence[str] = ()
  local_data_dir: str | None = None
  target_sentinel: bool = False
  prompt_indices: Mapping[str, int] | None = None
  text_prompt: str | None = None

  def __post_init__(self):
    for name in ('inputs', 'targets'):
      if name not in self.feature_lengths:
        raise UserError(
          f'TASK_FEATURE_LENGTHS needs a length for {name!r}, '
          f'got {dict(self.feature_lengths)}'
        )
    for name, length in self.feature_lengths.items():
      if name not in ('inputs', 'targets'):
        raise UserError(
          f'TASK_FEATURE_LENGTHS takes inputs and targets, got also {name!r}'
        )
      if not isinstance(length, int | float) or length % 1 or length < 1:
        raise UserError(
          f'TASK_FEATURE_LENGTHS[{name!r}] must be an integer of 1 or more, '
          f'got {length!r}'
        )
    lengths = {name: int(n) for name, n in self.feature_lengths.items()}
    object.__setattr__(self, 'feature_lengths', lengths)

  def seqio(self) -> 'seqio.Task | seqio.Mixture':
    """The task or mixture, changed as the attributes say.

    What is registered stays as it is: a changed task is a new object of the
    same name, with what is not changed from the old.

    Raises:
      UserError: if there is no such task, module, vocabulary or file, or if
        prompt_indices leaves out a task of the mixture.
    """
    register_tasks(self.modules)
    import seqio

    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if self.name not in names:
      near = difflib.get_close_matches(self.name, sorted(names), 3, 0.4)
      hint = f'nearest: {", ".join(near)}' if near else 'none is near'
      raise UserError(
        f'no task or mixture is called {self.name!r} ({hint}); a module that'
        ' registers more can be named in modules'
      )
    found = seqio.get_mixture_or_task(self.name)
    if isinstance(found, seqio.Task):
      return self._changed(found)
    return seqio.Mixture(
      found.name,
      # `tasks` and `get_rate` are those of nested mixtures too.
      [(self._changed(task), found.get_rate(task)) for task in found.tasks],
      sample_fn=found._sample_fn,  # has no public name
    )

  def class_labels(self) -> list[str] | None:
    """The labels of a classification task, in the order of their ids."""
    return class_labels(self.seqio())

  def facts(self) -> dict[str, object]:
    """What serving needs to know of the task (see `training.batches`)."""
    facts: dict[str, object] = {'labels': self.class_labels()}
    facts['template'] = template = TEMPLATES.get(self.name)
    if template and self.text_prompt:
      words = self.text_prompt.replace('{', '{{').replace('}', '}}')
      facts['template'] = f'{words} {template}'
    facts['target_sentinel'] = self.target_sentinel or None
    return {name: fact for name, fact in facts.items() if fact is not None}

  def digest(self, split: str) -> str:
    """Another one for other examples of a split (see `sources.digest`)."""
    import seqio

    from prompt_tuning.data import sources

    digest = hashlib.sha256()
    for part in seqio.get_subtasks(self.seqio()):
      if split in part.splits:
        with reading(part, split):
          found = sources.digest(part.source, split)
        digest.update(f'{part.name} {found}\n'.encode())
    return digest.hexdigest()[:16]

  def _changed(self, task: 'seqio.Task') -> 'seqio.Task':
    import seqio
    import tensorflow as tf

    from prompt_tuning.data import local_files
    from prompt_tuning.data import postprocessors
    from prompt_tuning.data import preprocessors
    from prompt_tuning.data.feature_converter import PROMPT_INDEX

    changes = {}
    steps = list(task.preprocessors)
    if self.local_data_dir is not None and isinstance(
      task.source, seqio.TfdsDataSource
    ):
      changes['source'] = local_files.source(
        task.source.tfds_dataset.name,
        self.local_data_dir,
        task.source.tfds_dataset._split_map,  # has no public name
      )
    if self.vocabulary is not None:
      replacement = self.vocabulary
      if not isinstance(replacement, seqio.Vocabulary):
        replacement = load_vocabulary(replacement).seqio()
      changes['output_features'] = {
        key: feature
        # These are ids or numbers already; no vocabulary made them.
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        else dataclasses.replace(feature, vocabulary=replacement)
        for key, feature in task.output_features.items()
      }
    if self.text_prompt is not None:
      _require_text(task, 'text_prompt')
      words = f'{self.text_prompt} '

      def put_in_front(dataset):
        return dataset.map(
          lambda row: {**row, 'inputs': tf.strings.join([words, row['inputs']])}
        )

      steps.insert(steps.index(seqio.preprocessors.tokenize), put_in_front)
    if self.target_sentinel:
      _require_text(task, 'target_sentinel')
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
    if self.prompt_indices is not None:
      if task.name not in self.prompt_indices:
        raise UserError(
          f'prompt_indices needs an index for task {task.name!r}, '
          f'got {dict(self.prompt_indices)}'
        )
      index = self.prompt_indices[task.name]

      def choose_prompt(dataset):
        prompt = {PROMPT_INDEX: tf.constant(index, tf.int32)}
        return dataset.map(lambda example: {**example, **prompt})

      steps.append(choose_prompt)
    if len(steps) > len(task.preprocessors):
      changes['preprocessors'] = steps
    return task.replace(**changes) if changes else task

  def checked(
    self,
    split: str,
    rows: int | None = None,
    virtual_tokens: VirtualTokens | None = None,
    shuffled: bool = False,
  ) -> 'seqio.Task | seqio.Mixture':
    """The task, after a look for what may be wrong with its data.

    Args:
      split: of the task.
      rows: V, which the vocabulary must fit into; None does not check that.
      virtual_tokens: among which prompt_indices must be.
      shuffled: its examples will be.

    Raises:
      UserError: as `seqio`, and if the task is not one of text to text, has ids
        that stand for virtual tokens or may not be shuffled, or the split does
        not exist, has no examples or cannot be read.
    """
    task = self.seqio()
    import seqio
    import tensorflow as tf

    for name in ('inputs', 'targets'):
      if name not in task.output_features:
        raise UserError(
          f'an encoder-decoder needs the features inputs and targets, task'
          f' {task.name} has {", ".join(task.output_features)}'
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
    for index in (self.prompt_indices or {}).values():
      if virtual_tokens is not None:
        virtual_tokens.ids(index)  # UserError where there is no such prompt
    if shuffled:
      _require_shuffling(task)
    for part in seqio.get_subtasks(task):
      if split not in part.splits:  # a mixture leaves such a task out
        continue
      with reading(part, split):
        first = part.get_dataset(
          self.feature_lengths, split=split, shuffle=False, num_epochs=1
        ).take(1)
        # seqio repeats the data before it filters them: a task without
        # examples would be an endless loop, not an end.
        try:
          examples = list(first.as_numpy_iterator())
        except tf.errors.InvalidArgumentError as error:
          raise UserError(
            f'task {part.name}, split {split!r}: its preprocessors fail on the'
            f' first example: {str(error).splitlines()[0]}'
          ) from error
        if not examples:
          raise UserError(
            f'task {part.name} has no examples in split {split!r}; look at its'
            ' files and filters'
          )
    return task


def import_seqio() -> None:
  """Imports seqio without what TensorFlow's C++ then says."""
  if 'seqio' not in sys.modules:
    with files.stderr_closed():
      importlib.import_module('seqio')


def register_tasks(modules: Sequence[str] = ()) -> None:
  """Registers the package's tasks, and those of further modules.

  Raises:
    UserError: a module is not there, or fails while it is imported.
  """
  import_seqio()
  # As `python -m` does: a module of the user's working folder is found.
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.append(os.getcwd())
  for module in (*TASK_MODULES, *modules):
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name and module.startswith(error.name):
        raise UserError(
          f'modules names {module!r}, which is not installed and not in this'
          ' folder'
        ) from error
      raise
    except UserError:
      raise
    except Exception as error:  # of a module of the user's
      raise UserError(
        f'modules names {module!r}, which fails when it is imported:'
        f' {type(error).__name__}: {error}'
      ) from error


def _require_text(task: 'seqio.Task', setting: str) -> None:
  """Raises UserError where a task's preprocessors do not tokenize text."""
  import seqio

  if seqio.preprocessors.tokenize not in task.preprocessors:
    raise UserError(
      f'{setting} needs a task that tokenizes its text, {task.name} does not'
    )


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


def _require_shuffling(task: 'seqio.Task | seqio.Mixture') -> None:
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
