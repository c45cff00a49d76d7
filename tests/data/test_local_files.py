"""Tasks on raw files in their authors' layouts, and TFDS data sets of them."""

import gzip
import importlib.util
import json
import pathlib

import pytest
from registered import get_task
import seqio

from prompt_tuning.data import lengths
from prompt_tuning.data import local_files
from prompt_tuning.data import show
from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.errors import UserError

LENGTHS = {'inputs': 64, 'targets': 8}


def json_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')


def tsv(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join('\t'.join(line) for line in lines) + '\n', 'utf-8')


@pytest.fixture
def raw(tmp_path):
  """A file or more of every layout."""
  folder = tmp_path / 'raw'
  cola = ['gj04', '1', '', 'It works.']
  tsv(folder / 'glue/CoLA/train.tsv', cola, ['gj04', '0', '*', 'Works it.'])
  tsv(folder / 'glue/CoLA/test.tsv', ['index', 'sentence'], ['0', 'A test.'])
  tsv(
    folder / 'glue/MRPC/dev.tsv',
    ['\ufeffQuality', '#1 ID', '#2 ID', '#1 String', '#2 String'],
    ['1', '7', '8', 'He said " yes .', 'Yes .'],
  )
  head = ['id', 'qid1', 'qid2', 'question1', 'question2', 'is_duplicate']
  tsv(
    folder / 'QQP/train.tsv',
    head,
    ['0', '1', '2', 'Why?', 'How?', '0'],
    ['1', '3', '4', 'a row that lacks cells'],
    ['2', '5', '6', 'Who?', 'Who is it?', '1'],
  )
  tsv(
    folder / 'glue/STS-B/dev.tsv',
    ['index', 'sentence1', 'sentence2', 'score'],
    ['0', 'A.', 'B.', '3.700'],
  )
  tsv(
    folder / 'glue/MNLI/dev_matched.tsv',
    ['index', 'sentence1', 'sentence2', 'gold_label'],
    ['0', 'Premise.', 'Hypothesis.', 'neutral'],
  )
  below = folder / 'super_glue'
  json_lines(
    below / 'BoolQ/train.jsonl',
    [
      {
        'question': 'is it',
        'passage': 'So\u2028it is.',
        'label': True,
        'idx': 0,
      },
      {'question': 'no', 'passage': 'No.', 'label': False, 'idx': 1},
    ],
  )
  json_lines(
    below / 'MultiRC/val.jsonl',
    [
      {
        'idx': 5,
        'passage': {
          'text': 'A fox ran.',
          'questions': [
            {
              'question': 'Who?',
              'idx': 8,
              'answers': [
                {'text': 'A cat', 'idx': 20, 'label': 0},
                {'text': 'A fox', 'idx': 21, 'label': 1},
              ],
            }
          ],
        },
      }
    ],
  )
  json_lines(
    below / 'ReCoRD/train.jsonl',
    [
      {
        'idx': 1,
        'passage': {
          'text': 'Bob met Ada.',
          'entities': [
            {'start': 0, 'end': 2},
            {'start': 8, 'end': 10},
            {'start': 0, 'end': 2},
          ],
        },
        'qas': [
          {
            'idx': 2,
            'query': '@placeholder met Ada',
            'answers': [{'text': 'Bob'}, {'text': 'Bob'}],
          }
        ],
      }
    ],
  )
  json_lines(
    below / 'WSC/val.jsonl',
    [
      {
        'text': 'the cup fell when it broke .',
        'target': {
          'span1_text': 'The cup',
          'span1_index': 0,
          'span2_text': 'it',
          'span2_index': 4,
        },
        'label': False,
        'idx': 0,
      }
    ],
  )
  json_lines(below / 'AX-b/AX-b.jsonl', [])
  squad = {
    'data': [
      {
        'title': 'T',
        'paragraphs': [
          {
            'context': 'Ada won.',
            'qas': [
              {'id': 'q', 'question': 'Who?', 'answers': [{'text': 'Ada'}]}
            ],
          }
        ],
      }
    ]
  }
  path = folder / 'squad/dev-v1.1.json'
  path.parent.mkdir()
  path.write_text(json.dumps(squad))
  path = folder / 'mrqa/dev/BioASQ.jsonl.gz'
  path.parent.mkdir(parents=True)
  mrqa = {
    'context': ' Ada won. ',
    'qas': [{'qid': 'm', 'question': ' Who? ', 'answers': ['Ada', 'she']}],
  }
  with gzip.open(path, 'wt') as file:
    file.write(json.dumps({'header': {'dataset': 'BioASQ'}}) + '\n')
    file.write(json.dumps(mrqa) + '\n')
  path = folder / 'definite_pronoun_resolution/train.c.txt'
  path.parent.mkdir()
  path.write_text('Bees hum as they fly.\nthey\nBees,flowers\nBees\n\n')
  return folder


def examples(name, split, raw=None, **options):
  task = get_task(
    name, vocabulary='t5_1_1_mini', local_data_dir=raw and str(raw), **options
  )
  dataset = task.get_dataset(
    sequence_length=LENGTHS, split=split, shuffle=False, num_epochs=1
  )
  return [
    (
      row['inputs_pretokenized'].decode(),
      row['targets_pretokenized'].decode(),
    )
    for row in dataset.as_numpy_iterator()
  ]


EXPECTED = {
  ('glue_cola_v002', 'train'): [
    ('cola sentence: It works.', 'acceptable'),
    ('cola sentence: Works it.', 'unacceptable'),
  ],
  ('glue_cola_v200', 'test'): [('cola sentence: A test.', '<unk>')],
  ('taskless_glue_mrpc_v002', 'validation'): [
    ('sentence1: He said " yes . sentence2: Yes .', 'equivalent')
  ],
  ('glue_qqp_v002', 'train'): [
    ('qqp question1: Why? question2: How?', 'not_duplicate'),
    ('qqp question1: Who? question2: Who is it?', 'duplicate'),
  ],
  ('glue_stsb_v002', 'validation'): [
    ('stsb sentence1: A. sentence2: B.', '3.6')
  ],
  ('glue_mnli_matched_v002', 'validation'): [
    ('mnli hypothesis: Hypothesis. premise: Premise.', 'neutral')
  ],
  ('super_glue_boolq_v102', 'train'): [
    ('boolq passage: So\u2028it is. question: is it', 'True'),
    ('boolq passage: No. question: no', 'False'),
  ],
  ('super_glue_multirc_v102', 'validation'): [
    ('multirc question: Who? answer: A cat paragraph: A fox ran.', 'False'),
    ('multirc question: Who? answer: A fox paragraph: A fox ran.', 'True'),
  ],
  ('super_glue_record_v102', 'train'): [
    (
      'record query: @placeholder met Ada entities: Ada, Bob passage: Bob met '
      'Ada.',
      'Bob',
    )
  ],
  # TFDS mends the first letter of a span that is not part of the text.
  ('super_glue_wsc_v102_simple_eval', 'validation'): [
    ('wsc: the cup fell when *it* broke .', 'the cup')
  ],
  ('squad_v010_allanswers', 'validation'): [
    ('question: Who ? context: Ada won . ', 'Ada')
  ],
  ('mrqa_bio_asq_v100', 'validation'): [
    ('question: Who ? context: Ada won . ', 'Ada')
  ],
  ('dpr_v001_simple', 'train'): [('wsc: Bees hum as *they* fly.', 'Bees')],
}


@pytest.mark.parametrize(('name', 'split'), EXPECTED)
def test_a_task_reads_raw_files(raw, name, split):
  assert examples(name, split, raw) == EXPECTED[name, split]


def test_what_is_not_there_is_no_split(raw):
  task = get_task('glue_cola_v002', local_data_dir=str(raw))
  assert set(task.splits) == {'train', 'test'}
  # QQP has a training split alone, which transfer does not read.
  with pytest.raises(UserError, match='no file of glue/qqp.*dev.tsv'):
    get_task('glue_qqp_from_mrpc_v002', local_data_dir=str(raw))


def test_the_fields_of_metrics_come_along(raw):
  task = get_task(
    'super_glue_multirc_v102',
    vocabulary='t5_1_1_mini',
    local_data_dir=str(raw),
  )
  dataset = task.get_dataset(LENGTHS, 'validation', shuffle=False, num_epochs=1)
  targets = [
    task.postprocess_fn('True', example=row, is_target=True)
    for row in dataset.as_numpy_iterator()
  ]
  assert targets == [{'value': 1, 'group': 8}] * 2


@pytest.mark.parametrize(
  ('path', 'content', 'task', 'message'),
  [
    (
      'super_glue/BoolQ/train.jsonl',
      '{"question": "a", "passage": "b", "label": true, "idx": 0}\n{"que',
      'super_glue_boolq_v102',
      'train.jsonl:2 is not JSON',
    ),
    (
      'super_glue/BoolQ/train.jsonl',
      '{"question": "a", "passage": "b", "label": "maybe", "idx": 0}\n',
      'super_glue_boolq_v102',
      "train.jsonl:1: unknown label 'maybe'; the labels are False, True",
    ),
    (
      'super_glue/BoolQ/train.jsonl',
      '{"question": "a", "label": true, "idx": 0}\n',
      'super_glue_boolq_v102',
      "train.jsonl:1: the field 'passage' is required",
    ),
    (
      'glue/SST-2/train.tsv',
      'sentence\tlabel\nfine\t1\tmore\n',
      'glue_sst2_v002',
      'train.tsv:2: a row must have 2 cells',
    ),
    (
      'glue/SST-2/train.tsv',
      b'sentence\tlabel\nfin\xe9\t1\n',
      'glue_sst2_v002',
      'train.tsv:2: the file must be UTF-8, got byte 0xe9',
    ),
    (
      'glue/STS-B/train.tsv',
      'sentence1\tsentence2\tscore\na\tb\tx\n',
      'glue_stsb_v002',
      "train.tsv:2: a number is required, got 'x'",
    ),
    (
      'squad/train-v1.1.json',
      '[]',
      'squad_v010_allanswers',
      'SQuAD 1.1 is one JSON object with data',
    ),
    (
      'mrqa/train/SearchQA.jsonl',
      '{"context": "a", "qas": []}\n',
      'mrqa_search_qa_v100',
      'the first line of an MRQA file is its header',
    ),
    (
      'definite_pronoun_resolution/train.c.txt',
      'A.\nb\nc,d\ne\n',
      'dpr_v001_simple',
      "the answer 'e' is none of the candidates",
    ),
  ],
)
def test_faults_name_file_and_line(tmp_path, path, content, task, message):
  path = tmp_path / path
  path.parent.mkdir(parents=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match='.*') as error:
    examples(task, 'train', tmp_path)
  assert message in str(error.value)


def test_a_folder_without_the_files_says_what_it_looked_for(tmp_path):
  with pytest.raises(UserError, match='looked for .*CoLA/train.tsv'):
    get_task('glue_cola_v002', local_data_dir=str(tmp_path))
  with pytest.raises(UserError, match='cannot replace the data set c4/en'):
    get_task('c4_v220_prefix_lm', local_data_dir=str(tmp_path))


def test_every_data_set_of_a_task_has_a_layout():
  get_task('bbc_topics')
  names = {
    seqio.TaskRegistry.get(name).source.tfds_dataset.name.partition(':')[0]
    for name in seqio.TaskRegistry.names()
    if name.startswith(('glue', 'super_glue', 'squad', 'mrqa', 'dpr'))
  }
  assert names == set(local_files.DATA)


# TFDS data sets.


def prepare_data():
  path = pathlib.Path(__file__).resolve().parents[2] / 'scripts/prepare_data.py'
  specification = importlib.util.spec_from_file_location('prepare_data', path)
  module = importlib.util.module_from_spec(specification)
  specification.loader.exec_module(module)
  return module


def test_tfds_gives_what_the_raw_files_give(raw, tmp_path, capsys):
  tfds_dir = tmp_path / 'tfds'
  wanted = {
    'glue/cola': ('glue_cola_v002', 'glue_cola_v200'),
    'super_glue/multirc': ('super_glue_multirc_v102',),
    'super_glue/record': ('super_glue_record_v102',),
    'mrqa/bio_asq': ('mrqa_bio_asq_v100',),
    'definite_pronoun_resolution': ('dpr_v001_simple',),
  }
  arguments = ['--local_data_dir', raw, '--tfds_data_dir', tfds_dir]
  arguments = [*map(str, arguments), '--data_sets', *wanted]
  assert prepare_data().main(arguments) == 0
  assert 'glue/cola:1.0.0: train 2, test 1' in capsys.readouterr().out
  of_tfds = {'tfds_data_dir': str(tfds_dir)}
  for names in wanted.values():
    for name in names:
      for split in get_task(name, local_data_dir=str(raw)).splits:
        Task(name, LENGTHS, 't5_1_1_mini', **of_tfds).checked(split)
        found = examples(name, split, **of_tfds)
        assert found == examples(name, split, raw)
  # Again: nothing is written twice.
  assert prepare_data().main(arguments) == 0
  assert 'glue/cola:1.0.0 is there already' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--data_sets', 'glue/colla'], "has 'glue/colla'; known are"),
    (['--data_sets', 'glue/rte'], 'has no file of glue/rte'),
  ],
)
def test_preparing_what_is_not_there_is_one_line(raw, capsys, more, message):
  arguments = ['--local_data_dir', str(raw), '--tfds_data_dir', str(raw / 't')]
  assert prepare_data().main([*arguments, *more]) == 1
  assert message in capsys.readouterr().err


# Lengths.


def test_lengths_are_of_whole_texts(raw):
  task = get_task(
    'super_glue_boolq_v102',
    vocabulary='t5_1_1_mini',
    local_data_dir=str(raw),
  )
  found = lengths.measure(task, 'train')
  vocabulary = task.output_features['inputs'].vocabulary
  assert found['inputs'].tolist() == [
    len(vocabulary.encode(text)) + 1
    for text, _ in EXPECTED['super_glue_boolq_v102', 'train']
  ]
  limits = {'inputs': int(found['inputs'].min()), 'targets': 8}
  assert lengths.truncated(found, limits) == {'inputs': 0.5, 'targets': 0.0}


def test_training_warns_of_cut_texts_and_refuses_to_cut_labels(raw, caplog):
  def batches(inputs, targets):
    task = Task(
      'super_glue_boolq_v102',
      {'inputs': inputs, 'targets': targets},
      vocabulary='t5_1_1_mini',
      local_data_dir=str(raw),
    )
    return TaskData(task, batch_size=1).batches(virtual_tokens=None, seed=0)

  batches(64, 8)
  assert not caplog.records
  batches(4, 8)
  assert '100.0% of 2 examples have inputs longer than 4' in caplog.text
  with pytest.raises(UserError, match="the label 'False' .* allows 1"):
    batches(64, 1)


def test_show_prints_examples_histograms_and_what_is_cut(raw, capsys):
  arguments = ['super_glue_boolq_v102', '--vocabulary', 't5_1_1_mini']
  arguments += ['--local_data_dir', str(raw), '--prompt_length', '2']
  assert show.main([*arguments, '--inputs', '8', '--targets', '4']) == 0
  out = capsys.readouterr().out
  assert 'inputs: boolq passage: No. question: no' in out
  assert 'encoder_input_tokens: <prompt_0> <prompt_1> ' in out
  assert 'of 2 examples' in out and '#' in out and '99%' in out
  assert 'truncated at inputs 8: 100.00%, targets 4: 0.00%' in out
  assert show.main([*arguments, '--targets', '4', '--throughput']) == 0
  assert 'examples/s in batches of 32' in capsys.readouterr().out


def test_show_of_what_is_not_there_is_one_line(raw, capsys):
  arguments = ['--vocabulary', 't5_1_1_mini', '--local_data_dir', str(raw)]
  assert show.main(['super_glue_boolk_v102', *arguments]) == 1
  assert 'nearest: ' in capsys.readouterr().err
  arguments += ['--split', 'dev']
  assert show.main(['super_glue_boolq_v102', *arguments]) == 1
  assert "no split 'dev'; it has train" in capsys.readouterr().err
