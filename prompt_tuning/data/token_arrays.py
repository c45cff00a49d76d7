"""Tokenised text on disk, in numpy.

A folder holds one flat stream of ids, memory-mapped when read:

  tokens.npy     [N] uint16 (int32 for 65,536 ids and more), every document
                 closed by EOS
  documents.npy  [D + 1] int64, the offset at which each document starts, and N
  spiece.model   the vocabulary that made the ids
  meta.json      its name, digest and size; number of tokens; digest of tokens;
                 layout: 'text', or 'pairs' where documents alternate between
                 an input and its target
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil

from jaxtyping import Int
import numpy as np

from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError

_EOS = vocabularies.EOS_ID
_FILES = ('meta.json', 'tokens.npy', 'documents.npy', 'spiece.model')


def write_token_arrays(
  folder: str | pathlib.Path,
  documents: Iterable[Sequence[int]],
  vocabulary: vocabularies.Vocabulary,
  *,
  name: str | None = None,
  layout: str = 'text',
) -> 'TokenArrays':
  """Writes documents as token arrays and opens them.

  The folder appears only once it is complete; an existing one is refused.

  Args:
    folder: where to write.
    documents: ids of each document without EOS, which is added here. Empty
      documents are left out, of pairs they are an error.
    vocabulary: made the ids; its model file is copied into the folder.
    name: what meta.json calls the vocabulary; its file's path when None.
    layout: 'text', or 'pairs' for an input and its target in turn.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise UserError(
      f'token arrays need a new folder, {folder} exists; name another or '
      'remove it'
    )
  dtype = np.dtype(np.uint16 if vocabulary.size < 65536 else np.int32)
  partial = folder.with_name(f'{folder.name}.partial-{os.getpid()}')
  partial.mkdir(parents=True)
  try:
    offsets = [0]
    raw = partial / 'tokens'
    with open(raw, 'wb') as stream:
      for document in documents:
        ids = np.asarray(document)
        if not len(ids):
          if layout == 'pairs':
            raise UserError(
              'a pair needs an input and a target of one token or more, '
              f'document {len(offsets) - 1} is empty; leave its pair out'
            )
          continue
        if ids.min() < 0 or ids.max() >= vocabulary.size:
          raise UserError(
            f'ids from 0 to {vocabulary.size - 1} are required by the '
            f'vocabulary, document {len(offsets) - 1} has {ids.min()} to '
            f'{ids.max()}; encode with the vocabulary given'
          )
        stream.write(np.append(ids, _EOS).astype(dtype).tobytes())
        offsets.append(offsets[-1] + len(ids) + 1)
    if len(offsets) == 1:
      raise UserError(
        f'at least one document with text is required, none came for {folder}'
      )
    if layout == 'pairs' and len(offsets) % 2 == 0:
      raise UserError(
        f'pairs need a target for every input, {len(offsets) - 1} documents '
        'are an odd number'
      )
    tokens = np.memmap(raw, dtype, mode='r')
    np.save(partial / 'tokens.npy', tokens)
    raw.unlink()
    np.save(partial / 'documents.npy', np.asarray(offsets, np.int64))
    shutil.copyfile(vocabulary.path, partial / 'spiece.model')
    meta = {
      'vocabulary': name or vocabulary.path,
      'vocabulary_size': vocabulary.size,
      'vocabulary_sha256': vocabulary.digest,
      'extra_ids': vocabulary.extra_ids,
      'tokens': offsets[-1],
      'documents': len(offsets) - 1,
      'dtype': dtype.name,
      'layout': layout,
      'tokens_sha256': hashlib.sha256(tokens).hexdigest(),
    }
    (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return TokenArrays.open(folder)


def _damaged(said: str) -> UserError:
  return UserError(f'{said}; write the folder again')


@dataclasses.dataclass(frozen=True)
class TokenArrays:
  """An opened folder of token arrays.

  Attributes:
    folder: where the files are.
    tokens: [N], memory-mapped.
    documents: [D + 1], memory-mapped.
    meta: what meta.json says.
  """

  folder: pathlib.Path
  tokens: Int[np.ndarray, 'N']
  documents: Int[np.ndarray, 'documents']
  meta: Mapping[str, object]

  @classmethod
  def open(cls, folder: str | pathlib.Path) -> 'TokenArrays':
    """Maps the files; one line of UserError where they do not fit together."""
    folder = pathlib.Path(folder).expanduser()
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
      raise UserError(
        f'token arrays are {", ".join(_FILES)}; {folder} lacks '
        f'{", ".join(missing)}; write them with scripts/prepare_corpus.py'
      )
    try:
      meta = json.loads((folder / 'meta.json').read_text())
      count, borders = int(meta['tokens']), int(meta['documents']) + 1
      dtype = meta['dtype']
      int(meta['vocabulary_size']), int(meta['extra_ids'])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise _damaged(
        f'{folder}/meta.json is not what prepare_corpus.py writes '
        f'({type(error).__name__}: {error})'
      ) from None
    tokens = _map(folder / 'tokens.npy')
    documents = _map(folder / 'documents.npy')
    found = tokens.dtype.name
    if found != dtype or found not in ('uint16', 'int32'):
      raise _damaged(
        f'{folder}/tokens.npy must be {dtype} (meta.json), it is {found}'
      )
    if tokens.shape != (count,) or documents.shape != (borders,):
      raise _damaged(
        f'{folder} must hold {count} tokens and {borders - 1} documents '
        f'(meta.json), tokens.npy has shape {tokens.shape} and documents.npy '
        f'{documents.shape}'
      )
    ends = documents[0], documents[-1]
    if documents.dtype != np.int64 or ends != (0, count):
      raise _damaged(
        f'{folder}/documents.npy must be int64 offsets from 0 to {count}, it '
        f'is {documents.dtype.name} from {ends[0]} to {ends[1]}'
      )
    return cls(folder, tokens, documents, meta)

  @functools.cached_property
  def vocabulary(self) -> vocabularies.Vocabulary:
    """The vocabulary that made the ids."""
    vocabulary = vocabularies.load_vocabulary(
      self.folder / 'spiece.model', int(self.meta['extra_ids'])
    )
    if vocabulary.digest != self.meta['vocabulary_sha256']:
      raise _damaged(
        f'{self.folder}/spiece.model is not the vocabulary that made the '
        'tokens (its digest differs from meta.json)'
      )
    return vocabulary

  def verify(self) -> None:
    """Reads all tokens and compares their digest with meta.json's."""
    digest = hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()
    if digest != self.meta['tokens_sha256']:
      raise _damaged(
        f'{self.folder}/tokens.npy has sha256 {digest}, meta.json says '
        f'{self.meta["tokens_sha256"]}'
      )

  @property
  def layout(self) -> str:
    """'text' or 'pairs'."""
    return str(self.meta.get('layout', 'text'))

  def split(
    self, name: str, validation_fraction: float
  ) -> Int[np.ndarray, 'documents']:
    """Offsets of the documents without ('train') or of ('validation') the last.

    The border is the first start of a document (of a pair) past 1 -
    validation_fraction of the tokens; documents are shuffled when they are
    written.

    Returns:
      The offset at which each document of the split starts, and its end.
    """
    border = (1.0 - validation_fraction) * len(self.tokens)
    border = int(np.searchsorted(self.documents, border))
    if self.layout == 'pairs':
      border += border % 2
    train, validation = self.documents[: border + 1], self.documents[border:]
    return train if name == 'train' else validation


def _map(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    reason = str(error).splitlines()[0] if str(error) else 'unreadable'
    raise _damaged(
      f'{path} must be a whole numpy array, it is truncated or damaged '
      f'({reason})'
    ) from None
