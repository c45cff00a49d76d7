import numpy as np
import pytest
from scipy import special

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.training import calibration
from prompt_tuning.training import ensemble

VIRTUAL = VirtualTokens(first_id=100, length=2, num_prompts=3)


def test_every_member_sees_every_example_with_its_own_prompt():
  batch = {
    'encoder_input_tokens': np.array([[100, 101, 7, 1], [100, 101, 8, 1]]),
    'decoder_loss_weights': np.array([[1.0], [0.0]]),
  }
  found = ensemble.for_each_member(batch, VIRTUAL)
  np.testing.assert_array_equal(
    found['encoder_input_tokens'],
    [
      *([100, 101, 7, 1], [100, 101, 8, 1]),
      *([102, 103, 7, 1], [102, 103, 8, 1]),
      *([104, 105, 7, 1], [104, 105, 8, 1]),
    ],
  )
  np.testing.assert_array_equal(
    found['decoder_loss_weights'][:, 0], [1, 0, 1, 0, 1, 0]
  )


def test_the_majority_decides_and_of_equals_the_first_member():
  yes, no, other = [5, 1], [6, 1], [7, 1]
  answers = np.array(
    [[yes, no, other, no], [no, no, yes, yes], [no, yes, no, yes]]
  )  # [members, examples, ids]
  np.testing.assert_array_equal(ensemble.vote(answers), [no, no, other, yes])


@pytest.mark.parametrize('tokens', [None, VirtualTokens(100, 2)])
def test_one_prompt_is_no_ensemble(tokens):
  with pytest.raises(UserError, match='needs two prompts or more'):
    ensemble.members(tokens)


def test_calibration_takes_off_what_the_model_thinks_anyway():
  # Zhao et al. 2021: p / p_content_free, the latter a mean of probabilities.
  content_free = np.log([[0.8, 0.2], [0.6, 0.4]]) - 3.0  # not normalised
  likelihoods = np.log([[0.65, 0.35], [0.75, 0.25]])
  found = calibration.calibrated(likelihoods, content_free)
  np.testing.assert_allclose(
    special.softmax(found, axis=-1)[:, 0],
    [(65 / 70) / (65 / 70 + 35 / 30), (75 / 70) / (75 / 70 + 25 / 30)],
  )
  assert np.argmax(found, axis=-1).tolist() == [1, 0]
