"""Trains a prompt on a frozen T5, or the T5 itself.

Example, on the bundled model and a CPU:

  prompt-tuning train \\
    --gin_file=models/t5_1_1_mini.gin \\
    --gin_file=prompts/class_labels.gin \\
    --gin_file=tasks/bbc_topics.gin \\
    --gin_file=runs/prompt_tune.gin \\
    --gin.INITIAL_CHECKPOINT_PATH="'t5_1_1_mini'" \\
    --gin.VOCABULARY="'t5_1_1_mini'" \\
    --gin.TRAIN_STEPS_RELATIVE=500 \\
    --gin.MODEL_DIR="'/tmp/bbc_prompt'"

The same command again continues a run that was stopped. MODEL_DIR gets the
prompt, checkpoints, metrics and config.gin, the whole configuration.
`python -m prompt_tuning.train` is the same.
"""

from collections.abc import Sequence
import sys
from typing import Any

from prompt_tuning import configuration
from prompt_tuning.errors import RestartError


def _finish(result: Any) -> dict[str, Any]:
  """Puts a prompt that was trained into MODEL_DIR/prompt."""
  if result.interrupted:
    raise RestartError(
      f'asked to stop at step {result.step}, which is saved; the same command'
      ' continues'
    )
  summary = {'step': result.step, 'best_step': result.best_step}
  if 'prompt' in result.variables:
    from etils import epath

    from prompt_tuning.interop.export import export

    model_dir = epath.Path(configuration.bound_value('train', 'model_dir'))
    summary['files'] = export(model_dir, model_dir / 'prompt')['files']
  return summary | result.metrics


def main(arguments: Sequence[str] | None = None) -> int:
  return configuration.run_main('train', arguments, __doc__, _finish)


if __name__ == '__main__':
  sys.exit(main())
