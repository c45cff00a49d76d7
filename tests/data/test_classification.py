import json

import pytest
import seqio

from prompt_tuning.data import classification
from prompt_tuning.data.classification import register_classification_task
from prompt_tuning.data.task import Task
from prompt_tuning.errors import UserError

LABELS = ('negative', 'positive')


@pytest.fixture
def register(tiny_vocabulary):
  """Registers tasks for the length of a test."""
  names = []

  def call(name, splits, **kwargs):
    kwargs = {'labels': LABELS, 'vocabulary': tiny_vocabulary, **kwargs}
    task = register_classification_task(name, splits, **kwargs)
    names.append(name)
    return task

  yield call
  for name in names:
    seqio.TaskRegistry.remove(name)


def texts(task, split='train'):
  dataset = task.get_dataset(
    {'inputs': 9, 'targets': 9}, split, shuffle=False
  ).as_numpy_iterator()
  return [
    (ex['inputs_pretokenized'].decode(), ex['targets_pretokenized'].decode())
    for ex in dataset
  ]


def test_the_template_is_filled_from_fields_of_any_name(register):
  task = register(
    'cls_template',
    {'train': [{'question': 'a?', 'answer': 'b', 'gold': 'positive'}]},
    template='question: {question} answer: {answer}',
    label_field='gold',
  )
  assert texts(task) == [('question: a? answer: b', 'positive')]


def test_rows_come_from_files_lists_and_functions_and_labels_may_be_numbers(
  register, tmp_path
):
  path = tmp_path / 'train.jsonl'
  path.write_text(json.dumps({'text': 'fine {x}', 'label': 1}) + '\n')
  row = {'text': 'dull', 'label': 'negative'}
  task = register(
    'cls_sources', {'train': path, 'dev': [row], 'test': lambda: iter([row])}
  )
  assert texts(task) == [('text: fine {x}', 'positive')]
  assert (
    texts(task, 'dev') == texts(task, 'test') == [('text: dull', 'negative')]
  )


def test_shuffling_takes_a_file_sorted_by_label_apart(register):
  rows = [{'text': str(i), 'label': LABELS[i >= 500]} for i in range(1000)]
  task = register('cls_sorted', {'train': rows})
  drawn = task.get_dataset(split='train', shuffle=True, seed=0).take(100)
  positive = sum(
    ex['targets_pretokenized'] == b'positive'
    for ex in drawn.as_numpy_iterator()
  )
  assert 30 < positive < 70


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    (
      {'text': 'a', 'label': 'great'},
      r"1: unknown label 'great'; the labels are negative, pos",
    ),
    ({'text': 'a', 'label': 2}, '1: unknown label 2'),
    (
      {'txt': 'a', 'label': 0},
      r"1: .*needs the field 'text', .*'txt', 'label'",
    ),
  ],
)
def test_a_faulty_row_is_named_by_file_and_line(
  register, tmp_path, row, message
):
  path = tmp_path / 'train.jsonl'
  path.write_text(json.dumps(row) + '\n')
  task = register('cls_faulty', {'train': path})
  with pytest.raises(UserError, match='train.jsonl:' + message):
    texts(task)


def test_faults_of_the_registration_are_one_line(register):
  splits = {'train': []}
  with pytest.raises(UserError, match='two or more different'):
    register('cls_labels', splits, labels=('a', 'a'))
  with pytest.raises(UserError, match='name a field'):
    register('cls_no_field', splits, template='text')
  register('cls_twice', splits)
  with pytest.raises(UserError, match="'cls_twice' exists"):
    register('cls_twice', splits)


def test_the_majority_class_is_that_of_training_and_scored_on_the_test_split(
  register,
):
  def rows(negative, positive):
    labels = ['negative'] * negative + ['positive'] * positive
    return [{'text': 'a', 'label': label} for label in labels]

  register('cls_majority', {'train': rows(2, 3), 'test': rows(3, 1)})
  result = classification.majority_class(
    Task('cls_majority', {'inputs': 16, 'targets': 4})
  )
  assert result['accuracy'] == 25.0
  assert result['majority_share'] == 75.0
  # F1 of negative is 0, of positive 2 * 0.25 / 1.25.
  assert result['macro_f1'] == pytest.approx(100 * 0.4 / 2)


def test_a_split_of_one_label_is_told(register, caplog):
  rows = [{'text': 'a', 'label': 'negative'}] * 3
  task = register('cls_one', {'train': rows})
  task.source.rows('train')
  assert "all 3 rows have the label 'negative'" in caplog.text


@pytest.mark.parametrize('name', ['a b', 'a/b', '', 5])
def test_a_task_has_a_name(tiny_vocabulary, name):
  with pytest.raises(UserError, match='called by letters, digits and _'):
    register_classification_task(
      name, {'train': []}, labels=('a', 'b'), vocabulary=tiny_vocabulary
    )


@pytest.mark.parametrize('labels', [(1, 2), ('a', ''), ('a', None)])
def test_labels_are_words(tiny_vocabulary, labels):
  with pytest.raises(UserError, match='two or more different words'):
    register_classification_task(
      'cls_words', {'train': []}, labels=labels, vocabulary=tiny_vocabulary
    )
