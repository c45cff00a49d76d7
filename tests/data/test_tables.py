import pytest

from prompt_tuning.data.tables import read_rows
from prompt_tuning.errors import UserError


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
    ('r.jsonl', '{"text": "a"}\n{"text": \n', r'r\.jsonl:2: .*JSON object'),
    ('r.jsonl', '["a"]\n', r'r\.jsonl:1: .*one JSON object'),
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
