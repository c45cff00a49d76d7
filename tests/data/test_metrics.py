import pytest

from prompt_tuning.data import metrics
from prompt_tuning.data.postprocessors import LabelToId


def test_a_prediction_that_is_no_label_becomes_minus_one():
  to_id = LabelToId(('bad', 'good'))
  assert [to_id(text) for text in ('good', 'bad', ' bad', 'goo', '')] == [
    1,
    0,
    -1,
    -1,
    -1,
  ]


def test_accuracy_counts_unknown_predictions_as_wrong():
  assert metrics.accuracy([0, 1, 1, 0], [0, 1, -1, 1]) == {'accuracy': 50.0}


def test_macro_f1_averages_over_all_labels_and_not_the_unknown_one():
  # Label 0: precision 1/1, recall 1/2, F1 2/3. Label 1: precision 1/2, recall
  # 1/2, F1 1/2. Label 2 never occurs: 0.
  result = metrics.macro_f1(3)([0, 1, 1, 0], [0, 1, -1, 1])
  assert result['macro_f1'] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)


def test_label_shares_show_a_model_stuck_at_the_majority_class():
  assert metrics.label_shares([0, 0, 0, 1], [0, 0, 0, 0]) == {
    'majority_share': 75.0,
    'predicted_majority_share': 100.0,
    'no_label_share': 0.0,
  }
  assert metrics.label_shares([0, 1], [-1, 1])['no_label_share'] == 50.0
