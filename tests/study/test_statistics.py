import numpy as np
import pytest
from scipy import stats

from prompt_tuning.study.statistics import Summary
from prompt_tuning.study.statistics import compare
from prompt_tuning.study.statistics import interval


def right(*answers):
  return {f'example {i}': bool(one) for i, one in enumerate(answers)}


def test_a_summary_has_the_samples_deviation():
  found = Summary.of([1.0, 2.0, 6.0])
  assert str(found) == '3.0 ± 2.6'  # sqrt((4 + 1 + 9) / 2)
  assert str(Summary.of([2.0])) == '2.0'
  # Such as a correlation with answers that are all alike.
  assert str(Summary.of([2.0, float('nan')])) == 'nan ± nan'


def test_a_comparison_is_of_the_examples_that_both_answered():
  one = right(1, 1, 1, 0, 1, 1, 0, 1, 1, 1)
  other = right(1, 0, 0, 0, 1, 0, 0, 0, 0, 1)
  found = compare([(one, other | {'example 99': False})])
  assert found.examples == 10
  assert found.difference == pytest.approx(50.0)
  assert found.low < 50 < found.high
  # Five examples speak for the first, none for the second.
  assert found.p_value == pytest.approx(2 * 0.5**5)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
  draw = np.random.default_rng(0)
  truth, covered = 70.0, 0
  for _ in range(40):
    low, high = interval([right(*(draw.random(200) < truth / 100))])
    covered += low <= truth <= high
  # 95% of 40 are 38; fewer than 33 would have a probability of 0.1%.
  assert covered >= stats.binom.ppf(0.001, 40, 0.95)


def test_answers_that_are_all_the_same_have_no_spread():
  assert interval([right(1, 1, 1)]) == (100.0, 100.0)
  found = compare([(right(1, 1), right(1, 1))])
  assert (found.difference, found.low, found.high) == (0, 0, 0)
  assert found.p_value == 1


def test_without_common_examples_there_is_no_comparison():
  assert compare([(right(1), {})]) is None
  assert compare([]) is None
  assert interval([]) is None
