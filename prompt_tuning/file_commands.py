"""The commands that know files alone: convert, inspect and diff.

Each is a function that reads its arguments, with a parser whose description is
its docstring, and gives the lines to print.
"""

import argparse
from collections.abc import Iterable, Sequence
import inspect
from typing import Any

from prompt_tuning import compilation_cache
from prompt_tuning import exit_codes
from prompt_tuning.interop import formats


def _convert(parser: argparse.ArgumentParser, arguments) -> Iterable[Any]:
  """Writes a model or a prompt in another format.

    prompt-tuning convert google/t5-v1_1-base out --to=t5x --step=1000000
    prompt-tuning convert runs/bbc/prompt adapter --to=peft --base=hf_folder
    prompt-tuning convert t5_1_1_mini hf_folder --to=hugging_face \\
      --vocabulary=t5_1_1_mini
    prompt-tuning convert t5_1_1_mini served --to=prompt_tokens \\
      --prompt=runs/bbc/prompt --vocabulary=t5_1_1_mini
    prompt-tuning convert prompt_a prompt_b table.npy --to=serving_table
    prompt-tuning convert t5_1_1_mini merged --to=t5x --trained=runs/ia3
    prompt-tuning convert runs/bbc/prompt out --to=recycled --base=other_model
    prompt-tuning convert runs/ia3 adapter --to=peft --base=hf_folder

  Sources are whatever INITIAL_CHECKPOINT_PATH and PROMPT_FILE take. --trained
  folds what can be folded (LoRA, IA3, norm scales), a run's or a file's, into
  the model's parameters.
  """
  add = parser.add_argument
  add('sources', nargs='+', metavar='SOURCE', help='a model, or prompts')
  add('output', metavar='OUTPUT', help='folder (or file) to write')
  names = (*formats.MODEL_FORMATS, *formats.PROMPT_FORMATS)
  add('--to', required=True, choices=names)
  add('--prompt', help='for t5x and prompt_tokens: a prompt to put in')
  add('--trained', help='what was trained on the model, to fold into it')
  add('--base', help="for peft: the adapter's model; for recycled: the new one")
  add('--old_base', help='for recycled: of the prompt, if it does not name it')
  kinds = formats.MAPS
  add('--recycler', default='linear', choices=kinds, help='for recycled')
  add(
    '--vocabulary',
    help='to write beside a Hugging Face model; for recycled: its words alone',
  )
  add('--step', type=int, help='of a model that does not say it')
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  add('--overwrite', action='store_true', help='replace files of OUTPUT')
  given = vars(parser.parse_args(arguments))
  compilation_cache.use()
  from prompt_tuning.interop import conversion

  return conversion.convert(**given)


def _inspect(parser: argparse.ArgumentParser, arguments) -> Iterable[Any]:
  """Says what is in models and prompts of any format; compares prompts.

    prompt-tuning inspect t5_1_1_mini
    prompt-tuning inspect runs/bbc/prompt runs/other/prompt
    prompt-tuning inspect runs/bbc --text

  Prints a summary with step and metadata; of several prompts also the cosine
  of their rows; with --text what the vocabulary's nearest pieces make of each.
  """
  parser.add_argument('paths', nargs='+', metavar='PATH')
  parser.add_argument(
    '--arrays',
    action='store_true',
    dest='all_arrays',
    help='shape, type and norm of each array too',
  )
  parser.add_argument(
    '--text',
    nargs='?',
    const='pieces',
    choices=('pieces', 'words'),
    help='prompts as text, of the nearest pieces or of whole words',
  )
  parser.add_argument('--base', help='for --text: the model, if not named')
  parser.add_argument('--vocabulary', help='for --text: likewise')
  given = vars(parser.parse_args(arguments))
  from prompt_tuning.interop import conversion

  return conversion.inspect(**given)


def _diff(parser: argparse.ArgumentParser, arguments) -> Iterable[Any]:
  """Says how two models, or two prompts, differ, whatever their formats.

    prompt-tuning diff t5_1_1_mini hf_folder

  Exit code 0 where all values are equal, 1 where they differ, 2 for faults, as
  diff's.
  """
  parser.add_argument('one')
  parser.add_argument('other')
  given = vars(parser.parse_args(arguments))
  from prompt_tuning.interop import conversion

  return conversion.differences(**given)


COMMANDS = {'convert': _convert, 'inspect': _inspect, 'diff': _diff}


def run(name: str, arguments: Sequence[str]) -> int:
  """The exit code of a command, its lines printed."""
  parser = argparse.ArgumentParser(
    prog=f'prompt-tuning {name}',
    description=inspect.cleandoc(COMMANDS[name].__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def work() -> int:
    lines = list(COMMANDS[name](parser, arguments))
    print(*lines, sep='\n', end='\n' if lines else '')
    return int(name == 'diff' and bool(lines))

  # Of diff 1 says that they differ.
  return exit_codes.guarded(work, fault=2 if name == 'diff' else 1)
