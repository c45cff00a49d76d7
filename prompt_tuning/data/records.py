"""Records out of lines and files: JSONL, TSV, CSV and plain text.

`read_records` streams lines, from stdin too; `read_rows` reads a file of data,
compressed with gzip or not. A record comes with its place, 'file.jsonl:3'.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import gzip
import json
import logging
import os
import pathlib
from typing import Any

from prompt_tuning import files
from prompt_tuning.errors import UserError

Row = Mapping[str, object]

logger = logging.getLogger(__name__)

DELIMITERS = {'.csv': ',', '.tsv': '\t'}
FORMATS = ('jsonl', 'tsv', 'csv', 'text')

# A cell may be a whole book; csv's own limit is 131,072 characters.
csv.field_size_limit(2**31 - 1)


def format_of(name: str) -> str:
  """One of `FORMATS`, by the ending of a file's name."""
  ending = pathlib.Path(name).suffix.lower().removeprefix('.')
  return {'json': 'jsonl'}.get(ending, ending if ending in FORMATS else 'text')


def read_records(
  lines: Iterable[str],
  input_format: str,
  name: str,
  columns: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, fields) of every record.

  A line of plain text is one, also where it is empty; elsewhere empty lines are
  none.

  Args:
    lines: of a file.
    input_format: one of `FORMATS`.
    name: the file's, for messages.
    columns: of a TSV or CSV; None reads its first line as such.

  Raises:
    UserError: an unknown format, a line that is not JSON or has other columns.
  """
  if input_format not in FORMATS:
    raise UserError(
      f'input_format must be {", ".join(FORMATS)}, got {input_format}'
    )
  if input_format in ('tsv', 'csv'):
    yield from _table(
      (line for _, line in _numbered(lines, name)), input_format, name, columns
    )
    return
  for number, line in _numbered(lines, name):
    line = line.rstrip('\r\n')
    place = f'{name}:{number}'
    if input_format == 'text':
      yield place, {'text': line}
    elif line.strip():
      yield place, _json_object(line, place)


def _json_object(line: str, place: str) -> dict[str, Any]:
  def unique(pairs):
    names = collections.Counter(name for name, _ in pairs)
    for name, count in names.items():
      if count > 1:
        raise UserError(f'{place} has the field {name!r} {count} times')
    return dict(pairs)

  def no_number(word):
    raise UserError(f'{place} has {word}, which is no JSON; write null')

  try:
    record = json.loads(
      line, object_pairs_hook=unique, parse_constant=no_number
    )
  except (json.JSONDecodeError, RecursionError) as error:
    raise UserError(f'{place} is not JSON: {error}') from None
  if not isinstance(record, dict):
    raise UserError(f'{place} is not a JSON object: {line[:60]}')
  return record


def looks_like_json(line: str) -> bool:
  """Whether a line is a JSON object."""
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def _table(
  lines: Iterable[str],
  kind: str,
  name: str,
  columns: Sequence[str] | None,
  drop_short: bool = False,
) -> Iterator[tuple[str, dict[str, str] | None]]:
  """The rows of a TSV or CSV; None for one with too few cells, if dropped."""
  # Quotes are text in TSV (as in GLUE's files) and quote cells in CSV.
  reader = csv.reader(
    (line.rstrip('\r\n') + '\n' for line in lines),
    delimiter=DELIMITERS[f'.{kind}'],
    quoting=csv.QUOTE_MINIMAL if kind == 'csv' else csv.QUOTE_NONE,
    strict=True,  # A quote that nobody closes would take the rest of the file.
  )
  try:
    if columns is None:
      columns = next(reader, [])
    twice = [c for c, n in collections.Counter(columns).items() if n > 1]
    if twice:
      raise UserError(
        f'{name} has the column {twice[0]!r} {columns.count(twice[0])} times:'
        ' give each its own name'
      )
    for cells in filter(None, reader):
      place = f'{name}:{reader.line_num}'
      if len(cells) < len(columns) and drop_short:
        yield place, None
      elif len(cells) != len(columns):
        raise UserError(
          f'{place}: a row must have {len(columns)} cells'
          f' ({", ".join(columns)}), got {len(cells)}'
        )
      else:
        yield place, dict(zip(columns, cells, strict=True))
  except csv.Error as error:
    raise UserError(
      f'{name}:{reader.line_num} cannot be read: {error}'
    ) from None


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
  path = pathlib.Path(files.place(path))
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
  kind = suffix.removeprefix('.')
  return list(_table(lines, kind, str(path), names, drop_short))


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
  (number,) = label_ids([(place, value)], labels)
  return number


def label_ids(
  placed: Iterable[tuple[str, object]], labels: Sequence[str]
) -> list[int]:
  """The numbers of a file's labels: all are words, or all are positions.

  What may be read as both is taken as words, and a line says so.

  Args:
    placed: (place, value) of each row.
    labels: the words, in the order of their numbers.

  Raises:
    UserError: a label is neither, or words and positions stand side by side.
  """
  given = list(placed)
  placed = [(place, str(value).strip()) for place, value in given]
  are_words = [word in labels for _, word in placed]
  if all(are_words):
    found = [labels.index(word) for _, word in placed]
    if found and all(map(_is_position(labels), {word for _, word in placed})):
      logger.warning(
        '%s: labels like %s are taken as words, not as positions from 0 on',
        *placed[0],
      )
    return found
  is_position = _is_position(labels)
  for (place, word), (_, value), is_word in zip(placed, given, are_words):
    if not is_word and not is_position(word):
      raise UserError(
        f'{place}: unknown label {value!r}; the labels are {", ".join(labels)}'
      )
  for (place, word), is_word in zip(placed, are_words):
    if is_word and not is_position(word):
      other = next(p for p, w in zip(placed, are_words) if not w)
      raise UserError(
        f'{place} has a label as its word, {word!r}, and {other[0]} as a'
        f' position, {other[1]}: write all of a file in one way'
      )
  if any(are_words):
    logger.warning(
      '%s: labels like %s are taken as positions from 0 on, since not all are'
      ' among the words %s',
      *placed[0],
      ', '.join(labels),
    )
  return [int(word) for _, word in placed]


def _is_position(labels: Sequence[str]) -> Callable[[str], bool]:
  return lambda word: (
    word.isascii() and word.isdecimal() and int(word) < len(labels)
  )
