"""T5's vocabularies, SentencePiece or bytes: pad 0, EOS 1, sentinels on top.

TensorFlow is not needed here: `Vocabulary` encodes and decodes with the
sentencepiece package; `Vocabulary.seqio()` builds seqio's own (which imports
TensorFlow) for the task pipelines. Both give the same ids.
"""

from collections.abc import Iterable, Sequence
import contextlib
import functools
import hashlib
import json
import pathlib
from typing import Any

import sentencepiece

from prompt_tuning import files
from prompt_tuning.errors import UserError

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
EXTRA_IDS = 100

_BUNDLED = pathlib.Path(__file__).resolve().parent.parent / 'bundled'
_MODEL_FILE = 'spiece.model'
# The name of ByT5's vocabulary, which needs no file.
BYTES = 'byt5'


_FIRST_SENTINEL = '▁<extra_id_0>'


def _sentinel_piece(number: int) -> bytes:
  """A serialised `pieces` entry of SentencePiece's ModelProto.

  Fields (sentencepiece_model.proto): pieces = 1, in it piece = 1, score = 2,
  type = 3, where type 4 is USER_DEFINED: matched in the text before all else.
  """
  piece = f'▁<extra_id_{number}>'.encode()
  body = b'\x0a' + bytes([len(piece)]) + piece
  body += b'\x15\x00\x00\x00\x00' + b'\x18\x04'
  return b'\x0a' + bytes([len(body)]) + body


class Vocabulary:
  """A SentencePiece model plus T5's sentinels <extra_id_N> at its end.

  Attributes:
    path: the model file.
    size: number of ids, sentinels included; the embedding table has at least
      as many rows.
    extra_ids: number of sentinels. <extra_id_0> is id size - 1, counting down.
  """

  pad_id = PAD_ID
  eos_id = EOS_ID
  unk_id = UNK_ID

  def __init__(self, path: str | pathlib.Path, extra_ids: int = EXTRA_IDS):
    """Reads the model; UserError where the file is missing or no such model."""
    self.path = str(path)
    self.extra_ids = extra_ids
    self._seqio = None
    try:
      serialised = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise UserError(
        f'a SentencePiece model is required, {path} cannot be read '
        f'({error.strerror}); give the path of a spiece.model'
      ) from None
    self.digest = hashlib.sha256(serialised).hexdigest()
    # Concatenated protocol buffers merge: the sentinels follow the pieces. In
    # descending order, so that <extra_id_0> gets the last id, as in T5. mT5's
    # model has its own there.
    with_sentinels = serialised + b''.join(
      map(_sentinel_piece, reversed(range(extra_ids)))
    )
    self._has_sentinels = _FIRST_SENTINEL.encode() in serialised
    try:
      self._processor = sentencepiece.SentencePieceProcessor(
        model_proto=serialised if self._has_sentinels else with_sentinels
      )
      self.size = self._processor.GetPieceSize()
    except (RuntimeError, OSError):
      self.size = 0
    if self.size <= extra_ids:
      raise UserError(
        f'a SentencePiece model is required, {path} is not one; give the path '
        'of a spiece.model'
      )
    found = {
      'pad': self._processor.pad_id(),
      'EOS': self._processor.eos_id(),
      'unknown': self._processor.unk_id(),
    }
    if list(found.values()) != [PAD_ID, EOS_ID, UNK_ID]:
      raise UserError(
        f"T5's vocabularies have pad {PAD_ID}, EOS {EOS_ID} and unknown "
        f'{UNK_ID}, {path} has {found}; train one with --pad_id=0 --eos_id=1 '
        '--unk_id=2'
      )

  def __reduce__(self):
    return (type(self), (self.path, self.extra_ids))

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without EOS."""
    return self._processor.EncodeAsIds(text)

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """Ids of many texts, without EOS; faster than one by one."""
    return self._processor.EncodeAsIds(list(texts))

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids up to the first EOS.

    Padding and ids outside the vocabulary (virtual tokens, rows that only
    round the embedding table up) are dropped: they never reach the
    detokeniser.
    """
    kept = []
    for token in ids:
      token = int(token)
      if token == EOS_ID:
        break
      if PAD_ID < token < self.size:
        kept.append(token)
    return self._processor.DecodeIds(kept)

  def sentinel(self, number: int) -> int:
    """Id of <extra_id_number>."""
    if not 0 <= number < self.extra_ids:
      raise UserError(
        f'the vocabulary {self.path} has {self.extra_ids} sentinels, counted '
        f'from 0, sentinel {number} was asked for'
      )
    return self.size - 1 - number

  def piece(self, token: int) -> str:
    """The piece of an id, as SentencePiece writes it (▁ for a space)."""
    _check_id(self, token)
    return self._processor.IdToPiece(int(token))

  def seqio(self):
    """The same vocabulary for seqio tasks; imports seqio and TensorFlow."""
    import seqio

    if self._seqio is None:  # its model is read once for all tasks
      added = 0 if self._has_sentinels else self.extra_ids
      self._seqio = seqio.SentencePieceVocabulary(self.path, added)
    return self._seqio


class ByteVocabulary:
  """ByT5's: the bytes of UTF-8 text from id 3 on; mirrors `Vocabulary`.

  There are no further ids for sentinels: they are the highest bytes, which
  UTF-8 never uses, as in T5X's ByT5 (Xue et al. 2022).
  """

  pad_id = PAD_ID
  eos_id = EOS_ID
  unk_id = UNK_ID
  path = BYTES
  size = 3 + 256
  extra_ids = 0
  digest = hashlib.sha256(BYTES.encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without EOS."""
    return [byte + 3 for byte in text.encode('utf-8')]

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """Ids of many texts, without EOS."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids up to the first EOS; what is no byte of UTF-8 is dropped."""
    kept = bytearray()
    for token in ids:
      token = int(token)
      if token == EOS_ID:
        break
      if 3 <= token < self.size:
        kept.append(token - 3)
    return kept.decode('utf-8', errors='ignore')

  def sentinel(self, number: int) -> int:
    """Id of the sentinel of this number, counting down from the last id."""
    return self.size - 1 - number

  def piece(self, token: int) -> str:
    """How a byte is written: the character or <0xNN>."""
    _check_id(self, token)
    byte = token - 3
    return chr(byte) if 32 <= byte < 127 else f'<0x{max(byte, 0):02x}>'

  def seqio(self):
    """The same vocabulary for seqio tasks; imports seqio and TensorFlow."""
    import seqio

    return seqio.ByteVocabulary()


def label_pieces(
  vocabulary: Any, labels: Sequence[str], who: str
) -> list[list[int]]:
  """The ids of labels, without EOS: the one look at what labels are.

  Args:
    vocabulary: ours or seqio's.
    labels: words that the model answers with.
    who: has them, for messages: 'task bbc_topics'.

  Raises:
    UserError: fewer than two, no texts, empty or equal ones, or some that the
      vocabulary cannot write so that they come back.
  """
  if isinstance(labels, str) or len(labels) < 2:
    raise UserError(f'{who}: labels needs two strings or more, got {labels!r}')
  rows = []
  for number, label in enumerate(labels):
    if not isinstance(label, str) or not label.strip():
      raise UserError(f'{who}: labels are words, got {label!r}')
    if label in labels[:number]:
      raise UserError(f'{who}: the label {label!r} is given twice')
    row = list(vocabulary.encode(label))
    if row in rows:
      other = labels[rows.index(row)]
      raise UserError(
        f'{who}: the vocabulary writes the labels {other!r} and {label!r}'
        ' alike; choose other labels'
      )
    if (written := vocabulary.decode(row)) != label:
      raise UserError(
        f'the vocabulary cannot write the label {label!r} of {who}: it comes'
        f' back as {written!r}; choose other labels'
      )
    rows.append(row)
  return rows


def _check_id(vocabulary: Vocabulary | ByteVocabulary, token: int) -> None:
  if not 0 <= token < vocabulary.size:
    raise UserError(
      f'the vocabulary {vocabulary.path} has {vocabulary.size} ids, id {token} '
      'was asked for'
    )


def bundled_vocabularies() -> list[str]:
  """Names of the vocabularies that the package brings."""
  return sorted(file.parent.name for file in _BUNDLED.glob(f'*/{_MODEL_FILE}'))


def load_vocabulary(
  path: str | pathlib.Path, extra_ids: int = EXTRA_IDS
) -> Vocabulary | ByteVocabulary:
  """The vocabulary of a model file, a folder with one, or a bundled name.

  Args:
    path: a SentencePiece model; a folder that holds a spiece.model, or a
      Hugging Face ByT5; the name of a bundled vocabulary, such as
      't5_1_1_mini'; or 'byt5' for bytes.
    extra_ids: number of sentinels (T5 and mT5: 100), which are added where the
      model does not end with its own, as mT5's does.
  """
  if path == BYTES:
    return ByteVocabulary()
  given = pathlib.Path(files.place(path))
  bundled = _BUNDLED / str(path) / _MODEL_FILE
  if _says_bytes(given / 'tokenizer_config.json'):
    return ByteVocabulary()
  if given.is_file():
    return _load(str(given.resolve()), extra_ids)
  if (given / _MODEL_FILE).is_file():
    return _load(str((given / _MODEL_FILE).resolve()), extra_ids)
  if bundled.is_file():
    return _load(str(bundled), extra_ids)
  names = ', '.join(bundled_vocabularies()) or 'none'
  raise UserError(
    f'vocabulary {path!s} is neither a SentencePiece model file nor a bundled '
    f'name (bundled: {names}; or {BYTES} for bytes); give the path of a '
    'spiece.model'
  )


def digest_beside(path: str | pathlib.Path) -> str | None:
  """The digest of the vocabulary beside a model; None where there is none.

  Args:
    path: the model's: a bundled name, a file or a folder.
  """
  given = pathlib.Path(path).expanduser()
  folder = given.parent if given.is_file() else given
  for file in (folder / _MODEL_FILE, _BUNDLED / str(path) / _MODEL_FILE):
    with contextlib.suppress(OSError):
      return hashlib.sha256(file.read_bytes()).hexdigest()
  if _says_bytes(folder / 'tokenizer_config.json'):
    return ByteVocabulary.digest
  return None


def _says_bytes(tokenizer_config: pathlib.Path) -> bool:
  """True for Hugging Face's configuration of ByT5's tokenizer."""
  with contextlib.suppress(OSError, ValueError, AttributeError):
    config = json.loads(tokenizer_config.read_text('utf-8'))
    return config.get('tokenizer_class') == 'ByT5Tokenizer'
  return False


@functools.lru_cache(maxsize=8)
def _load(path: str, extra_ids: int) -> Vocabulary:
  return Vocabulary(path, extra_ids)
