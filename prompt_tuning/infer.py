"""Predicts for texts of a file: JSONL, TSV or a text a line. No TensorFlow.

Example, for the prompt that the example of `prompt-tuning train` made:

  prompt-tuning infer \\
    --gin_file=models/t5_1_1_mini.gin \\
    --gin_file=runs/infer.gin \\
    --gin.INITIAL_CHECKPOINT_PATH="'t5_1_1_mini'" \\
    --gin.VOCABULARY="'t5_1_1_mini'" \\
    --gin.PROMPT_FILE="'/tmp/bbc_prompt/prompt'" \\
    --gin.INPUT_FILE="'articles.txt'" \\
    --gin.OUTPUT_FILE="'predictions.jsonl'"

'-' reads from stdin and writes to stdout. With
--gin.infer.labels="['sport', 'tech']" labels are ranked by their likelihood.
`python -m prompt_tuning.infer` is the same.
"""

from collections.abc import Sequence
import json
import sys
from typing import Any

from prompt_tuning import configuration


def _finish(result: dict[str, Any]) -> None:
  """The summary to stderr: stdout may be the output file."""
  print(json.dumps(result), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
  return configuration.run_main('infer', arguments, __doc__, _finish)


if __name__ == '__main__':
  sys.exit(main())
