"""One step of prompt tuning, scoring and generation, beside its peers.

  python scripts/benchmark.py --json figures.json
  python scripts/benchmark.py --model t5_1_1_base --batch 8 --work train \\
    --engines ours peft --python peft=VENV/bin/python

A gated T5 of random weights and full rows (or rows as long as --lengths has
them). Each engine is a process that compiles its step and then takes turns with
the others, round by round; figures are medians (least to largest):

  step          until its result is there
  CPU           what the process's threads spent in it together, which other
                work on the machine changes less
  examples/s    rows by the median
  tokens/s      virtual tokens, text and targets likewise, padding not
  FLOP/s        model FLOPs (step_engines.model_flops has the formula) by the
                median, and their share of the floor: the time that they would
                take at the best rates of plain and of batched products that a
                library reached in this run (the engines of the name `peak`)
  peak memory   largest resident set of the process; on GPU of its allocator
  temporaries   what XLA set apart for intermediate results
  compilation   before a step could run; no cache
  loss          of the first step: weights are random, and PyTorch's its own
  load          of the machine, 1 minute's average

`ours` trains as `train` does where nothing is typed. `peft` is Hugging Face's
T5 with PEFT's prompt, which pads to the longest of a batch. An engine whose
packages are missing is passed over; --python names another Python for it.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

from step_engines import ENGINES
from step_engines import WORKS
from step_engines import Work
from step_engines import memory_mb
from step_engines import model_flops


def child(name: str, work: Work) -> None:
  """Says what it made, then does steps as it is told how many."""

  def say(figures):
    print(json.dumps(figures), file=answers, flush=True)

  # What libraries print goes elsewhere.
  answers, sys.stdout = sys.stdout, sys.stderr
  for module in ENGINES[name].needs:
    if importlib.util.find_spec(module) is None:
      say({'missing': module})
      return
  step = ENGINES[name].make(work)
  say({k: v for k, v in vars(step).items() if k != 'run'})
  for line in sys.stdin:
    if ENGINES[name].is_peak:
      say(step.run())
      continue
    steps, cpu = [], []
    for _ in range(int(line)):
      start = (time.perf_counter(), time.process_time())
      step.run()
      steps.append(1e3 * (time.perf_counter() - start[0]))
      cpu.append(1e3 * (time.process_time() - start[1]))
    say({'step_ms': steps, 'cpu_ms': cpu, 'peak_mb': memory_mb()})


class Child:
  """An engine's process."""

  def __init__(self, name: str, work: Work, python: str):
    self._process = subprocess.Popen(
      [python, __file__, '--child', name, json.dumps(dataclasses.asdict(work))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE if not os.environ.get('BENCHMARK_LOG') else None,
      text=True,
      env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
    )

  def answer(self) -> dict[str, Any]:
    """The next line of it, or why there is none."""
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    log = (self._process.stderr.read() if self._process.stderr else '').strip()
    return {'failed': log[-5000:] or f'exit code {self._process.wait()}'}

  def steps(self, count: int) -> dict[str, Any]:
    self._process.stdin.write(f'{count}\n')
    self._process.stdin.flush()
    return self.answer()

  def end(self) -> None:
    self._process.communicate()


def measure(
  names: Sequence[str],
  work: Work,
  rounds: int,
  steps: int,
  pythons: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
  """{engine: what it made, and 'runs' of figures}."""
  children, found = {}, {}
  for name in names:
    if work.kind not in ENGINES[name].works:
      continue
    # One after the other: compiling beside others says nothing of its time.
    one = Child(name, work, pythons.get(name, sys.executable))
    found[name] = {**one.answer(), 'runs': []}
    print(f'{work.kind} {name}', *found[name].items(), file=sys.stderr)
    if {'missing', 'failed'} & set(found[name]):
      one.end()
    else:
      children[name] = one
  for number in range(rounds):
    order = list(children)
    first = number % max(len(order), 1)
    for name in (*order[first:], *order[:first]):
      load = os.getloadavg()[0]
      figures = children[name].steps(steps)
      if 'failed' in figures:
        found[name] |= figures
        children.pop(name).end()
        continue
      found[name]['runs'].append(figures | {'load': load})
  for one in children.values():
    one.end()
  return found


def summary(
  found: Mapping[str, Mapping[str, Any]], work: Work
) -> dict[str, dict[str, list[float]]]:
  """{engine: {row of the table: values}}."""
  rates = [
    run
    for name, one in found.items()
    for run in one['runs']
    if ENGINES[name].is_peak
  ]
  weights, attention = model_flops(work)
  texts = work.lengths or [work.inputs] * work.batch
  tokens = sum(texts) + len(texts) * (work.prompt + work.targets)
  floor = None
  if rates:
    best = {k: max(run[k] for run in rates) for k in ('products', 'batched')}
    floor = weights / best['products'] + attention / best['batched']
  columns = {}
  for name, one in found.items():
    if not one['runs'] or ENGINES[name].is_peak:
      continue
    steps = [ms for run in one['runs'] for ms in run['step_ms']]
    seconds = statistics.median(steps) / 1e3
    rows = {
      'step, ms': steps,
      'CPU, ms': [ms for run in one['runs'] for ms in run['cpu_ms']],
      'examples/s': [work.batch / seconds],
      'tokens/s': [tokens / seconds],
      'GFLOP/s': [(weights + attention) / seconds / 1e9],
    }
    # Model tuning has more to do than the FLOPs that are counted.
    if floor is not None and name != 'ours_model_tuning':
      rows['times the floor'] = [seconds / floor]
    rows['peak memory, MB'] = [one['runs'][-1]['peak_mb']]
    for row, figure in (
      ('temporaries, MB', 'temporaries_mb'),
      ('compilation, s', 'compile_s'),
      ('loss', 'loss'),
    ):
      if one.get(figure) is not None:
        rows[row] = [one[figure]]
    columns[name] = rows | {'load': [run['load'] for run in one['runs']]}
  return columns


DIGITS = {'compilation, s': 1, 'load': 1, 'times the floor': 2, 'loss': 3}


def spread(values: Sequence[float], digits: int) -> str:
  """'median (least to largest)', or the one value that there is."""
  parts = (statistics.median(values), min(values), max(values))
  middle, least, largest = (f'{part:,.{digits}f}' for part in parts)
  return middle + (f' ({least} to {largest})' if least != largest else '')


def table(columns: Mapping[str, Mapping[str, list[float]]]) -> Iterator[str]:
  """Lines of Markdown, a column an engine."""
  rows = dict.fromkeys(row for one in columns.values() for row in one)
  yield f'| | {" | ".join(columns)} |'
  yield '|---' * (len(columns) + 1) + '|'
  for row in rows:
    cells = []
    for one in columns.values():
      values = one.get(row)
      if not values:
        cells.append('–')
        continue
      digits = DIGITS.get(row, 1 if statistics.median(values) < 20 else 0)
      cells.append(spread(values, digits))
    yield f'| {row} | {" | ".join(cells)} |'


def remarks(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """What the peaks were, and which engines are not in the table."""
  for name, one in found.items():
    if 'missing' in one:
      yield f'{name}: not installed ({one["missing"]} is missing)'
    elif 'failed' in one:
      yield f'{name}: failed: {one["failed"].strip().splitlines()[-1]}'
    elif ENGINES[name].is_peak and one['runs']:
      best = {
        kind: max(run[kind] for run in one['runs']) / 1e9
        for kind in ('products', 'batched')
      }
      yield (
        f'{name}: {best["products"]:,.0f} GFLOP/s of plain products,'
        f' {best["batched"]:,.0f} of batched ones'
      )


def sizes_of(model: str) -> dict[str, Any]:
  """The sizes of a T5 as its gin file binds them."""
  from prompt_tuning import gin_files

  file = gin_files.find_file(f'models/{model}')
  names = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim')
  names = (*names, 'num_encoder_layers', 'num_decoder_layers')
  return {
    binding.parameter: binding.value
    for binding in gin_files.bindings_in(file.read_text())
    if binding.parameter in names
  }


def main() -> int:
  if sys.argv[1:2] == ['--child']:
    name, work = sys.argv[2:]
    child(name, Work(**json.loads(work)))
    return 0
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--work', nargs='+', default=list(WORKS), choices=WORKS)
  add('--engines', nargs='+', default=list(ENGINES), choices=ENGINES)
  add('--python', nargs='*', default=[], metavar='ENGINE=PATH')
  add('--model', default='t5_1_1_small', help='a file of configs/models')
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  shapes = {'batch': 16, 'inputs': 128, 'prompt': 100, 'targets': 8}
  for name, value in (shapes | {'rounds': 5, 'steps': 2}).items():
    add(f'--{name}', type=int, default=value)
  add('--microbatches', type=int, help="ours; default: the package's rule")
  texts = 'JSON: ids of text of each row; the first --batch of them are taken'
  add('--lengths', type=pathlib.Path, metavar='FILE', help=texts)
  add('--json', type=pathlib.Path, metavar='FILE')
  flags = parser.parse_args()
  pythons = dict(entry.split('=', 1) for entry in flags.python)
  lengths = None
  if flags.lengths is not None:
    lengths = json.loads(flags.lengths.read_text())[: flags.batch]
    lengths = [min(length, flags.inputs) for length in lengths]
    if len(lengths) < flags.batch:
      parser.error(f'--lengths has {len(lengths)} of --batch {flags.batch}')
  reports, failed = {}, False
  for kind in flags.work:
    work = Work(
      kind=kind,
      sizes=sizes_of(flags.model),
      lengths=lengths,
      **{name: getattr(flags, name) for name in shapes},
      **{name: getattr(flags, name) for name in ('dtype', 'microbatches')},
    )
    found = measure(flags.engines, work, flags.rounds, flags.steps, pythons)
    print(f'\n{kind}\n', *table(summary(found, work)), sep='\n')
    print('', *remarks(found), sep='\n')
    reports[kind] = {
      'work': dataclasses.asdict(work),
      'flops': dict(zip(('weights', 'attention'), model_flops(work))),
      'engines': found,
    }
    failed |= any('failed' in one for one in found.values())
  if flags.json is not None:
    machine = f'{platform.platform()}, {os.cpu_count()} cores'
    flags.json.write_text(json.dumps({'machine': machine, **reports}, indent=1))
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
