"""Text classification as a seqio task, from rows with a text and a label.

  register_classification_task(
    'reviews',
    {'train': 'train.jsonl', 'validation': 'dev.jsonl'},
    labels=('negative', 'positive'),
    template='review: {text}',
  )

registers a task whose examples are T5's text to text: the template filled in
from a row, and the label's word.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import os
import pathlib
import string

import seqio
import tensorflow as tf

from prompt_tuning.data import metrics
from prompt_tuning.data import task_data
from prompt_tuning.data.postprocessors import LabelToId
from prompt_tuning.data.tables import Row
from prompt_tuning.data.tables import read_rows
from prompt_tuning.data.vocabularies import EXTRA_IDS
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError

Rows = str | os.PathLike | Iterable[Row] | Callable[[], Iterable[Row]]

BUNDLED_VOCABULARY = (
  pathlib.Path(__file__).parents[1] / 'bundled/t5_1_1_mini/spiece.model'
)


class TextToTextSource(seqio.DataSource):
  """A seqio source of (inputs, targets) strings that fit in memory.

  A split is read when it is first used. Where shuffling is asked for, an epoch
  is a new permutation of all of it, so files sorted by label do no harm.
  """

  def __init__(
    self,
    read_split: Callable[[str], tuple[Sequence[str], Sequence[str]]],
    splits: Iterable[str],
  ):
    self._read_split = read_split
    self._examples = {}
    super().__init__(splits=tuple(splits), performs_internal_shuffling=True)

  def examples(self, split: str) -> tuple[Sequence[str], Sequence[str]]:
    """All inputs and all targets of a split, in the order of its rows."""
    if split not in self._examples:
      self._examples[split] = self._read_split(split)
    return self._examples[split]

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def num_input_examples(self, split: str) -> int:
    return len(self.examples(split)[0])

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    inputs, targets = self.examples(split)
    if shard_info is not None:
      mine = slice(shard_info.index, None, shard_info.num_shards)
      inputs, targets = inputs[mine], targets[mine]
    texts = {
      'inputs': tf.constant(inputs, tf.string, [len(inputs)]),
      'targets': tf.constant(targets, tf.string, [len(targets)]),
    }
    order = tf.data.Dataset.range(len(inputs))
    if shuffle and inputs:
      order = order.shuffle(len(inputs), seed=seed)
    return order.map(
      lambda i: {name: tf.gather(values, i) for name, values in texts.items()}
    )


def register_classification_task(
  name: str,
  splits: Mapping[str, Rows],
  *,
  labels: Sequence[str],
  template: str = 'text: {text}',
  label_field: str = 'label',
  vocabulary: str | None = None,
) -> seqio.Task:
  """Registers a classification task.

  Args:
    name: the task's name, free in seqio's registries.
    splits: the rows of each split: a .jsonl, .csv or .tsv file, dicts, or a
      function that gives dicts; read when the split is used.
    labels: the words that the model answers with, in the order of their ids.
    template: the inputs, with the row's fields in braces.
    label_field: the field with the label, a word of `labels` or its position.
    vocabulary: path or name, None for the bundled model's; a run may replace it
      by its own model's.

  Raises:
    UserError: if the name is taken or the labels are not distinct words; when a
      split is read, if a row lacks a field or has another label.
  """
  labels = tuple(labels)
  if len(labels) < 2 or len(set(labels)) < len(labels) or '' in labels:
    raise UserError(
      f'task {name}: labels must be two or more different words, got {labels}'
    )
  if name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
    raise UserError(f'a task called {name!r} exists; choose another name')
  fields = [field for _, field, _, _ in string.Formatter().parse(template)]
  if not any(fields):
    raise UserError(
      f'task {name}: the template must name a field of the rows in braces,'
      f' such as {{text}}; got {template!r}'
    )

  def read_split(split):
    inputs, targets = [], []
    for place, row in _located_rows(name, split, splits[split]):
      for field in (*filter(None, fields), label_field):
        if field not in row:
          raise UserError(
            f'{place}: task {name} needs the field {field!r}, '
            f'the row has {", ".join(map(repr, row))}'
          )
      inputs.append(template.format(**row))
      targets.append(_label(row[label_field], labels, place))
    return inputs, targets

  if vocabulary is None:
    # Not looked at before it is used, and a run with its own never does.
    ids = seqio.SentencePieceVocabulary(str(BUNDLED_VOCABULARY), EXTRA_IDS)
  else:
    ids = load_vocabulary(vocabulary).seqio()
  feature = seqio.Feature(vocabulary=ids)
  return seqio.TaskRegistry.add(
    name,
    source=TextToTextSource(read_split, splits),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
    postprocess_fn=LabelToId(labels),
    metric_fns=[
      metrics.accuracy,
      metrics.macro_f1(len(labels)),
      metrics.label_shares,
    ],
    shuffle_buffer_size=None,  # the source shuffles
  )


def _located_rows(name, split, rows) -> Iterable[tuple[str, Row]]:
  if isinstance(rows, (str, os.PathLike)):
    return read_rows(rows)
  rows = rows() if callable(rows) else rows
  return [
    (f'{name}, split {split!r}, row {i}', row) for i, row in enumerate(rows)
  ]


def _label(value, labels: tuple[str, ...], place: str) -> str:
  """The word of a label given as a word or as its position."""
  word = str(value).strip()
  if word in labels:
    return word
  if word.isdecimal() and int(word) < len(labels):
    return labels[int(word)]
  raise UserError(
    f'{place}: unknown label {value!r}; the labels are {", ".join(labels)}'
  )


def majority_class(
  task_name: str,
  split: str = 'test',
  fit_split: str = 'train',
  modules: Sequence[str] = (),
) -> dict[str, float]:
  """The task's metrics if every answer is fit_split's most frequent target.

  The bar any training has to clear. Keys are the metrics' names.
  """
  task = task_data.get_task(task_name, modules=modules)
  targets = {}
  for name in (split, fit_split):
    # One id a feature is enough: the targets are compared as text.
    lengths = dict.fromkeys(task.output_features, 1)
    task_data.check_task(task, name, lengths)
    dataset = task.get_dataset(
      sequence_length=lengths, split=name, shuffle=False, num_epochs=1
    )
    targets[name] = [
      example['targets_pretokenized'].decode()
      for example in dataset.as_numpy_iterator()
    ]
  answer = Counter(targets[fit_split]).most_common(1)[0][0]
  truth = [task.postprocess_fn(t, is_target=True) for t in targets[split]]
  constant = [task.postprocess_fn(answer, is_target=False)] * len(truth)
  result = {}
  for metric in task.predict_metric_fns:
    result.update(metric(targets=truth, predictions=constant))
  return result
