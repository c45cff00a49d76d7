#!/usr/bin/env python3
"""Text files to a SentencePiece vocabulary and token arrays for pre-training.

Reads .txt and .xz with a paragraph a line. An empty line ends a document; in a
file without empty lines, every 30 paragraphs are one. Trains a unigram
vocabulary (pad 0, EOS 1, unknown 2, no BOS) unless one is given, and writes the
folder that `prompt_tuning.data.token_arrays.TokenArrays` opens. Documents of
all files are shuffled with a fixed seed. --pairs takes a file with a pair a
line instead, input and target with a tab between, for the objective
text_to_text.

  scripts/prepare_corpus.py --texts books.txt.xz modern.txt --shares 0.5 1 \
      --train_vocabulary spiece.model --output arrays
  scripts/prepare_corpus.py --pairs pairs.tsv --vocabulary t5_1_1_mini \
      --output pair_arrays
"""

import argparse
from collections.abc import Iterator, Sequence
import io
import itertools
import lzma
import pathlib
import sys

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


def read_documents(path: str) -> Iterator[list[str]]:
  """Documents of a text file, each a list of paragraphs.

  At most 60 of them, so that shuffling mixes the sources well; 30 until the
  first empty line.
  """
  most, document = 30, []
  for line in _lines(path):
    line = ' '.join(line.split())
    if line:
      document.append(line)
    else:
      most = 60
    if document and (not line or len(document) >= most):
      yield document
      document = []
  if document:
    yield document


def _lines(path: str) -> Iterator[str]:
  opener = lzma.open if path.endswith('.xz') else open
  try:
    with opener(path, 'rt', encoding='utf-8') as lines:
      yield from lines
  except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
    raise UserError(
      f'a UTF-8 text file (.txt, .xz) is required, {path} cannot be read '
      f'({error})'
    ) from None


def chosen_documents(
  paths: Sequence[str], shares: Sequence[float], seed: int
) -> list[str]:
  """All documents in shuffled order, each as one line of text.

  A share of 0.5 keeps a random half of a file's documents, 2 takes each twice.
  """
  if len(shares) != len(paths):
    raise UserError(
      f'--shares needs a number for each of the {len(paths)} --texts, got '
      f'{shares}'
    )
  rng = np.random.default_rng(seed)
  texts = []
  for path, share in zip(paths, shares, strict=True):
    for document in read_documents(path):
      copies = int(share) + int(rng.random() < share % 1)
      texts += [' '.join(document)] * copies
  return [texts[i] for i in rng.permutation(len(texts))]


def chosen_pairs(path: str, seed: int) -> list[str]:
  """Inputs and targets in turn, pairs in shuffled order."""
  pairs = []
  for number, line in enumerate(_lines(path), start=1):
    sides = [side.strip() for side in line.split('\t')]
    if len(sides) != 2 or not all(sides):
      raise UserError(
        f'{path}, line {number}: an input and a target with one tab between '
        f'are required, got {line.strip()[:60]!r}'
      )
    pairs.append(sides)
  order = np.random.default_rng(seed).permutation(len(pairs))
  return [side for i in order for side in pairs[i]]


def train_vocabulary(
  documents: Sequence[str], output: str, pieces: int, seed: int
) -> None:
  """Trains a cased unigram vocabulary and writes its model file.

  Args:
    documents: shuffled; 150,000 texts of 400 characters are taken from them.
    output: the model file to write.
    pieces: rows without the sentinels.
    seed: of SentencePiece's random choices.
  """
  lines = itertools.islice(
    (text[i : i + 400] for text in documents for i in range(0, len(text), 400)),
    150_000,
  )
  sentencepiece.set_random_generator_seed(seed)
  model = io.BytesIO()
  try:
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
      minloglevel=1,
    )
  except RuntimeError as error:
    raise UserError(
      f'a vocabulary of {pieces} pieces could not be trained ({error}); give '
      'more text or fewer --pieces'
    ) from None
  pathlib.Path(output).write_bytes(model.getvalue())


def encoded(
  documents: Sequence[str], vocabulary: vocabularies.Vocabulary
) -> Iterator[list[int]]:
  """Ids of each document, encoded a thousand at a time."""
  for first in range(0, len(documents), 1000):
    yield from vocabulary.encode_batch(documents[first : first + 1000])


def parser() -> argparse.ArgumentParser:
  """The command line."""
  result = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = result.add_argument
  what = result.add_mutually_exclusive_group(required=True)
  what.add_argument('--texts', nargs='+', help='text files')
  what.add_argument('--pairs', help='file of tab-separated pairs')
  add(
    '--shares',
    nargs='+',
    type=float,
    help='of each text, how much to take: 0.5 half of its documents, 2 each '
    'twice (default: 1)',
  )
  add('--output', required=True, help='new folder for the token arrays')
  which = result.add_mutually_exclusive_group(required=True)
  which.add_argument('--vocabulary', help='model file or bundled name to use')
  which.add_argument('--train_vocabulary', help='model file to train and write')
  add(
    '--pieces',
    type=int,
    default=8092,
    help='of a trained vocabulary, without the 100 sentinels (default 8092)',
  )
  add('--seed', type=int, default=0, help='of shuffling (default 0)')
  return result


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 1 with a line on standard error."""
  arguments = parser().parse_args(argv)
  try:
    if arguments.pairs:
      documents = chosen_pairs(arguments.pairs, arguments.seed)
    else:
      shares = arguments.shares or [1.0] * len(arguments.texts)
      documents = chosen_documents(arguments.texts, shares, arguments.seed)
    name = arguments.vocabulary or arguments.train_vocabulary
    if arguments.train_vocabulary:
      train_vocabulary(documents, name, arguments.pieces, arguments.seed)
    vocabulary = vocabularies.load_vocabulary(name)
    arrays = token_arrays.write_token_arrays(
      arguments.output,
      encoded(documents, vocabulary),
      vocabulary,
      name=name,
      layout='pairs' if arguments.pairs else 'text',
    )
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(
    f'{arguments.output}: {len(arrays.tokens):,} tokens in '
    f'{len(documents):,} documents'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
