import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

from prompt_tuning.data.classification import register_classification_task
from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.training import partitioning
from prompt_tuning.training.evaluator import METRICS_FILE
from prompt_tuning.training.evaluator import Evaluation

LABELS = ('negative', 'positive')
LENGTHS = {'inputs': 8, 'targets': 6}
VIRTUAL = VirtualTokens(first_id=500, length=2)
WORDS = ('good', 'bad', 'film', 'dull', 'fine')


class FakeModel:
  """Predicts the ids of `variables['answer']` for every example.

  Scores are sums over the encoder's row, so that a test can tell rows apart.
  """

  traces = 0
  config = types.SimpleNamespace(vocab_size=VIRTUAL.first_id)

  def predict_batch(self, variables, batch, rng=None):
    del rng
    self.traces += 1
    rows = batch['encoder_input_tokens'].shape[0]
    return jnp.tile(variables['answer'][None], (rows, 1))

  def predict_batch_with_aux(self, variables, batch, rng=None):
    ids = self.predict_batch(variables, batch, rng)
    return ids, {'scores': self.score_batch(variables, batch)}

  def score_batch(self, variables, batch):
    del variables
    return batch['encoder_input_tokens'].sum(axis=-1).astype(jnp.float32)

  def rank_classify(self, variables, batch, label_tokens):
    rows = batch['encoder_input_tokens'].shape[0]
    assert label_tokens.shape[0] == len(LABELS)
    return jnp.tile(variables['label_scores'][None], (rows, 1))


@pytest.fixture(scope='module')
def task(tiny_vocabulary):
  """Five examples, two of them positive; a metric of scores besides."""
  rows = [
    {'text': word, 'label': LABELS[number < 2]}
    for number, word in enumerate(WORDS)
  ]
  registered = register_classification_task(
    'eval_task',
    {'train': rows, 'validation': rows},
    labels=LABELS,
    vocabulary=tiny_vocabulary,
  )

  def score_metric(targets, scores):
    assert len(targets) == len(scores)
    return {'total': float(np.sum(scores)), 'count': len(scores)}

  seqio.TaskRegistry.add_provider(
    'eval_scored',
    registered.replace(
      name='eval_scored', metric_fns=[score_metric, *registered.metric_fns]
    ),
  )
  seqio.TaskRegistry.add_provider(
    'eval_no_metrics', registered.replace(name='eval_no_metrics', metric_fns=[])
  )
  seqio.TaskRegistry.add_provider(
    'eval_no_labels',
    registered.replace(name='eval_no_labels', postprocess_fn=None),
  )
  yield registered
  for name in ('task', 'scored', 'no_metrics', 'no_labels'):
    seqio.TaskRegistry.remove(f'eval_{name}')


def answer(task, text):
  ids = [*task.output_features['targets'].vocabulary.encode(text), 1]
  return jnp.array(ids + [0] * (24 - len(ids)), jnp.int32)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_of_the_examples_and_not_of_rows_that_fill_a_batch(
  task, tmp_path
):
  model = FakeModel()
  evaluator = Evaluation(Task('eval_task', LENGTHS), batch_size=4).build(
    model, VIRTUAL, tmp_path
  )
  variables = {'answer': answer(task, 'positive')}
  result = evaluator.evaluate(variables, 7)
  assert result['eval_task/accuracy'] == pytest.approx(40.0)
  assert result['eval_task/majority_share'] == pytest.approx(60.0)
  assert result['eval_task/predicted_majority_share'] == 100.0
  lines = read(tmp_path / 'inference/eval_task-7.jsonl')
  assert lines[0] == {
    'input': 'text: good',
    'target': 'positive',
    'prediction': 'positive',
  }
  assert [line['input'] for line in lines] == [f'text: {w}' for w in WORDS]
  (logged,) = read(tmp_path / METRICS_FILE)
  assert logged == {'step': 7, 'split': 'validation', **result}


def test_a_task_has_a_score_and_a_mixture_the_mean_of_its_tasks(task, tmp_path):
  half = task.replace(name='eval_half', metric_fns=task.metric_fns[:1])
  seqio.TaskRegistry.add_provider('eval_half', half)
  seqio.MixtureRegistry.add('eval_both', ['eval_task', 'eval_half'], 1.0)
  try:
    evaluator = Evaluation(Task('eval_both', LENGTHS), batch_size=4).build(
      FakeModel(), VIRTUAL, tmp_path
    )
    found = evaluator.evaluate({'answer': answer(task, 'positive')}, 7)
  finally:
    seqio.MixtureRegistry.remove('eval_both')
    seqio.TaskRegistry.remove('eval_half')
  # Two of five are positive: F1 is 0 for one label, 4/7 for the other. Shares
  # are none of the metrics.
  macro_f1 = 100 * (4 / 7) / 2
  assert found['eval_task/score'] == pytest.approx((40 + macro_f1) / 2)
  assert found['eval_half/score'] == pytest.approx(40)
  assert found['eval_both/score'] == pytest.approx(
    (found['eval_task/score'] + 40) / 2
  )
  assert found['score'] == found['eval_both/score']


def test_a_run_selects_by_the_tasks_that_it_trains_on(task, tmp_path):
  """Of a mixture evaluated zero-shot too; where nothing trains, by all."""
  zero_shot = task.replace(
    name='eval_zero_shot',
    metric_fns=task.metric_fns[:1],
    source=_Splits(task.source, ['validation']),
  )
  seqio.TaskRegistry.add_provider('eval_zero_shot', zero_shot)
  seqio.MixtureRegistry.add('eval_both', ['eval_task', 'eval_zero_shot'], 1.0)
  variables = {'answer': answer(task, 'positive')}

  def found(name):
    evaluation = Evaluation(Task(name, LENGTHS), batch_size=4)
    evaluator = evaluation.build(FakeModel(), VIRTUAL, tmp_path)
    return evaluator.evaluate(variables, 7)

  try:
    both, alone = found('eval_both'), found('eval_zero_shot')
  finally:
    seqio.MixtureRegistry.remove('eval_both')
    seqio.TaskRegistry.remove('eval_zero_shot')
  assert both['score'] == both['eval_task/score'] != both['eval_both/score']
  assert alone['score'] == alone['eval_zero_shot/score']


class _Splits(seqio.DataSource):
  """A source with fewer splits."""

  def __init__(self, source, splits):
    self._source = source
    super().__init__(splits, performs_internal_shuffling=True)

  supports_arbitrary_sharding = True

  def list_shards(self, split):
    return self._source.list_shards(split)

  def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
    return self._source.get_dataset(split, shuffle, seed, shard_info)


def test_functions_are_compiled_at_the_first_evaluation_only(task, tmp_path):
  model = FakeModel()
  evaluator = Evaluation(Task('eval_task', LENGTHS), batch_size=2).build(
    model, None, tmp_path
  )
  first = evaluator.evaluate({'answer': answer(task, 'positive')}, 1)
  second = evaluator.evaluate({'answer': answer(task, 'negative')}, 2)
  assert first['eval_task/accuracy'] == pytest.approx(40.0)
  assert second['eval_task/accuracy'] == pytest.approx(60.0)
  assert model.traces == 1
  assert len(read(tmp_path / METRICS_FILE)) == 2


def test_scores_are_those_of_each_example_with_and_without_a_prompt(
  task, tmp_path
):
  totals = []
  for virtual in (None, VIRTUAL):
    result = (
      Evaluation(Task('eval_scored', LENGTHS), batch_size=4)
      .build(FakeModel(), virtual, tmp_path)
      .evaluate({'answer': answer(task, 'positive')}, 1)
    )
    assert result['eval_scored/count'] == 5
    totals.append(result['eval_scored/total'])
  assert totals[1] - totals[0] == 5 * (500 + 501)
  assert 'score' in read(tmp_path / 'inference/eval_scored-1.jsonl')[0]


def test_rank_classification_answers_with_the_likeliest_label(task, tmp_path):
  evaluator = Evaluation(
    Task('eval_task', LENGTHS), batch_size=4, rank_classification=True
  ).build(FakeModel(), VIRTUAL, tmp_path)
  scores = {'label_scores': jnp.array([-1.0, -2.0])}
  result = evaluator.evaluate(scores, 3)
  assert result['eval_task/accuracy'] == pytest.approx(60.0)
  lines = read(tmp_path / 'inference/eval_task-3.jsonl')
  assert {line['prediction'] for line in lines} == {'negative'}


def test_an_ensemble_votes_and_tells_its_members_metrics(task, tmp_path):
  class Members(FakeModel):
    """Member k gives the k-th answer."""

    config = types.SimpleNamespace(vocab_size=VIRTUAL.first_id)

    def predict_batch(self, variables, batch, rng=None):
      first = batch['encoder_input_tokens'][:, 0]
      member = (first - VIRTUAL.first_id) // VIRTUAL.length
      return variables['answers'][member]

  virtual = VirtualTokens(VIRTUAL.first_id, VIRTUAL.length, num_prompts=3)
  evaluation = Evaluation(
    Task('eval_task', LENGTHS), batch_size=4, ensemble=True
  )
  evaluator = evaluation.build(Members(), virtual, tmp_path)
  answers = jnp.stack(
    [answer(task, x) for x in ('positive', 'negative', 'negative')]
  )
  found = evaluator.evaluate({'answers': answers}, step=1)
  # Two of the five examples are positive.
  assert found['eval_task/accuracy'] == 60
  of_members = [found[f'members/{k}/eval_task/accuracy'] for k in range(3)]
  assert of_members == [40, 60, 60]
  assert found['members/best_score'] == found['members/1/score']
  assert found['members/mean_score'] == pytest.approx(
    sum(found[f'members/{k}/score'] for k in range(3)) / 3
  )


def test_calibrated_labels_need_what_is_ranked(task, tmp_path):
  with pytest.raises(UserError, match='needs rank_classification=True'):
    Evaluation(Task('eval_task', LENGTHS), calibrate=True)

  class Biased(FakeModel):
    """Likes the first label, most of all where words are unknown to it."""

    def rank_classify(self, variables, batch, label_tokens):
      # ':' is unknown too, in every text.
      unknown = (batch['encoder_input_tokens'] == 2).sum(axis=-1)
      bias = jnp.where(unknown > 1, 1.0, 0.5)
      return jnp.stack([bias, jnp.zeros_like(bias)], axis=-1)

  wanted = {False: 'negative', True: 'positive'}
  for calibrate, label in wanted.items():
    evaluation = Evaluation(
      Task('eval_task', LENGTHS),
      rank_classification=True,
      calibrate=calibrate,
    )
    folder = tmp_path / str(calibrate)
    evaluator = evaluation.build(Biased(), None, folder)
    evaluator.evaluate({}, step=1)
    lines = read(folder / 'inference' / 'eval_task-1.jsonl')
    assert {line['prediction'] for line in lines} == {label}


def test_ids_past_the_vocabulary_are_no_part_of_the_text(task, tmp_path):
  vocabulary = task.output_features['targets'].vocabulary
  ids = vocabulary.encode('positive')
  row = [vocabulary.vocab_size, *ids, 501, -3, 1]
  variables = {'answer': jnp.array(row + [0] * 4, jnp.int32)}
  result = (
    Evaluation(Task('eval_task', LENGTHS), batch_size=5)
    .build(FakeModel(), VIRTUAL, tmp_path)
    .evaluate(variables, 1)
  )
  assert result['eval_task/no_label_share'] == 0.0


def test_evaluation_leaves_the_training_stream_as_it_was(task, tmp_path):
  data = TaskData(Task('eval_task', LENGTHS), batch_size=2)
  stream = lambda: data.batches(virtual_tokens=None, seed=0, start=0)  # noqa: E731
  expected = list(itertools.islice(stream(), 6))
  evaluator = Evaluation(Task('eval_task', LENGTHS), split='train').build(
    FakeModel(), None, tmp_path
  )
  for step, (batch, reference) in enumerate(zip(stream(), expected)):
    np.testing.assert_array_equal(
      batch['encoder_input_tokens'], reference['encoder_input_tokens']
    )
    if step % 2:
      evaluator.evaluate({'answer': answer(task, 'positive')}, step)


def test_another_vocabulary_is_used_and_the_registered_task_kept(
  task, tiny_vocabulary, tmp_path
):
  evaluator = Evaluation(
    Task('eval_task', LENGTHS, tiny_vocabulary), num_examples=3
  ).build(FakeModel(), None, tmp_path)
  assert seqio.TaskRegistry.get('eval_task') is task
  result = evaluator.evaluate({'answer': answer(task, 'positive')}, 1)
  lines = read(tmp_path / 'inference/eval_task-1.jsonl')
  assert len(lines) == 3
  positive = sum(line['target'] == 'positive' for line in lines)
  assert result['eval_task/accuracy'] == pytest.approx(100 * positive / 3)


def test_variables_on_a_mesh_get_batches_that_divide_by_its_devices(
  task, tmp_path
):
  layout = partitioning.Layout(partitioning.make_mesh(data=4, fsdp=2))
  variables = layout.replicate({'answer': answer(task, 'positive')})
  evaluator = Evaluation(Task('eval_scored', LENGTHS), batch_size=3).build(
    FakeModel(), VIRTUAL, tmp_path, layout
  )
  result = evaluator.evaluate(variables, 1)
  assert result['eval_scored/accuracy'] == pytest.approx(40.0)
  assert result['eval_scored/count'] == 5


def test_it_runs_inside_a_loop_that_forbids_implicit_transfers(task, tmp_path):
  evaluator = Evaluation(Task('eval_task', LENGTHS)).build(
    FakeModel(), VIRTUAL, tmp_path
  )
  variables = {'answer': answer(task, 'positive')}
  with jax.transfer_guard('disallow'):
    result = evaluator.evaluate(variables, 1)
  assert result['eval_task/accuracy'] == pytest.approx(40.0)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('eval_none', {}, "'eval_none'"),
    ('eval_task', {'split': 'test'}, "no split 'test'"),
    ('eval_no_metrics', {}, 'none for split'),
    (
      'eval_no_labels',
      {'rank_classification': True},
      'needs a task with labels',
    ),
  ],
)
def test_faults_are_one_line_before_the_first_evaluation(
  task, tmp_path, name, changes, message
):
  with pytest.raises(UserError, match=message) as caught:
    Evaluation(Task(name, LENGTHS), **changes).build(
      FakeModel(), None, tmp_path
    )
  assert '\n' not in str(caught.value)


def test_files_that_cannot_be_written_leave_earlier_ones_intact(task, tmp_path):
  evaluator = Evaluation(Task('eval_task', LENGTHS)).build(
    FakeModel(), None, tmp_path
  )
  variables = {'answer': answer(task, 'positive')}
  evaluator.evaluate(variables, 1)
  before = (tmp_path / 'inference/eval_task-1.jsonl').read_text()
  (tmp_path / 'inference/eval_task-2.jsonl').mkdir()
  with pytest.raises(UserError, match='cannot write the evaluation'):
    evaluator.evaluate(variables, 2)
  assert (tmp_path / 'inference/eval_task-1.jsonl').read_text() == before
