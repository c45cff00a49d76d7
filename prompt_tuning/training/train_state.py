"""What a run changes: the step, the trained variables, the optimiser's state.

Frozen variables are not here on purpose: they have no gradient, no optimiser
state, are never donated and never saved.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """The state that a train step maps to the next one.

  Attributes:
    step: int32 scalar, the count of updates made so far, those of the base
      checkpoint included (as T5X counts).
    trainable: the trained variable collections, `{collection: tree}`, for
      example `{'prompt': {'table': float32 [K, P, E]}}`.
    opt_state: the optimiser's state for `trainable`.
  """

  # Unchecked types: a state of shapes or of shardings has this class as well.
  step: Any
  trainable: Any
  opt_state: Any

  @classmethod
  def create(
    cls,
    trainable: Any,
    optimizer: optax.GradientTransformation,
    initial_step: int = 0,
  ) -> 'TrainState':
    """The state of a run that starts at the base checkpoint's step."""
    return cls(
      step=jnp.asarray(initial_step, jnp.int32),
      trainable=trainable,
      opt_state=optimizer.init(trainable),
    )
