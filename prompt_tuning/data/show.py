"""Shows what a task feeds to the model, and how long its texts are.

  prompt-tuning show taskless_super_glue_rte_v102 \\
      --vocabulary t5_1_1_mini --prompt_length 20 --inputs 128 --targets 8

Prints formatted examples with their ids, virtual tokens marked, and for inputs
and targets a histogram of lengths, percentiles, and the share of examples that
a length would cut.
"""

import argparse
from collections.abc import Iterator, Sequence
import os
import sys
import time

from jaxtyping import Int
import numpy as np

from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.data.virtual_tokens import PLACEMENTS
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError

_BAR = 40
_LIMITS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def marked(
  ids: Sequence[int], vocabulary, virtual_tokens: VirtualTokens | None
) -> str:
  """Ids as text: virtual tokens as <prompt_i>, padding counted at the end."""
  ids = [int(token) for token in ids]
  text, padding = [], 0
  while ids and ids[-1] == vocabulary.pad_id:
    ids.pop()
    padding += 1
  for token in ids:
    if virtual_tokens is not None and token >= virtual_tokens.first_id:
      text.append(f'<prompt_{token - virtual_tokens.first_id}>')
    else:
      text.append(str(token))
  if padding:
    text.append(f'(padding: {padding})')
  return ' '.join(text)


def histogram(values: Int[np.ndarray, 'N'], limit: int) -> Iterator[str]:
  """Lines that say how the lengths are distributed and what a limit cuts."""
  edges = np.unique(np.linspace(values.min(), values.max() + 1, 13).astype(int))
  if len(edges) == 1:
    edges = np.append(edges, edges[0] + 1)
  counts, _ = np.histogram(values, edges)
  for low, high, count in zip(edges, edges[1:], counts, strict=False):
    bar = '#' * int(round(_BAR * count / counts.max()))
    yield f'  {low:6}-{high - 1:<6} {count:8,}  {bar}'
  numbers = np.percentile(values, (50, 90, 95, 99))
  percentiles = ', '.join(
    f'{name} {int(np.ceil(value))}'
    for name, value in zip(('50%', '90%', '95%', '99%'), numbers, strict=True)
  )
  yield f'  {percentiles}, longest {values.max()}'
  shares = [
    f'{length}: {100 * np.mean(values > length):.1f}%'
    for length in sorted({*_LIMITS, limit})
    if length == limit or values.min() <= length <= 2 * values.max()
  ]
  yield f'  cut at {"  ".join(shares)}'


def _task(arguments: argparse.Namespace) -> Task:
  return Task(
    arguments.task,
    {'inputs': arguments.inputs, 'targets': arguments.targets},
    vocabulary=arguments.vocabulary,
    modules=arguments.modules,
    local_data_dir=arguments.local_data_dir,
  )


def _virtual_tokens(
  arguments: argparse.Namespace, vocabulary
) -> VirtualTokens | None:
  if not arguments.prompt_length:
    return None
  return VirtualTokens(
    arguments.rows or vocabulary.vocab_size,
    arguments.prompt_length,
    placement=arguments.placement,
  )


def show(arguments: argparse.Namespace) -> Iterator[str]:
  """The lines of the report."""
  stated = _task(arguments)
  limits = stated.feature_lengths
  task = stated.checked(arguments.split)
  import seqio

  from prompt_tuning.data import feature_converter
  from prompt_tuning.data import lengths

  for part in seqio.get_subtasks(task):
    if arguments.split not in part.splits:
      continue
    vocabulary = part.output_features['inputs'].vocabulary
    virtual_tokens = _virtual_tokens(arguments, vocabulary)
    yield f'{part.name}, split {arguments.split!r}'
    dataset = part.get_dataset(
      sequence_length=limits, split=arguments.split, shuffle=False, num_epochs=1
    ).take(arguments.examples)
    converter = feature_converter.VirtualTokensFeatureConverter(virtual_tokens)
    for text, row in zip(
      dataset.as_numpy_iterator(),
      converter(dataset, limits).as_numpy_iterator(),
      strict=True,
    ):
      yield ''
      for name in ('inputs', 'targets'):
        words = text.get(f'{name}_pretokenized')
        words = vocabulary.decode(text[name]) if words is None else words
        words = words.decode() if isinstance(words, bytes) else words
        yield f'{name}: {words}'
      yield 'encoder_input_tokens: ' + marked(
        row['encoder_input_tokens'], vocabulary, virtual_tokens
      )
      yield 'decoder_target_tokens: ' + marked(
        row['decoder_target_tokens'], vocabulary, virtual_tokens
      )
    yield ''
    if lengths.cut_by_task(part):
      yield 'the task cuts its texts to their lengths itself'
      continue
    measured = lengths.measure(part, arguments.split, arguments.most)
    for name, values in measured.items():
      yield (
        f'{name}: tokens with EOS, without virtual tokens, of '
        f'{len(values):,} examples'
      )
      yield from histogram(values, limits[name])
    shares = lengths.truncated(measured, limits)
    yield 'truncated at ' + ', '.join(
      f'{name} {limits[name]}: {100 * share:.2f}%'
      for name, share in shares.items()
    )
    yield ''


def throughput(arguments: argparse.Namespace, batches: int = 300) -> str:
  """A line on how fast training batches come, those of 32 examples."""
  data = TaskData(_task(arguments), batch_size=32, split=arguments.split)
  vocabulary = data.task.seqio().output_features['inputs'].vocabulary
  virtual_tokens = _virtual_tokens(arguments, vocabulary)
  stream = data.batches(virtual_tokens=virtual_tokens, seed=0)
  for _ in range(20):  # buffers fill first
    next(stream)
  start = time.perf_counter()
  for _ in range(batches):
    next(stream)
  seconds = time.perf_counter() - start
  return (
    f'pipeline: {32 * batches / seconds:,.0f} examples/s in batches of 32, '
    f'on {os.cpu_count()} cores'
  )


def parser() -> argparse.ArgumentParser:
  """The command line."""
  result = argparse.ArgumentParser(
    prog='prompt-tuning show',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = result.add_argument
  add('task', help='a task or mixture')
  add('--split', default='train', help='default train')
  add('--examples', type=int, default=3, help='how many to print (default 3)')
  add('--inputs', type=int, default=512, help='their length (default 512)')
  add('--targets', type=int, default=16, help='their length (default 16)')
  add('--vocabulary', help="path or name; the task's own if not given")
  add('--prompt_length', type=int, default=100, help='P, 0 for none')
  add('--placement', choices=PLACEMENTS, default='prefix')
  add(
    '--rows', type=int, help="V, the model's (default: the vocabulary's size)"
  )
  add('--local_data_dir', help='raw files to read instead of TFDS data sets')
  add('--modules', nargs='*', default=(), help='modules that register tasks')
  add(
    '--most',
    type=int,
    default=20_000,
    help='examples whose lengths are measured (default 20,000)',
  )
  add(
    '--throughput',
    action='store_true',
    help='also measure how many examples a second training can read',
  )
  return result


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for faults of data, 2 of usage."""
  arguments = parser().parse_args(argv)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  try:
    for line in show(arguments):
      print(line, flush=True)
    if arguments.throughput:
      print(throughput(arguments))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except BrokenPipeError:  # `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


if __name__ == '__main__':
  sys.exit(main())
