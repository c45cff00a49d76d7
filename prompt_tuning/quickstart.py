"""The first run: a prompt for BBC News topics on the bundled model.

Tunes a prompt on the training split, scores it on the test split beside the
majority class and the model without a prompt, writes a plot of the curves, and
classifies what you type. Training and scoring print the command that does the
same.

  ./scripts/quickstart.sh [--output_dir=DIR] [--seed=N] [--model_tuning]
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import sys
import time

from prompt_tuning import configuration
from prompt_tuning import train
from prompt_tuning.errors import UserError

MODEL = [
  '--gin_file=models/t5_1_1_mini.gin',
  "--gin.INITIAL_CHECKPOINT_PATH='t5_1_1_mini'",
  "--gin.VOCABULARY='t5_1_1_mini'",
]
TASK = ['--gin_file=tasks/bbc_topics.gin']
# The paper's optimiser and start; a shorter prompt, few steps and therefore a
# learning rate that falls to 0 at their end suit a small model and two cores.
RECIPE = ['--gin_file=prompts/class_labels.gin', '--gin.PROMPT_LENGTH=20']
LEARNING_RATE = 0.5
STEPS = 400
# Openings of articles, written for this. The prompt was tuned on 128 tokens of
# each article, and is worse on a single sentence.
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


def cosine(learning_rate: float, first_step: int, steps: int) -> list[str]:
  """Flags of a learning rate that falls to 0; T5X counts the base's steps."""
  schedule = '--gin.create_learning_rate_scheduler'
  return [
    '--gin.train.learning_rate=@create_learning_rate_scheduler()',
    f"{schedule}.factors='constant * cosine_decay'",
    f'{schedule}.base_learning_rate={learning_rate}',
    f'{schedule}.warmup_steps={first_step}',
    f'{schedule}.steps_per_cycle={steps}',
  ]


def command(name: str, flags: Sequence[str]) -> str:
  """The shell's spelling of one of our commands."""
  quoted = [f'"{f}"' if set(f) & set("'@()") else f for f in flags]
  return ' \\\n    '.join([f'prompt-tuning {name}', *quoted])


def tune(run_file: str, flags: Sequence[str], model_dir: pathlib.Path) -> float:
  """Trains by a run file; returns the seconds it took."""
  arguments = [
    *MODEL,
    *TASK,
    f'--gin_file=runs/{run_file}',
    *flags,
    f"--gin.MODEL_DIR='{model_dir}'",
  ]
  print(f'\n$ {command("train", arguments)}\n', flush=True)
  start = time.monotonic()
  if train.main(arguments):
    raise SystemExit(1)
  return time.monotonic() - start


def score(
  output_dir: pathlib.Path,
  prompt: str | None = None,
  base: str | None = None,
  rank: bool = False,
) -> float:
  """Accuracy, in percent, on the task's test split."""
  flags = [
    *MODEL,
    *TASK,
    '--gin_file=runs/eval.gin',
    f'--gin.PROMPT_FILE={prompt!r}' if prompt else '--gin.evaluate.prompt=None',
    f"--gin.EVAL_OUTPUT_DIR='{output_dir}'",
    "--gin.Evaluation.split='test'",
    f'--gin.Evaluation.rank_classification={rank}',
  ]
  if base is not None:
    flags[1] = f"--gin.INITIAL_CHECKPOINT_PATH='{base}'"
  print(f'\n$ {command("eval", flags)}', flush=True)
  evaluate = configuration.configure(
    'evaluate', configuration.parse_flags(flags)
  )
  return evaluate()['bbc_topics/accuracy']


def network_config():
  """The bundled model's T5Config, from its gin file."""
  flags = configuration.parse_flags(MODEL[:1])
  return configuration.configure('T5Config', flags)()


def plot(runs: dict[str, pathlib.Path], path: pathlib.Path) -> None:
  """Loss and accuracy against steps, of each run's metrics.jsonl."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
  for name, model_dir in runs.items():
    lines = [
      json.loads(line)
      for line in (model_dir / 'metrics.jsonl').read_text().splitlines()
    ]
    first = min(line['step'] for line in lines if line['split'] == 'train')
    for axis, split, key in (
      (left, 'train', 'loss_per_token'),
      (right, 'eval', 'bbc_topics/accuracy'),
    ):
      points = [
        (line['step'], line[key]) for line in lines if line['split'] == split
      ]
      steps = [step - first for step, _ in points]
      axis.plot(steps, [value for _, value in points], label=name)
  left.set(xlabel='step', ylabel='training loss, nats per token')
  right.set(xlabel='step', ylabel='validation accuracy, %', ylim=(0, 100))
  for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def classify(model_dir: pathlib.Path) -> None:
  """Labels a few texts, and what is typed where somebody types."""
  from prompt_tuning.data.bbc import TOPICS
  from prompt_tuning.data.vocabularies import load_vocabulary
  from prompt_tuning.interop.base_checkpoints import load_checkpoint
  from prompt_tuning.interop.prompts import load_prompt
  from prompt_tuning.models.model import EncoderDecoderModel
  from prompt_tuning.training import inference

  model = EncoderDecoderModel(network_config())
  variables, virtual_tokens = inference.load_variables(
    model, load_checkpoint('t5_1_1_mini'), load_prompt(model_dir / 'prompt')
  )
  predictor = inference.Predictor(
    model,
    variables,
    load_vocabulary('t5_1_1_mini'),
    virtual_tokens,
    labels=TOPICS,
    batch_size=1,
  )

  def show(text: str) -> None:
    (record,) = predictor([f'article: {text}'])
    print(f'  {record["prediction"]:<14} {text[:60]}')

  print('\nThe exported prompt classifies:')
  for text in TEXTS:
    show(text)
  while sys.stdin.isatty():
    try:
      text = input('A text of your own (Enter to end): ').strip()
    except EOFError:
      break
    if not text:
      break
    show(text)


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='quickstart', description=__doc__.partition('\n')[0]
  )
  parser.add_argument('--output_dir', default='outputs/quickstart')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument(
    '--model_tuning',
    action='store_true',
    help='also tune the whole model, the upper bound',
  )
  options = parser.parse_args(arguments)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  try:
    return run(options)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


def run(options: argparse.Namespace) -> int:
  from prompt_tuning.data import classification
  from prompt_tuning.interop.base_checkpoints import load_checkpoint
  from prompt_tuning.interop.export import export
  from prompt_tuning.interop.prompts import load_prompt
  from prompt_tuning.models import network
  from prompt_tuning.training.loop import count_parameters

  folder = pathlib.Path(options.output_dir)
  first_step = load_checkpoint('t5_1_1_mini').step
  model_dir = folder / f'prompt_seed{options.seed}'
  runs = {'prompt tuning': model_dir}
  seconds = tune(
    'prompt_tune.gin',
    [
      *RECIPE,
      *cosine(LEARNING_RATE, first_step, options.steps),
      f'--gin.TRAIN_STEPS_RELATIVE={options.steps}',
      "--gin.train.best_metric='bbc_topics/accuracy'",
      '--gin.train.eval_period=100',
      f'--gin.train.seed={options.seed}',
    ],
    model_dir,
  )
  _, metadata = load_prompt(model_dir / 'prompt')
  prompt_parameters = metadata['prompt_length'] * metadata['embed']
  total = count_parameters(network.parameter_shapes(network_config()))

  print('\nScoring the test split ...', flush=True)
  majority = classification.majority_class('bbc_topics')['accuracy']
  rows = [
    ('majority class', majority, 0, ''),
    ('no prompt, labels ranked', score(folder / 'zero_shot', rank=True), 0, ''),
    (
      'prompt tuning',
      score(folder / 'prompt', prompt=str(model_dir / 'prompt')),
      prompt_parameters,
      f'{seconds:.0f} s',
    ),
  ]
  if options.model_tuning:
    tuned = folder / f'model_seed{options.seed}'
    seconds = tune(
      'model_tune.gin',
      [
        f'--gin.TRAIN_STEPS_RELATIVE={options.steps}',
        '--gin.BATCH_SIZE=32',
        "--gin.train.best_metric='bbc_topics/accuracy'",
        '--gin.train.eval_period=100',
        f'--gin.train.seed={options.seed}',
      ],
      tuned,
    )
    runs['model tuning'] = tuned
    # Both are scored at their best validation step.
    export(tuned, tuned / 'export')
    tuned_score = score(folder / 'model', base=str(tuned / 'export'))
    rows.append(('model tuning', tuned_score, total, f'{seconds:.0f} s'))
  print(f'\n{"":26}{"test accuracy":>14}{"trained":>12}{"share":>9}{"time":>8}')
  for name, accuracy, parameters, took in rows:
    share = f'{100 * parameters / total:.2f}%'
    print(f'{name:26}{accuracy:13.1f}%{parameters:12,}{share:>9}{took:>8}')
  if not options.model_tuning:
    print('(model tuning, the upper bound: the same command, --model_tuning)')

  plot(runs, folder / 'curves.png')
  print('\nWritten:')
  for path in (
    model_dir / 'prompt' / 'prompt.npy',
    model_dir / 'prompt' / 'prompt.safetensors',
    model_dir / 'metrics.jsonl',
    folder / 'curves.png',
  ):
    print(f'  {path}  {path.stat().st_size:,} bytes')
  classify(model_dir)
  return 0


if __name__ == '__main__':
  sys.exit(main())
