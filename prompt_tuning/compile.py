"""Compiles a run's steps for devices that need not be there.

Example, a T5 XXL on 16 chips of TPU v5e, from any Linux machine:

  prompt-tuning compile \\
    --gin_file=models/t5_1_1_xxl.gin \\
    --gin_file=runs/compile.gin \\
    --gin.TOPOLOGY="'v5e:4x4'"

Prints memory, operations and collectives of the training step, of decoding and
of scoring, and exits with 1 where one does not fit, naming a setting with which
it does. Needs neither weights nor data; TPU topologies need
`pip install "prompt_tuning[tpu]"`.
`python -m prompt_tuning.compile` is the same.
"""

from collections.abc import Sequence
import os
import sys

from prompt_tuning import configuration


def main(arguments: Sequence[str] | None = None) -> int:
  given = sys.argv[1:] if arguments is None else arguments
  if any(
    'TOPOLOGY' in argument and 'None' not in argument for argument in given
  ):
    # The compiler needs no TPU; JAX itself works on this machine's CPU.
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  return configuration.run_main('compile_steps', arguments, __doc__)


if __name__ == '__main__':
  sys.exit(main())
