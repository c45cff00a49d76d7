"""The first run: a prompt for BBC News topics on the bundled model.

Tunes a prompt on the training split, scores it on the test split beside the
majority class and the model without a prompt, writes a plot of the curves, and
classifies what you type. Training and scoring print the command that does the
same.

  ./scripts/quickstart.sh [--output_dir=DIR] [--seed=N] [--model_tuning]
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from prompt_tuning import cli
from prompt_tuning import configuration
from prompt_tuning.errors import UserError
from prompt_tuning.gin_files import Request

MODEL, TASK = 'models/t5_1_1_mini', 'tasks/bbc_topics'
ACCURACY = 'bbc_topics/accuracy'
# The paper's optimiser and start; a shorter prompt, few steps and therefore a
# learning rate that falls to 0 at their end suit a small model and two cores.
RECIPE = (
  *('runs/prompt_tune', 'prompts/class_labels', 'schedules/cosine'),
  'PROMPT_LENGTH=20',
)
BASELINE = ('runs/model_tune', 'BATCH_SIZE=32')
STEPS = 400
TEXTS = (
  'Late winner takes the cup. The striker scored twice in the second half as '
  'the home side came from behind to win the cup final. The coach praised his '
  'players, who had lost three of their last four matches, and said that the '
  'captain would be fit for the game on Saturday. "We played our best football '
  'of the season," he said. "The team never gave up, and the fans were great." '
  'England will meet Wales in the next round, and the winner plays France.',
  'Shares fall at bank. Shares fell sharply on Tuesday after the bank reported '
  'a loss for the third quarter. Analysts had expected profits to rise, and '
  'the chief executive blamed higher costs and weak demand in the euro zone. '
  'Sales were down by 5% and the company will cut jobs. Oil prices and the '
  'weak dollar hurt exports, economists said, and growth may be slower than '
  'the market had hoped.',
  'New phone goes on sale. The new mobile phone runs the latest software, '
  'plays music and connects to the internet at high speed. Users will be able '
  'to download games and to send pictures, the firm said, and the handset has '
  'more memory than a computer of ten years ago. People want broadband and '
  'video on the move, said a researcher, but viruses could spread by e-mail to '
  'phones as they did to PCs.',
  'Minister defends plan. The prime minister told MPs that the government '
  'would not change its plan before the election. Labour and the Liberal '
  'Democrats said that voters would not forgive ministers for the tax, and '
  'called for a debate in the Commons. The Conservative leader said the home '
  'secretary should resign. A spokesman for the party said that the bill would '
  'become law by May.',
)


def command(name: str, *words: str) -> Any:
  """What a command of ours prints, and before it how a shell spells it."""
  quoted = ' \\\n    '.join(map(shlex.quote, words))
  print(f'\n$ prompt-tuning {name} {quoted}\n', flush=True)
  return cli.call(name, words)


def tune(
  recipe: Sequence[str], options: argparse.Namespace, model_dir: pathlib.Path
) -> str:
  """Trains by a recipe; returns the seconds it took."""
  start = time.monotonic()
  result = command(
    'train',
    *(MODEL, TASK, *recipe),
    f'TRAIN_STEPS_RELATIVE={options.steps}',
    f'train.best_metric={ACCURACY}',
    'train.eval_period=100',
    f'train.seed={options.seed}',
    f'MODEL_DIR={model_dir}',
  )
  print(json.dumps(result, default=float), flush=True)
  return f'{time.monotonic() - start:.0f} s'


def score(folder: pathlib.Path, *words: str) -> float:
  """Accuracy, in percent, on the task's test split."""
  # Of another seed the quick start has been run before, perhaps.
  to = (f'EVAL_OUTPUT_DIR={folder}', 'evaluate.overwrite=True')
  return command('eval', *words, 'Evaluation.split=test', *to)[ACCURACY]


def plot(runs: dict[str, pathlib.Path], path: pathlib.Path) -> None:
  """Loss and accuracy against steps, of each run's metrics.jsonl."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  from prompt_tuning.interop.base_checkpoints import load_checkpoint

  first = load_checkpoint('t5_1_1_mini').step
  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
  kinds = [('train', 'loss_per_token', 'training loss, nats per token')]
  kinds += [('eval', ACCURACY, 'validation accuracy, %')]
  for name, model_dir in runs.items():
    text = (model_dir / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for axis, (split, key, label) in zip(axes, kinds):
      points = [line for line in lines if line['split'] == split]
      steps = [line['step'] - first for line in points]
      axis.plot(steps, [line[key] for line in points], label=name)
      axis.set(xlabel='step', ylabel=label)
  axes[1].set(ylim=(0, 100))
  for axis in axes:
    axis.grid(alpha=0.3)
    axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def classify(model_dir: pathlib.Path) -> None:
  """Labels a few texts, and what is typed where somebody types."""
  import prompt_tuning
  from prompt_tuning.data.bbc import TOPICS

  predictor = prompt_tuning.load('t5_1_1_mini', model_dir)

  def show(text: str) -> None:
    (ranking,) = predictor.rank([f'article: {text}'], TOPICS)
    print(f'  {max(ranking, key=ranking.get):<14} {text[:60]}')

  print('\nThe exported prompt classifies:')
  for text in TEXTS:
    show(text)
  if sys.stdin.isatty():
    print('A text of your own (Enter to end):')
    for text in itertools.takewhile(str.strip, sys.stdin):
      show(text.strip())


def run(options: argparse.Namespace) -> None:
  import numpy as np

  from prompt_tuning.data import classification
  from prompt_tuning.data.task import Task
  from prompt_tuning.models import network
  from prompt_tuning.models import parameters

  folder = pathlib.Path(options.output_dir)
  model_dir = folder / f'prompt_seed{options.seed}'
  runs = {'prompt tuning': model_dir}
  seconds = tune(RECIPE, options, model_dir)
  prompt = model_dir / 'prompt' / 'prompt.npy'
  task = Task('bbc_topics', {'inputs': 128, 'targets': 4})
  config = configuration.configure('T5Config', Request(files=(MODEL,)))()
  shapes = parameters.flatten(network.parameter_shapes(config)).values()
  total = sum(leaf.size for leaf in shapes)

  print('\nScoring the test split ...', flush=True)
  bare = (MODEL, TASK, 'runs/eval', 'evaluate.trained=()')
  rank = 'Evaluation.rank_classification=True'
  zero_shot = score(folder / 'zero_shot', *bare, rank)
  tuned = score(folder / 'prompt', str(model_dir))
  rows = [
    ('majority class', classification.majority_class(task)['accuracy']),
    ('no prompt, labels ranked', zero_shot),
    ('prompt tuning', tuned, np.load(prompt).size, seconds),
  ]
  if options.model_tuning:
    runs['model tuning'] = folder / f'model_seed{options.seed}'
    seconds = tune(BASELINE, options, runs['model tuning'])
    # Both are scored at their best validation step.
    tuned = score(folder / 'model', str(runs['model tuning']))
    rows.append(('model tuning', tuned, total, seconds))
  print(f'\n{"":26}{"test accuracy":>14}{"trained":>12}{"share":>9}{"time":>8}')
  for name, accuracy, *trained in rows:
    count, took = trained or (0, '')
    share = f'{100 * count / total:.2f}%'
    print(f'{name:26}{accuracy:13.1f}%{count:12,}{share:>9}{took:>8}')
  if not options.model_tuning:
    print('(model tuning, the upper bound: the same command, --model_tuning)')

  plot(runs, folder / 'curves.png')
  print('\nWritten:')
  for path in (
    *(prompt, prompt.with_suffix('.safetensors')),
    *(model_dir / 'metrics.jsonl', folder / 'curves.png'),
  ):
    print(f'  {path}  {path.stat().st_size:,} bytes')
  classify(model_dir)


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='quickstart', description=__doc__.partition('\n')[0]
  )
  add = parser.add_argument
  add('--output_dir', default='outputs/quickstart')
  add('--seed', type=int, default=0)
  add('--steps', type=int, default=STEPS)
  tuning = 'also tune the whole model, the upper bound'
  add('--model_tuning', action='store_true', help=tuning)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  try:
    run(parser.parse_args(arguments))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return getattr(error, 'EXIT_CODE', 1)
  return 0


if __name__ == '__main__':
  sys.exit(main())
