"""Numbers of several runs, and what may be said of their differences."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Summary:
  """Of one figure over several runs.

  Attributes:
    mean: of the runs.
    deviation: the sample's standard deviation; None of one run.
    values: of the runs.
  """

  mean: float
  deviation: float | None
  values: tuple[float, ...]

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Summary':
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return cls(float(np.mean(values)), deviation, tuple(values))

  def __str__(self) -> str:
    if self.deviation is None:
      return f'{self.mean:.1f}'
    return f'{self.mean:.1f} ± {self.deviation:.1f}'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two methods on the same examples.

  Attributes:
    difference: of their shares of right answers, in percent: first minus
      second, over all pairs of runs.
    low, high: its bootstrap interval over examples (percentile, 95%).
    examples: how many both answered.
    pairs: runs of the one that have a partner of the other.
    p_value: of McNemar's exact test on the first pair of runs alone, whose
      examples are independent of each other.
  """

  difference: float
  low: float
  high: float
  examples: int
  pairs: int
  p_value: float


def compare(
  pairs: Sequence[tuple[Mapping[str, bool], Mapping[str, bool]]], seed: int = 0
) -> Comparison | None:
  """Compares runs of two methods, pair by pair (same task, same seed).

  The bootstrap draws examples, not runs: for an example, the difference is the
  mean over the pairs. So its interval says how sure the difference is for
  these runs, on other examples of the kind.

  Args:
    pairs: of each pair who answered which example rightly (`Run.answers`).
    seed: of the bootstrap.

  Returns:
    None where no example was answered by both.
  """
  names = sorted(
    set.intersection(*(set(one) & set(other) for one, other in pairs))
    if pairs
    else ()
  )
  if not names:
    return None
  difference = np.array(
    [
      [float(one[name]) - float(other[name]) for name in names]
      for one, other in pairs
    ]
  )  # [pairs, examples]
  by_example = 100 * difference.mean(axis=0)
  low, high = _bootstrap(by_example, seed)
  better, worse = (int((difference[0] == sign).sum()) for sign in (1, -1))
  p_value = 1.0
  if better + worse:
    p_value = float(stats.binomtest(better, better + worse).pvalue)
  return Comparison(
    float(by_example.mean()), low, high, len(names), len(pairs), p_value
  )


def interval(
  right: Sequence[Mapping[str, bool]], seed: int = 0
) -> tuple[float, float] | None:
  """Bootstrap interval over examples of a share of right answers, in percent.

  Args:
    right: `Run.answers` of runs on the same examples.
    seed: of the bootstrap.

  Returns:
    (low, high); None without answers.
  """
  names = set.intersection(*map(set, right)) if right else set()
  if not names:
    return None
  by_example = np.array(
    [100 * np.mean([one[name] for one in right]) for name in sorted(names)]
  )
  return _bootstrap(by_example, seed)


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
  """The interval of the mean of values that are drawn again."""
  if np.ptp(values) == 0:
    return float(values[0]), float(values[0])
  found = stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=_RESAMPLES,
    confidence_level=CONFIDENCE,
    method='percentile',
    rng=np.random.default_rng(seed),
  ).confidence_interval
  return float(found.low), float(found.high)
