import dataclasses
import types

import pytest
import seqio

from prompt_tuning.data.classification import register_classification_task
from prompt_tuning.data.demonstrations import Demonstrations
from prompt_tuning.data.task import Task
from prompt_tuning.data.task import trained_beside
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.errors import UserError

PAIRS = [(f'text {i}', label) for i in range(6) for label in ('bad', 'good')]


def test_demonstrations_are_of_each_label_in_turn():
  prefix = Demonstrations(
    count=4, template='{inputs} is {targets}', separator='; '
  ).prefix(PAIRS)
  assert prefix.endswith('; ') and prefix.count('; ') == 4
  assert prefix.count(' is bad') == prefix.count(' is good') == 2


def test_the_seed_draws_and_the_order_of_the_data_does_not_matter():
  def of(seed, pairs=PAIRS):
    return Demonstrations(count=3, seed=seed).prefix(pairs)

  assert of(0) == of(0, PAIRS[::-1])
  assert len({of(seed) for seed in range(5)}) > 1


def test_long_demonstrations_are_cut_and_braces_are_text():
  found = Demonstrations(count=1, max_words=2, instruction='Say {it}:').prefix(
    [('{one} two three', 'yes')]
  )
  assert found == 'Say {it}: {one} two yes '


def test_no_demonstrations_leave_an_instruction():
  assert Demonstrations(count=0).prefix(PAIRS) == ''
  assert Demonstrations(count=0, instruction='Say:').prefix(PAIRS) == 'Say: '


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'template': '{inputs}'}, "must have '{inputs}' and '{targets}'"),
    ({'count': -1}, 'must be 0 or more, got -1'),
  ],
)
def test_what_makes_no_demonstration_is_told(settings, message):
  with pytest.raises(UserError, match=message):
    Demonstrations(**settings)


@pytest.fixture
def task(tiny_vocabulary):
  rows = [{'text': 'fine', 'label': 'good'}, {'text': 'dull', 'label': 'bad'}]
  register_classification_task(
    'demo_task',
    {'train': rows, 'validation': [{'text': 'sport', 'label': 'good'}]},
    labels=('bad', 'good'),
    template='review: {text}',
    vocabulary=tiny_vocabulary,
  )
  yield Task('demo_task', {'inputs': 64, 'targets': 8})
  seqio.TaskRegistry.remove('demo_task')


def test_they_stand_in_front_of_the_inputs_of_every_split_and_of_served_texts(
  task,
):
  shown = dataclasses.replace(task, demonstrations=Demonstrations(count=2))
  (example,) = (
    shown.seqio()
    .get_dataset(shown.feature_lengths, 'validation', shuffle=False)
    .as_numpy_iterator()
  )
  prefix = shown.prefix('demo_task')
  assert sorted(prefix.split('review: ')) == ['', 'dull bad ', 'fine good ']
  text = example['inputs_pretokenized'].decode()
  assert text == prefix + 'review: sport'
  assert shown.facts()['template'] == prefix + 'review: {text}'
  # They take nothing of the text's room.
  vocabulary = shown.seqio().output_features['inputs'].vocabulary
  lengths = {'inputs': 64 + len(vocabulary.encode(prefix)), 'targets': 8}
  assert shown.lengths() == lengths and task.lengths() == task.feature_lengths
  assert task.facts()['template'] == 'review: {text}'


def test_a_label_needs_room_for_its_sentinel_too(task):
  vocabulary = task.seqio().output_features['targets'].vocabulary
  longest = max(len(vocabulary.encode(word)) for word in ('bad', 'good'))

  def read(sentinel, room):
    lengths = {'inputs': 64, 'targets': longest + room}
    one = dataclasses.replace(
      task, feature_lengths=lengths, target_sentinel=sentinel
    )
    data = TaskData(one, batch_size=2)
    return next(data.batches(virtual_tokens=None, seed=0, start=0))

  read(False, 1)
  read(True, 2)
  with pytest.raises(UserError, match='tokens with EOS and sentinel'):
    read(True, 1)


def test_wsc_and_mnli_are_trained_for_by_other_tasks():
  def reads(data_set, *splits):
    source = seqio.TfdsDataSource(data_set, splits=splits)
    return types.SimpleNamespace(name='none', source=source, splits=splits)

  wsc = reads('super_glue/wsc.fixed:1.0.2', 'validation')
  matched = reads('glue/mnli_matched:2.0.0', 'validation')
  mrpc = reads('glue/mrpc:2.0.0', 'validation')
  others = [
    wsc,
    reads('super_glue/wsc.fixed:1.0.2', 'train'),
    reads('glue/mnli:2.0.0', 'train'),
    reads('glue/qqp:2.0.0', 'train'),
  ]
  found = [trained_beside(task, others) for task in (wsc, matched, mrpc)]
  assert found == [others[1], others[2], None]


def test_a_task_without_a_training_split_has_none_to_show(tiny_vocabulary):
  register_classification_task(
    'demo_no_train',
    {'validation': [{'text': 'sport', 'label': 'good'}]},
    labels=('bad', 'good'),
    vocabulary=tiny_vocabulary,
  )
  try:
    task = Task('demo_no_train', {'inputs': 8, 'targets': 8})
    with pytest.raises(UserError, match="'train', which task demo_no_train"):
      Task(
        task.name, task.feature_lengths, demonstrations=Demonstrations()
      ).seqio()
  finally:
    seqio.TaskRegistry.remove('demo_no_train')
