"""Records out of lines and files: JSONL, TSV, CSV and plain text.

`read_records` streams lines, from stdin too; `read_rows` reads a file of data,
compressed with gzip or not. A record comes with its place, 'file.jsonl:3'.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import csv
import gzip
import json
import os
import pathlib
from typing import Any

from prompt_tuning.errors import UserError

Row = Mapping[str, object]

DELIMITERS = {'.csv': ',', '.tsv': '\t'}


def format_of(name: str) -> str:
  """'jsonl', 'tsv' or 'text', by the ending of a file's name."""
  ending = pathlib.Path(name).suffix.lower()
  return {'.jsonl': 'jsonl', '.json': 'jsonl', '.tsv': 'tsv'}.get(
    ending, 'text'
  )


def read_records(
  lines: Iterable[str],
  input_format: str,
  name: str,
  columns: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, fields) of every line that is not empty.

  Args:
    lines: of a file.
    input_format: 'jsonl', 'tsv' or 'text'.
    name: the file's, for messages.
    columns: of a TSV; None reads its first line as such.

  Raises:
    UserError: an unknown format, a line that is not JSON or has other columns.
  """
  if input_format not in ('jsonl', 'tsv', 'text'):
    raise UserError(
      f'input_format must be jsonl, tsv or text, got {input_format}'
    )
  for number, line in _numbered(lines, name):
    line = line.rstrip('\r\n')
    place = f'{name}:{number}'
    if not line.strip():
      continue
    if input_format == 'text':
      yield place, {'text': line}
    elif input_format == 'jsonl':
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise UserError(f'{place} is not JSON: {error}') from None
      if not isinstance(record, dict):
        raise UserError(f'{place} is not a JSON object: {line[:60]}')
      yield place, record
    else:
      cells = line.split('\t')
      if columns is None:
        columns = cells
        continue
      if len(cells) != len(columns):
        raise UserError(
          f'{place} has {len(cells)} columns, needs {len(columns)}: '
          f'{", ".join(columns)}'
        )
      yield place, dict(zip(columns, cells))


def _numbered(lines: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
  number = 0
  try:
    for number, line in enumerate(lines, 1):
      yield number, line
  except UnicodeDecodeError as error:
    raise UserError(
      f'{name} is not UTF-8 after line {number}: {error.reason}; convert it'
    ) from None


def read_text(path: str | os.PathLike) -> str:
  """The text of a UTF-8 file, with or without byte order mark, .gz unpacked.

  Raises:
    UserError: naming file and line, if it cannot be read or is not UTF-8.
  """
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
    if path.suffix == '.gz':
      data = gzip.decompress(data)
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    raise UserError(
      f'{path}:{line}: the file must be UTF-8, got byte'
      f' 0x{error.object[error.start]:02x}; convert it (iconv -t utf-8)'
    ) from error
  except (OSError, EOFError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path}: cannot be read ({reason}); check the path') from (
      error
    )


def read_rows(
  path: str | os.PathLike,
  *,
  names: Sequence[str] | None = None,
  drop_short: bool = False,
) -> list[tuple[str, Row | None]]:
  """The rows of a data file, each with its place for error messages.

  Args:
    path: .jsonl (an object a line), .csv or .tsv (with a line of names), or one
      of these with .gz; UTF-8. Blank lines of JSONL are left out.
    names: of the columns, for .csv and .tsv without a line of names.
    drop_short: None stands for a row with too few cells, which is an error
      otherwise.

  Returns:
    [('file.jsonl:3', {'text': ..., 'label': ...}), ...]

  Raises:
    UserError: naming file and line, if something is not as described.
  """
  path = pathlib.Path(path)
  suffix = pathlib.Path(path.name.removesuffix('.gz')).suffix
  if suffix not in ('.jsonl', *DELIMITERS):
    raise UserError(
      f'{path}: rows are read from .jsonl, .csv or .tsv files, '
      f'got {path.suffix or "no suffix"}'
    )
  # Lines end at \n alone: text may hold U+2028 and the like.
  lines = read_text(path).split('\n')
  if suffix == '.jsonl':
    return list(read_records(lines, 'jsonl', str(path)))
  # Quotes are text in TSV (as in GLUE's files) and quote cells in CSV.
  reader = csv.reader(
    (line.removesuffix('\r') + '\n' for line in lines),
    delimiter=DELIMITERS[suffix],
    quoting=csv.QUOTE_MINIMAL if suffix == '.csv' else csv.QUOTE_NONE,
  )
  if names is None:
    names = next(reader, [])
  rows = []
  for cells in filter(None, reader):
    place = f'{path}:{reader.line_num}'
    if len(cells) < len(names) and drop_short:
      rows.append((place, None))
    elif len(cells) != len(names):
      raise UserError(
        f'{place}: a row must have {len(names)} cells'
        f' ({", ".join(names)}), got {len(cells)}'
      )
    else:
      rows.append((place, dict(zip(names, cells, strict=True))))
  return rows


def require(row: Mapping, names: Sequence[str], place: str) -> None:
  """UserError where a row lacks one of these fields."""
  for name in names:
    if name not in row:
      raise UserError(
        f'{place}: the field {name!r} is required, the row has '
        f'{", ".join(map(repr, row))}'
      )


def label_id(value: object, labels: Sequence[str], place: str) -> int:
  """The number of a label given as its word, truth value or number."""
  word = str(value).strip()
  if word in labels:
    return labels.index(word)
  if word.isdecimal() and int(word) < len(labels):
    return int(word)
  raise UserError(
    f'{place}: unknown label {value!r}; the labels are {", ".join(labels)}'
  )
