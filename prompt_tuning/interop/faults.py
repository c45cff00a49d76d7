"""Faults of reading and writing others' formats, in one line each."""

from collections.abc import Iterator
import contextlib
from typing import Any

from prompt_tuning import files
from prompt_tuning.errors import UserError


@contextlib.contextmanager
def reading(what: Any, kind: str = 'of another kind') -> Iterator[None]:
  """Whatever is wrong with the bytes of a file becomes a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # json, msgpack, numpy, torch have kinds of theirs
    raise UserError(
      f'cannot read {what} ({files.reason(error)}); it is damaged or {kind}, '
      'get it again'
    ) from error


@contextlib.contextmanager
def writing(folder: Any) -> Iterator[None]:
  """A disk that is full, or not ours to write to, becomes a UserError."""
  try:
    yield
  except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
    raise UserError(
      f'cannot write {folder}: {files.reason(error)}; free the disk or choose'
      ' another folder'
    ) from error
