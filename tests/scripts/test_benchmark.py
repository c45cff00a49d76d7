"""Steps side by side: what is counted, and that our engines do the work."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'scripts'
SIZES = {
  'vocab_size': 7,
  'emb_dim': 5,
  'num_heads': 3,
  'head_dim': 2,
  'mlp_dim': 4,
  'num_encoder_layers': 1,
  'num_decoder_layers': 1,
}


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(SCRIPTS)
  import benchmark

  return benchmark


def work(benchmark, **changes):
  given = {'kind': 'score', 'sizes': SIZES, 'batch': 1, 'inputs': 8}
  given |= {'prompt': 2, 'targets': 3, 'dtype': 'float32'}
  return benchmark.Work(**given | changes)


def test_flops_are_those_of_the_products(benchmark):
  # 10 positions of the encoder: four projections of 5 x 6, three of 5 x 4.
  encoder = 10 * 2 * (4 * 30 + 3 * 20)
  # 3 targets: those and two more of 5 x 6, and logits; keys and values of 10.
  decoder = 3 * 2 * (6 * 30 + 3 * 20 + 5 * 7) + 10 * 2 * 2 * 30
  attention = 2 * 2 * 6 * (10 * 10 + 3 * 3 + 3 * 10)
  assert benchmark.model_flops(work(benchmark)) == (
    encoder + decoder,
    attention,
  )
  weights, mixing = benchmark.model_flops(work(benchmark, kind='train'))
  assert (weights, mixing) == (2 * (encoder + decoder), 3 * attention)
  # Padding is not counted.
  both = work(benchmark, batch=2, lengths=[8, 0])
  short = 2 * 2 * (4 * 30 + 3 * 20) + 3 * 2 * (6 * 30 + 3 * 20 + 5 * 7)
  short += 2 * 2 * 2 * 30
  assert benchmark.model_flops(both)[0] == encoder + decoder + short


def test_steps_become_a_table_beside_the_floor(benchmark):
  asked = work(benchmark)
  weights, attention = benchmark.model_flops(asked)
  runs = [
    {'step_ms': [2000, 4000], 'cpu_ms': [3000, 3000], 'peak_mb': 900, 'load': 1}
  ]
  rate = {'products': weights, 'batched': attention, 'load': 1}
  found = {
    'ours': {'runs': runs, 'compile_s': 1.26, 'temporaries_mb': None},
    'peft': {'runs': [], 'missing': 'torch'},
    'jax_peak': {'runs': [rate, rate | {'products': weights / 2}]},
  }
  columns = benchmark.summary(found, asked)
  assert list(columns) == ['ours']
  # A second for each kind of product, at the best rate.
  assert columns['ours']['times the floor'] == [1.5]
  assert columns['ours']['tokens/s'] == [13 / 3]
  lines = list(benchmark.table(columns))
  assert lines[2] == '| step, ms | 3,000 (2,000 to 4,000) |'
  assert '| compilation, s | 1.3 |' in lines
  assert not any('temporaries' in line for line in lines)
  assert next(benchmark.remarks(found)) == (
    'peft: not installed (torch is missing)'
  )


def test_engines_take_turns_and_a_failed_one_is_not_asked_again(
  benchmark, monkeypatch
):
  told = []

  class Child:
    def __init__(self, name, work, python):
      self.name = name

    def answer(self):
      return {'missing': 'torch'} if self.name == 'peft' else {}

    def steps(self, count):
      told.append((self.name, count))
      fails = self.name == 'minimal_jax'
      return {'failed': 'no'} if fails else {'step_ms': [1] * count}

    def end(self):
      told.append(self.name)

  monkeypatch.setattr(benchmark, 'Child', Child)
  names = ['ours', 'peft', 'minimal_jax', 'ours_model_tuning']
  asked = work(benchmark, kind='train')
  found = benchmark.measure(names, asked, 2, 3, {})
  assert told == [
    'peft',
    *(('ours', 3), ('minimal_jax', 3), 'minimal_jax', ('ours_model_tuning', 3)),
    *(('ours_model_tuning', 3), ('ours', 3)),
    *('ours', 'ours_model_tuning'),
  ]
  assert [len(found[name]['runs']) for name in names] == [2, 0, 0, 2]


def test_a_child_that_dies_leaves_its_last_words(benchmark):
  one = benchmark.Child('no engine', work(benchmark), sys.executable)
  assert 'KeyError' in one.answer()['failed']


def test_rows_have_the_lengths_that_were_asked_for(benchmark):
  from step_engines import batch_of

  asked = work(benchmark, batch=2, lengths=[8, 3])
  batch = batch_of(asked, 7)
  assert (batch['encoder_input_tokens'] > 0).sum(1).tolist() == [10, 5]
  assert batch['encoder_input_tokens'][0, :2].tolist() == [7, 8]
  assert batch['decoder_target_tokens'].shape == (2, 3)


@pytest.mark.slow
def test_our_engines_do_the_work_that_a_hand_written_step_does(tmp_path):
  file, lengths = tmp_path / 'figures.json', tmp_path / 'lengths.json'
  lengths.write_text(json.dumps([12, 5, 20, 300]))
  done = subprocess.run(
    [
      *(sys.executable, SCRIPTS / 'benchmark.py', '--model', 't5_1_1_mini'),
      *('--batch', '4', '--inputs', '100', '--prompt', '4', '--targets', '4'),
      *('--rounds', '2', '--steps', '1', '--json', file),
      *('--lengths', lengths, '--engines'),
      *('ours', 'ours_model_tuning', 'minimal_jax', 'jax_peak'),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  assert done.returncode == 0, done.stderr
  assert '| | ours | ours_model_tuning | minimal_jax |' in done.stdout
  found = json.loads(file.read_text())
  assert found['train']['work']['lengths'] == [12, 5, 20, 100]
  engines = types.SimpleNamespace(**found['train']['engines'])
  assert engines.ours['loss'] == pytest.approx(
    engines.minimal_jax['loss'], rel=1e-4
  )
  assert engines.ours['loss'] == pytest.approx(
    engines.ours_model_tuning['loss'], rel=1e-4
  )
  for kind in ('train', 'score', 'generate'):
    (first, second) = found[kind]['engines']['ours']['runs']
    assert len(first['step_ms']) == len(second['cpu_ms']) == 1
    assert first['step_ms'][0] > 0 and first['peak_mb'] > 50
