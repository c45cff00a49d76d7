"""What a task is, said once for training, evaluation and reports.

seqio and TensorFlow are imported by the functions, not by this module, so that
a configuration naming a task costs nothing until its data is read.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import functools
import hashlib
import importlib
import os
import sys
import typing

from prompt_tuning import files
from prompt_tuning.data import checking
from prompt_tuning.data import demonstrations as demonstrations_lib
from prompt_tuning.data.demonstrations import Demonstrations
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
    tfds_data_dir: the folder of TFDS's data sets (--tfds_data_dir); None: the
      variable TFDS_DATA_DIR names it.
    use_cached: reads what seqio's cache_tasks_main wrote of the task; one that
      has no place for a cache is read as it is, as T5X does.
    cache_dirs: folders of such caches (--seqio_additional_cache_dirs), looked
      into before seqio's own.
    target_sentinel: puts <extra_id_0> in front of the targets, as a model that
      knows span corruption alone expects them, and takes it off predictions
      before they are scored (Lester et al. 2021, 3.2).
    prompt_indices: which prompt of the table each task's examples get,
      {task name: index}; None gives all of them prompt 0, or that of their own
      feature `prompt_index`.
    demonstrations: training examples that stand in front of every input; each
      task of a mixture has its own. They come on top of the length of the
      inputs (see `lengths`).
    text_prompt: put in front of each example's inputs, with a space, before
      they are read as pieces: a prompt in words, in demonstrations too. It
      takes room of the length of the inputs.
  """

  name: str
  feature_lengths: Mapping[str, int]
  vocabulary: typing.Any = None
  modules: Sequence[str] = ()
  local_data_dir: str | None = None
  target_sentinel: bool = False
  prompt_indices: Mapping[str, int] | None = None
  demonstrations: Demonstrations | None = None
  text_prompt: str | None = None
  tfds_data_dir: str | None = None
  use_cached: bool = False
  cache_dirs: Sequence[str] = ()

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
    read = {
      'LOCAL_DATA_DIR': self.local_data_dir,
      '--tfds_data_dir': self.tfds_data_dir,
      'USE_CACHED_TASKS': self.use_cached,
    }
    given = [name for name, value in read.items() if value]
    if len(given) > 1:
      raise UserError(
        f'{" and ".join(given)} say where a task is read; give one of them'
      )
    if self.cache_dirs and not self.use_cached:
      raise UserError(
        '--seqio_additional_cache_dirs is of use with USE_CACHED_TASKS=True'
      )

  def seqio(self) -> 'seqio.Task | seqio.Mixture':
    """The task or mixture, changed as the attributes say.

    What is registered stays as it is: a changed task is a new object of the
    same name, with what is not changed from the old.

    Raises:
      UserError: if there is no such task, module, vocabulary or file, or if
        prompt_indices leaves out a task of the mixture.
    """
    for flag, folders in (
      ('--tfds_data_dir', filter(None, [self.tfds_data_dir])),
      ('--seqio_additional_cache_dirs', self.cache_dirs),
    ):
      for folder in folders:
        if not files.place(folder).is_dir():
          raise UserError(f'{flag}: there is no folder {folder}')
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
    facts['template'] = self.template()
    facts['target_sentinel'] = self.target_sentinel or None
    facts['prompt_indices'] = self.prompt_indices and dict(self.prompt_indices)
    return {name: fact for name, fact in facts.items() if fact is not None}

  def template(self) -> str | None:
    """Of its inputs out of a row's fields, where they are made by one."""
    template = TEMPLATES.get(self.name)
    if template is None:
      return None
    prefix = self.prefix(self.name)
    return prefix.replace('{', '{{').replace('}', '}}') + template

  def prefix(self, name: str) -> str:
    """What stands in front of the inputs of it, or of a task of a mixture."""
    words = f'{self.text_prompt} ' if self.text_prompt else ''
    if self.demonstrations is None:
      return words
    import seqio

    if name not in self._demonstrated:
      plain = dataclasses.replace(self, demonstrations=None).seqio()
      (part,) = (p for p in seqio.get_subtasks(plain) if p.name == name)
      if 'train' not in part.splits:  # the one that trains for it has its form
        part = trained_beside(part, seqio.get_subtasks(plain)) or part
      with checking.reading(part, 'train'):
        pairs = demonstrations_lib.texts(part)
      self._demonstrated[name] = self.demonstrations.prefix(pairs)
    return self._demonstrated[name] + words

  def lengths(self) -> dict[str, int]:
    """`feature_lengths`, with room for demonstrations where there are any.

    An input is so cut no earlier than without them.
    """
    lengths = dict(self.feature_lengths)
    if self.demonstrations is not None:
      import seqio

      lengths['inputs'] += max(
        len(
          part.output_features['inputs'].vocabulary.encode(
            self.prefix(part.name)
          )
        )
        for part in seqio.get_subtasks(self.seqio())
      )
    return lengths

  @functools.cached_property
  def _demonstrated(self) -> dict[str, str]:
    """{task: its demonstrations}: a task's training split is read once."""
    return {}

  def digest(self, split: str) -> str:
    """Another one for other examples of a split (see `sources.digest`)."""
    import seqio

    from prompt_tuning.data import sources

    digest = hashlib.sha256()
    for part in seqio.get_subtasks(self.seqio()):
      if split in part.splits:
        with checking.reading(part, split):
          found = sources.digest(part.source, split)
        digest.update(f'{part.name} {found}\n'.encode())
    return digest.hexdigest()[:16]

  def _changed(self, task: 'seqio.Task') -> 'seqio.Task':
    import seqio
    import tensorflow as tf

    from prompt_tuning.data import local_files
    from prompt_tuning.data import postprocessors
    from prompt_tuning.data import preprocessors
    from prompt_tuning.data import sources
    from prompt_tuning.data.feature_converter import PROMPT_INDEX

    changes = {}
    steps = list(task.preprocessors)
    if isinstance(task.source, seqio.TfdsDataSource):
      of_tfds = task.source.tfds_dataset
      splits = of_tfds._split_map  # has no public name
      if self.local_data_dir is not None:
        changes['source'] = local_files.source(
          of_tfds.name, self.local_data_dir, splits
        )
      if self.tfds_data_dir is not None:
        changes['source'] = seqio.TfdsDataSource(
          of_tfds.name, self.tfds_data_dir, splits=splits
        )
    if self.use_cached and task.supports_caching:
      kinds = [type(step) for step in steps]
      place = kinds.index(seqio.CacheDatasetPlaceholder)
      changes['source'] = sources.CachedSource(
        self._cache_folder(task.name), steps[place].file_shuffle_buffer_size
      )
      steps = steps[place + 1 :]
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
    for name in ('target_sentinel', 'demonstrations', 'text_prompt'):
      if getattr(self, name) and seqio.preprocessors.tokenize not in steps:
        raise UserError(
          f'{name} needs a task that tokenizes its text, {task.name} does not'
          f'{" once it is cached" if self.use_cached else ""}'
        )
    if self.target_sentinel:
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
    if prefix := self.prefix(task.name):

      def put_in_front(dataset):
        return dataset.map(
          lambda example: {**example, 'inputs': prefix + example['inputs']}
        )

      steps.insert(steps.index(seqio.preprocessors.tokenize), put_in_front)
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
    if steps != list(task.preprocessors):
      changes['preprocessors'] = steps
    return task.replace(**changes) if changes else task

  def _cache_folder(self, name: str) -> str:
    """Where seqio's cache_tasks_main wrote a task."""
    import seqio

    folders = [*self.cache_dirs, *seqio.get_global_cache_dirs()]
    for folder in folders:
      place = files.place(folder) / seqio.utils.get_task_dir_from_name(name)
      if (place / 'COMPLETED').exists():
        return str(place)
    raise UserError(
      f'USE_CACHED_TASKS: task {name} is not cached in'
      f' {", ".join(map(str, folders)) or "any folder"}; name its folder by'
      ' --seqio_additional_cache_dirs, write it by seqio_cache_tasks, or say'
      ' USE_CACHED_TASKS=False'
    )

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

    for name in ('inputs', 'targets'):
      if name not in task.output_features:
        raise UserError(
          f'an encoder-decoder needs the features inputs and targets, task'
          f' {task.name} has {", ".join(task.output_features)}'
        )
    with checking.reading(task, split):
      size = task.output_features['inputs'].vocabulary.vocab_size
    if rows is not None and size > rows:
      raise UserError(
        f'the vocabulary of task {task.name} has {size} pieces, the model'
        f' {rows} rows; give the vocabulary of the model'
      )
    for part in seqio.get_subtasks(task):
      checking.require_tfds_data(part)
    if split not in task.splits:
      raise UserError(
        f'task {task.name} has no split {split!r}; '
        f'it has {", ".join(sorted(task.splits))}'
      )
    for index in (self.prompt_indices or {}).values():
      if virtual_tokens is not None:
        virtual_tokens.ids(index)  # UserError where there is no such prompt
    if shuffled:
      checking.require_shuffling(task)
    for part in seqio.get_subtasks(task):
      if split not in part.splits:  # a mixture leaves such a task out
        continue
      example = checking.first_example(part, split, self.feature_lengths)
      checking.require_vocabulary_of_cache(part, example)
    return task


def trained_beside(
  task: 'seqio.Task', others: Sequence['seqio.Task']
) -> 'seqio.Task | None':
  """The one of others that trains on the TFDS data set of a task without.

  WSC and MNLI are trained by one task and evaluated by others.
  """
  own = _data_set(task)
  for one in others:
    if 'train' in one.splits and (theirs := _data_set(one)):
      if own == theirs or own.startswith(f'{theirs}_'):
        return one
  return None


def _data_set(task: 'seqio.Task') -> str:
  """Of TFDS, as the task was registered; '' where it is of another kind."""
  import seqio

  if task.name in seqio.TaskRegistry.names():  # it may read local files now
    task = seqio.TaskRegistry.get(task.name)
  if not isinstance(task.source, seqio.TfdsDataSource):
    return ''
  return task.source.tfds_dataset.name.partition(':')[0]


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
