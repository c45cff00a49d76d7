"""Says what is in models and prompts of any format; compares prompts.

  prompt-tuning inspect t5_1_1_mini
  prompt-tuning inspect runs/bbc/prompt runs/other/prompt

Prints parameters, shapes, types, norms, step and metadata; of several prompts
also the cosine of their rows. `python -m prompt_tuning.inspect` is the same.
"""

import argparse
from collections.abc import Sequence
import sys

from prompt_tuning.errors import UserError
from prompt_tuning.interop import conversion


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='prompt-tuning inspect',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('paths', nargs='+', metavar='PATH')
  given = parser.parse_args(arguments)
  try:
    for line in conversion.inspect(given.paths):
      print(line)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
