#!/usr/bin/env python3
"""Text files to a SentencePiece vocabulary and token arrays for pre-training.

Reads .txt, .gz and .xz with a paragraph a line. An empty line ends a
document; in a file without empty lines, every 30 paragraphs are one. Trains a
unigram vocabulary (pad 0, EOS 1, unknown 2, no BOS) unless one is given, and
writes the folder that `prompt_tuning.data.token_arrays.TokenArrays` opens.
Documents of all files are shuffled with a fixed seed. --pairs takes files with
a pair a line instead, input and target with a tab between, for the objective
text_to_text.

  scripts/prepare_corpus.py --texts books.txt.xz modern.txt --shares 0.5 1 \
      --train_vocabulary spiece.model --output arrays
  scripts/prepare_corpus.py --texts more.txt --vocabulary t5_1_1_mini \
      --output more_arrays
  scripts/prepare_corpus.py --pairs pairs.tsv --vocabulary t5_1_1_mini \
      --output pair_arrays
"""

import argparse
from collections.abc import Iterator
import gzip
import itertools
import lzma
import os
import pathlib
import sys
import time

import numpy as np
import sentencepiece

from prompt_tuning.data import token_arrays
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError

# Characters that are pieces whatever the text: printable ASCII, and the signs
# and accented letters of English newspapers.
_REQUIRED = (
  ''.join(map(chr, range(33, 127))) + '£€–—‘’“”°áàâäãåçèéêëíîïñóôöøúûüßÉÖÜ'
)
# A document longer than this is cut: shuffling then mixes the sources well.
_MOST_PARAGRAPHS = 60


def read_documents(
  path: str, paragraphs_per_document: int = 30
) -> Iterator[list[str]]:
  """Documents of a text file, each a list of paragraphs."""
  bordered, document = False, []
  for line in _lines(path):
    line = ' '.join(line.split())
    if line:
      document.append(line)
    else:
      bordered = True
    most = _MOST_PARAGRAPHS if bordered else paragraphs_per_document
    if document and (not line or len(document) >= most):
      yield document
      document = []
  if document:
    yield document


def _lines(path: str) -> Iterator[str]:
  """Lines of a text file, compressed or not."""
  opener = {'.gz': gzip.open, '.xz': lzma.open}.get(
    pathlib.Path(path).suffix, open
  )
  try:
    with opener(path, 'rt', encoding='utf-8') as lines:
      yield from lines
  except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
    raise UserError(
      f'a UTF-8 text file (.txt, .gz, .xz) is required, {path} cannot be read '
      f'({getattr(error, "strerror", None) or error})'
    ) from None


def chosen_documents(
  paths: list[str],
  shares: list[float],
  paragraphs_per_document: int,
  seed: int,
) -> list[str]:
  """All documents in shuffled order, each as one line of text.

  A share of 0.5 keeps a random half of a file's documents, 2 takes each twice.
  """
  rng = np.random.default_rng(seed)
  texts = []
  for path, share in zip(paths, shares, strict=True):
    found, kept = 0, 0
    for document in read_documents(path, paragraphs_per_document):
      text = ' '.join(document)
      copies = int(share) + int(rng.random() < share % 1)
      found += len(text)
      kept += copies * len(text)
      texts.extend([text] * copies)
    _say(f'{path}: {found / 1e6:.1f} million characters, {kept / 1e6:.1f} kept')
  if not texts:
    raise UserError(f'text is required, {", ".join(paths)} has none')
  return [texts[i] for i in rng.permutation(len(texts))]


def chosen_pairs(paths: list[str], seed: int) -> list[str]:
  """Inputs and targets of all files in turn, pairs in shuffled order."""
  pairs = []
  for path in paths:
    for number, line in enumerate(_lines(path), start=1):
      sides = [side.strip() for side in line.split('\t')]
      if len(sides) != 2 or not all(sides):
        raise UserError(
          f'{path}, line {number}: an input and a target with one tab between '
          f'are required, got {line.strip()[:60]!r}'
        )
      pairs.append(sides)
  if not pairs:
    raise UserError(f'pairs are required, {", ".join(paths)} has none')
  order = np.random.default_rng(seed).permutation(len(pairs))
  return [side for i in order for side in pairs[i]]


def train_vocabulary(
  documents: list[str],
  output: str,
  pieces: int,
  sentences: int,
  seed: int,
  threads: int,
) -> None:
  """Trains a cased unigram vocabulary and writes its model file.

  Args:
    documents: shuffled; `sentences` pieces of text of a few hundred
      characters are taken from them.
    output: the model file to write.
    pieces: rows without the sentinels.
    sentences: how many pieces of text to train on.
    seed: of SentencePiece's random choices.
    threads: of the training.
  """
  lines = itertools.islice(
    (text[i : i + 400] for text in documents for i in range(0, len(text), 400)),
    sentences,
  )
  path = pathlib.Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + '.partial')
  sentencepiece.set_random_generator_seed(seed)
  try:
    with open(partial, 'wb') as model:
      sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines,
        model_writer=model,
        model_type='unigram',
        vocab_size=pieces,
        pad_id=vocabularies.PAD_ID,
        eos_id=vocabularies.EOS_ID,
        unk_id=vocabularies.UNK_ID,
        bos_id=-1,
        # Of few pieces, none go to the numbers that a text happens to have.
        split_digits=True,
        character_coverage=0.9998,
        required_chars=_REQUIRED,
        num_threads=threads,
        minloglevel=1,
      )
    partial.rename(path)
  except (RuntimeError, OSError) as error:
    reason = str(error).splitlines()[0] if str(error) else 'no reason given'
    raise UserError(
      f'a vocabulary of {pieces} pieces could not be trained ({reason}); give '
      'more text or fewer --pieces'
    ) from None
  finally:
    partial.unlink(missing_ok=True)


def encoded(
  documents: list[str], vocabulary: vocabularies.Vocabulary
) -> Iterator[list[int]]:
  """Ids of each document, encoded a thousand at a time."""
  for first in range(0, len(documents), 1000):
    yield from vocabulary.encode_batch(documents[first : first + 1000])


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
  """The command line."""
  result = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = result.add_argument
  what = result.add_mutually_exclusive_group(required=True)
  what.add_argument('--texts', nargs='+', help='text files')
  what.add_argument('--pairs', nargs='+', help='files of tab-separated pairs')
  add(
    '--shares',
    nargs='+',
    type=float,
    help='for each text, how much of it to take: 0.5 half of the documents, '
    '2 each twice (default: 1 for all)',
  )
  add('--output', help='folder for the token arrays; must be new')
  which = result.add_mutually_exclusive_group(required=True)
  which.add_argument(
    '--vocabulary', help='SentencePiece model or bundled name to use'
  )
  which.add_argument(
    '--train_vocabulary', help='SentencePiece model to train and write'
  )
  add(
    '--pieces',
    type=int,
    default=8092,
    help='pieces of a trained vocabulary, without the 100 sentinels '
    '(default 8092: 8192 rows)',
  )
  add(
    '--sentences',
    type=int,
    default=150_000,
    help='texts of 400 characters to train the vocabulary on '
    '(default 150,000, a few minutes)',
  )
  add(
    '--paragraphs_per_document',
    type=int,
    default=30,
    help='in files without empty lines (default 30)',
  )
  add('--seed', type=int, default=0, help='of shuffling (default 0)')
  add(
    '--threads',
    type=int,
    default=os.cpu_count() or 1,
    help='for training the vocabulary (default: all cores)',
  )
  return result


def prepare(arguments: argparse.Namespace) -> None:
  """Does what the command line says; UserError for the user's faults."""
  texts = arguments.texts or []
  shares = arguments.shares or [1.0] * len(texts)
  if len(shares) != len(texts) or min(shares, default=0) < 0:
    raise UserError(
      f'--shares needs a number of 0 or more for each of the {len(texts)} '
      f'--texts, got {shares}'
    )
  if arguments.output and pathlib.Path(arguments.output).exists():
    raise UserError(
      f'--output must be a new folder, {arguments.output} exists; name '
      'another or remove it'
    )
  if arguments.pairs:
    documents = chosen_pairs(arguments.pairs, arguments.seed)
  else:
    documents = chosen_documents(
      texts, shares, arguments.paragraphs_per_document, arguments.seed
    )
  started = time.monotonic()
  if arguments.train_vocabulary:
    train_vocabulary(
      documents,
      arguments.train_vocabulary,
      arguments.pieces,
      arguments.sentences,
      arguments.seed,
      arguments.threads,
    )
    _say(f'vocabulary: {time.monotonic() - started:.0f} s')
  vocabulary = vocabularies.load_vocabulary(
    arguments.vocabulary or arguments.train_vocabulary
  )
  if arguments.output:
    arrays = token_arrays.write_token_arrays(
      arguments.output,
      encoded(documents, vocabulary),
      vocabulary,
      name=arguments.vocabulary or arguments.train_vocabulary,
      layout='pairs' if arguments.pairs else 'text',
    )
    _say(
      f'{arguments.output}: {len(arrays.tokens):,} tokens in '
      f'{len(documents):,} documents, {time.monotonic() - started:.0f} s'
    )


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 1 with a line on standard error."""
  arguments = parser().parse_args(argv)
  try:
    prepare(arguments)
  except UserError as error:
    _say(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
