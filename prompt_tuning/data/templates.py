"""A model's input out of a record: names of its fields in braces."""

from collections.abc import Mapping
import dataclasses
import functools
import math
import string
from typing import Any

from prompt_tuning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Template:
  """'question: {question} passage: {passage}', checked when it is made.

  A field is written as it is: there are no conversions and no widths, so that
  no template can make more of a record than its text.

  Attributes:
    pattern: as the user wrote it; '{{' is a brace.
  """

  pattern: str

  def __post_init__(self):
    wanted = "'question: {question}'"
    if not isinstance(self.pattern, str):
      raise UserError(f'a template is a text like {wanted}: {self.pattern!r}')
    try:
      parts = list(string.Formatter().parse(self.pattern))
    except ValueError as error:
      raise UserError(
        f'template {self.pattern!r} is not valid: {error}'
      ) from None
    if not self.fields:
      raise UserError(
        f'template {self.pattern!r} must name a field of the records: it needs'
        f' names of fields in braces, as in {wanted}'
      )
    for _, field, width, conversion in parts:
      bare = field is None or field.isidentifier()
      if not bare or width or conversion:
        raise UserError(
          f'template {self.pattern!r} needs names of fields in braces and'
          f' nothing else there, as in {wanted}'
        )

  @functools.cached_property
  def fields(self) -> tuple[str, ...]:
    """Names of the fields that it needs, each once."""
    parts = string.Formatter().parse(self.pattern)
    return tuple(
      dict.fromkeys(field for _, field, *_ in parts if field is not None)
    )

  def input_of(self, given: str | Mapping[str, Any], place: str) -> str:
    """The model's input for a text or a record; see `fill`.

    A plain text takes the place of the only field; for a template of several
    it is an input as it is.
    """
    if not isinstance(given, str):
      return self.fill(given, place)
    if len(self.fields) == 1:
      return self.fill({self.fields[0]: given}, place)
    require_text(given, place)
    return given

  def fill(self, record: Mapping[str, Any], place: str) -> str:
    """The model's input.

    Args:
      record: with all of its fields, each a text, a number or a truth value.
      place: of the record, for messages.

    Raises:
      UserError: a field is missing, null, no number, a list or an object, or
        is no text that UTF-8 can write.
    """
    texts = {}
    for field in self.fields:
      if field not in record:
        raise UserError(
          f'{place} has no field {field}, needed by the template'
          f' {self.pattern!r}; it has {", ".join(record)}'
        )
      value = record[field]
      plain = isinstance(value, str | int | float)
      if not plain or (isinstance(value, float) and not math.isfinite(value)):
        said = 'null' if value is None else repr(value)[:40]
        raise UserError(
          f'{place}: the field {field!r} is {said}, the template'
          f' {self.pattern!r} needs a text or a number'
        )
      texts[field] = str(value)
    text = self.pattern.format_map(texts)
    require_text(text, place)
    return text


def require_text(text: str, place: str) -> None:
  """UserError for half of a surrogate pair, which no file can hold."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{place} holds {text[error.start]!r}, half of a character (a lone'
      ' surrogate); mend the text'
    ) from None
