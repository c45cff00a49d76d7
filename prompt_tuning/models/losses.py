"""Cross entropy with z-loss and label smoothing, and its normaliser."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.errors import UserError

Normalizer = (
  float
  | Literal[
    'NUM_REAL_TARGET_TOKENS',
    'NUM_TOTAL_TARGET_TOKENS',
    'AVERAGE_PER_SEQUENCE',
  ]
  | None
)


def cross_entropy(
  logits: Float[Array, 'B L V'],
  targets: Int[Array, 'B L'],
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[Float[Array, 'B L'], Float[Array, 'B L']]:
  """Cross entropy and z-loss of each token, in nats, float32.

  Smoothing keeps 1 - label_smoothing for the target and spreads the rest
  evenly over the other V - 1 ids; the entropy of that distribution is taken
  off, so that a perfect prediction has loss zero (as in T5X). The z-loss,
  z_loss * log(Z)^2, is returned apart and is not in the first value.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)
  loss = log_z - target_logit[..., 0]
  if label_smoothing:
    others = logits.shape[-1] - 1
    keep, low = 1.0 - label_smoothing, label_smoothing / others
    total = jnp.sum(log_z[..., None] - logits, axis=-1)
    entropy = -(keep * np.log(keep) + others * low * np.log(low + 1e-20))
    loss = (keep - low) * loss + low * total - np.float32(entropy)
  return loss, z_loss * jnp.square(log_z)


def token_weights(
  batch: Mapping[str, Any], normalizer: float | str | None
) -> Float[Array, 'B L']:
  """What each token's loss counts: its weight over the normaliser.

  Args:
    batch: `decoder_target_tokens`, `decoder_loss_weights` (ones if absent) and,
      where examples are packed, `decoder_segment_ids`.
    normalizer: None sums over tokens (T5X's default); a number divides the sum
      by it; NUM_REAL_TARGET_TOKENS divides by the sum of weights,
      NUM_TOTAL_TARGET_TOKENS by B * L, and AVERAGE_PER_SEQUENCE gives every
      example (not every row, where packed) the same weight.
  """
  targets = batch['decoder_target_tokens']
  weights = batch.get('decoder_loss_weights')
  if weights is None:
    weights = jnp.ones(targets.shape)
  weights = jnp.asarray(weights, jnp.float32)
  match normalizer:
    case None:
      return weights
    case 'NUM_REAL_TARGET_TOKENS':
      return weights / jnp.maximum(jnp.sum(weights), 1e-30)
    case 'NUM_TOTAL_TARGET_TOKENS':
      return weights / np.float32(targets.size)
    case 'AVERAGE_PER_SEQUENCE':
      segments = batch.get('decoder_segment_ids')
      if segments is None:
        of_example = jnp.sum(weights, axis=-1, keepdims=True)
      else:
        same = segments[:, :, None] == segments[:, None, :]  # [B, L, L]
        of_example = jnp.sum(jnp.where(same, weights[:, None, :], 0.0), axis=-1)
      weights = jnp.where(of_example > 0, weights / of_example, 0.0)
      return weights / jnp.maximum(jnp.sum(weights), 1e-30)
    case float() | int():
      return weights / np.float32(normalizer)
  raise UserError(
    f'loss_normalizing_factor is {normalizer!r}; it takes None, a number,'
    ' NUM_REAL_TARGET_TOKENS, NUM_TOTAL_TARGET_TOKENS or'
    ' AVERAGE_PER_SEQUENCE'
  )
