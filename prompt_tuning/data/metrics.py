"""Metrics of predictions, in percent; scikit-learn and scipy do the arithmetic.

Metric functions have seqio's signature: sequences `targets` and `predictions`
in the same order, a dict of names and numbers back. A prediction of -1 is no
label at all and counts as wrong everywhere. Names are T5's.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import functools
import re
import string

import numpy as np
import scipy.stats
import sklearn.metrics

from prompt_tuning.data.postprocessors import UNKNOWN_LABEL

Metric = Callable[..., dict[str, float]]


def accuracy(
  targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """Share of predictions that equal their target."""
  return {
    'accuracy': 100
    * float(sklearn.metrics.accuracy_score(targets, predictions))
  }


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of label 1 of two; a prediction that is no label counts as the wrong."""
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  no_label = (predictions != 0) & (predictions != 1)
  predictions = np.where(no_label, 1 - targets, predictions)
  score = sklearn.metrics.f1_score(targets, predictions, zero_division=0)
  return {'f1': 100 * float(score)}


def macro_f1(num_labels: int, name: str = 'macro_f1') -> Metric:
  """F1 of each label, averaged; a label that never occurs counts as 0."""

  def metric(
    targets: Sequence[int], predictions: Sequence[int]
  ) -> dict[str, float]:
    score = sklearn.metrics.f1_score(
      targets,
      predictions,
      labels=range(num_labels),
      average='macro',
      zero_division=0,
    )
    return {name: 100 * float(score)}

  return metric


def matthews_corrcoef(
  targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """Matthews' correlation coefficient (CoLA)."""
  score = sklearn.metrics.matthews_corrcoef(targets, predictions)
  return {'matthews_corrcoef': 100 * float(score)}


def pearson_corrcoef(
  targets: Sequence[float], predictions: Sequence[float]
) -> dict[str, float]:
  """Pearson's correlation (STS-B); NaN where one side is constant."""
  score = scipy.stats.pearsonr(targets, predictions)[0]
  return {'pearson_corrcoef': 100 * float(score)}


def spearman_corrcoef(
  targets: Sequence[float], predictions: Sequence[float]
) -> dict[str, float]:
  """Spearman's rank correlation (STS-B); NaN where one side is constant."""
  score = scipy.stats.spearmanr(targets, predictions)[0]
  return {'spearman_corrcoef': 100 * float(score)}


def multirc(
  targets: Sequence[Mapping], predictions: Sequence[Mapping]
) -> dict[str, float]:
  """F1 over all answers (F1a) and the share of questions answered in full.

  Args:
    targets: {'value': 0 or 1, 'group': number of the question}.
    predictions: {'value': 0, 1 or -1}.
  """
  truth = [target['value'] for target in targets]
  given = [prediction['value'] for prediction in predictions]
  right = {}
  for target, one, other in zip(targets, truth, given, strict=True):
    group = target['group']
    right[group] = right.get(group, True) and one == other
  return {
    **f1(truth, given),
    'exact_match': 100 * float(np.mean(list(right.values()))),
  }


def _normalised(text: str) -> str:
  """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
  text = text.lower().translate(str.maketrans('', '', string.punctuation))
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _word_f1(answer: str, prediction: str) -> float:
  """F1 of the words that two normalised texts share; 0 if either is empty."""
  answer, prediction = answer.split(), prediction.split()
  shared = sum((Counter(answer) & Counter(prediction)).values())
  return 2 * shared / (len(answer) + len(prediction)) if shared else 0.0


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match and word F1 against the best of an example's answers.

  Rajpurkar et al. 2016, section 6.1.
  """
  exact, overlap = [], []
  for answers, prediction in zip(targets, predictions, strict=True):
    prediction = _normalised(prediction)
    answers = [_normalised(answer) for answer in answers]
    exact.append(prediction in answers)
    overlap.append(max(_word_f1(answer, prediction) for answer in answers))
  return {
    'em': 100 * float(np.mean(exact)),
    'f1': 100 * float(np.mean(overlap)),
  }


def record(
  targets: Sequence[Mapping], predictions: Sequence[Mapping]
) -> dict[str, float]:
  """`squad` of each query once: its rows differ in their target only."""
  first = {}
  for target, prediction in zip(targets, predictions, strict=True):
    first.setdefault(target['group'], (target['value'], prediction['value']))
  return squad(*zip(*first.values(), strict=True))


def label_shares(
  targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """What accuracy must be read against.

  Returns:
    majority_share: of the most frequent target, the accuracy of always giving
      it; predicted_majority_share: of the most frequent prediction, near 100
      where training got no further than the majority class; no_label_share: of
      predictions that are no label.
  """

  def share_of_most_frequent(ids):
    return 100 * float(np.unique(ids, return_counts=True)[1].max() / len(ids))

  return {
    'majority_share': share_of_most_frequent(targets),
    'predicted_majority_share': share_of_most_frequent(predictions),
    'no_label_share': 100
    * float(np.mean(np.asarray(predictions) == UNKNOWN_LABEL)),
  }


def of_examples(metric: Metric) -> Metric:
  """The metric for predictions that `postprocessors.WithExamples` made."""

  @functools.wraps(metric)
  def unwrapped(targets, predictions):
    return metric(targets, [row['prediction'] for row in predictions])

  return unwrapped
