"""Rows of text from JSONL, CSV and TSV files, compressed with gzip or not."""

from collections.abc import Iterator, Mapping, Sequence
import csv
import gzip
import json
import os
import pathlib

from prompt_tuning.errors import UserError

Row = Mapping[str, object]

DELIMITERS = {'.csv': ',', '.tsv': '\t'}


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
  """The rows of a table file, each with its place for error messages.

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
  suffix = (
    pathlib.Path(path.stem).suffix if path.suffix == '.gz' else path.suffix
  )
  if suffix not in ('.jsonl', *DELIMITERS):
    raise UserError(
      f'{path}: rows are read from .jsonl, .csv or .tsv files, '
      f'got {path.suffix or "no suffix"}'
    )
  # Lines end at \n alone: text may hold U+2028 and the like.
  lines = read_text(path).split('\n')
  if suffix == '.jsonl':
    return list(_json_rows(path, lines))
  return list(
    _delimited_rows(path, lines, DELIMITERS[suffix], names, drop_short)
  )


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


def _delimited_rows(
  path, lines, delimiter, names, drop_short
) -> Iterator[tuple[str, Row | None]]:
  # Quotes are text in TSV (as in GLUE's files) and quote cells in CSV.
  quoting = csv.QUOTE_MINIMAL if delimiter == ',' else csv.QUOTE_NONE
  reader = csv.reader(
    (line.removesuffix('\r') + '\n' for line in lines),
    delimiter=delimiter,
    quoting=quoting,
  )
  if names is None:
    names = next(reader, [])
  for cells in reader:
    if not cells:
      continue
    place = f'{path}:{reader.line_num}'
    if len(cells) < len(names) and drop_short:
      yield place, None
      continue
    if len(cells) != len(names):
      raise UserError(
        f'{place}: a row must have {len(names)} cells'
        f' ({", ".join(names)}), got {len(cells)}'
      )
    yield place, dict(zip(names, cells, strict=True))
