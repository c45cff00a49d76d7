"""Records out of lines and files, and what is said of faulty ones."""

import io

import pytest

from prompt_tuning.data.records import format_of
from prompt_tuning.data.records import read_records
from prompt_tuning.data.records import read_rows
from prompt_tuning.errors import UserError


def read(lines, input_format, columns=None):
  return list(read_records(lines, input_format, 'f', columns))


def test_lines_of_three_formats_become_records():
  assert read(['a b\r\n', '\n', ' c'], 'text') == [
    ('f:1', {'text': 'a b'}),
    ('f:3', {'text': ' c'}),
  ]
  assert read(['{"q": "a", "n": 1}\n'], 'jsonl') == [
    ('f:1', {'q': 'a', 'n': 1})
  ]
  assert read(['q\tp\n', 'a\tb\n'], 'tsv') == [('f:2', {'q': 'a', 'p': 'b'})]
  assert read(['a\tb'], 'tsv', ['q', 'p']) == [('f:1', {'q': 'a', 'p': 'b'})]


@pytest.mark.parametrize(
  ('line', 'input_format', 'said'),
  [
    ('{"a"', 'jsonl', 'f:2 is not JSON'),
    ('[1]', 'jsonl', 'f:2 is not a JSON object'),
    ('a\tb\tc', 'tsv', 'f:2 has 3 columns, needs 1: q'),
    ('a', 'csv', 'must be jsonl, tsv or text, got csv'),
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
  names = ('a.jsonl', 'a.JSON', 'b/c.tsv', 'a.txt', '-')
  assert [format_of(name) for name in names] == [
    'jsonl',
    'jsonl',
    'tsv',
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


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='none.csv: cannot be read'):
    read_rows(tmp_path / 'none.csv')
