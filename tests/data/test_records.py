"""Records out of lines and files, and what is said of faulty ones."""

import io

import pytest

from prompt_tuning.data.records import format_of
from prompt_tuning.data.records import label_ids
from prompt_tuning.data.records import read_records
from prompt_tuning.data.records import read_rows
from prompt_tuning.data.templates import Template
from prompt_tuning.errors import UserError


def read(lines, input_format, columns=None):
  return list(read_records(lines, input_format, 'f', columns))


def test_lines_of_four_formats_become_records():
  # Every line of a text is one: predictions stand in the lines of their texts.
  assert read(['a b\r\n', '\n', ' c'], 'text') == [
    ('f:1', {'text': 'a b'}),
    ('f:2', {'text': ''}),
    ('f:3', {'text': ' c'}),
  ]
  assert read(['{"q": "a", "n": 1}\n'], 'jsonl') == [
    ('f:1', {'q': 'a', 'n': 1})
  ]
  assert read(['q\tp\n', 'a\tb\n'], 'tsv') == [('f:2', {'q': 'a', 'p': 'b'})]
  assert read(['a\tb'], 'tsv', ['q', 'p']) == [('f:1', {'q': 'a', 'p': 'b'})]
  assert read(['q,p\n', '\n', '"a, b",c\n'], 'csv') == [
    ('f:3', {'q': 'a, b', 'p': 'c'})
  ]


@pytest.mark.parametrize(
  ('line', 'input_format', 'said'),
  [
    ('{"a"', 'jsonl', 'f:2 is not JSON'),
    ('[1]', 'jsonl', 'f:2 is not a JSON object'),
    ('{"a": NaN}', 'jsonl', 'f:2 has NaN, which is no JSON; write null'),
    ('{"a": 1, "a": 2}', 'jsonl', "f:2 has the field 'a' 2 times"),
    ('[' * 99999, 'jsonl', 'f:2 is not JSON'),
    ('a\tb\tc', 'tsv', r'f:2: a row must have 1 cells \(q\), got 3'),
    ('a', 'xml', 'must be jsonl, tsv, csv, text, got xml'),
  ],
)
def test_a_line_that_is_no_record_is_named(line, input_format, said):
  first = '{}' if input_format == 'jsonl' else 'q'
  with pytest.raises(UserError, match=said):
    read([first, line], input_format)


def test_lines_that_are_not_utf_8_are_named():
  lines = io.TextIOWrapper(io.BytesIO(b'ok\n' * 5000 + b'\xff\n'), 'utf-8')
  with pytest.raises(UserError, match='f is not UTF-8 after line .*convert it'):
    read(lines, 'text')


def test_a_files_ending_tells_its_format():
  names = ('a.jsonl', 'a.JSON', 'b/c.tsv', 'a.csv', 'a.txt', '-')
  assert [format_of(name) for name in names] == [
    'jsonl',
    'jsonl',
    'tsv',
    'csv',
    'text',
    'text',
  ]


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_the_same_rows_come_from_all_three_formats(tmp_path):
  rows = [{'text': 'a b', 'label': 'x'}, {'text': 'é', 'label': 'y'}]
  files = {
    'r.jsonl': '{"text": "a b", "label": "x"}\n\n{"text": "é", "label": "y"}\n',
    'r.csv': 'text,label\n"a b",x\né,y\n',
    'r.tsv': 'text\tlabel\na b\tx\né\ty\n',
  }
  for name, content in files.items():
    path = write(tmp_path, name, content)
    assert [row for _, row in read_rows(path)] == rows, name


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(
  tmp_path,
):
  path = write(tmp_path, 'r.csv', b'\xef\xbb\xbftext,label\r\na,x\r\n')
  assert read_rows(path) == [(f'{path}:2', {'text': 'a', 'label': 'x'})]


def test_quotes_in_tsv_are_text(tmp_path):
  path = write(tmp_path, 'r.tsv', 'text\tlabel\n"never closed\tx\n')
  assert read_rows(path)[0][1]['text'] == '"never closed'


def test_a_cell_of_csv_may_hold_a_line_break(tmp_path):
  path = write(tmp_path, 'r.csv', 'text,label\n"a\nb",x\n')
  assert read_rows(path)[0][1]['text'] == 'a\nb'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    (
      'r.jsonl',
      '{"text": "a"}\n{"text": \n',
      r'r\.jsonl:2 is not JSON: Expecting value',
    ),
    ('r.jsonl', '["a"]\n', r'r\.jsonl:1 is not a JSON object: \["a"\]'),
    ('r.csv', 'text,label\na\n', r'r\.csv:2: .* 2 cells .*got 1'),
    ('r.tsv', b'text\tlabel\nok\tx\n\xff\ty\n', r'r\.tsv:3: .*UTF-8.*0xff'),
    ('r.xml', '', r'\.jsonl, \.csv or \.tsv files, got \.xml'),
  ],
)
def test_a_fault_names_its_file_and_line(tmp_path, name, content, message):
  path = write(tmp_path, name, content)
  with pytest.raises(UserError, match=message) as caught:
    read_rows(path)
  assert '\n' not in str(caught.value)


def test_a_quote_that_nobody_closes_takes_no_rows_along(tmp_path):
  file = tmp_path / 'a.csv'
  file.write_text('label,text\ngood,fine\nbad,"dull\ngood,lovely\n')
  with pytest.raises(UserError, match='a.csv'):
    list(read_rows(file))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='none.csv: cannot be read'):
    read_rows(tmp_path / 'none.csv')


def test_a_column_is_named_once_and_a_cell_may_be_long(tmp_path):
  path = write(tmp_path, 'r.csv', 'text,text\na,b\n')
  with pytest.raises(UserError, match=r"the column 'text' 2 times"):
    read_rows(path)
  path = write(tmp_path, 'long.csv', f'text,label\n{"a" * 200_000},x\n')
  assert len(read_rows(path)[0][1]['text']) == 200_000


LABELS = ('1', '2', '3', '4', '5')


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    (['1', '5'], [0, 4]),
    ([0, 4, 1], [0, 4, 1]),  # 0 is no label: so all are positions
    (['1', '2'], [0, 1]),
  ],
)
def test_labels_of_a_file_are_words_or_positions_and_never_both(
  caplog, values, expected
):
  placed = [(f'f:{i}', value) for i, value in enumerate(values)]
  assert label_ids(placed, LABELS) == expected
  said = caplog.text
  if '5' in values:
    assert not said
  else:
    assert ('as positions' if 0 in values else 'as words') in said


def test_words_beside_positions_and_unknown_labels_are_named():
  with pytest.raises(UserError, match='has a label as its word, .bad., and'):
    label_ids([('f:1', 'bad'), ('f:2', 1)], ('bad', 'good'))
  with pytest.raises(UserError, match="f:2: unknown label '5'"):
    label_ids([('f:1', '0'), ('f:2', '5')], LABELS[:2])


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    (None, "f:1: the field 'text' is null"),
    ({'a': 1}, "the field 'text' is {'a': 1}"),
    (float('nan'), "the field 'text' is nan"),
    ('\ud800', 'half of a character'),
  ],
)
def test_a_field_that_is_no_text_is_named(value, said):
  with pytest.raises(UserError, match=said):
    Template('review: {text}').fill({'text': value}, 'f:1')


def test_a_template_writes_fields_as_they_are():
  template = Template('{{{a}}} {b} {a}')
  assert template.fields == ('a', 'b')
  assert template.fill({'a': 1, 'b': 'x {a}', 'c': None}, 'f') == '{1} x {a} 1'


@pytest.mark.parametrize(
  'pattern',
  [
    '{text',
    '{text:d}',
    '{text!q}',
    '{text:>9999999999}',
    '{a.b}',
    '{}',
    'a',
    5,
  ],
)
def test_a_template_has_names_alone_in_braces(pattern):
  with pytest.raises(UserError, match='template') as caught:
    Template(pattern)
  assert '\n' not in str(caught.value)
