"""Corpus preparation: documents, vocabulary, arrays, prose out of packages."""

import importlib.util
import lzma
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning.data.token_arrays import TokenArrays

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'scripts'
PROSE = (
  'The minister said on Tuesday that the government would look at the plan '
  'again, but that there was no money for it before the next election.'
)


def load(name):
  specification = importlib.util.spec_from_file_location(
    name, SCRIPTS / f'{name}.py'
  )
  module = importlib.util.module_from_spec(specification)
  specification.loader.exec_module(module)
  return module


prepare_corpus = load('prepare_corpus')
debian_text = load('debian_text')
# It imports the two others as scripts do.
sys.path.insert(0, str(SCRIPTS))
text_pairs = load('text_pairs')
sys.path.remove(str(SCRIPTS))


@pytest.fixture
def text_file(tmp_path):
  """40 documents of two paragraphs, of words that differ."""
  rng = np.random.default_rng(0)
  words = PROSE.split() + ['film', 'award', 'match', 'goal', 'share', 'price']
  lines = []
  for _ in range(40):
    for _ in range(2):
      lines.append(' '.join(rng.choice(words, 30)))
    lines.append('')
  path = tmp_path / 'text.txt'
  path.write_text('\n'.join(lines))
  return path


def prepare(tmp_path, text_file, *more):
  arguments = ['--texts', str(text_file), '--output', str(tmp_path / 'arrays')]
  return prepare_corpus.main([*arguments, *map(str, more)])


# Documents.


def test_an_empty_line_ends_a_document(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one\ntwo\n\n\nthree\n')
  assert list(prepare_corpus.read_documents(str(path))) == [
    ['one', 'two'],
    ['three'],
  ]


def test_without_empty_lines_30_paragraphs_are_grouped(tmp_path):
  path = tmp_path / 'a.txt.xz'
  with lzma.open(path, 'wt', encoding='utf-8') as out:
    out.write('naïve café\n' * 31)
  assert list(prepare_corpus.read_documents(str(path))) == [
    ['naïve café'] * 30,
    ['naïve café'],
  ]


def test_shares_thin_and_repeat_with_a_fixed_seed(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('\n\n'.join(f'document {i}' for i in range(200)))

  def chosen(share, seed=0):
    return prepare_corpus.chosen_documents([str(path)], [share], seed)

  assert sorted(chosen(2)) == sorted(chosen(1) * 2)
  assert 70 < len(chosen(0.5)) < 130
  assert chosen(0.5) == chosen(0.5)
  assert chosen(1) != chosen(1, seed=1)
  assert set(chosen(1)) == set(chosen(1, seed=1))


# The whole of it.


def test_text_becomes_a_vocabulary_and_arrays(tmp_path, text_file):
  model = tmp_path / 'spiece.model'
  code = prepare(
    tmp_path, text_file, '--train_vocabulary', model, '--pieces', 160
  )
  assert code == 0
  arrays = TokenArrays.open(tmp_path / 'arrays')
  assert arrays.vocabulary.size == 260
  assert arrays.meta['documents'] == 40
  decoded = {
    arrays.vocabulary.decode(arrays.tokens[begin:end])
    for begin, end in zip(arrays.documents[:-1], arrays.documents[1:])
  }
  assert decoded == {
    ' '.join(document)
    for document in prepare_corpus.read_documents(str(text_file))
  }
  # The same again with the vocabulary given: the same ids.
  shutil.move(tmp_path / 'arrays', tmp_path / 'first')
  assert prepare(tmp_path, text_file, '--vocabulary', model) == 0
  np.testing.assert_array_equal(
    TokenArrays.open(tmp_path / 'arrays').tokens,
    TokenArrays.open(tmp_path / 'first').tokens,
  )


@pytest.mark.parametrize(
  ('more', 'said'),
  [
    (['--vocabulary', 'no_such'], 'neither a SentencePiece model'),
    (['--train_vocabulary', 'x.model', '--shares', '1', '2'], '--shares'),
    (['--train_vocabulary', 'x.model', '--pieces', '50000'], '50000 pieces'),
    (['--vocabulary', 't5_1_1_mini', '--texts', 'absent.txt'], 'absent.txt'),
  ],
)
def test_faults_are_one_line_and_leave_no_files(
  tmp_path, text_file, capsys, monkeypatch, more, said
):
  monkeypatch.chdir(tmp_path)
  assert prepare(tmp_path, text_file, *more) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and said in error
  assert list(tmp_path.iterdir()) == [text_file]


# Prose out of packages.


@pytest.mark.parametrize(
  'text',
  [
    'Too short to tell.',
    'for (int i = 0; i < n; ++i) { total += values[i] * weights[i]; } ' * 3,
    'Alpha Beta Gamma Delta Epsilon Zeta Eta Theta Iota Kappa Lambda. ' * 2,
    'Der Minister sagte am Dienstag, dass die Regierung den Plan noch einmal '
    'prüfen werde, aber vor der nächsten Wahl kein Geld dafür habe.',
  ],
)
def test_only_english_sentences_are_prose(text):
  assert debian_text.is_prose(PROSE)
  assert not debian_text.is_prose(text.strip())


def test_markup_and_code_are_stripped():
  page = (
    '<html><head><title>News</title></head><body>'
    f'<p>{PROSE.replace("government", "<b>government</b>")}</p>'
    f'<pre>{PROSE}</pre><script>var a = "{PROSE}";</script>'
    f'<p>{PROSE.replace("plan", "plan &amp; budget")}</p></body></html>'
  )
  found = [
    text.strip()
    for text in debian_text.markup_paragraphs(page)
    if debian_text.is_prose(text.strip())
  ]
  assert found == [PROSE, PROSE.replace('plan', 'plan & budget')]


def test_a_list_mark_goes_and_a_first_letter_stays():
  paragraphs = debian_text.plain_paragraphs('* of late\n\n12. on time\n\nonce')
  assert list(paragraphs) == ['of late', 'on time', 'once']


def test_glosses_keep_their_headword():
  entry = (
    'football\n    n 1: any of various games played with a ball in which two '
    'teams\n         try to score [syn: {football}, {football game}]\n'
    '    2: the inflated oblong ball used in playing American football\n'
  )
  assert list(debian_text.dictionary_paragraphs(entry)) == [
    'football: any of various games played with a ball in which two teams try '
    'to score.',
    'football: the inflated oblong ball used in playing American football.',
  ]


def test_a_package_gives_each_english_paragraph_once(tmp_path):
  doc = tmp_path / 'usr/share/doc/news'
  (doc / 'html/de').mkdir(parents=True)
  days = 'Monday', 'Tuesday', 'Friday', 'Sunday'
  monday, tuesday, friday, sunday = [PROSE.replace('Tuesday', d) for d in days]
  (doc / 'readme.txt').write_text(
    '\n\n'.join([friday, monday, sunday, sunday, 'x = 1;\n'])
  )
  (doc / 'html/page.html').write_text(f'<p>{monday}</p><p>{tuesday}</p>')
  (doc / 'html/de/page.html').write_text(f'<p>{monday} Es ist so.</p>' * 3)
  (doc / 'copyright').write_text(f'License: GPL-2+\n\n{PROSE} It is so.\n')
  documents = debian_text.extract(tmp_path, set(), 10**6)
  assert documents == [[monday, tuesday], [friday, sunday]]
  assert debian_text.licences(tmp_path) == 'GPL-2+'


@pytest.mark.skipif(
  shutil.which('dpkg-deb') is None, reason='dpkg-deb is part of Debian'
)
def test_a_debian_package_becomes_text_and_a_table_of_sources(tmp_path):
  root = tmp_path / 'root'
  (root / 'DEBIAN').mkdir(parents=True)
  (root / 'DEBIAN/control').write_text(
    'Package: news-doc\nVersion: 1.5\nArchitecture: all\n'
    'Maintainer: A B <a@example.org>\nDescription: news\n'
  )
  doc = root / 'usr/share/doc/news-doc'
  doc.mkdir(parents=True)
  other = PROSE.replace('minister', 'prime minister')
  (doc / 'news.txt').write_text(f'{PROSE}\n\n{other}\n')
  (doc / 'copyright').write_text('License: CC-BY-4.0\n')
  debs = tmp_path / 'work/debs'
  debs.mkdir(parents=True)
  subprocess.run(
    ['dpkg-deb', '-b', str(root), str(debs / 'news-doc_1.5_all.deb')],
    check=True,
    capture_output=True,
  )
  output = tmp_path / 'out.txt'
  debian_text.main(
    ['--packages', 'news-doc', '--output', str(output)]
    + ['--work_dir', str(tmp_path / 'work')]
  )
  assert output.read_text() == f'{PROSE}\n{other}\n\n'
  table = (tmp_path / 'out.txt.sources.md').read_text()
  assert '| news-doc | 1.5 | CC-BY-4.0 | 0.00 |' in table


# Pairs.

# Offsets, groups and pointers as wndb(5WN) has them; glosses are ours.
_NOUNS = """  1 A line of the licence begins with spaces.
00000001 05 n 02 big_cat 0 tom 1 002 @ 00000002 n 0000 ;c 00000003 n 0000 | \
it roars; "a big cat roared"; "two"
00000002 03 n 01 beast 0 000 | a living thing
00000003 09 n 01 zoology 0 000 | the study of beasts
"""


def test_wordnet_gives_word_kind_group_and_topic(tmp_path):
  (tmp_path / 'data.noun').write_text(_NOUNS)
  for part in ('verb', 'adv'):
    (tmp_path / f'data.{part}').write_text('')
  (tmp_path / 'data.adj').write_text(
    '00000004 00 s 01 tame(p) 0 000 | not wild\n'
  )
  text = 'it roars: "a big cat roared"; "two"'
  assert sorted(set(text_pairs.wordnet_pairs(tmp_path))) == [
    ('group: it roars: "a big cat roared"; "two"', 'animal'),
    ('group: the study of beasts', 'cognition'),
    (f'kind: {text}', 'beast'),
    (f'topic: {text}', 'zoology'),
    ('word: a living thing', 'beast'),
    (f'word: {text}', 'big cat'),
    (f'word: {text}', 'tom'),
    ('word: not wild', 'tame'),
    ('word: the study of beasts', 'zoology'),
  ]


def test_packages_give_sections_once_a_description():
  listing = (
    'Package: a\nDescription: plays chess\nSection: games\n\n'
    'Package: b\nDescription: plays chess\nSection: games\n\n'
    'Package: c\nDescription: a shell\nSection: contrib/shells\n\n'
    'Package: d\nSection: math\n'
  )
  assert list(text_pairs.package_pairs(listing)) == [
    ('section: plays chess', 'games'),
    ('section: a shell', 'shells'),
  ]


def test_keywords_are_frequent_here_and_rare_elsewhere():
  paragraphs = ['common words everywhere stand'] * 100
  paragraphs += ['common goal goal words match keeper stand'] * 30
  found = set(text_pairs.keyword_pairs(paragraphs, 1000))
  assert (
    'keywords: common goal goal words match keeper stand',
    'goal, keeper, match',
  ) in found


def test_pairs_become_arrays_that_keep_them_together(tmp_path):
  path = tmp_path / 'pairs.tsv'
  pairs = [(f'kind: a word {i}', f'answer {i}') for i in range(30)]
  text_pairs.write_pairs(pairs, path, seed=3)
  output = tmp_path / 'arrays'
  arguments = ['--pairs', path, '--vocabulary', 't5_1_1_mini']
  arguments += ['--output', output]
  assert prepare_corpus.main(list(map(str, arguments))) == 0
  arrays = TokenArrays.open(output)
  texts = [
    arrays.vocabulary.decode(arrays.tokens[begin : end - 1].tolist())
    for begin, end in zip(arrays.documents, arrays.documents[1:])
  ]
  assert arrays.layout == 'pairs'
  assert sorted(zip(texts[::2], texts[1::2], strict=True)) == sorted(pairs)


@pytest.mark.parametrize('line', ['no tab', 'a\tb\tc', '\tb', 'a\t '])
def test_a_line_that_is_no_pair_is_named(tmp_path, capsys, line):
  path = tmp_path / 'pairs.tsv'
  path.write_text(f'a\tb\n{line}\n')
  arguments = ['--vocabulary', 't5_1_1_mini', '--output', tmp_path / 'a']
  assert prepare_corpus.main(['--pairs', str(path), *map(str, arguments)]) == 1
  assert f'{path}, line 2: an input and a target' in capsys.readouterr().err
