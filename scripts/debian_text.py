#!/usr/bin/env python3
"""English prose out of Debian packages: one text file and a list of sources.

Packages are fetched with `apt-get download` and unpacked, never installed, so
this runs on any Debian or Ubuntu and leaves the system as it was. From HTML,
XML, info, manual pages, dict databases, fortunes, games' data and plain text it
keeps whole English paragraphs, each once. The output has a paragraph a line and
an empty line between documents; OUTPUT.sources.md lists versions and licences.

  scripts/debian_text.py --output general.txt --work_dir deb --max_mb 16 \
      --packages $(cat scripts/corpus_packages/general.txt)
"""

import argparse
import bz2
from collections.abc import Iterable, Iterator
import gzip
import html
import lzma
import pathlib
import re
import subprocess
import sys

# The most frequent words of English prose: a paragraph with too few of them is
# code, a table, a list of names or another language.
_FUNCTION_WORDS = frozenset(
  'the of and to a in is that it was for on are as with be by at this or you '
  'from have not an can which if but will they his he has all your when one '
  'their there we more had who what so were other some than into its may '
  'only no any do our been would should must could about'.split()
)
_SKIPPED_FOLDERS = frozenset(
  'ar ast bg bn bs ca cs cy da de el eo es et eu fa fi fr ga gl gu he hi hr '
  'hu id is it ja ka km ko lt lv mk ml mr ms nb nl nn no pa pl pt ro ru sk sl '
  'sq sr sv ta te th tr ug uk vi zh locale i18n translations bin sbin'.split()
)
_SKIPPED_NAMES = re.compile(
  'copyright|changelog|licen[cs]e|copying|authors|credits|thanks|maintainers|'
  r'index\.|genindex|search|news\.debian|buildinfo|install$',
  re.I,
)
# Elements whose content is not prose, and those that end a paragraph.
_DROPPED = re.compile(
  '<(script|style|pre|table|head|nav|programlisting|screen|literallayout|'
  'synopsis|informaltable|svg|math|textarea|select|footer|bookinfo|'
  'articleinfo|info|indexterm|varname|remark|authorgroup|copyright|'
  r'legalnotice|revhistory)\b[^>]*>.*?</\1\s*>|<!--.*?-->|<!\[CDATA\[.*?\]\]>|'
  r'<\?.*?\?>|<!DOCTYPE[^>\[]*(\[.*?\])?\s*>',
  re.S | re.I,
)
_BLOCK = re.compile(
  r'</?(?:p|para|simpara|div|section|sect\d|chapter|title|h\d|li|ul|ol|dl|dt|'
  'dd|td|tr|br|hr|blockquote|listitem|item|page|note|tip|warning|caution|'
  r'important|term|figure|body|article|book|terms|steps|list|desc)\b[^>]*>',
  re.I,
)
_MARKUP = ('.html', '.htm', '.xhtml', '.docbook', '.xml', '.page')
_PLAIN = ('.txt', '.text', '.md', '.rst', '.pod', '.faq', '')


def is_prose(text: str) -> bool:
  """True for a paragraph of English sentences of 80 characters or more."""
  words = re.findall(r"[A-Za-z]+(?:['’][a-z]+)?", text)
  if not 80 <= len(text) <= 6000 or len(words) < 10:
    return False
  letters = sum(map(len, words))
  functional = sum(word.lower() in _FUNCTION_WORDS for word in words)
  return (
    (text[0].isalnum() or text[0] in '"“\'(')
    and text[-1] in '.!?:;"\')’”'
    and letters + text.count(' ') >= 0.88 * len(text)
    and functional >= 0.2 * len(words)
    and len(re.findall(r'[{}<>|\\=_#@~^$*+]', text)) <= 0.008 * len(text)
    and 3.2 <= letters / len(words) <= 7.5
    and sum(map(str.isascii, text)) >= 0.97 * len(text)
  )


def markup_paragraphs(text: str) -> Iterator[str]:
  """Paragraphs of HTML or XML, elements that hold no prose left out."""
  for block in _BLOCK.split(_DROPPED.sub(' ', text)):
    yield html.unescape(re.sub('<[^>]{0,2000}>', '', block))


def plain_paragraphs(text: str) -> Iterator[str]:
  """Blocks of lines between empty lines, without the mark of a list."""
  for block in re.split(r'\n[ \t\r]*\n', text):
    # A hyphen at the end of a line joins the word that it split.
    block = re.sub(r'(?<=[a-z])-\n\s*(?=[a-z])', '', block)
    yield re.sub(r'^\s*(?:[-*o•]|\d{1,2}[.)])\s+', '', block)


def quoted_paragraphs(text: str) -> Iterator[str]:
  """Strings between quotes in a game's data files."""
  for double, back in re.findall(r'"((?:[^"\\]|\\.|"")*)"|`([^`]*)`', text):
    for part in (double or back).split('\n\n'):
      yield part.replace('""', '"').replace('\\n', ' ').replace('\\"', '"')


def manual_paragraphs(text: str) -> Iterator[str]:
  """Running text of a groff manual page: requests and escapes removed."""
  text = re.sub(r'^\.[BI] ', '', text, flags=re.M)
  # Two fonts take turns: no space stands between their words.
  text = re.sub(
    r'^\.[BIR]{2} (.*)', lambda m: m[1].replace(' ', ''), text, flags=re.M
  )
  for block in re.split(r"^[.'].*\n", text, flags=re.M):
    block = block.replace('\\-', '-').replace('\\(aq', "'")
    yield re.sub(r'\\f.|\\[&|^/,]', '', block)


def dictionary_paragraphs(text: str) -> Iterator[str]:
  """`headword: definition` for WordNet, blocks of text for other databases."""
  for entry in re.split(r'\n(?=\S)', text):
    head, _, body = entry.partition('\n')
    if not re.search(r'^\s+(n|v|adj|adv)\s+(\d+)?:? ', body, re.M):
      yield from plain_paragraphs(re.sub('[{}]', '', body))
      continue
    body = re.sub(r'\[(syn|ant|also):.*?\]', ' ', body, flags=re.S)
    for sense in re.split(r'(?:^|\n)\s+(?:(?:n|v|adj|adv)\s+)?\d*: ', body):
      sense = ' '.join(sense.split()).strip(' ;')
      if len(sense) > 25:
        yield f'{head.strip()}: {sense}.'


def file_paragraphs(path: pathlib.Path) -> Iterable[str]:
  """Candidate paragraphs of one file, unfiltered."""
  openers = {'.gz': gzip.open, '.dz': gzip.open, '.bz2': bz2.open}
  openers['.xz'] = lzma.open
  opener = openers.get(path.suffix, open)
  name = path.name if opener is open else path.stem
  with opener(path, 'rb') as stream:
    data = stream.read()
  if b'\0' in data[:4096]:
    return ()
  try:
    text = data.decode('utf-8')
  except UnicodeDecodeError:
    text = data.decode('latin-1')
  suffix = pathlib.Path(name).suffix.lower()
  if suffix == '.dict':
    return dictionary_paragraphs(text)
  if 'fortunes' in path.parts:
    return text.split('\n%\n')
  if suffix in _MARKUP or text.lstrip()[:5].lower() in (
    '<html',
    '<!doc',
    '<?xml',
  ):
    return markup_paragraphs(text)
  if 'man' in path.parts:
    return manual_paragraphs(text)
  if 'games' in path.parts:
    return [*quoted_paragraphs(text), *plain_paragraphs(text)]
  if suffix in _PLAIN or suffix.startswith('.info'):
    return plain_paragraphs(text)
  return ()


def extract(
  folder: pathlib.Path, seen: set[str], limit: float
) -> list[list[str]]:
  """Documents (lists of paragraphs) of an unpacked package.

  Args:
    folder: of the package.
    seen: letters of the paragraphs that came before; theirs are added. Packages
      quote one another.
    limit: characters at most, spread evenly over a package that has more.
  """
  documents = []
  for path in sorted(folder.rglob('*')):
    folders = path.relative_to(folder).parts[:-1]
    if (
      not path.is_file()
      or path.is_symlink()
      or _SKIPPED_NAMES.search(path.name)
      or any(re.split('[_@-]', f)[0] in _SKIPPED_FOLDERS for f in folders)
      or '_sources' in folders
    ):
      continue
    kept = []
    for text in file_paragraphs(path):
      text = ' '.join(text.split())
      gloss = re.fullmatch(r'[^:]+: ([^{}<>|=_]{30,}\.)', text)
      if '.dict' in path.suffixes and gloss and '. ' not in text:
        key = gloss[1]  # words of one meaning share it
      elif is_prose(text):
        key = text
      else:
        continue
      letters = re.sub('[^a-z]+', '', key.lower())
      if letters not in seen:
        seen.add(letters)
        kept.append(text)
    documents += [kept[i : i + 40] for i in range(0, len(kept), 40)]
  documents = [texts for texts in documents if sum(map(len, texts)) >= 200]
  sizes = [sum(map(len, texts)) for texts in documents]
  share = min(1.0, limit / max(sum(sizes), 1))
  thinned, budget = [], 0.0
  for texts, size in zip(documents, sizes, strict=True):
    budget += size * share
    if budget > 0:
      thinned.append(texts)
      budget -= size
  return thinned


def licences(folder: pathlib.Path) -> str:
  """Names of the licences in the package's copyright file, in its words."""
  for path in (folder / 'usr/share/doc').glob('*/copyright'):
    text = path.read_text('utf-8', 'replace')
    names = re.findall(r'^License:\s*(\S.*)$', text, re.M)
    names += re.findall(r'/usr/share/common-licenses/([\w.+-]+\w)', text)
    names = names or re.findall('public domain|BSD|MIT|PostgreSQL', text)
    if names:
      return ', '.join(dict.fromkeys(name.strip() for name in names))
  return 'see the package'


def unpacked(package: str, work_dir: str) -> tuple[str, pathlib.Path]:
  """The version of a package and its unpacked folder, fetched once."""
  debs = pathlib.Path(work_dir, 'debs')
  folder = pathlib.Path(work_dir, 'unpacked', package)
  for made in (debs, folder):
    made.mkdir(parents=True, exist_ok=True)
  if not list(debs.glob(f'{package}_*.deb')):
    subprocess.run(['apt-get', 'download', package], cwd=debs, check=True)
  (archive,) = debs.glob(f'{package}_*.deb')
  subprocess.run(['dpkg-deb', '-x', archive, folder], check=True)
  return archive.name.split('_')[1].replace('%3a', ':'), folder


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and writes the text and the list of sources."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--output', required=True, help='text file to write')
  add('--packages', nargs='+', required=True, help='names of Debian packages')
  add('--work_dir', required=True, help='for the packages')
  add('--max_mb', type=float, default=4.0, help='of one package (default 4)')
  arguments = parser.parse_args(argv)
  seen = set()
  rows = ['| package | version | licence | MB of text |', '|---|---|---|---|']
  with open(arguments.output, 'w', encoding='utf-8') as out:
    for package in arguments.packages:
      version, folder = unpacked(package, arguments.work_dir)
      documents = extract(folder, seen, arguments.max_mb * 1e6)
      text = ''.join('\n'.join(texts) + '\n\n' for texts in documents)
      out.write(text)
      size = f'{len(text) / 1e6:.2f}'
      rows.append(f'| {package} | {version} | {licences(folder)} | {size} |')
      print(f'{package:28} {size} MB', file=sys.stderr)
  table = pathlib.Path(f'{arguments.output}.sources.md')
  table.write_text('\n'.join(rows) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
