"""Tokenised text on disk and the pre-training objectives over it, in numpy.

A folder holds one flat stream of ids, memory-mapped when read:

  tokens.npy     [N] uint16 (int32 for 65,536 ids and more), every document
                 closed by EOS
  documents.npy  [D + 1] int64, the offset at which each document starts, and N
  spiece.model   the vocabulary that made the ids
  meta.json      its name, digest and size; number of tokens; digest of tokens;
                 layout: 'text', or 'pairs' where documents alternate between
                 an input and its target

Training cuts windows from a stream of text. An epoch is a seeded permutation of
its windows, whose borders move by a seeded offset from epoch to epoch, so batch
i is a function of (seed, i) alone: resuming at any batch costs nothing. The
same holds for pairs, whose windows are the pairs.

Objectives: T5's span corruption (Raffel et al. 2020, section 3.1.4), prefix
language modelling, T5's LM adaptation (Lester et al. 2021, section 3.1), and
text to text, over pairs, as in T5's supervised pre-training (Raffel et al.
2020, section 3.5).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError

OBJECTIVES = ('span_corruption', 'prefix_lm', 'text_to_text')
LAYOUTS = ('text', 'pairs')
SPLITS = ('train', 'validation')

_EOS = vocabularies.EOS_ID
_FILES = ('meta.json', 'tokens.npy', 'documents.npy', 'spiece.model')
# Distinguishes the random streams that one seed feeds.
_EPOCH_STREAM, _WINDOW_STREAM = 0, 1


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
    digest = hashlib.sha256()
    offsets = [0]
    with open(partial / 'tokens.npy', 'wb') as stream:
      # The length is known at the end: numpy pads headers to whole blocks, so
      # the true one fits in the place of this.
      header_size = _write_header(stream, dtype, 0)
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
        data = np.append(ids.astype(dtype), dtype.type(_EOS)).tobytes()
        stream.write(data)
        digest.update(data)
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
      stream.seek(0)
      if _write_header(stream, dtype, offsets[-1]) != header_size:
        raise AssertionError('the header of tokens.npy changed its size')
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
      'tokens_sha256': digest.hexdigest(),
    }
    (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return TokenArrays.open(folder)


def _write_header(stream, dtype: np.dtype, length: int) -> int:
  """Writes the .npy header of a vector and returns its size in bytes."""
  np.lib.format.write_array_header_1_0(
    stream,
    {
      'descr': np.lib.format.dtype_to_descr(dtype),
      'fortran_order': False,
      'shape': (length,),
    },
  )
  return stream.tell()


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
    folder = pathlib.Path(folder)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
      raise UserError(
        f'token arrays are {", ".join(_FILES)}; {folder} lacks '
        f'{", ".join(missing)}; write them with scripts/prepare_corpus.py'
      )
    try:
      meta = json.loads((folder / 'meta.json').read_text())
      expected = int(meta['tokens']), int(meta['documents']), meta['dtype']
      int(meta['vocabulary_size']), int(meta['extra_ids'])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{folder}/meta.json is not what prepare_corpus.py writes '
        f'({type(error).__name__}: {error}); write the folder again'
      ) from None
    tokens = _map(folder / 'tokens.npy')
    documents = _map(folder / 'documents.npy')
    if tokens.dtype.name != expected[2] or tokens.dtype.name not in (
      'uint16',
      'int32',
    ):
      raise UserError(
        f'{folder}/tokens.npy must be {expected[2]} (meta.json), it is '
        f'{tokens.dtype.name}; write the folder again'
      )
    if tokens.shape != (expected[0],) or documents.shape != (expected[1] + 1,):
      raise UserError(
        f'{folder} must hold {expected[0]} tokens and {expected[1]} documents '
        f'(meta.json), tokens.npy has shape {tokens.shape} and documents.npy '
        f'{documents.shape}; write the folder again'
      )
    if (
      documents.dtype != np.int64
      or documents[0] != 0
      or documents[-1] != len(tokens)
    ):
      raise UserError(
        f'{folder}/documents.npy must be int64 offsets from 0 to '
        f'{len(tokens)}, it is {documents.dtype.name} from {documents[0]} to '
        f'{documents[-1]}; write the folder again'
      )
    return cls(folder, tokens, documents, meta)

  @functools.cached_property
  def vocabulary(self) -> vocabularies.Vocabulary:
    """The vocabulary that made the ids."""
    vocabulary = vocabularies.load_vocabulary(
      self.folder / 'spiece.model', int(self.meta['extra_ids'])
    )
    if vocabulary.digest != self.meta['vocabulary_sha256']:
      raise UserError(
        f'{self.folder}/spiece.model is not the vocabulary that made the '
        'tokens (its digest differs from meta.json); write the folder again'
      )
    return vocabulary

  def verify(self) -> None:
    """Reads all tokens and compares their digest with meta.json's."""
    digest = hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()
    if digest != self.meta['tokens_sha256']:
      raise UserError(
        f'{self.folder}/tokens.npy has sha256 {digest}, meta.json says '
        f'{self.meta["tokens_sha256"]}; write the folder again'
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
    return (
      self.documents[: border + 1]
      if name == 'train'
      else self.documents[border:]
    )


def _map(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    reason = str(error).splitlines()[0] if str(error) else 'unreadable'
    raise UserError(
      f'{path} must be a whole numpy array, it is truncated or damaged '
      f'({reason}); write the folder again'
    ) from None


def span_corruption_lengths(
  window: int, noise_density: float = 0.15, mean_noise_span_length: float = 3.0
) -> tuple[int, int]:
  """Lengths of inputs and targets made of a window, sentinels and EOS included.

  Each noise span costs one sentinel in the inputs and one in the targets.
  """
  noise, spans = _noise_counts(window, noise_density, mean_noise_span_length)
  return window - noise + spans + 1, noise + spans + 1


def _noise_counts(
  window: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Numbers of noise tokens and of noise spans in a window of 2 or more."""
  noise = min(max(round(window * noise_density), 1), window - 1)
  spans = max(round(noise / mean_noise_span_length), 1)
  # Spans are divided by at least one token that is kept.
  return noise, min(spans, noise, window - noise)


def span_corruption_window(
  inputs_length: int,
  targets_length: int,
  noise_density: float = 0.15,
  mean_noise_span_length: float = 3.0,
) -> int:
  """The longest window whose inputs and targets fit, T5's rule for the first.

  T5's `random_spans_helper` gives 568 for inputs of 512 (targets need 114).
  """
  window = 1
  while True:
    inputs, targets = span_corruption_lengths(
      window + 1, noise_density, mean_noise_span_length
    )
    if inputs > inputs_length or targets > targets_length:
      break
    window += 1
  if window < 2:
    raise UserError(
      'span corruption needs inputs and targets of 3 or more, '
      f'TASK_FEATURE_LENGTHS has {inputs_length} and {targets_length}'
    )
  return window


def random_segmentation(
  rng: np.random.Generator, items: int, segments: int
) -> Int[np.ndarray, 'segments']:
  """Lengths of `segments` non-empty runs of `items`, all divisions alike."""
  cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
  return np.diff(cuts, prepend=0, append=items)


def span_corruption(
  rng: np.random.Generator,
  window: Int[np.ndarray, 'w'],
  first_sentinel: int,
  *,
  noise_density: float = 0.15,
  mean_noise_span_length: float = 3.0,
  sentinels: bool = True,
) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
  """T5's span corruption of a window of 2 or more ids, both sides with EOS.

  Inputs are the window with each noise span replaced by a sentinel, targets
  the noise spans, each behind its sentinel. Kept and noise runs alternate,
  starting with a kept one.

  Args:
    rng: numpy's generator.
    window: ids without EOS.
    first_sentinel: id of <extra_id_0>; the following count down.
    noise_density: share of the window that is noise.
    mean_noise_span_length: in tokens.
    sentinels: False drops noise from the inputs without a trace and
      concatenates it in the targets.
  """
  noise, spans = _noise_counts(
    len(window), noise_density, mean_noise_span_length
  )
  noise_lengths = random_segmentation(rng, noise, spans)
  kept_lengths = random_segmentation(rng, len(window) - noise, spans)
  lengths = np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1)
  is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
  ids = np.asarray(window, np.int32)
  if not sentinels:
    return np.append(ids[~is_noise], np.int32(_EOS)), np.append(
      ids[is_noise], np.int32(_EOS)
    )
  names = first_sentinel - np.arange(spans, dtype=np.int32)
  inputs = np.insert(ids[~is_noise], np.cumsum(kept_lengths), names)
  starts = np.cumsum(noise_lengths) - noise_lengths
  targets = np.insert(ids[is_noise], starts, names)
  return np.append(inputs, np.int32(_EOS)), np.append(targets, np.int32(_EOS))


def prefix_lm(
  rng: np.random.Generator,
  window: Int[np.ndarray, 'w'],
  inputs_length: int,
  targets_length: int,
) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
  """Splits a window at a random point: encoder reads on, decoder continues.

  The point is uniform among those that leave both sides non-empty and within
  their lengths. Both sides end with EOS, as T5's do: a model that never saw
  one after a few tokens has to be taught by every prompt to stop.
  """
  first = max(1, len(window) - (targets_length - 1))
  last = min(inputs_length - 1, len(window) - 1)
  point = int(rng.integers(first, last + 1))
  ids = np.asarray(window, np.int32)
  end = np.full(1, vocabularies.EOS_ID, np.int32)
  return np.append(ids[:point], end), np.append(ids[point:], end)


@dataclasses.dataclass(frozen=True)
class TokenArrayData:
  """Endless training batches from token arrays, for pre-training.

  Attributes:
    folder: token arrays, as `write_token_arrays` leaves them.
    objective: 'span_corruption' or 'prefix_lm' of text, 'text_to_text' of
      pairs, whose sides are cut to their lengths.
    batch_size: examples in a batch, B.
    task_feature_lengths: {'inputs': ..., 'targets': ...}, in tokens; inputs
      without the virtual tokens.
    split: 'train', or 'validation' for the documents held out.
    validation_fraction: share of the tokens, at the end of the stream, that
      is held out.
    noise_density: of span corruption.
    mean_noise_span_length: of span corruption, in tokens.
    sentinels: False leaves span corruption's sentinels out.
    window: tokens cut from the stream for an example. None takes the longest
      that fits for span corruption (568 for inputs 512 and targets 114) and
      the longer of inputs and targets, less EOS, for prefix LM. Pairs have no
      windows.
  """

  folder: str
  objective: str = 'span_corruption'
  batch_size: int = 32
  task_feature_lengths: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {'inputs': 512, 'targets': 114}
  )
  split: str = 'train'
  validation_fraction: float = 0.005
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  sentinels: bool = True
  window: int | None = None

  def __post_init__(self):
    for name, allowed in (('objective', OBJECTIVES), ('split', SPLITS)):
      if getattr(self, name) not in allowed:
        raise UserError(
          f'{name} must be one of {", ".join(allowed)}, got '
          f'{getattr(self, name)!r}'
        )
    lengths = self.task_feature_lengths
    if set(lengths) != {'inputs', 'targets'} or min(lengths.values()) < 1:
      raise UserError(
        'TASK_FEATURE_LENGTHS must give positive inputs and targets, got '
        f'{dict(lengths)}'
      )
    if self.batch_size < 1:
      raise UserError(f'batch_size must be 1 or more, got {self.batch_size}')
    if not 0.0 <= self.validation_fraction < 1.0:
      raise UserError(
        f'validation_fraction must be in [0, 1), got {self.validation_fraction}'
      )
    if not 0.0 < self.noise_density < 1.0 or self.mean_noise_span_length < 1:
      raise UserError(
        'noise_density must be in (0, 1) and mean_noise_span_length 1 or '
        f'more, got {self.noise_density} and {self.mean_noise_span_length}'
      )
    layout = 'pairs' if self.objective == 'text_to_text' else 'text'
    if self.arrays.layout != layout:
      raise UserError(
        f'objective {self.objective} needs token arrays of {layout}, '
        f'{self.folder} holds {self.arrays.layout}; write them with '
        'scripts/prepare_corpus.py --'
        f'{"pairs" if layout == "pairs" else "texts"}'
      )
    if layout == 'text':
      self._check_window()

  @functools.cached_property
  def arrays(self) -> TokenArrays:
    """The opened folder."""
    return TokenArrays.open(self.folder)

  @property
  def vocabulary(self) -> str:
    """Path of the vocabulary that made the ids."""
    return self.arrays.vocabulary.path

  def class_labels(self) -> None:
    """Running text has no classes."""
    return None

  @functools.cached_property
  def window_length(self) -> int:
    """Tokens cut from the stream for an example."""
    if self.window is not None:
      return self.window
    inputs = self.task_feature_lengths['inputs']
    targets = self.task_feature_lengths['targets']
    if self.objective == 'prefix_lm':
      return max(inputs, targets, 3) - 1
    return span_corruption_window(
      inputs, targets, self.noise_density, self.mean_noise_span_length
    )

  def _check_window(self) -> None:
    inputs = self.task_feature_lengths['inputs']
    targets = self.task_feature_lengths['targets']
    window = self.window_length
    if window < 2:
      raise UserError(f'window must be 2 or more, got {window}')
    if self.objective == 'prefix_lm':
      needed = (inputs, targets)
      fits = window <= inputs + targets - 2 and min(needed) > 1
    else:
      needed = span_corruption_lengths(
        window, self.noise_density, self.mean_noise_span_length
      )
      fits = needed[0] <= inputs and needed[1] <= targets
    if not fits:
      raise UserError(
        f'a window of {window} tokens does not fit inputs {inputs} and targets '
        f'{targets} of TASK_FEATURE_LENGTHS (needs {needed[0]} and '
        f'{needed[1]}); give a shorter window or none'
      )
    _, spans = _noise_counts(
      window, self.noise_density, self.mean_noise_span_length
    )
    extra_ids = int(self.arrays.meta['extra_ids'])
    if (
      self.objective == 'span_corruption'
      and self.sentinels
      and spans > extra_ids
    ):
      raise UserError(
        f'a window of {window} tokens has {spans} noise spans, the vocabulary '
        f'has {extra_ids} sentinels; give shorter TASK_FEATURE_LENGTHS'
      )

  @functools.cached_property
  def _documents(self) -> Int[np.ndarray, 'documents']:
    documents = self.arrays.split(self.split, self.validation_fraction)
    tokens = int(documents[-1] - documents[0])
    needed = 2 if self.objective == 'text_to_text' else self.window_length
    if tokens < needed:
      raise UserError(
        f'split {self.split} of {self.folder} has {tokens} tokens, an '
        f'example needs {needed}; give more text, shorter '
        'TASK_FEATURE_LENGTHS or another validation_fraction'
      )
    return documents

  @functools.cached_property
  def _stream(self) -> Int[np.ndarray, 'tokens']:
    return self.arrays.tokens[self._documents[0] : self._documents[-1]]

  @functools.cached_property
  def examples_per_epoch(self) -> int:
    """Windows or pairs in one pass over the split."""
    if self.objective == 'text_to_text':
      return len(self._documents) // 2
    # A window less than would fit, so that the borders can move.
    length = self.window_length
    return max((len(self._stream) - length + 1) // length, 1)

  def _epoch(
    self, seed: int, epoch: int
  ) -> tuple[int, Int[np.ndarray, 'windows']]:
    """An epoch's offset in the stream and its order of windows or pairs."""
    rng = np.random.default_rng((_EPOCH_STREAM, seed, epoch))
    windows, offset = self.examples_per_epoch, 0
    if self.objective != 'text_to_text':
      spare = len(self._stream) - windows * self.window_length
      offset = int(rng.integers(min(spare + 1, self.window_length)))
    return offset, rng.permutation(windows)

  def _pair(
    self, number: int
  ) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
    """Input and target of a pair of the split, cut to their lengths."""
    sides = []
    for which, name in enumerate(('inputs', 'targets')):
      begin, end = self._documents[2 * number + which :][:2]
      end = min(end - 1, begin + self.task_feature_lengths[name] - 1)
      ids = np.asarray(self.arrays.tokens[begin:end], np.int32)
      sides.append(np.append(ids, np.int32(_EOS)))
    return sides[0], sides[1]

  def example(
    self, window: Int[np.ndarray, 'w'], rng: np.random.Generator
  ) -> tuple[Int[np.ndarray, 'inputs'], Int[np.ndarray, 'targets']]:
    """Encoder ids and decoder targets made of a window, unpadded."""
    if self.objective == 'prefix_lm':
      return prefix_lm(
        rng,
        window,
        self.task_feature_lengths['inputs'],
        self.task_feature_lengths['targets'],
      )
    # A target holds one EOS, its last: borders of documents leave no mark, as
    # in T5's pre-training.
    text = window[window != _EOS]
    if len(text) < 2:
      return np.array([_EOS], np.int32), np.array([_EOS], np.int32)
    return span_corruption(
      rng,
      text,
      int(self.arrays.meta['vocabulary_size']) - 1,
      noise_density=self.noise_density,
      mean_noise_span_length=self.mean_noise_span_length,
      sentinels=self.sentinels,
    )

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None = None,
    seed: int = 0,
    start: int = 0,
    rows: Int[np.ndarray, 'r'] | None = None,
    num_shards: int = 1,
  ) -> Iterator[dict[str, Int[np.ndarray, 'r length']]]:
    """Batches from number `start` on, without end.

    Args:
      virtual_tokens: placed in each row; T is P + inputs length then.
      seed: of the order and of the noise.
      start: number of batches that were consumed already.
      rows: numbers of the rows of each batch to make; None: all B.
      num_shards: changes nothing, since every row is read by itself.

    Yields:
      T5X's features, int32: encoder_input_tokens [r, T], and
      decoder_input_tokens, decoder_target_tokens and decoder_loss_weights
      [r, L]. Row j of batch i depends on (seed, i, j) alone.
    """
    del num_shards
    if rows is None:
      rows = np.arange(self.batch_size)
    inputs_length = self.task_feature_lengths['inputs']
    if virtual_tokens is not None:
      inputs_length += virtual_tokens.length
    targets_length = self.task_feature_lengths['targets']
    windows = self.examples_per_epoch
    current, offset, order = -1, 0, None
    for first in range(start * self.batch_size, 2**62, self.batch_size):
      encoder = np.zeros((len(rows), inputs_length), np.int32)
      targets = np.zeros((len(rows), targets_length), np.int32)
      weights = np.zeros_like(targets)
      for row, number in enumerate(rows.tolist()):
        epoch, position = divmod(first + number, windows)
        if epoch != current:
          current, (offset, order) = epoch, self._epoch(seed, epoch)
        if self.objective == 'text_to_text':
          source, target = self._pair(int(order[position]))
        else:
          begin = offset + int(order[position]) * self.window_length
          source, target = self.example(
            self._stream[begin : begin + self.window_length],
            np.random.default_rng((_WINDOW_STREAM, seed, first + number)),
          )
        if virtual_tokens is not None:
          source = virtual_tokens.place(source, virtual_tokens.ids())
        encoder[row, : len(source)] = source
        targets[row, : len(target)] = target
        weights[row, : len(target)] = 1
      # Padding's id 0 also starts the decoder, as in T5.
      decoder_inputs = np.zeros_like(targets)
      decoder_inputs[:, 1:] = targets[:, :-1]
      yield {
        'encoder_input_tokens': encoder,
        'decoder_input_tokens': decoder_inputs,
        'decoder_target_tokens': targets,
        'decoder_loss_weights': weights,
      }
