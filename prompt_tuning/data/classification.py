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
import logging
import os
import pathlib
import re

import seqio

from prompt_tuning import files
from prompt_tuning.data import metrics
from prompt_tuning.data.postprocessors import LabelToId
from prompt_tuning.data.records import Row
from prompt_tuning.data.records import label_ids
from prompt_tuning.data.records import read_rows
from prompt_tuning.data.sources import RowsSource
from prompt_tuning.data.task import TEMPLATES
from prompt_tuning.data.task import Task
from prompt_tuning.data.templates import Template
from prompt_tuning.data.vocabularies import EXTRA_IDS
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError

Rows = str | os.PathLike | Iterable[Row] | Callable[[], Iterable[Row]]

logger = logging.getLogger(__name__)

BUNDLED_VOCABULARY = (
  pathlib.Path(__file__).parents[1] / 'bundled/t5_1_1_mini/spiece.model'
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
  words = [label for label in labels if isinstance(label, str) and label]
  if len(set(words)) < max(len(labels), 2):
    raise UserError(
      f'task {name}: labels must be two or more different words, got {labels}'
    )
  if not isinstance(name, str) or not re.fullmatch(r'\w[\w.:+-]*', name):
    raise UserError(
      f'a task is called by letters, digits and _ alone, got {name!r}'
    )
  if name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
    raise UserError(f'a task called {name!r} exists; choose another name')
  try:
    inputs = Template(template)
  except UserError as error:
    raise UserError(f'task {name}: {error}') from None

  def read_split(split):
    placed = list(_located_rows(name, split, splits[split]))
    for place, row in placed:
      for field in (*inputs.fields, label_field):
        if field not in row:
          raise UserError(
            f'{place}: task {name} needs the field {field!r}, '
            f'the row has {", ".join(map(repr, row))}'
          )
    given = [(place, row[label_field]) for place, row in placed]
    targets = [labels[number] for number in label_ids(given, labels)]
    if len(set(targets)) == 1:
      logger.warning(
        'task %s, split %r: all %d rows have the label %r',
        *(name, split, len(targets), targets[0]),
      )
    return [
      {'inputs': inputs.fill(row, place), 'targets': target}
      for (place, row), target in zip(placed, targets)
    ]

  if vocabulary is None:
    # Not looked at before it is used, and a run with its own never does.
    ids = seqio.SentencePieceVocabulary(str(BUNDLED_VOCABULARY), EXTRA_IDS)
  else:
    ids = load_vocabulary(vocabulary).seqio()
  feature = seqio.Feature(vocabulary=ids)
  TEMPLATES[name] = template
  return seqio.TaskRegistry.add(
    name,
    source=RowsSource(read_split, splits, {'inputs': str, 'targets': str}),
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


def classification_task(
  name: str,
  splits: Mapping[str, str],
  labels: Sequence[str],
  template: str = 'text: {text}',
  label_field: str = 'label',
) -> str:
  """Registers a classification task on files and returns its name.

  For configuration: MIXTURE_OR_TASK_NAME = @classification_task(). Called again
  with the same arguments, as each use of the macro does, it registers nothing.

  Args:
    name: see `register_classification_task`, like the following.
    splits: {'train': 'train.jsonl', ...}, .jsonl, .csv or .tsv files.
    labels: the words of the answers.
    template: of the inputs.
    label_field: the field with the label.
  """
  arguments = (dict(splits), tuple(labels), template, label_field)
  if _from_configuration.get(name) != arguments:
    for split, path in splits.items():
      if not files.place(path).is_file():
        raise UserError(
          f'task {name}, split {split!r}: there is no file {path}'
        )
    register_classification_task(
      name,
      splits,
      labels=labels,
      template=template,
      label_field=label_field,
    )
    _from_configuration[name] = arguments
  return name


# What `classification_task` registered: {name: its arguments}.
_from_configuration = {}


def _located_rows(name, split, rows) -> Iterable[tuple[str, Row]]:
  if isinstance(rows, (str, os.PathLike)):
    return read_rows(rows)
  rows = rows() if callable(rows) else rows
  return [
    (f'{name}, split {split!r}, row {i}', row) for i, row in enumerate(rows)
  ]


def majority_class(
  task: Task, split: str = 'test', fit_split: str = 'train'
) -> dict[str, float]:
  """The task's metrics if every answer is fit_split's most frequent target.

  The bar any training has to clear. Keys are the metrics' names.
  """
  targets = {}
  for name in (split, fit_split):
    found = task.checked(name)
    dataset = found.get_dataset(
      dict(task.feature_lengths), split=name, shuffle=False, num_epochs=1
    )
    targets[name] = [
      example['targets_pretokenized'].decode()
      for example in dataset.as_numpy_iterator()
    ]
  answer = Counter(targets[fit_split]).most_common(1)[0][0]
  truth = [found.postprocess_fn(t, is_target=True) for t in targets[split]]
  constant = [found.postprocess_fn(answer, is_target=False)] * len(truth)
  result = {}
  for metric in found.predict_metric_fns:
    result.update(metric(targets=truth, predictions=constant))
  return result
