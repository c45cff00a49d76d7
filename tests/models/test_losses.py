"""The loss, on numbers small enough for a pencil."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.models import losses

LOGITS = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]]))
TARGETS = jnp.array([[0, 2]])


def test_cross_entropy_is_minus_the_log_probability():
  loss, z_loss = losses.cross_entropy(LOGITS, TARGETS)
  np.testing.assert_allclose(loss, [[np.log(2), np.log(10)]], rtol=1e-6)
  np.testing.assert_array_equal(z_loss, [[0, 0]])


def test_z_loss_is_the_squared_log_normaliser():
  # Logits shifted by 3 have log(Z) = 3, and the same cross entropy.
  loss, z_loss = losses.cross_entropy(LOGITS + 3, TARGETS, z_loss=0.01)
  np.testing.assert_allclose(loss, [[np.log(2), np.log(10)]], rtol=1e-5)
  np.testing.assert_allclose(z_loss, [[0.09, 0.09]], rtol=1e-5)


def test_label_smoothing_is_the_divergence_from_the_smoothed_target():
  smoothed = np.array([0.8, 0.1, 0.1])
  divergence = np.sum(smoothed * np.log(smoothed / [0.5, 0.25, 0.25]))
  loss, _ = losses.cross_entropy(LOGITS, TARGETS, label_smoothing=0.2)
  np.testing.assert_allclose(loss[0, 0], divergence, rtol=1e-5)
  # The other one predicts what smoothing asks for 0, and not for 2.
  match, _ = losses.cross_entropy(
    LOGITS, jnp.zeros_like(TARGETS), label_smoothing=0.2
  )
  np.testing.assert_allclose(match[0, 1], 0, atol=1e-6)


@pytest.mark.parametrize(
  'normalizer, expected',
  [
    (None, [[1, 1, 1], [1, 0, 0]]),
    (2.0, [[0.5, 0.5, 0.5], [0.5, 0, 0]]),
    ('NUM_REAL_TARGET_TOKENS', [[0.25, 0.25, 0.25], [0.25, 0, 0]]),
    ('NUM_TOTAL_TARGET_TOKENS', [[1 / 6, 1 / 6, 1 / 6], [1 / 6, 0, 0]]),
    ('AVERAGE_PER_SEQUENCE', [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]]),
  ],
)
def test_normalisers_by_hand(normalizer, expected):
  batch = {
    'decoder_target_tokens': jnp.array([[5, 6, 1], [1, 0, 0]]),
    'decoder_loss_weights': jnp.array([[1, 1, 1], [1, 0, 0]]),
  }
  got = losses.token_weights(batch, normalizer)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_average_per_sequence_counts_packed_examples():
  batch = {
    'decoder_target_tokens': jnp.array([[5, 1, 7, 0]]),
    'decoder_loss_weights': jnp.array([[1, 1, 1, 0]]),
    'decoder_segment_ids': jnp.array([[1, 1, 2, 0]]),
  }
  got = losses.token_weights(batch, 'AVERAGE_PER_SEQUENCE')
  np.testing.assert_allclose(got, [[0.25, 0.25, 0.5, 0]], rtol=1e-6)


def test_an_unknown_normaliser_is_named():
  batch = {'decoder_target_tokens': jnp.array([[5]])}
  with pytest.raises(UserError, match="'TOKENS'; it takes None, a number"):
    losses.token_weights(batch, 'TOKENS')
