#!/usr/bin/env python3
"""English prose out of Debian packages: one text file and a list of sources.

Packages are fetched with `apt-get download` and unpacked, never installed, so
this runs on any Debian or Ubuntu and leaves the system as it was. From HTML,
DocBook, Mallard, info, manual pages, dict databases, fortunes and plain text
it keeps whole English paragraphs: markup, code, tables, lists of names and
repeated paragraphs are dropped. The output has a paragraph a line and an
empty line between documents, which `scripts/prepare_corpus.py` reads.

  scripts/debian_text.py --output modern.txt.xz --work_dir /tmp/deb \
      --packages dict-foldoc dict-wn debian-handbook
"""

import argparse
import bz2
from collections.abc import Iterator
import concurrent.futures
import gzip
import hashlib
import html
import lzma
import os
import pathlib
import re
import subprocess
import sys

# The most frequent words of English prose: a paragraph with too few of them
# is code, a table, a list of names or another language.
_FUNCTION_WORDS = frozenset(
  'the of and to a in is that it was for on are as with be by at this or you '
  'from have not an can which if but will they his he has all your when one '
  'their there we more had who what so were other some than into its may '
  'only no any do our been would should must could about'.split()
)
_LANGUAGES = frozenset(
  'ar ast bg bn bs ca cs cy da de el eo es et eu fa fi fr ga gl gu he hi hr '
  'hu id is it ja ka km ko lt lv mk ml mr ms nb nl nn no pa pl pt ro ru sk sl '
  'sq sr sv ta te th tr ug uk vi zh'.split()
)
# Elements whose content is not prose, and those that end a paragraph.
_DROPPED = re.compile(
  r'<(script|style|pre|table|head|nav|programlisting|screen|literallayout|'
  r'synopsis|informaltable|svg|math|textarea|select|footer|bookinfo|'
  r'articleinfo|info|indexterm|varname|remark|authorgroup|copyright|'
  r'legalnotice|revhistory)\b[^>]*>.*?</\1\s*>|<!--.*?-->|<!\[CDATA\[.*?\]\]>|'
  r'<\?.*?\?>|<!DOCTYPE[^>\[]*(\[.*?\])?\s*>',
  re.S | re.I,
)
_BLOCK = re.compile(
  r'</?(p|para|simpara|div|section|sect\d|chapter|title|h\d|li|ul|ol|dl|dt|dd|'
  r'td|tr|br|hr|blockquote|listitem|item|page|note|tip|warning|caution|'
  r'important|term|figure|body|article|book|terms|steps|list|desc)\b[^>]*>',
  re.I,
)
_TAG = re.compile(r'<[^>]{0,2000}>', re.S)
_QUOTED = re.compile(r'_?\s*"((?:[^"\\]|\\.|"")*)"|`([^`]*)`', re.S)
_SPACE = re.compile(r'\s+')
_LETTERS = re.compile(r'[^a-z]+')
_WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")
_SYMBOLS = re.compile(r'[{}<>|\\=_#@~^$*+]')
_MARKUP = ('.html', '.htm', '.xhtml', '.docbook', '.xml', '.page')
_PLAIN = ('.txt', '.text', '.md', '.rst', '.info', '.pod', '.faq', '')
_QUOTED_STRINGS = ('.cfg', '.ruleset', '.lua', '.properties', '.qml')
_SKIPPED_NAMES = re.compile(
  r'copyright|changelog|license|licence|copying|authors|credits|thanks|index\.'
  r'|genindex|search|authors|maintainers|news\.debian|buildinfo|install$',
  re.I,
)


def is_prose(text: str, minimum: int = 80) -> bool:
  """True for a paragraph of English sentences of at least `minimum` letters."""
  if not minimum <= len(text) <= 6000 or text[-1] not in '.!?:;"\')’”':
    return False
  words = _WORD.findall(text)
  if (
    len(words) < minimum // 8
    or not text[0].isalnum()
    and text[0] not in '"“\'('
  ):
    return False
  letters = sum(map(len, words))
  functional = sum(word.lower() in _FUNCTION_WORDS for word in words)
  return (
    letters + text.count(' ') >= 0.88 * len(text)
    and functional >= 0.2 * len(words)
    and len(_SYMBOLS.findall(text)) <= 0.008 * len(text)
    and 3.2 <= letters / len(words) <= 7.5
    and text.isascii() | (sum(c.isascii() for c in text) >= 0.97 * len(text))
  )


def markup_paragraphs(text: str) -> Iterator[str]:
  """Paragraphs of HTML or XML, elements that hold no prose left out."""
  text = _DROPPED.sub(' ', text)
  for block in _BLOCK.split(text):
    if block and len(block) > 60:
      yield html.unescape(_TAG.sub('', block))


def plain_paragraphs(text: str) -> Iterator[str]:
  """Blocks of lines between empty lines, without the mark of a list."""
  for block in re.split(r'\n[ \t\r]*\n', text):
    # A hyphen at the end of a line joins the word that it split.
    block = re.sub(r'(?<=[a-z])-\n\s*(?=[a-z])', '', block)
    yield re.sub(r'^\s*(?:[-*o•]|\d{1,2}[.)])\s+', '', block)


def quoted_paragraphs(text: str) -> Iterator[str]:
  """Long strings between quotes in a game's or a program's data files."""
  for double, back in _QUOTED.findall(text):
    for part in (double or back).split('\n\n'):
      yield part.replace('""', '"').replace('\\n', ' ').replace('\\"', '"')


def manual_paragraphs(text: str) -> Iterator[str]:
  """Running text of a groff manual page: requests and escapes removed."""
  lines = []
  for line in text.splitlines() + ['.PP']:
    request = re.match(r"[.'](\w+|\\\")?", line)
    if not request:
      lines.append(line)
    elif request[1] in ('B', 'I', 'BR', 'IR', 'RB', 'RI', 'BI', 'IB'):
      words = line.split(' ')[1:]
      lines.append((' ' if len(request[1]) == 1 else '').join(words))
    else:
      yield re.sub(
        r'\\f.|\\[&|^/,]', '', '\n'.join(lines).replace('\\-', '-')
      ).replace('\\(aq', "'")
      lines = []


def dictionary_paragraphs(text: str) -> Iterator[str]:
  """`headword: definition` for WordNet, blocks of text for other databases."""
  for entry in re.split(r'\n(?=\S)', text):
    head, _, body = entry.partition('\n')
    head = head.strip()
    if not re.search(r'^\s+(n|v|adj|adv)\s+(\d+)?:? ', body, re.M):
      yield from plain_paragraphs(re.sub(r'[{}]', '', body))
      continue
    body = re.sub(r'\[(syn|ant|also):.*?\]', ' ', body, flags=re.S)
    for sense in re.split(
      r'(?:^|\n)\s+(?:(?:n|v|adj|adv)\s+)?(?:\d+)?: ', body
    ):
      sense = _SPACE.sub(' ', sense).strip(' ;')
      if len(sense) > 25:
        yield f'{head}: {sense}.'


def read_text(path: pathlib.Path) -> tuple[str, str]:
  """The decoded file and its suffix without the compression's."""
  opener, name = open, path.name
  for ending, compressed in (
    ('.gz', gzip),
    ('.dz', gzip),
    ('.bz2', bz2),
    ('.xz', lzma),
  ):
    if name.endswith(ending):
      opener, name = compressed.open, name[: -len(ending)]
  with opener(path, 'rb') as stream:
    data = stream.read(40_000_000)
  suffix = pathlib.Path(name).suffix.lower()
  if re.fullmatch(r'\.\d\w*', suffix):
    suffix = '.man' if '/man/' in str(path) else ''
  if re.match(r'\.info', suffix):
    suffix = '.info'
  try:
    return data.decode('utf-8'), suffix
  except UnicodeDecodeError:
    return data.decode('latin-1'), suffix


def file_paragraphs(path: pathlib.Path, package: str) -> Iterator[str]:
  """Candidate paragraphs of one file, unfiltered."""
  text, suffix = read_text(path)
  if '\x00' in text[:4096]:
    return
  if suffix == '.dict':
    yield from dictionary_paragraphs(text)
  elif '/fortunes/' in str(path):
    yield from text.split('\n%\n')
  elif suffix in _MARKUP or text[:200].lstrip()[:5].lower() in (
    '<html',
    '<!doc',
    '<?xml',
  ):
    yield from markup_paragraphs(text)
  elif suffix == '.man':
    yield from manual_paragraphs(text)
  elif suffix in _QUOTED_STRINGS or (
    package.endswith('-data') and suffix == '.txt'
  ):
    yield from quoted_paragraphs(text)
    if suffix == '.txt':
      yield from plain_paragraphs(text)
  elif suffix in _PLAIN:
    yield from plain_paragraphs(text)


def english_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Files below a folder, sorted, without those of another language."""
  for root, folders, names in os.walk(folder):
    folders[:] = sorted(
      f
      for f in folders
      if re.split(r'[_@-]', f)[0] not in _LANGUAGES
      and f
      not in (
        'locale',
        'bin',
        'sbin',
        'i18n',
        'translations',
        '_static',
        '_sources',
      )
      and not (re.match(r'en[_-](?!us)', f, re.I) and 'en' in folders)
    )
    for name in sorted(names):
      path = pathlib.Path(root, name)
      language = re.search(r'[._-]([a-z]{2})(?:[_-]\w\w)?(?:\.\w+)+$', name)
      if (
        path.is_symlink()
        or _SKIPPED_NAMES.search(name)
        or (
          language
          and language[1] in _LANGUAGES
          and language[1] not in ('is', 'no', 'it', 'id')
        )
        or path.stat().st_size > 40_000_000
      ):
        continue
      yield path


def extract(folder: pathlib.Path, package: str, limit: int) -> list[list[str]]:
  """Documents (lists of paragraphs) of an unpacked package, `limit` bytes at
  most, spread evenly over its files when it holds more."""
  documents, seen = [], set()
  for path in english_files(folder):
    try:
      candidates = list(file_paragraphs(path, package))
    except (OSError, EOFError, lzma.LZMAError):
      continue
    short = path.name.endswith('.dict.dz')
    document = []
    for candidate in candidates:
      text = _SPACE.sub(' ', candidate).strip()
      key = _LETTERS.sub('', text.lower()) if len(text) < 7000 else ''
      if short and text.count(':') and '. ' not in text[:-1]:
        key = _LETTERS.sub('', text.lower().partition(':')[2])
        keep = 40 <= len(text) and len(_SYMBOLS.findall(text)) == 0
      else:
        keep = is_prose(text)
      if keep and key and key not in seen:
        seen.add(key)
        document.append(text)
      if len(document) == 40:
        documents.append(document)
        document = []
    if sum(map(len, document)) >= 200:
      documents.append(document)
  total = sum(len(p) + 1 for d in documents for p in d)
  if total <= limit:
    return documents
  kept, budget = [], 0.0
  for document in documents:
    # An even thinning: each document is kept with the same share of bytes.
    budget += sum(len(p) + 1 for p in document) * limit / total
    if budget > 0:
      kept.append(document)
      budget -= sum(len(p) + 1 for p in document)
  return kept


def licences(folder: pathlib.Path, package: str) -> str:
  """Names of the licences in the package's copyright file, in its words."""
  for path in (folder / 'usr/share/doc').glob('*/copyright'):
    text = path.read_text('utf-8', 'replace')
    names = re.findall(r'^License:\s*(\S.*)$', text, re.M)
    names += re.findall(r'/usr/share/common-licenses/([\w.+-]+\w)', text)
    if not names:
      names = re.findall(
        r'public domain|GNU (?:Free Documentation|General Public) License|'
        r'BSD|MIT|Creative Commons[\w -]*|PostgreSQL|WordNet|Artistic',
        text,
      )
    unique = list(dict.fromkeys(name.strip() for name in names))
    if unique:
      return ', '.join(unique[:6]) + (' ...' if len(unique) > 6 else '')
  return 'see the package'


def run(command: list[str], **kwargs) -> str:
  """Standard output of a command; its last line of error as the fault."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
  except FileNotFoundError:
    raise SystemExit(
      f'error: {command[0]} is required: run this on Debian or Ubuntu'
    ) from None
  if done.returncode:
    reason = (done.stderr.strip() or 'no reason given').splitlines()[-1]
    raise SystemExit(f'error: {" ".join(command[:3])} failed: {reason}')
  return done.stdout


def unpacked(package: str, work_dir: str) -> tuple[pathlib.Path, pathlib.Path]:
  """The file of a package and its unpacked folder, each made once."""
  debs = pathlib.Path(work_dir, 'debs')
  folder = pathlib.Path(work_dir, 'unpacked', package)
  debs.mkdir(parents=True, exist_ok=True)
  found = sorted(debs.glob(f'{package}_*.deb'))
  if not found:
    run(['apt-get', 'download', package], cwd=debs)
    found = sorted(debs.glob(f'{package}_*.deb'))
  if not folder.is_dir():
    partial = folder.with_suffix('.partial')
    partial.mkdir(parents=True, exist_ok=True)
    run(['dpkg-deb', '-x', str(found[-1]), str(partial)])
    partial.rename(folder)
  return found[-1], folder


def process(
  package: str, work_dir: str, limit: int
) -> tuple[dict, list[list[str]]]:
  """Downloads (once), unpacks (once) and extracts one package."""
  archive, folder = unpacked(package, work_dir)
  documents = extract(folder, package, limit)
  source = {
    'package': package,
    'version': archive.name.split('_')[1].replace('%3a', ':'),
    'licence': licences(folder, package),
  }
  return source, documents


def write_text(
  output: pathlib.Path,
  packages: list[str],
  work_dir: str,
  limit: int,
  processes: int,
) -> list[tuple[dict, float]]:
  """Writes the text of all packages; returns each source and its MB kept.

  The file appears under its name only once it is complete.
  """
  opener = {'.gz': gzip.open, '.xz': lzma.open}.get(output.suffix, open)
  partial = output.with_name(output.name + '.partial')
  rows, seen = [], set()
  with (
    concurrent.futures.ProcessPoolExecutor(processes) as pool,
    opener(partial, 'wt', encoding='utf-8') as out,
  ):
    count = len(packages)
    for source, documents in pool.map(
      process, packages, [work_dir] * count, [limit] * count
    ):
      size = 0
      for document in documents:
        # Packages quote one another: a paragraph is kept the first time only.
        lines = [text for text in document if not _seen(text, seen)]
        if sum(map(len, lines)) >= 200:
          out.write('\n'.join(lines) + '\n\n')
          size += sum(map(len, lines))
      rows.append((source, size / 1e6))
      print(
        f'{source["package"]:28} {size / 1e6:7.2f} MB',
        file=sys.stderr,
        flush=True,
      )
  partial.rename(output)
  return rows


def _seen(text: str, digests: set[bytes]) -> bool:
  """True for a text whose letters came before; remembers those that did not."""
  digest = hashlib.blake2b(
    _LETTERS.sub('', text.lower()).encode(), digest_size=8
  ).digest()
  known = digest in digests
  digests.add(digest)
  return known


def sources_table(rows: list[tuple[dict, float]]) -> str:
  """A Markdown table of packages, versions, licences and MB of text kept."""
  lines = [
    '| package | version | licence, as its copyright file says | MB of text |',
    '|---|---|---|---|',
  ]
  for source, size in rows:
    lines.append(
      f'| {source["package"]} | {source["version"]} | {source["licence"]} '
      f'| {size:.2f} |'
    )
  lines.append(f'| total | | | {sum(size for _, size in rows):.2f} |')
  return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
  """Parses the command line and writes the text and the list of sources."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--output', required=True, help='text file to write (.txt, .gz or .xz)'
  )
  parser.add_argument('--packages', nargs='+', help='names of Debian packages')
  parser.add_argument('--packages_file', help='a file with a name a line')
  parser.add_argument(
    '--work_dir',
    required=True,
    help='where packages are downloaded and unpacked',
  )
  parser.add_argument(
    '--sources',
    help='Markdown table of the sources (default: OUTPUT.sources.md)',
  )
  parser.add_argument(
    '--max_mb',
    type=float,
    default=4.0,
    help='most text kept of one package (default 4)',
  )
  parser.add_argument(
    '--processes', type=int, default=2, help='packages read at once (default 2)'
  )
  arguments = parser.parse_args(argv)
  packages = list(arguments.packages or ())
  if arguments.packages_file:
    try:
      packages += pathlib.Path(arguments.packages_file).read_text().split()
    except OSError as error:
      raise SystemExit(f'error: --packages_file: {error}') from None
  if not packages:
    raise SystemExit(
      'error: no package named: give --packages or --packages_file'
    )
  output = pathlib.Path(arguments.output)
  try:
    rows = write_text(
      output,
      list(dict.fromkeys(packages)),
      arguments.work_dir,
      int(arguments.max_mb * 1e6),
      arguments.processes,
    )
    sources = pathlib.Path(arguments.sources or f'{output}.sources.md')
    sources.write_text(sources_table(rows), encoding='utf-8')
  except OSError as error:
    raise SystemExit(f'error: {error}') from None
  return 0


if __name__ == '__main__':
  sys.exit(main())
