"""Says how two models, or two prompts, differ, whatever their formats.

  prompt-tuning diff t5_1_1_mini hf_folder

Exit code 0 where all values are equal, 1 where they differ, 2 for faults, as
diff's. `python -m prompt_tuning.diff` is the same.
"""

import argparse
from collections.abc import Sequence
import sys

from prompt_tuning.errors import UserError
from prompt_tuning.interop import conversion


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='prompt-tuning diff',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('one')
  parser.add_argument('other')
  given = parser.parse_args(arguments)
  try:
    lines = list(conversion.differences(given.one, given.other))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  for line in lines:
    print(line)
  return 1 if lines else 0


if __name__ == '__main__':
  sys.exit(main())
