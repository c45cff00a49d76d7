"""Metrics of label ids, in percent. A prediction of -1 is no label at all.

Metric functions have seqio's signature: sequences `targets` and `predictions`
in the same order, a dict of names and numbers back.
"""

from collections.abc import Callable, Sequence

import numpy as np
import sklearn.metrics

from prompt_tuning.data.postprocessors import UNKNOWN_LABEL


def accuracy(
  targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """Share of predictions that equal their target."""
  return {
    'accuracy': 100
    * float(sklearn.metrics.accuracy_score(targets, predictions))
  }


def macro_f1(num_labels: int) -> Callable[..., dict[str, float]]:
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
    return {'macro_f1': 100 * float(score)}

  return metric


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
