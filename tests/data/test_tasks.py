"""The paper's tasks on rows written here; texts as in Raffel et al. 2020."""

import inspect

import pytest
from registered import get_task
import seqio
import tensorflow as tf

from prompt_tuning.data import local_files
from prompt_tuning.data import metrics
from prompt_tuning.data import postprocessors
from prompt_tuning.data import pretraining
from prompt_tuning.data import registration
from prompt_tuning.data import sources
from prompt_tuning.data import task as task_lib
from prompt_tuning.data.templates import Template
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError


def texts(task_name, row, **options):
  """(inputs, targets) of a row in TFDS's schema."""
  task = get_task(task_name, **options)
  tfds_name = task.source.tfds_dataset.name.partition(':')[0]
  values = sources.columns([row], local_files.DATA[tfds_name].schema)
  dataset = tf.data.Dataset.range(1).map(
    lambda i: tf.nest.map_structure(lambda column: column[i], values)
  )
  steps = list(task.preprocessors)
  for step in steps[: steps.index(seqio.preprocessors.tokenize)]:
    dataset = step(dataset)
  return [
    (found['inputs'].decode(), found['targets'].decode())
    for found in dataset.as_numpy_iterator()
  ]


ROWS = {
  'super_glue_boolq_v102': (
    {'question': 'is it so', 'passage': 'It is.', 'label': 1, 'idx': 0},
    'boolq passage: It is. question: is it so',
    'True',
  ),
  'super_glue_cb_v102': (
    {'premise': 'He left.', 'hypothesis': 'He is here.', 'label': 1, 'idx': 0},
    'cb hypothesis: He is here. premise: He left.',
    'contradiction',
  ),
  'super_glue_copa_v102': (
    {
      'premise': 'It rained.',
      'choice1': 'We got wet.',
      'choice2': 'We ate.',
      'question': 'effect',
      'label': 0,
      'idx': 0,
    },
    'copa choice1: We got wet. choice2: We ate. premise: It rained. question: '
    'effect',
    'choice1',
  ),
  'super_glue_multirc_v102': (
    {
      'paragraph': '<b>Sent 1: </b>A fox ran.<br>',
      'question': 'Who ran?',
      'answer': 'A cat',
      'label': 0,
      'idx': {'paragraph': 3, 'question': 4, 'answer': 5},
    },
    'multirc question: Who ran? answer: A cat paragraph: Sent 1: A fox ran. ',
    'False',
  ),
  'super_glue_wic_v102': (
    {
      'word': 'bank',
      'sentence1': 'The bank paid.',
      'sentence2': 'By the bank.',
      'label': 0,
      'idx': 0,
    },
    'wic sentence1: The bank paid. sentence2: By the bank. word: bank',
    'False',
  ),
  'super_glue_axb_v102': (
    {'sentence1': 'A.', 'sentence2': 'B.', 'label': -1, 'idx': 0},
    'rte hypothesis: B. premise: A.',
    '<unk>',
  ),
  'glue_qqp_v200': (
    {'question1': 'Why?', 'question2': 'How?', 'label': 0, 'idx': 0},
    'qqp question1: Why? question2: How?',
    'not_duplicate',
  ),
  'glue_stsb_v002': (
    {'sentence1': 'A.', 'sentence2': 'B.', 'label': 0.5, 'idx': 0},
    'stsb sentence1: A. sentence2: B.',
    '0.4',
  ),
  'super_glue_wsc_v102_simple_train': (
    {
      'text': 'The cup fell when it broke .',
      'span1_text': 'The cup',
      'span1_index': 0,
      'span2_text': 'it',
      'span2_index': 4,
      'label': 1,
      'idx': 0,
    },
    'wsc: The cup fell when *it* broke .',
    'The cup',
  ),
  'dpr_v001_simple': (
    {
      'sentence': 'Bees like flowers; they, they say, hum.',
      'pronoun': 'they',
      'candidates': ['Bees', 'flowers'],
      'label': 0,
    },
    'wsc: Bees like flowers; *they*, they say, hum.',
    'Bees',
  ),
}


@pytest.mark.parametrize('name', ROWS)
def test_texts_are_t5s_and_taskless_ones_have_no_name_in_front(name):
  row, inputs, targets = ROWS[name]
  assert texts(name, row) == [(inputs, targets)]
  for form in ('taskless_', 'task_index_'):
    assert texts(f'{form}{name}', row) == [(inputs.partition(' ')[2], targets)]


def test_record_asks_once_for_each_answer():
  row = {
    'passage': 'Ada won.\n@highlight\nBob lost\n@highlight\nIt rained',
    'query': '@placeholder won',
    'entities': ['Ada', 'Bob'],
    'answers': ['Ada', 'Bob'],
    'idx': {'passage': 0, 'query': 1},
  }
  text = (
    'record query: @placeholder won entities: Ada, Bob passage: Ada won. Bob '
    'lost. It rained'
  )
  assert texts('super_glue_record_v102', row) == [(text, 'Ada'), (text, 'Bob')]
  assert texts('super_glue_record_v102', {**row, 'answers': []}) == [
    (text, '<unk>')
  ]


def test_squad_and_mrqa_space_punctuation_and_take_the_first_answer():
  row = {
    'id': 'a',
    'title': '',
    'question': 'Who?',
    'context': 'Ada (b. 1815) won.',
    'answers': {'text': ['Ada', 'Ada (b. 1815)']},
  }
  expected = ('question: Who ? context: Ada ( b . 1815 ) won . ', 'Ada')
  assert texts('squad_v010_allanswers', row) == [expected]
  row = {**row, 'subset': '', 'qid': 'a', 'answers': row['answers']['text']}
  assert texts('mrqa_drop_v100_examples', row) == [expected]


def test_wsc_trains_on_true_candidates_alone():
  row, *_ = ROWS['super_glue_wsc_v102_simple_train']
  for label in (0, -1):
    given = {**row, 'label': label}
    assert texts('super_glue_wsc_v102_simple_train', given) == []
    assert len(texts('super_glue_wsc_v102_simple_eval', given)) == 1


def test_wsc_mends_the_two_misplaced_pronouns():
  row, *_ = ROWS['super_glue_wsc_v102_simple_train']
  start = (
    'The boy continued to whip the pony , and eventually the pony threw him '
    'over. John laughed out quite loud. '
  )
  given = {
    **row,
    'text': f'{start}"Good for him," he said. ',
    'span2_text': 'him',
    'span2_index': 19,
  }
  assert texts('taskless_super_glue_wsc_v102_simple_eval', given)[0][0] == (
    f'{start}"Good for *him* ," he said.'
  )


def test_a_wsc_index_that_points_elsewhere_is_an_error():
  row, *_ = ROWS['super_glue_wsc_v102_simple_train']
  for index in (0, 3, 99):
    with pytest.raises(tf.errors.InvalidArgumentError, match='must point at'):
      texts('super_glue_wsc_v102_simple_eval', {**row, 'span2_index': index})


def test_task_index_puts_a_sentinel_of_the_tasks_own_in_front():
  for name, number in (('boolq', 0), ('rte', 5), ('axg', 5)):
    task = get_task(
      f'task_index_super_glue_{name}_v102', vocabulary='t5_1_1_mini'
    )
    dataset = tf.data.Dataset.from_tensors({'inputs': 'a', 'targets': 'b'})
    steps = list(task.preprocessors)
    for step in steps[steps.index(seqio.preprocessors.tokenize) :][:2]:
      dataset = step(dataset, output_features=task.output_features)
    found = next(dataset.as_numpy_iterator())
    assert found['inputs'][0] == 8192 - 1 - number
    assert found['targets'][0] != found['inputs'][0]


def test_transfer_reads_the_other_tasks_words():
  task = get_task('glue_mrpc_from_qqp_v002')
  assert [
    task.postprocess_fn(text, is_target=False)
    for text in ('duplicate', 'not_duplicate', 'equivalent', 'maybe')
  ] == [1, 0, 1, -1]
  # What the model is asked to rank are the words that it was taught.
  assert task_lib.class_labels(task) == ['not_duplicate', 'duplicate']
  # A target is never rewritten.
  assert task.postprocess_fn('duplicate', is_target=True) == -1


def test_mixtures_have_the_rates_of_t5_and_no_other_forms_tasks():
  get_task('bbc_topics')
  for model in registration.VOCABULARIES:
    for form in registration.FORMS:
      mixture = seqio.MixtureRegistry.get(
        f'{model}{form}super_glue_v102_examples_proportional'
      )
      rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
      assert all(name.startswith(f'{model}{form}super_glue') for name in rates)
      assert rates[f'{model}{form}super_glue_record_v102_examples'] == 138854
      assert sum(rates.values()) == 184351


def test_examples_variants_give_the_same_metrics_on_richer_predictions():
  plain = get_task('glue_mrpc_v002')
  logged = get_task('glue_mrpc_v002_examples')
  example = {'inputs_pretokenized': 'a', 'targets_pretokenized': 'equivalent'}
  answers = ['equivalent', 'not_equivalent', 'junk']

  def results(task):
    targets = [
      task.postprocess_fn('equivalent', example=example, is_target=True)
    ] * 3
    given = [
      task.postprocess_fn(text, example=example, is_target=False)
      for text in answers
    ]
    found = {}
    for metric in task.predict_metric_fns:
      found.update(metric(targets=targets, predictions=given))
    return found, given

  (expected, _), (found, rich) = results(plain), results(logged)
  assert found == expected == {'f1': 50.0, 'accuracy': pytest.approx(100 / 3)}
  assert rich[2] == {
    'prediction': -1,
    'prediction_pretokenized': 'junk',
    **example,
  }


def test_target_sentinel_goes_before_targets_and_from_predictions():
  task = get_task(
    'taskless_glue_rte_v002', vocabulary='t5_1_1_mini', target_sentinel=True
  )
  dataset = tf.data.Dataset.from_tensors({'inputs': 'a', 'targets': 'b'})
  steps = list(task.preprocessors)
  for step in steps[steps.index(seqio.preprocessors.tokenize) :][:2]:
    dataset = step(dataset, output_features=task.output_features)
  assert next(dataset.as_numpy_iterator())['targets'][0] == 8191
  for text in ('<extra_id_0> entailment', 'entailment'):
    assert task.postprocess_fn(text, is_target=False) == 0


def test_a_prompt_in_words_goes_before_the_inputs():
  words = 'Is {this} so?'
  task = get_task(
    'taskless_glue_rte_v002',
    vocabulary='t5_1_1_mini',
    text_prompt=words,
    target_sentinel=True,
  )
  dataset = tf.data.Dataset.from_tensors({'inputs': 'a b', 'targets': 'c'})
  steps = list(task.preprocessors)
  at = steps.index(seqio.preprocessors.tokenize)
  dataset = steps[at - 1](dataset)
  for step in steps[at : at + 2]:
    dataset = step(dataset, output_features=task.output_features)
  found = next(dataset.as_numpy_iterator())
  encode = load_vocabulary('t5_1_1_mini').encode
  assert found['inputs'].tolist() == encode('Is {this} so? a b')
  assert found['targets'][0] == 8191
  # Inference fills the same template.
  lengths = {'inputs': 64, 'targets': 4}
  facts = task_lib.Task('bbc_topics', lengths, text_prompt=words).facts()
  assert Template(facts['template']).fill({'title': 'T', 'body': 'B'}, 'x') == (
    'Is {this} so? article: T. B'
  )


# Metrics by hand.


def test_squad_takes_the_best_answer():
  found = metrics.squad(
    [['The cat', 'a dog'], ['x y z'], ['']], ['dog.', 'x y', '']
  )
  # Word F1 of "x y z" and "x y" is 2*2/(3+2); of nothing and nothing 0.
  assert found == {
    'em': pytest.approx(200 / 3),
    'f1': pytest.approx(100 * (1 + 0.8 + 0) / 3),
  }


def test_multirc_counts_questions_answered_in_full():
  targets = [{'value': v, 'group': g} for v, g in ((1, 0), (0, 0), (1, 1))]
  found = metrics.multirc(targets, [{'value': v} for v in (1, -1, 1)])
  # The answer that is no label counts as a wrong yes: 2 right of 3 given.
  assert found == {'f1': pytest.approx(80.0), 'exact_match': 50.0}


def test_record_counts_a_query_once():
  rows = [{'value': ['a'], 'group': (0, 0)}] * 3
  rows += [{'value': ['b'], 'group': (0, 1)}]
  found = metrics.record(rows, [{'value': v} for v in ('a', 'x', 'x', 'x')])
  # "a" is an article: an exact match, and no word in common.
  assert found == {'em': 50.0, 'f1': 0.0}


def test_correlations_and_cola():
  assert metrics.pearson_corrcoef([1, 2, 3], [2, 4, 6]) == {
    'pearson_corrcoef': pytest.approx(100)
  }
  assert metrics.spearman_corrcoef([1, 2, 3], [3, 2, 9]) == {
    'spearman_corrcoef': pytest.approx(50)
  }
  assert metrics.matthews_corrcoef([0, 1, 0, 1], [0, 1, 1, 0]) == {
    'matthews_corrcoef': 0.0
  }


@pytest.mark.parametrize(
  ('prediction', 'referent', 'expected'),
  [
    ('The crate', 'crate', 1),
    ("Bob's hat", 'Bob', 0),
    ('fuzzy bunny', 'the bunny', 1),
    ('Tom', 'Bob', 0),
    ('the', 'Bob', -1),
  ],
)
def test_wsc_looks_for_the_referents_words(prediction, referent, expected):
  example = {'targets_pretokenized': referent.encode(), 'label': 1}
  assert postprocessors.wsc(prediction, example, False) == expected


# Pre-training objectives.

LENGTHS = {'inputs': 64, 'targets': 40}


@pytest.mark.parametrize('name', pretraining.OBJECTIVES)
def test_objectives_fit_their_lengths_and_keep_the_text(name):
  task = get_task(f'c4_v220_{name}', vocabulary='t5_1_1_mini')
  documents = [' '.join(f'word {i} of {j}.' for i in range(80)) for j in (1, 2)]
  dataset = tf.data.Dataset.from_tensor_slices({'text': documents})
  features = task.output_features

  def run(seed):
    found = dataset
    with seqio.utils.map_seed_manager(seed):
      for step in task.preprocessors:
        if isinstance(step, seqio.CacheDatasetPlaceholder):
          continue
        found = call(step, found, features)
    return [
      {key: value.tolist() for key, value in row.items()}
      for row in found.as_numpy_iterator()
    ]

  rows = run(0)
  assert rows and rows == run(0) and rows != run(1)
  text = sum(
    (features['inputs'].vocabulary.encode(text) for text in documents), []
  )
  text = ' '.join(map(str, text))
  for row in rows:
    assert len(row['inputs']) <= LENGTHS['inputs']
    assert len(row['targets']) <= LENGTHS['targets']
    assert row['inputs'][-1] == row['targets'][-1] == 1
    if name == 'prefix_lm':
      whole = [*row['inputs'][:-1], *row['targets'][:-1]]
    elif name.startswith('bart'):
      whole = row['targets'][:-1]
    else:
      whole = rejoined(row['inputs'][:-1], row['targets'][:-1])
    assert ' '.join(map(str, whole)) in text
    has_sentinels = any(token >= 8092 for token in row['inputs'])
    assert has_sentinels == (name in ('span_corruption', 'bart_text_infilling'))


def call(step, dataset, features):
  """A preprocessor with those of seqio's arguments that it takes."""
  names = inspect.signature(step).parameters
  given = {'output_features': features, 'sequence_length': LENGTHS}
  return step(dataset, **{k: v for k, v in given.items() if k in names})


def rejoined(inputs, targets):
  spans, current = {}, None
  for token in targets:
    if token >= 8092:
      current = spans[token] = []
    else:
      current.append(token)
  return [t for token in inputs for t in spans.get(token, [token])]


# Checks.


def test_missing_tfds_data_say_which_folder_and_command(tmp_path, monkeypatch):
  folder = str(tmp_path / 'tfds')
  monkeypatch.setattr(seqio.utils, '_TFDS_DATA_DIR_OVERRIDE', folder)
  lengths = {'inputs': 8, 'targets': 4}
  task = task_lib.Task('glue_wnli_v002', lengths, vocabulary='t5_1_1_mini')
  with pytest.raises(UserError) as error:
    task.checked('train')
  for part in ('glue/wnli:1.0.0', folder, 'prepare_data.py', 'LOCAL_DATA_DIR'):
    assert part in str(error.value)
