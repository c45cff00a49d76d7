"""Which T5 fits which slice: a table of `prompt-tuning compile`, in Markdown.

  python scripts/compile_table.py --topologies v5e:2x2 v5e:4x4 h100:1 \\
    --sizes base xxl --reports reports

Compiles the training step of every size for every topology (batch 32 or those
of --batches, inputs 512, prompt 100, unless --gin bindings say otherwise) and
prints memory a device and a step's time by compute, memory and network. A
report that is there already is not made again: other bindings need another
folder. Needs `pip install "prompt_tuning[tpu]"`, `[gpu]` or both.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

SIZES = ('small', 'base', 'large', 'xl', 'xxl')


def report(
  size: str,
  topology: str,
  batch: int | None,
  folder: pathlib.Path,
  bindings: list[str],
) -> dict:
  """The report of one training step, made by the command or read again."""
  name = f'{size}-{topology.replace(":", "-")}'
  if batch is not None:
    name += f'-batch-{batch}'
    bindings = [*bindings, f'--gin.BATCH_SIZE={batch}']
  path = folder / f'{name}.json'
  if not path.exists():
    command = [
      *(sys.executable, '-m', 'prompt_tuning', 'compile'),
      f'--gin_file=models/t5_1_1_{size}.gin',
      '--gin_file=runs/compile.gin',
      f"--gin.TOPOLOGY='{topology}'",
      "--gin.compile_steps.steps=('train',)",
      f"--gin.compile_steps.report_file='{path}'",
      '--gin.compile_steps.advise=False',
      *bindings,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if not path.exists():
      raise SystemExit(f'{" ".join(command)}\n{done.stderr[-2000:]}')
  return json.loads(path.read_text())[0]


def cell(found: dict) -> str:
  """'4.9 (2x1x8)' in GiB, with the mesh; bold where it does not fit."""
  mesh = 'x'.join(str(size) for size in found['mesh'].values())
  memory = f'{found["memory"] / 2**30:.1f}'
  return f'{memory} ({mesh})' if found['fits'] else f'**no**, {memory}'


def time_cell(found: dict) -> str:
  """'231-469': all overlapping, nothing overlapping, in milliseconds."""
  seconds = found['seconds']
  if seconds is None:
    return ''
  longest, total = max(seconds.values()), sum(seconds.values())
  return f'{1e3 * longest:.0f}-{1e3 * total:.0f}'


def table(head: str, sizes, rows, reports, write) -> str:
  """A Markdown table with a row for each (topology, batch)."""
  lines = [
    f'| {head} | ' + ' | '.join(sizes) + ' |',
    '|---' * (len(sizes) + 1) + '|',
  ]
  for topology, batch in rows:
    name = topology if batch is None else f'{topology}, batch {batch}'
    cells = [write(reports[size, topology, batch]) for size in sizes]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topologies', nargs='+', required=True)
  parser.add_argument('--sizes', nargs='+', default=SIZES, choices=SIZES)
  parser.add_argument('--batches', nargs='+', type=int, default=[None])
  parser.add_argument('--reports', type=pathlib.Path, required=True)
  parser.add_argument('--gin', nargs='*', default=[], metavar='NAME=VALUE')
  flags = parser.parse_args()
  flags.reports.mkdir(parents=True, exist_ok=True)
  bindings = [f'--gin.{binding}' for binding in flags.gin]
  reports = {}
  rows = list(itertools.product(flags.topologies, flags.batches))
  for row, size in itertools.product(rows, flags.sizes):
    reports[size, *row] = found = report(size, *row, flags.reports, bindings)
    said = ' '.join(map(str, filter(None, row)))
    print(f'{size} on {said}: {cell(found)}', file=sys.stderr, flush=True)
  arguments = (flags.sizes, rows, reports)
  print(table('GiB a device (mesh)', *arguments, cell))
  print()
  print(table('ms a step', *arguments, time_cell))


if __name__ == '__main__':
  main()
