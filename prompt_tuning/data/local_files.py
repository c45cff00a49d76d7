"""GLUE, SuperGLUE, SQuAD, MRQA and DPR from the raw files their authors give.

`LOCAL_DATA_DIR` names a folder that holds the files as they are published:

  CoLA SST-2 MRPC QQP STS-B MNLI QNLI RTE WNLI  train.tsv, dev.tsv, test.tsv
    (MNLI: dev_matched.tsv, dev_mismatched.tsv, ...; the diagnostic set:
    diagnostic/diagnostic.tsv), in glue/, GLUE/, glue_data/ or the folder itself
  BoolQ CB COPA MultiRC ReCoRD RTE WiC WSC      train.jsonl, val.jsonl,
    test.jsonl (AX-b/AX-b.jsonl, AX-g/AX-g.jsonl), in super_glue/, SuperGLUE/ or
    the folder itself
  squad/                                        train-v1.1.json, dev-v1.1.json
  mrqa/{train,dev,test}/                        HotpotQA.jsonl(.gz), ...
  definite_pronoun_resolution/                  train.c.txt, test.c.txt

Rows come in TFDS's schema and order, so a task gives the same examples from
either; `scripts/prepare_data.py` writes TFDS data sets of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import pathlib
import re

from prompt_tuning import files
from prompt_tuning.data import glue
from prompt_tuning.data import question_answering
from prompt_tuning.data import super_glue
from prompt_tuning.data.records import label_id
from prompt_tuning.data.records import read_rows
from prompt_tuning.data.records import read_text
from prompt_tuning.data.records import require
from prompt_tuning.data.sources import RowsSource
from prompt_tuning.data.sources import Schema
from prompt_tuning.errors import UserError

Rows = Iterator[dict]


@dataclasses.dataclass(frozen=True)
class LocalData:
  """A data set in its authors' files.

  Attributes:
    files: {split: the paths its file may have below LOCAL_DATA_DIR}, of which
      '{a,b}/c' are a/c and b/c.
    read: (path, labels) to rows of the schema.
    schema: of a row, TFDS's field names.
    labels: the names of `label` in the order of TFDS, () where it is no class.
  """

  files: Mapping[str, str]
  read: Callable[[pathlib.Path, tuple[str, ...]], Rows]
  schema: Schema
  labels: tuple[str, ...] = ()

  def present(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{split: its file} for the splits whose file is there."""
    found = {}
    for split, pattern in self.files.items():
      for name in _expand(pattern):
        if split not in found and (folder / name).is_file():
          found[split] = folder / name
    return found

  def rows(self, folder: pathlib.Path, split: str) -> list[dict]:
    """The rows of a split that is present."""
    return list(self.read(self.present(folder)[split], self.labels))


def source(
  tfds_name: str, folder: str, splits: Mapping[str, str] | None = None
) -> RowsSource:
  """What a task reads instead of the TFDS data set of this name.

  Args:
    tfds_name: with or without a version.
    folder: LOCAL_DATA_DIR.
    splits: {split: the data set's name of it}, None for all.

  Raises:
    UserError: if the data set has no known layout or no file of the splits is
      there.
  """
  name = tfds_name.partition(':')[0]
  if name not in DATA:
    raise UserError(
      f'LOCAL_DATA_DIR cannot replace the data set {name}; it can: '
      f'{", ".join(sorted(DATA))}'
    )
  data = DATA[name]
  root = pathlib.Path(files.place(folder))
  present = data.present(root)
  splits = splits or {split: split for split in data.files}
  names = {new: old for new, old in splits.items() if old in present}
  if not names:
    wanted = [_expand(data.files[old])[0] for old in splits.values()]
    raise UserError(
      f'LOCAL_DATA_DIR={folder} has no file of {name}; looked for '
      f'{", ".join(wanted)} and the like'
    )
  return RowsSource(
    lambda split: data.rows(root, names[split]),
    names,
    data.schema,
  )


def _expand(pattern: str) -> list[str]:
  parts = [part.split(',') for part in re.split('[{}]', pattern)]
  return [*map(''.join, itertools.product(*parts))]


def _class(label, labels: Sequence[str], place: str) -> int:
  """The number of a label, -1 where there is none (test splits)."""
  return -1 if label is None else label_id(label, labels, place)


# GLUE's TSV files.

# Folder, columns of the fields in the order of `glue.TASKS`, label's column.
_GLUE_COLUMNS = {
  'cola': ('CoLA', ('sentence',), 'is_acceptable'),
  'sst2': ('SST-2', ('sentence',), 'label'),
  'mrpc': ('MRPC', ('#1 String', '#2 String'), 'Quality'),
  'qqp': ('QQP', ('question1', 'question2'), 'is_duplicate'),
  'stsb': ('STS-B', ('sentence1', 'sentence2'), 'score'),
  'mnli': ('MNLI', ('sentence2', 'sentence1'), 'gold_label'),
  'mnli_matched': ('MNLI', ('sentence2', 'sentence1'), 'gold_label'),
  'mnli_mismatched': ('MNLI', ('sentence2', 'sentence1'), 'gold_label'),
  'qnli': ('QNLI', ('question', 'sentence'), 'label'),
  'rte': ('RTE', ('sentence1', 'sentence2'), 'label'),
  'wnli': ('WNLI', ('sentence1', 'sentence2'), 'label'),
  'ax': ('diagnostic', ('sentence2', 'sentence1'), 'label'),
}


def _glue_files(name: str) -> dict[str, str]:
  splits = {'train': 'train', 'validation': 'dev', 'test': 'test'}
  if name == 'ax':
    splits = {'test': '{diagnostic,test}'}
  elif name.startswith('mnli'):
    held_out, kind = (('validation', 'dev'), ('test', 'test')), name[4:]
    if kind:
      splits = {split: file + kind for split, file in held_out}
    else:
      splits = {'train': 'train'} | {
        split + kind: file + kind
        for split, file in held_out
        for kind in ('_matched', '_mismatched')
      }
  below = '{glue/,GLUE/,glue_data/,}' + _GLUE_COLUMNS[name][0]
  return {split: f'{below}/{file}.tsv' for split, file in splits.items()}


def _read_glue(
  path: pathlib.Path, labels: tuple[str, ...], *, name: str
) -> Rows:
  _, texts, label = _GLUE_COLUMNS[name]
  fields = [field.rpartition('=')[2] for field in glue.TASKS[name].fields]
  headless = None
  if name == 'cola' and path.stem != 'test':
    headless = ('source', label, 'star', 'sentence')
  for number, (place, row) in enumerate(
    # Some rows of QQP lack cells; TFDS leaves them out but counts them.
    read_rows(path, names=headless, drop_short=name == 'qqp')
  ):
    if row is None:
      continue
    require(row, texts, place)
    example = {field: row[text] for field, text in zip(fields, texts)}
    if name == 'stsb':
      example['label'] = _number(row.get(label, '-1'), place)
    else:
      example['label'] = _class(row.get(label) or None, labels, place)
    yield {**example, 'idx': number}


def _number(value: str, place: str) -> float:
  try:
    return float(value)
  except ValueError:
    raise UserError(f'{place}: a number is required, got {value!r}') from None


# SuperGLUE's JSONL files.

_SUPER_GLUE_FOLDERS = {
  'boolq': 'BoolQ',
  'cb': 'CB',
  'copa': 'COPA',
  'multirc': 'MultiRC',
  'record': 'ReCoRD',
  'rte': 'RTE',
  'wic': 'WiC',
  'wsc.fixed': 'WSC',
  'axb': 'AX-b',
  'axg': 'AX-g',
}
_BOOLEAN = ('False', 'True')


def _super_glue_files(name: str) -> dict[str, str]:
  folder = _SUPER_GLUE_FOLDERS[name]
  splits = {'train': 'train', 'validation': 'val', 'test': 'test'}
  if name in ('axb', 'axg'):
    splits = {'test': folder}
  below = '{super_glue/,SuperGLUE/,}' + folder
  return {split: f'{below}/{file}.jsonl' for split, file in splits.items()}


def _read_fields(
  path: pathlib.Path, labels: tuple[str, ...], *, fields: Sequence[str]
) -> Rows:
  for place, row in read_rows(path):
    require(row, (*fields, 'idx'), place)
    yield {
      **{field: row[field] for field in (*fields, 'idx')},
      'label': _class(row.get('label'), labels, place),
    }


def _read_multirc(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  for place, row in read_rows(path):
    require(row, ('passage', 'idx'), place)
    require(row['passage'], ('text', 'questions'), place)
    for question in row['passage']['questions']:
      for answer in question['answers']:
        label = answer.get('label')
        label = None if label is None else bool(label)
        yield {
          'paragraph': row['passage']['text'],
          'question': question['question'],
          'answer': answer['text'],
          'label': _class(label, labels, place),
          'idx': {
            'paragraph': row['idx'],
            'question': question['idx'],
            'answer': answer['idx'],
          },
        }


def _read_record(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  del labels
  for place, row in read_rows(path):
    require(row, ('passage', 'qas', 'idx'), place)
    text = row['passage']['text']
    entities = {
      text[entity['start'] : entity['end'] + 1]
      for entity in row['passage']['entities']
    }
    for query in row['qas']:
      answers = {answer['text'] for answer in query.get('answers', ())}
      yield {
        'passage': text,
        'query': query['query'],
        'entities': sorted(entities),
        'answers': sorted(answers),
        'idx': {'passage': row['idx'], 'query': query['idx']},
      }


def _read_wsc(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  for place, row in read_rows(path):
    require(row, ('text', 'target', 'idx'), place)
    example = {
      'text': row['text'],
      **{name: row['target'][name] for name in _WSC_SPANS},
      'idx': row['idx'],
      'label': _class(row.get('label'), labels, place),
    }
    for span in ('span1', 'span2'):
      _mend_span(example, span)
    yield example


_WSC_SPANS = {
  'span1_text': str,
  'span1_index': int,
  'span2_text': str,
  'span2_index': int,
}


def _mend_span(example: dict, span: str) -> None:
  """TFDS's wsc.fixed: spans that are no part of the text made one."""
  text, index = example[f'{span}_text'], example[f'{span}_index']
  if text in example['text'] or text in (
    # Their words do not stand together.
    'Kamenev and Zinoviev',
    'Kamenev, Zinoviev, and Stalin',
  ):
    return
  if 'theyscold' in text:
    example['span2_index'] = 10
  first = example['text'].split()[index]
  change = str.lower if first[0].islower() else str.upper
  text = change(text[0]) + text[1:]
  example[f'{span}_text'] = text.rstrip('.').replace('\n', ' ')


# Question answering and pronouns.

_MRQA_FILES = {
  'squad': 'SQuAD',
  'news_qa': 'NewsQA',
  'trivia_qa': 'TriviaQA-web',
  'search_qa': 'SearchQA',
  'hotpot_qa': 'HotpotQA',
  'natural_questions': 'NaturalQuestionsShort',
  'bio_asq': 'BioASQ',
  'drop': 'DROP',
  'duo_rc': 'DuoRC.ParaphraseRC',
  'race': 'RACE',
  'relation_extraction': 'RelationExtraction',
  'textbook_qa': 'TextbookQA',
}


def _mrqa_files(name: str) -> dict[str, str]:
  splits = {'train': 'train', 'validation': 'dev'}
  if name in question_answering.OUT_OF_DOMAIN:
    splits = {'test': '{test,dev}'}
  file = _MRQA_FILES[name] + '.jsonl{.gz,}'
  return {
    split: f'{{mrqa,MRQA}}/{folder}/{file}' for split, folder in splits.items()
  }


def _read_mrqa(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  del labels
  rows = read_rows(path)
  if not rows or 'header' not in rows[0][1]:
    raise UserError(
      f'{path}:1: the first line of an MRQA file is its header, got another'
    )
  for place, row in rows[1:]:
    require(row, ('context', 'qas'), place)
    for question in row['qas']:
      require(question, ('qid', 'question', 'answers'), place)
      yield {
        'subset': rows[0][1]['header'].get('dataset', ''),
        'context': row['context'].strip(),
        'qid': question['qid'],
        'question': question['question'].strip(),
        'answers': question['answers'],
      }


def _read_squad(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  del labels
  try:
    articles = json.loads(read_text(path))['data']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path}: SQuAD 1.1 is one JSON object with data, got something else '
      f'({error})'
    ) from None
  for article in articles:
    for paragraph in article['paragraphs']:
      for question in paragraph['qas']:
        yield {
          'id': question['id'],
          'title': article.get('title', ''),
          'context': paragraph['context'],
          'question': question['question'],
          'answers': {
            'text': [answer['text'] for answer in question['answers']]
          },
        }


def _read_pronouns(path: pathlib.Path, labels: tuple[str, ...]) -> Rows:
  """Blocks of a sentence, its pronoun, two candidates and the right one."""
  del labels
  blocks = read_text(path).strip().replace('\r\n', '\n').split('\n\n')
  for number, block in enumerate(blocks):
    lines = [line.strip() for line in block.strip().split('\n')]
    if len(lines) != 4:
      raise UserError(
        f'{path}, example {number + 1}: four lines are required (sentence, '
        f'pronoun, candidates, answer), got {len(lines)}'
      )
    candidates = [word.strip() for word in lines[2].split(',', 1)]
    if lines[3] not in candidates:
      raise UserError(
        f'{path}, example {number + 1}: the answer {lines[3]!r} is none of '
        f'the candidates {candidates}'
      )
    yield {
      'sentence': lines[0],
      'pronoun': lines[1],
      'candidates': candidates,
      'label': candidates.index(lines[3]),
    }


_SUPER_GLUE_READERS = {
  'multirc': (
    _read_multirc,
    {
      **dict.fromkeys(('paragraph', 'question', 'answer'), str),
      'label': int,
      'idx': dict.fromkeys(('paragraph', 'question', 'answer'), int),
    },
    _BOOLEAN,
  ),
  'record': (
    _read_record,
    {
      **dict.fromkeys(('passage', 'query'), str),
      **dict.fromkeys(('entities', 'answers'), [str]),
      'idx': {'passage': int, 'query': int},
    },
    (),
  ),
  'wsc.fixed': (
    _read_wsc,
    {'text': str, **_WSC_SPANS, 'label': int, 'idx': int},
    _BOOLEAN,
  ),
}


def _super_glue_data(name: str) -> LocalData:
  if name in _SUPER_GLUE_READERS:
    return LocalData(_super_glue_files(name), *_SUPER_GLUE_READERS[name])
  _, texts, labels, _, _ = super_glue.CLASSIFICATION[name]
  fields = [text.rpartition('=')[2] for text in texts]
  return LocalData(
    _super_glue_files(name),
    functools.partial(_read_fields, fields=fields),
    {**dict.fromkeys(fields, str), 'label': int, 'idx': int},
    labels,
  )


def _glue_data(name: str) -> LocalData:
  task = glue.TASKS[name]
  return LocalData(
    _glue_files(name),
    functools.partial(_read_glue, name=name),
    {
      **{field.rpartition('=')[2]: str for field in task.fields},
      'label': int if task.labels else float,
      'idx': int,
    },
    task.labels,
  )


_MRQA_SCHEMA = {
  'subset': str,
  'context': str,
  'qid': str,
  'question': str,
  'answers': [str],
}

# By TFDS's name of data set and config.
DATA = {
  **{f'glue/{name}': _glue_data(name) for name in _GLUE_COLUMNS},
  **{
    f'super_glue/{name}': _super_glue_data(name) for name in _SUPER_GLUE_FOLDERS
  },
  **{
    f'mrqa/{name}': LocalData(_mrqa_files(name), _read_mrqa, _MRQA_SCHEMA)
    for name in _MRQA_FILES
  },
  'squad/v1.1': LocalData(
    {
      'train': '{squad,SQuAD}/train-v1.1.json',
      'validation': '{squad,SQuAD}/dev-v1.1.json',
    },
    _read_squad,
    {
      'id': str,
      'title': str,
      'context': str,
      'question': str,
      'answers': {'text': [str]},
    },
  ),
  'definite_pronoun_resolution': LocalData(
    {
      split: f'definite_pronoun_resolution/{split}.c.txt'
      for split in ('train', 'test')
    },
    _read_pronouns,
    {'sentence': str, 'pronoun': str, 'candidates': [str], 'label': int},
  ),
}
