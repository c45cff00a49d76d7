"""Writes what a run trained: a prompt, or a model.

Example, for the run that the example of `prompt-tuning train` made:

  prompt-tuning export \\
    --gin_file=runs/export.gin \\
    --gin.MODEL_DIR="'/tmp/bbc_prompt'" \\
    --gin.EXPORT_DIR="'/tmp/bbc_export'"

The files' metadata name the base model, its fingerprint, P, E, task, step,
metric and versions. --gin_file=prompts/from_file.gin takes them back.
`python -m prompt_tuning.export` is the same.
"""

from collections.abc import Sequence
import sys

from prompt_tuning import configuration


def main(arguments: Sequence[str] | None = None) -> int:
  return configuration.run_main('export', arguments, __doc__)


if __name__ == '__main__':
  sys.exit(main())
