"""Vocabularies: ids as T5's and seqio's, no TensorFlow, one-line errors."""

import pickle
import subprocess
import sys

import pytest
import sentencepiece

from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError

SENTENCES = [
  'The film won three awards at the festival in Cannes.',
  'Shares in the company rose by 12% after its results.',
  'A new version of the software is free to download.',
  'The minister said the election would be held in May.',
  'England lost the final match of the football season.',
]


@pytest.fixture(scope='module')
def model_file(tmp_path_factory):
  """A SentencePiece model of 120 pieces, trained here."""
  folder = tmp_path_factory.mktemp('vocabulary')
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(SENTENCES * 10),
    model_prefix=str(folder / 'spiece'),
    vocab_size=120,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return folder / 'spiece.model'


@pytest.fixture(scope='module')
def vocabulary(model_file):
  return vocabularies.load_vocabulary(model_file)


def test_size_is_pieces_and_extra_ids(vocabulary, model_file):
  pieces = sentencepiece.SentencePieceProcessor(
    model_file=str(model_file)
  ).GetPieceSize()
  assert vocabulary.size == pieces + 100
  assert (vocabulary.pad_id, vocabulary.eos_id) == (0, 1)


def test_text_comes_back_and_has_no_eos(vocabulary):
  for sentence in SENTENCES:
    ids = vocabulary.encode(sentence)
    assert 1 not in ids
    assert vocabulary.decode(ids) == sentence
  assert vocabulary.encode_batch(SENTENCES) == [
    vocabulary.encode(sentence) for sentence in SENTENCES
  ]


def test_sentinels_count_down_from_the_last_id(vocabulary):
  last = vocabulary.size - 1
  ids = vocabulary.encode('The film <extra_id_0> awards <extra_id_99>')
  assert last in ids and vocabulary.size - 100 in ids
  assert vocabulary.sentinel(0) == last
  assert vocabulary.piece(last) == '▁<extra_id_0>'
  assert vocabulary.decode([last, last - 1]) == '<extra_id_0> <extra_id_1>'
  with pytest.raises(UserError, match='100 sentinels'):
    vocabulary.sentinel(100)


def test_a_model_with_sentinels_of_its_own_gets_no_others(
  model_file, vocabulary, tmp_path
):
  """As mT5's: its last hundred pieces are they."""
  pieces = reversed(range(100))
  added = b''.join(map(vocabularies._sentinel_piece, pieces))
  file = tmp_path / 'spiece.model'
  file.write_bytes(model_file.read_bytes() + added)
  like_mt5 = vocabularies.load_vocabulary(file)
  text = f'{SENTENCES[0]} <extra_id_3>'
  assert like_mt5.encode(text) == vocabulary.encode(text)
  assert like_mt5.size == vocabulary.size
  assert like_mt5.sentinel(0) == vocabulary.sentinel(0)
  assert like_mt5.seqio().encode(text) == vocabulary.seqio().encode(text)
  assert like_mt5.seqio().vocab_size == vocabulary.size


def test_decoding_stops_at_eos_and_drops_padding(vocabulary):
  film = vocabulary.encode('The film')
  final = vocabulary.encode('final match')
  assert vocabulary.decode([0, *film, 0, 1, *final]) == 'The film'


def test_ids_outside_the_vocabulary_never_reach_the_detokeniser(vocabulary):
  film = vocabulary.encode('The film')
  beyond = [vocabulary.size, vocabulary.size + 12_345, -1]
  assert vocabulary.decode([*film[:1], *beyond, *film[1:]]) == 'The film'


def test_ids_equal_seqios(vocabulary):
  pytest.importorskip('seqio')
  seqio_vocabulary = vocabulary.seqio()
  texts = [
    *SENTENCES,
    'The film <extra_id_0> won <extra_id_12>.',
    'joined<extra_id_3>up',
  ]
  for text in texts:
    ids = vocabulary.encode(text)
    assert ids == list(seqio_vocabulary.encode(text))
    assert vocabulary.decode(ids) == seqio_vocabulary.decode(ids)
  assert vocabulary.size == seqio_vocabulary.vocab_size


def test_a_folder_with_a_model_is_a_vocabulary(model_file, vocabulary):
  assert vocabularies.load_vocabulary(model_file.parent) is vocabulary


def test_a_vocabulary_can_be_pickled(vocabulary):
  copy = pickle.loads(pickle.dumps(vocabulary))
  assert copy.encode(SENTENCES[0]) == vocabulary.encode(SENTENCES[0])


def test_the_bundled_vocabulary_has_8192_ids_and_knows_newspaper_words():
  vocabulary = vocabularies.load_vocabulary('t5_1_1_mini')
  assert vocabulary.size == 8192
  text = 'Profits at the software firm rose to £2.4bn, it said on Tuesday.'
  assert vocabulary.decode(vocabulary.encode(text)) == text
  for word in ('business', 'film', 'sport', 'software', 'election'):
    assert len(vocabulary.encode(f'the {word}')) == 2


def test_a_wrong_name_is_one_line_that_names_the_bundled_ones():
  with pytest.raises(UserError, match='t5_1_1_mini') as error:
    vocabularies.load_vocabulary('t5_1_1_minnow')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'', b'no model at all', b'\x00' * 50])
def test_a_file_that_is_no_model_is_one_line(tmp_path, content):
  path = tmp_path / 'spiece.model'
  path.write_bytes(content)
  with pytest.raises(UserError, match='spiece.model') as error:
    vocabularies.load_vocabulary(path)
  assert '\n' not in str(error.value)


def test_a_model_with_other_special_ids_is_refused(tmp_path):
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(SENTENCES * 10),
    model_prefix=str(tmp_path / 'llama'),
    vocab_size=120,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  with pytest.raises(UserError, match='pad 0, EOS 1'):
    vocabularies.load_vocabulary(tmp_path / 'llama.model')


def test_importing_and_using_needs_no_tensorflow(model_file):
  code = (
    'import sys\n'
    'sys.modules["tensorflow"] = None\n'
    'sys.modules["seqio"] = None\n'
    'from prompt_tuning.data import token_arrays, vocabularies\n'
    f'v = vocabularies.load_vocabulary({str(model_file)!r})\n'
    'print(v.decode(v.encode("The film won")))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.stdout == 'The film won\n', done.stderr


def test_a_byt5_folder_of_hugging_face_has_bytes(tmp_path):
  config = tmp_path / 'tokenizer_config.json'
  config.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  assert vocabularies.load_vocabulary(tmp_path).size == 259
  config.write_text('[]')
  with pytest.raises(UserError):
    vocabularies.load_vocabulary(tmp_path)


def test_bytes_are_those_of_seqios_byte_vocabulary():
  ours = vocabularies.load_vocabulary('byt5')
  theirs = ours.seqio()
  text = 'Größe: 5 € – naïve 日本'
  assert ours.size == theirs.vocab_size == 259
  assert ours.encode(text) == theirs.encode(text)
  assert ours.encode_batch([text, '']) == [ours.encode(text), []]
  assert ours.decode([*ours.encode(text), 1, 80]) == text
  # Virtual tokens, padding and half a character have no text.
  assert ours.decode([0, 700, *ours.encode('ö')[:1], 68]) == 'A'
  assert ours.sentinel(0) == 258
  assert [ours.piece(token) for token in (68, 3, 258)] == [
    'A',
    '<0x00>',
    '<0xff>',
  ]
  with pytest.raises(UserError, match='has 259 ids'):
    ours.piece(259)


@pytest.mark.parametrize(
  'labels, said',
  [
    (['good', 'good'], "'good' is given twice"),
    (['good', ''], "labels are words, got ''"),
    (['good', 5], 'labels are words, got 5'),
    (['good'], 'needs two strings or more'),
    ('good', 'needs two strings or more'),
    (['good', '\u2603'], 'cannot write the label'),
    (['good', 'good '], 'alike'),
  ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, said):
  vocabulary = vocabularies.load_vocabulary('t5_1_1_mini')
  with pytest.raises(UserError, match=said):
    vocabularies.label_pieces(vocabulary, labels, 'task a')


def test_labels_are_their_pieces():
  vocabulary = vocabularies.load_vocabulary('t5_1_1_mini')
  labels = ['entailment', 'not_entailment']
  rows = vocabularies.label_pieces(vocabulary, labels, 'task a')
  assert [vocabulary.decode(row) for row in rows] == labels
