#!/usr/bin/env python3
"""Pairs of English input and short answer out of WordNet, Debian and prose.

For the last stage of pre-training a small T5 (`runs/text_to_text.gin`). Each
input begins with the name of a question, so that the decoder has to read the
encoder's output, its first tokens above all, which is what a prompt replaces.

  word: GLOSS            a word with this meaning            (WordNet)
  kind: GLOSS            the next more general word          (WordNet)
  group: GLOSS           the lexicographers' group of nouns  (WordNet)
  topic: GLOSS           the field that uses the word        (WordNet)
  section: DESCRIPTION   a package's section                 (Debian)
  keywords: PARAGRAPH    its three most characteristic words (texts)

Writes a line a pair, input and answer with a tab between, shuffled with a
fixed seed; `scripts/prepare_corpus.py --pairs` makes token arrays of it.
WordNet comes out of the Debian package wordnet-base, which is downloaded and
unpacked, not installed; descriptions out of `apt-cache dumpavail`.

  scripts/text_pairs.py --output pairs.tsv --work_dir deb --texts general.txt
"""

import argparse
import collections
from collections.abc import Iterable, Iterator
import math
import pathlib
import random
import re
import subprocess

import debian_text
import prepare_corpus

# Words of a paragraph are compared by their letters alone; short ones are
# rarely what it is about.
_WORD = re.compile(r'[A-Za-z][a-z]{3,}')
# Lexicographers' numbers of files (lexnames(5WN)) and the group they mean.
_GROUPS = dict(
  zip(
    range(4, 29),
    'act animal artifact attribute body cognition communication event feeling '
    'food group location motive object person phenomenon plant possession '
    'process quantity relation shape state substance time'.split(),
    strict=True,
  )
)
Pair = tuple[str, str]


def wordnet_pairs(folder: pathlib.Path) -> Iterator[Pair]:
  """Pairs of the files data.noun, data.verb, data.adj and data.adv.

  Their format is wndb(5WN): offset, number of the group, part of speech,
  words, pointers to other synsets, and the gloss behind a bar.
  """
  words, entries = {}, []
  for name in ('noun', 'verb', 'adj', 'adv'):
    for line in (folder / f'data.{name}').read_text('utf-8').splitlines():
      if line.startswith(' '):
        continue
      fields, _, gloss = line.partition(' | ')
      fields = fields.split()
      count = int(fields[3], 16)
      lemmas = [
        # (p), (a) and (ip) say where an adjective stands.
        re.sub(r'\(\w+\)$', '', word).replace('_', ' ')
        for word in fields[4 : 4 + 2 * count : 2]
      ]
      pointers = fields[5 + 2 * count :]
      targets = collections.defaultdict(list)
      for i in range(0, 4 * int(fields[4 + 2 * count]), 4):
        targets[pointers[i]].append((pointers[i + 2], pointers[i + 1]))
      part = {'s': 'a'}.get(fields[2], fields[2])
      words[part, fields[0]] = lemmas
      gloss = re.sub(r'; "', ': "', gloss.strip(), count=1)
      entries.append((part, int(fields[1]), lemmas, targets, gloss))
  for part, group, lemmas, targets, gloss in entries:
    for lemma in lemmas[:3]:
      yield f'word: {gloss}', lemma
    for kind in targets['@'][:1]:
      yield f'kind: {gloss}', words[kind][0]
    if part == 'n' and group in _GROUPS:
      yield f'group: {gloss}', _GROUPS[group]
    # Few synsets have one: each is asked several times.
    for topic in targets[';c'][:1] * 4:
      yield f'topic: {gloss}', words[topic][0]


def package_pairs(listing: str) -> Iterator[Pair]:
  """The section of each package of `apt-cache dumpavail`, once a text."""
  seen = set()
  for package in listing.split('\n\n'):
    found = re.search(r'^Description: (.+)$', package, re.M)
    section = re.search(r'^Section: (?:\w+/)?(.+)$', package, re.M)
    if found and section and found[1] not in seen:
      seen.add(found[1])
      yield f'section: {found[1]}', section[1]


def keyword_pairs(paragraphs: list[str], most: int) -> Iterator[Pair]:
  """The three words of highest tf-idf, of `most` paragraphs spread evenly."""
  frequency = collections.Counter()
  for text in paragraphs:
    frequency.update({word.lower() for word in _WORD.findall(text)})
  step = max(len(paragraphs) // most, 1)
  for text in paragraphs[::step][:most]:
    start = text[:300]  # what a reader of limited length sees
    counts = collections.Counter(w.lower() for w in _WORD.findall(start))
    # Words of few paragraphs are names and slips of the pen.
    scores = {
      word: (1 + math.log(count)) * math.log(len(paragraphs) / frequency[word])
      for word, count in counts.items()
      if frequency[word] >= 20
    }
    best = sorted(scores, key=lambda word: (-scores[word], word))[:3]
    if len(best) == 3:
      yield f'keywords: {start}', ', '.join(best)


def write_pairs(pairs: Iterable[Pair], output: str, seed: int) -> None:
  """Writes shuffled pairs as lines; tabs and line ends become spaces."""
  lines = ['\t'.join(' '.join(s.split()) for s in pair) for pair in pairs]
  random.Random(seed).shuffle(lines)
  pathlib.Path(output).write_text('\n'.join(lines) + '\n', encoding='utf-8')


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and writes the pairs."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--output', required=True, help='file of tab-separated pairs to write')
  add('--work_dir', required=True, help="as debian_text.py's")
  add('--texts', nargs='*', default=[], help='texts, for keywords')
  arguments = parser.parse_args(argv)
  _, wordnet = debian_text.unpacked('wordnet-base', arguments.work_dir)
  listing = subprocess.check_output(['apt-cache', 'dumpavail'], text=True)
  paragraphs = [
    paragraph
    for path in arguments.texts
    for document in prepare_corpus.read_documents(path)
    for paragraph in document
  ]
  pairs = [
    *wordnet_pairs(wordnet / 'usr/share/wordnet'),
    *package_pairs(listing),
    *keyword_pairs(paragraphs, 150_000),
  ]
  write_pairs(pairs, arguments.output, seed=0)
  counts = collections.Counter(source.partition(':')[0] for source, _ in pairs)
  for name, count in counts.items():
    print(f'{name:10} {count:9,}')


if __name__ == '__main__':
  main()
