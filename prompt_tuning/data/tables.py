"""Rows of text from JSONL, CSV and TSV files."""

from collections.abc import Iterator, Mapping
import csv
import json
import os
import pathlib

from prompt_tuning.errors import UserError

Row = Mapping[str, object]

DELIMITERS = {'.csv': ',', '.tsv': '\t'}


def read_rows(path: str | os.PathLike) -> list[tuple[str, Row]]:
  """The rows of a table file, each with its place for error messages.

  Args:
    path: .jsonl (an object a line), .csv or .tsv (with a line of names); UTF-8,
      with or without byte order mark. Blank lines of JSONL are left out.

  Returns:
    [('file.jsonl:3', {'text': ..., 'label': ...}), ...]

  Raises:
    UserError: naming file and line, if something is not as described.
  """
  path = pathlib.Path(path)
  if path.suffix not in ('.jsonl', *DELIMITERS):
    raise UserError(
      f'{path}: rows are read from .jsonl, .csv or .tsv files, '
      f'got {path.suffix or "no suffix"}'
    )
  try:
    text = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    raise UserError(
      f'{path}:{line}: the file must be UTF-8, got byte'
      f' 0x{error.object[error.start]:02x}; convert it (iconv -t utf-8)'
    ) from error
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}); check the path'
    ) from error
  # Lines end at \n alone: text may hold U+2028 and the like.
  lines = text.split('\n')
  if path.suffix == '.jsonl':
    return list(_json_rows(path, lines))
  return list(_delimited_rows(path, lines, DELIMITERS[path.suffix]))


def _json_rows(path, lines) -> Iterator[tuple[str, Row]]:
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(
        f'{path}:{number}: a line must be one JSON object, '
        f'got {line[:40]!r} ({error.msg})'
      ) from error
    if not isinstance(row, dict):
      raise UserError(
        f'{path}:{number}: a line must be one JSON object, got {line[:40]!r}'
      )
    yield f'{path}:{number}', row


def _delimited_rows(path, lines, delimiter) -> Iterator[tuple[str, Row]]:
  # Quotes are text in TSV (as in GLUE's files) and quote cells in CSV.
  quoting = csv.QUOTE_MINIMAL if delimiter == ',' else csv.QUOTE_NONE
  reader = csv.reader(
    (line + '\n' for line in lines), delimiter=delimiter, quoting=quoting
  )
  names = next(reader, [])
  for cells in reader:
    if not cells:
      continue
    if len(cells) != len(names):
      raise UserError(
        f'{path}:{reader.line_num}: a row must have {len(names)} cells'
        f' ({", ".join(names)}), got {len(cells)}'
      )
    yield f'{path}:{reader.line_num}', dict(zip(names, cells, strict=True))
