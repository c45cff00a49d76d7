"""Engines side by side: our own is measured, others are passed over."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'scripts'
TINY = (
  *('--model', 't5_1_1_mini', '--batch', '4', '--inputs', '12'),
  *('--prompt', '4', '--targets', '4', '--microbatches', '2', '--steps', '2'),
)


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(SCRIPTS)
  import benchmark_runs

  return benchmark_runs


def test_figures_become_a_table(benchmark, monkeypatch):
  runs = [{'step_ms': 1500.2, 'load': 0.5}, {'step_ms': 1400, 'load': 0.5}]
  found = {
    'one': {'runs': runs, 'reads': dict.fromkeys(('python_files',), 9)},
    'other': {'runs': [], 'missing': 'torch'},
    'third': {'runs': [], 'failed': 'Traceback\nValueError: no\n'},
  }
  rows = {k: benchmark.ROWS[k] for k in ('step, ms', 'Python files')}
  monkeypatch.setattr(benchmark, 'ROWS', rows)
  assert list(benchmark.table(found)) == [
    '| | one |',
    '|---|---|',
    '| step, ms | 1,450 (1,400 to 1,500) |',
    '| Python files | 9 |',
    '\nother: not installed (torch is missing)',
    '\nthird: failed: ValueError: no',
  ]


def test_engines_take_turns_and_a_failed_one_is_not_run_again(
  benchmark, monkeypatch
):
  ran = []

  def run(name, work, python):
    ran.append((name, work.reads, python))
    return {'failed': 'no'} if name == 'b' else {'step_ms': 1}

  monkeypatch.setattr(benchmark, 'run', run)
  sizes = dict.fromkeys(
    ('batch', 'inputs', 'prompt', 'targets', 'microbatches', 'steps'), 1
  )
  work = benchmark.Work(model='m', sources=None, shared='', **sizes)
  found = benchmark.measure(['a', 'b', 'c'], work, 2, {'c': 'python of c'})
  here = sys.executable
  assert ran == [
    *(('a', True, here), ('b', True, here), ('c', True, 'python of c')),
    *(('c', False, 'python of c'), ('a', False, here)),
    *(('c', False, 'python of c'), ('a', False, here)),
  ]
  assert len(found['a']['runs']) == 2 and found['b']['failed'] == 'no'


@pytest.mark.slow
def test_our_engine_is_measured(tmp_path):
  file = tmp_path / 'figures.json'
  done = subprocess.run(
    [
      *(sys.executable, SCRIPTS / 'benchmark_runs.py', *TINY),
      *('--engines', 'ours', 'upstream', '--repetitions', '1'),
      *('--sources', tmp_path, '--json', file),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('| | ours |\n|---|---|\n| step, ms | ')
  assert 'upstream: not installed' in done.stdout
  found = json.loads(file.read_text())
  assert found['work']['batch'] == 4
  ours = found['engines']['ours']
  (figures,) = ours['runs']
  assert len(figures['steps_ms']) == len(figures['steps_cpu_ms']) == 2
  numbers = {k: v for k, v in figures.items() if not isinstance(v, list)}
  # A checkpoint of 4 x 192 floats and an unfactored moment is some kilobytes.
  assert 6 < numbers['checkpoint_kb'] < 100
  assert 0 < numbers['compile_s'] < numbers['startup_s']
  assert all(math.isfinite(v) and v > 0 for v in numbers.values()), numbers
  names = {pathlib.Path(name).name for name in ours['reads']['files']}
  assert {'train_step.py', 'network.py', 'losses.py', 'prompt.py'} <= names
  assert ours['reads']['python_files'] == len(names)
  assert ours['reads']['first_loss'] == figures['first_loss']
  # models, prompts, runs and schedules, and what they include.
  assert 4 < ours['reads']['gin_files'] < 12
