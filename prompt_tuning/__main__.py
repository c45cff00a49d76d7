"""`python -m prompt_tuning` is the console command."""

import sys

from prompt_tuning.cli import main

if __name__ == '__main__':
  sys.exit(main())
