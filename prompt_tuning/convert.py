"""Writes a model or a prompt in another format.

  prompt-tuning convert google/t5-v1_1-base out --to=t5x --step=1000000
  prompt-tuning convert runs/bbc/prompt adapter --to=peft --base=hf_folder
  prompt-tuning convert t5_1_1_mini hf_folder --to=hugging_face \\
    --vocabulary=t5_1_1_mini
  prompt-tuning convert t5_1_1_mini served --to=prompt_tokens \\
    --prompt=runs/bbc/prompt --vocabulary=t5_1_1_mini
  prompt-tuning convert prompt_a prompt_b table.npy --to=serving_table

Sources are whatever INITIAL_CHECKPOINT_PATH and PROMPT_FILE take.
`python -m prompt_tuning.convert` is the same.
"""

import argparse
from collections.abc import Sequence
import sys

from prompt_tuning.errors import UserError
from prompt_tuning.interop import conversion


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='prompt-tuning convert',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('sources', nargs='+', metavar='SOURCE', help='a model, or prompts')
  add('output', metavar='OUTPUT', help='folder (or file) to write')
  formats = (*conversion.MODEL_FORMATS, *conversion.PROMPT_FORMATS)
  add('--to', required=True, choices=formats)
  add('--prompt', help='for t5x and prompt_tokens: a prompt to put in')
  add('--base', help="for peft: the adapter's Hugging Face model")
  add('--vocabulary', help='to write beside a Hugging Face model')
  add('--step', type=int, help='of a model that does not say it')
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  given = vars(parser.parse_args(arguments))
  try:
    for file in conversion.convert(
      given.pop('sources'), given.pop('output'), **given
    ):
      print(file)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
