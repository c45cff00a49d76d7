"""Predictions for texts: batching, labels, files."""

import dataclasses
import io
import json
import os
import pathlib
import stat
import threading

import jax
import numpy as np
import pytest

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import decoding
from prompt_tuning.models import model as model_lib
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.serving import jobs
from prompt_tuning.serving import loading
from prompt_tuning.serving.loading import Loaded
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.training import partitioning
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.trained import Trained

VOCAB = 64
CONFIG = network.T5Config(
  vocab_size=VOCAB,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
LABELS = ['x', 'yy']
TEXTS = ['ab', 'a longer text of many letters', 'c', 'dd ee']


class Letters:
  """A small letter, a digit or one of a few signs an id, from 3 on."""

  size = VOCAB
  eos_id = 1
  pad_id = 0
  path = 'letters'
  digest = 'of letters'
  signs = ' abcdefghijklmnopqrstuvwxyz0123456789:.,?'

  def encode(self, text):
    return [3 + self.signs.index(letter) for letter in text]

  def decode(self, ids):
    ids = list(ids)
    if 1 in ids:
      ids = ids[: ids.index(1)]
    signs = self.signs.ljust(VOCAB, '_')
    return ''.join(signs[i - 3] for i in ids if i >= 3)


@pytest.fixture(scope='module')
def model():
  return model_lib.EncoderDecoderModel(
    CONFIG,
    decode_fn=decoding.temperature_sample,
    methods=(Prompt(3, num_prompts=2),),
  )


def test_a_kernel_of_other_devices_is_replaced_and_named(caplog):
  config = dataclasses.replace(CONFIG, attention='tpu_kernel')
  model = model_lib.EncoderDecoderModel(config)
  params = jax.jit(model.init_params)(jax.random.key(0))
  arrays = jax.tree.map(np.asarray, parameters.flatten(params))
  base = BaseCheckpoint('tiny', 0, arrays, {})
  loaded = loading.load(model, base)
  assert loaded.model.config == dataclasses.replace(config, attention='formula')
  assert 'attention=tpu_kernel does not run on cpu' in caplog.text


@pytest.fixture(scope='module')
def variables(model):
  table = jax.random.normal(jax.random.key(1), (2, 3, 16))
  params = jax.jit(model.init_params)(jax.random.key(0))
  return {'params': params, 'prompt': {'table': table}}


@pytest.fixture(scope='module')
def loaded(model, variables):
  tokens = VirtualTokens(first_id=VOCAB, length=3, num_prompts=2)
  return Loaded(model, variables, tokens, partitioning.single_device())


@pytest.fixture(scope='module')
def predictor(loaded):
  made = {}

  def make(**settings):
    key = repr(settings)
    if key not in made:  # a predictor keeps what it compiled
      made[key] = Predictor(
        loaded,
        Letters(),
        **{'targets_length': 3, 'batch_size': 3, **settings},
      )
    return made[key]

  return make


def test_records_come_in_order_and_each_text_has_one(predictor):
  records = list(predictor().records(TEXTS))
  assert [record['input'] for record in records] == TEXTS
  assert all(set(r) == {'input', 'prediction', 'score'} for r in records)


def test_a_text_has_the_same_score_in_any_batch(predictor):
  together = list(predictor().records(TEXTS, LABELS))
  alone = list(predictor(batch_size=1).records(TEXTS, LABELS))
  for one, other in zip(together, alone, strict=True):
    assert one['prediction'] == other['prediction']
    np.testing.assert_allclose(one['score'], other['score'], rtol=1e-5)


def test_labels_are_scored_as_targets(predictor, model, variables):
  """Against score_batch on a batch made by hand."""
  (record,) = predictor().records(['ab'], LABELS)
  ids = Letters()
  inputs = [[VOCAB, VOCAB + 1, VOCAB + 2, *ids.encode('ab'), 1]]
  targets = np.array([[*ids.encode('yy'), 1]], np.int32)
  batch = {
    'encoder_input_tokens': np.array(inputs, np.int32),
    'decoder_input_tokens': np.array([[0, *targets[0, :-1]]], np.int32),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones((1, 3), np.float32),
  }
  expected = model.score_batch(variables, batch)[0]
  np.testing.assert_allclose(record['scores']['yy'], expected, rtol=1e-5)
  assert record['prediction'] == max(record['scores'], key=record['scores'].get)


def test_a_prompt_of_the_table_is_chosen_by_its_index(predictor):
  (first,) = predictor().records(['ab'], LABELS)
  (second,) = predictor(prompt_index=1).records(['ab'], LABELS)
  assert first['scores'] != second['scores']


def test_texts_are_read_a_batch_at_a_time(predictor):
  read = []

  def texts():
    for text in TEXTS:
      read.append(text)
      yield text

  records = predictor().records(texts())
  next(records)
  assert read == TEXTS[:3]


def test_a_long_text_is_cut_to_inputs_length(predictor):
  (cut,) = predictor(inputs_length=4).records(['abcdefgh'], LABELS)
  (short,) = predictor(inputs_length=4).records(['abc'], LABELS)
  np.testing.assert_allclose(cut['score'], short['score'], rtol=1e-6)


def test_a_vocabulary_larger_than_the_model_is_refused(loaded):
  class Larger(Letters):
    size = VOCAB + 1

  with pytest.raises(UserError, match='65 pieces, the model 64 rows'):
    Predictor(loaded, Larger())


def test_predict_rank_and_score_agree(predictor):
  """Three ways to ask, one model."""
  texts = TEXTS[:2]
  generated = list(predictor().records(texts))
  assert predictor().predict(texts) == [r['prediction'] for r in generated]
  ranked = predictor().rank(texts, LABELS)
  scores = predictor().score(texts * 2, ['x', 'x', 'yy', 'yy'])
  for row, found in enumerate(ranked):
    assert list(found.values()) == sorted(found.values(), reverse=True)
    np.testing.assert_allclose(found['x'], scores[row], rtol=1e-5)
    np.testing.assert_allclose(found['yy'], scores[row + 2], rtol=1e-5)
  with pytest.raises(UserError, match='2 texts and 1 targets'):
    predictor().score(texts, ['x'])
  assert predictor().score([], []) == []


def test_one_label_is_no_choice(predictor):
  with pytest.raises(UserError, match='labels needs two'):
    list(predictor().records(['a'], ['x']))


@pytest.mark.parametrize('settings', [{'batch_size': 0}, {'targets_length': 0}])
def test_settings_that_cannot_work_are_refused(predictor, settings):
  with pytest.raises(UserError, match=next(iter(settings))):
    predictor(**settings)


def write_lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.fixture
def infer(model, loaded, monkeypatch):
  """`infer` on a base in memory."""
  monkeypatch.setattr(jobs.loading, 'load_for_job', lambda *a, **k: loaded)
  monkeypatch.setattr(
    jobs.vocabularies, 'load_vocabulary', lambda path: Letters()
  )

  def call(source, output, **settings):
    return jobs.infer(
      model, None, 'letters', source, str(output), targets_length=3, **settings
    )

  return call


def test_a_file_gives_a_line_of_json_for_each_record(infer, tmp_path):
  rows = [{'id': 7, 'q': 'ab'}, {'id': 3, 'q': 'cd', 'score': 'mine'}]
  source = write_lines(tmp_path / 'a.jsonl', rows)
  target = tmp_path / 'new' / 'out.jsonl'
  result = infer(source, target, template='question: {q}')
  assert result == {'examples': 2, 'cut': 0, 'output': str(target)}
  lines = [json.loads(line) for line in target.read_text().splitlines()]
  assert [line['input'] for line in lines] == ['question: ab', 'question: cd']
  # A record's own fields stay beside ours.
  assert [line['id'] for line in lines] == [7, 3]
  assert lines[1]['score_given'] == 'mine'
  assert isinstance(lines[1]['score'], float)
  # Also those that a prediction of a prediction has.
  again = tmp_path / 'again.jsonl'
  infer(str(target), again, template='question: {q}')
  lines = [json.loads(line) for line in again.read_text().splitlines()]
  assert lines[1]['score_given'] == 'mine'
  assert isinstance(lines[1]['score_given_given'], float)
  assert [line['id'] for line in lines] == [7, 3]


def test_a_field_of_a_file_is_scored(infer, predictor, tmp_path):
  rows = [{'text': 'ab', 'answer': answer} for answer in ('x', 'yyyyyyyyyy', 7)]
  source = write_lines(tmp_path / 'a.jsonl', rows)
  file = tmp_path / 'out.jsonl'
  infer(source, file, target='answer', batch_size=2)
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert [set(line) for line in lines] == [
    {'text', 'answer', 'input', 'score'}
  ] * 3
  ranked = predictor().rank(['ab'], ['x', 'yyyyyyyyyy', '7'])[0]
  for line, answer in zip(lines, ('x', 'yyyyyyyyyy', '7'), strict=True):
    np.testing.assert_allclose(line['score'], ranked[answer], rtol=1e-5)
  again = tmp_path / 'again.jsonl'
  for settings, words in (
    ({'target': 'anwser'}, 'a.jsonl:1 has no field anwser'),
    ({'target': 'answer', 'labels': ['x', 'y']}, 'give one of them'),
    ({'target': 'answer', 'input_format': 'text'}, 'lines of text'),
  ):
    with pytest.raises(UserError, match=words):
      infer(source, again, **settings)
  assert not again.exists()


def test_a_fault_in_the_middle_leaves_the_earlier_output(infer, tmp_path):
  records = [{'text': 'ab'}] * 3 + [{'other': 1}]
  source = write_lines(tmp_path / 'a.jsonl', records)
  target = tmp_path / 'out.jsonl'
  target.write_text('earlier\n')
  with pytest.raises(UserError, match='a.jsonl:4 has no field text.*other'):
    infer(source, target, batch_size=2, overwrite=True)
  assert target.read_text() == 'earlier\n'


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'template': 'no field'}, 'names of fields in braces'),
    ({'template': '{text'}, 'is not valid'),
    ({'template': '{}'}, 'names of fields in braces'),
    ({'input_format': 'xml'}, 'jsonl, tsv, csv, text'),
  ],
)
def test_faults_of_the_template_and_format_are_told(
  infer, tmp_path, settings, words
):
  source = tmp_path / 'a.txt'
  source.write_text('ab\n')
  with pytest.raises(UserError, match=words):
    infer(str(source), tmp_path / 'out', **settings)


def test_a_missing_or_empty_input_is_told(infer, tmp_path):
  with pytest.raises(UserError, match='none.txt cannot be read'):
    infer(str(tmp_path / 'none.txt'), tmp_path / 'out')
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(UserError, match='empty.txt has no records'):
    infer(str(tmp_path / 'empty.txt'), tmp_path / 'out')


def test_a_result_an_input_or_a_folder_is_not_written_over(
  infer, tmp_path, tmp_path_factory
):
  source = write_lines(tmp_path / 'a.jsonl', [{'text': 'ab'}])
  target = tmp_path / 'out.jsonl'
  theirs = tmp_path / 'out.jsonl.partial'
  theirs.write_text('mine')
  infer(source, target)
  first = target.read_text()
  assert theirs.read_text() == 'mine'
  with pytest.raises(UserError, match='out.jsonl exists: .*overwrite'):
    infer(source, target)
  infer(source, target, overwrite=True)
  assert target.read_text() == first
  link = tmp_path / 'link'
  link.symlink_to(source)
  for path in (source, link):
    with pytest.raises(UserError, match='would be written over .*a.jsonl'):
      infer(source, path, overwrite=True)
  other = tmp_path_factory.mktemp('other')
  write_lines(other / 'a.jsonl', [{'text': 'ab'}])
  with pytest.raises(UserError, match='is a folder'):
    infer(str(other / 'a.jsonl'), tmp_path, overwrite=True)


def test_a_device_and_a_link_stay_what_they_are(infer, tmp_path):
  source = write_lines(tmp_path / 'a.jsonl', [{'text': 'ab'}])
  infer(source, '/dev/null')
  assert not pathlib.Path('/dev/null').is_file()
  target, link = tmp_path / 'there.jsonl', tmp_path / 'link'
  link.symlink_to(target)
  infer(source, link)
  assert link.is_symlink() and target.read_text()
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  read = []
  reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
  reader.start()
  infer(source, pipe)
  reader.join()
  assert read == [target.read_text()]
  assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_every_line_of_a_text_has_its_prediction(infer, tmp_path):
  (tmp_path / 'a.txt').write_text('ab\n\ncd\n')
  infer(str(tmp_path / 'a.txt'), tmp_path / 'out')
  lines = (tmp_path / 'out').read_text().splitlines()
  assert [json.loads(line)['input'] for line in lines] == ['ab', '', 'cd']


def test_texts_that_are_cut_are_counted_and_told(infer, tmp_path, caplog):
  rows = [{'text': 'ab'}, {'text': 'a' * 40}]
  source = write_lines(tmp_path / 'a.jsonl', rows)
  result = infer(source, tmp_path / 'out', inputs_length=16)
  assert result['cut'] == 1
  assert '1 of 2 texts are longer than inputs_length 16' in caplog.text
  lines = (tmp_path / 'out').read_text().splitlines()
  assert [json.loads(line).get('cut') for line in lines] == [None, 25]


@pytest.mark.parametrize(
  'format_, text', [('csv', 'q,n\n"a, b",1\n'), ('tsv', 'q\tn\na, b\t1\n')]
)
def test_tables_are_read_as_what_they_are(infer, tmp_path, format_, text):
  source = tmp_path / f'a.{format_}'
  source.write_text(text)
  infer(str(source), tmp_path / 'out', template='{q}')
  (line,) = (tmp_path / 'out').read_text().splitlines()
  assert json.loads(line)['input'] == 'a, b' and json.loads(line)['n'] == '1'


def test_json_lines_on_stdin_are_read_as_such(infer, tmp_path, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('{"text": "ab", "id": 1}\n'))
  infer('-', tmp_path / 'out')
  (line,) = (tmp_path / 'out').read_text().splitlines()
  assert json.loads(line)['input'] == 'ab' and json.loads(line)['id'] == 1


def trained_with(**facts):
  return (Trained(Prompt(3), {}, facts),)


def test_what_the_training_says_holds_for_inference(
  infer, tmp_path, capsys, monkeypatch
):
  told = trained_with(
    template='review: {sentence}', labels=['a', 'b'], inputs_length=32
  )
  source = tmp_path / 'a.txt'
  source.write_text('ab\n')
  infer(str(source), tmp_path / 'out', trained=told, rank=True)
  (line,) = (tmp_path / 'out').read_text().splitlines()
  assert json.loads(line)['input'] == 'review: ab'
  assert set(json.loads(line)['scores']) == {'a', 'b'}
  assert 'note' not in capsys.readouterr().err
  infer(str(source), tmp_path / 'other', trained=told, template='{text}')
  said = capsys.readouterr().err
  assert (
    "trained with template 'review: {sentence}', asked for '{text}'" in said
  )
  with pytest.raises(UserError, match='training named none'):
    infer(str(source), tmp_path / 'third', rank=True)


def test_the_prompt_of_the_training_is_taken_and_of_several_one_is_asked_for():
  assert loading.remembered(trained_with(prompt_indices={'a': 1})) == {
    'prompt_index': 1
  }
  two = trained_with(prompt_indices={'a': 0, 'b': 1})
  assert loading.remembered(two) == {'prompt_index': None}


def test_a_prompt_of_several_tasks_needs_its_index(predictor):
  with pytest.raises(UserError, match='say which by prompt_index'):
    predictor(prompt_index=None)


def test_a_sentinel_of_the_training_is_put_and_taken_off(loaded):
  class Sentinels(Letters):
    def sentinel(self, number):
      return VOCAB - 1 - number

    def decode(self, ids):
      text = super().decode([i for i in ids if i != VOCAB - 1])
      return '<extra_id_0> ' + text

  made = Predictor(
    loaded, Sentinels(), targets_length=3, batch_size=1, target_sentinel=True
  )
  assert made._targets(['ab']).tolist() == [[VOCAB - 1, 4, 5, 1]]
  assert not made.predict(['ab'])[0].startswith('<extra')
