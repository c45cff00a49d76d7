"""Engines of prompt tuning on the same work, side by side, in Markdown.

  python scripts/benchmark_runs.py --json figures.json
  python scripts/benchmark_runs.py --engines ours t5x upstream \\
    --sources FOLDER --python t5x=VENV/bin/python upstream=VENV/bin/python

All train a prompt on one T5 1.1 of random weights (float32, no dropout, the
paper's Adafactor), from one prompt, on the same full rows; first_loss in the
report shows that it is the same work. A run is a process of its own, one engine
after the other, round by round; figures are medians (least to largest):

  step          from the end of a step to that of the next, which is waited for
                CPU: what the process's threads spent in it together, which
                other work on the machine changes less
  start-up      from the start of the process to the end of its first step
  compilation   tracing, lowering and compiling the step; no cache
  peak memory   largest resident set of the process, checkpoints included
  checkpoint    the last one, seconds until it is on disk
  typed         gin files and settings of the command, less those for measuring
  gin           files that the run reads; lines that are not empty or comments
  Python        files of the engine's own packages whose code runs while the
                step is traced, which is what one opens to read it; their lines
  load          of the machine, 1 minute's average, as a run begins

`upstream` is the public prompt tuning: --sources (or T5X_SOURCES) has clones of
it and Flaxformer, `prompt-tuning` and `flaxformer`; it needs chex, and empty
modules take the place of flax.optim and aqt, which it imports and does not use
here. An engine whose packages are missing is passed over.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmark import spread
from run_engines import BASE_STEP
from run_engines import ENGINES
from run_engines import Meter
from run_engines import Work


def prepare(work: Work) -> None:
  """Writes the base, the prompt to start from and a vocabulary."""
  import jax
  import numpy as np

  from prompt_tuning import gin_files
  from prompt_tuning.interop import t5x as t5x_files
  from prompt_tuning.models import network
  from prompt_tuning.models import parameters
  from prompt_tuning.models.model import EncoderDecoderModel

  file = gin_files.find_file(f'models/{work.model}')
  sizes = {
    binding.parameter: binding.value
    for binding in gin_files.bindings_in(file.read_text())
    if binding.parameter in network.T5Config.__dataclass_fields__
  }
  config = network.T5Config(**sizes)
  params = EncoderDecoderModel(config).init_params(jax.random.key(0))
  arrays = parameters.flatten(params)
  t5x_files.write_checkpoint(work.shared, arrays, BASE_STEP)
  rng, shape = np.random.default_rng(0), (work.prompt, config.emb_dim)
  prompt = rng.uniform(-0.5, 0.5, shape).astype(np.float32)
  np.save(work.file('prompt.npy'), prompt)
  bundled = pathlib.Path(gin_files.__file__).parent / 'bundled/t5_1_1_mini'
  shutil.copy(bundled / 'spiece.model', work.shared)


def child(name: str, work: Work) -> dict[str, Any]:
  """Runs an engine in this process; what its parent is told."""
  if name == 'prepare':
    prepare(work)
    return {}
  engine = ENGINES[name]
  engine.find(work)
  for module in engine.needs:
    package = module.partition('.')[0]
    if not all(map(importlib.util.find_spec, (package, module))):
      return {'missing': module}
  meter = Meter(work)
  engine.run(work, meter)
  return meter.result(engine.own)


def run(name: str, work: Work, python: str = sys.executable) -> dict[str, Any]:
  """Starts a process for an engine; its figures, or why there are none."""
  with tempfile.TemporaryDirectory() as folder:
    given = {'model_dir': f'{folder}/run', 'started': time.time()}
    work = dataclasses.replace(work, **given)
    done = subprocess.run(
      [python, __file__, '--child', name, json.dumps(dataclasses.asdict(work))],
      capture_output=True,
      text=True,
      cwd=folder,
      env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
    )
  if done.returncode:
    return {'failed': done.stderr[-5000:] or f'exit code {done.returncode}'}
  return json.loads(done.stdout.splitlines()[-1])


def measure(
  engines: Sequence[str],
  work: Work,
  repetitions: int,
  pythons: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
  """{engine: {'reads': figures, 'runs': [figures, ...]}}."""
  found = {name: {'runs': []} for name in engines}
  for number in range(repetitions + 1):
    # The first round says what is read, and fills the disk's cache.
    work = dataclasses.replace(work, reads=not number)
    first = number % len(engines)
    for name in (*engines[first:], *engines[:first]):
      if {'missing', 'failed'} & set(found[name]):
        continue
      load = os.getloadavg()[0]
      figures = run(name, work, pythons.get(name, sys.executable))
      said = {k: v for k, v in figures.items() if not isinstance(v, list)}
      print(f'{number}/{repetitions} {name} {said}', file=sys.stderr)
      if {'missing', 'failed'} & set(figures):
        found[name] |= figures
      elif number:
        found[name]['runs'].append(figures | {'load': load})
      else:
        found[name]['reads'] = figures
  return found


ROWS = {  # name: (figure, digits)
  'step, ms': ('step_ms', 0),
  'step, CPU ms': ('step_cpu_ms', 0),
  'start-up, s': ('startup_s', 1),
  'compilation, s': ('compile_s', 1),
  'peak memory, MB': ('peak_mb', 0),
  'checkpoint, kB': ('checkpoint_kb', 0),
  'checkpoint, s': ('checkpoint_s', 2),
  'typed': ('typed', 0),
  'gin files': ('gin_files', 0),
  'gin lines': ('gin_lines', 0),
  'Python files': ('python_files', 0),
  'Python lines': ('python_lines', 0),
  'load before': ('load', 1),
}


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """Lines of Markdown, a column an engine."""
  shown = {name: one for name, one in found.items() if one['runs']}
  yield f'| | {" | ".join(shown)} |'
  yield '|---' * (len(shown) + 1) + '|'
  for row, (figure, digits) in ROWS.items():
    cells = []
    for one in shown.values():
      runs = one['runs'] if figure in one['runs'][0] else [one['reads']]
      values = [run[figure] for run in runs]
      cells.append(spread(values, digits))
    yield f'| {row} | {" | ".join(cells)} |'
  for name, one in found.items():
    if 'missing' in one:
      yield f'\n{name}: not installed ({one["missing"]} is missing)'
    elif 'failed' in one:
      yield f'\n{name}: failed: {one["failed"].strip().splitlines()[-1]}'


def main() -> int:
  if sys.argv[1:2] == ['--child']:
    name, work = sys.argv[2:]
    print(json.dumps(child(name, Work(**json.loads(work)))))
    return 0
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--engines', nargs='+', default=list(ENGINES), choices=ENGINES)
  add('--python', nargs='*', default=[], metavar='ENGINE=PATH')
  add('--sources', default=os.environ.get('T5X_SOURCES'), metavar='FOLDER')
  add('--model', default='t5_1_1_small')
  sizes = {'batch': 16, 'inputs': 128, 'prompt': 100, 'targets': 8}
  counts = {'microbatches': 4, 'steps': 5, 'repetitions': 3}
  for name, value in (sizes | counts).items():
    add(f'--{name}', type=int, default=value)
  add('--json', type=pathlib.Path, metavar='FILE')
  flags = vars(parser.parse_args())
  engines, repetitions = flags.pop('engines'), flags.pop('repetitions')
  pythons = dict(entry.split('=', 1) for entry in flags.pop('python'))
  file = flags.pop('json')
  with tempfile.TemporaryDirectory() as shared:
    work = Work(shared=shared, **flags)
    if fault := run('prepare', work).get('failed'):
      sys.exit(fault)
    found = measure(engines, work, repetitions, pythons)
  print(*table(found), sep='\n')
  if file is not None:
    machine = f'{platform.platform()}, {os.cpu_count()} cores'
    report = {'machine': machine, 'work': flags, 'engines': found}
    file.write_text(json.dumps(report, indent=1))
  return int(any('failed' in one for one in found.values()))


if __name__ == '__main__':
  sys.exit(main())
