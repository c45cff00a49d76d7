"""Scores a prompt, or a T5 without one, on a task's metrics.

Example, for the prompt that the example of `prompt-tuning train` made:

  prompt-tuning eval \\
    --gin_file=models/t5_1_1_mini.gin \\
    --gin_file=tasks/bbc_topics.gin \\
    --gin_file=runs/eval.gin \\
    --gin.INITIAL_CHECKPOINT_PATH="'t5_1_1_mini'" \\
    --gin.VOCABULARY="'t5_1_1_mini'" \\
    --gin.PROMPT_FILE="'/tmp/bbc_prompt/prompt'" \\
    --gin.EVAL_OUTPUT_DIR="'/tmp/bbc_prompt/eval'"

Prints the metrics as JSON; EVAL_OUTPUT_DIR gets them and the predictions.
--gin.evaluate.prompt=None in place of PROMPT_FILE scores the model without a
prompt.
`python -m prompt_tuning.eval` is the same.
"""

from collections.abc import Sequence
import sys

from prompt_tuning import configuration


def main(arguments: Sequence[str] | None = None) -> int:
  return configuration.run_main('evaluate', arguments, __doc__)


if __name__ == '__main__':
  sys.exit(main())
