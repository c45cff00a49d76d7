"""Which evaluation of a run is the best: the one home of that rule.

Higher is better, but for a loss; a value that is not finite is never the best;
of equals the earliest is. The checkpoint of the best step is kept, it is what
`train` returns, and what its files and `export` are made of.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
import math
from typing import Any

from prompt_tuning.errors import UserError

# In every evaluation: the mean score of its tasks (see `training.evaluator`).
SCORE = 'score'


@dataclasses.dataclass(frozen=True)
class Selection:
  """By what a run selects.

  Attributes:
    metric: a name of the evaluation's; None: the last step is the best.
    mode: 'max' or 'min'; None: 'min' for a loss, 'max' for all else.
    patience: evaluations without a better value after which the run ends;
      None: it goes on to its last step.
  """

  metric: str | None = None
  mode: str | None = None
  patience: int | None = None

  def __post_init__(self):
    if self.mode is None:
      mode = 'min' if (self.metric or '').endswith('loss') else 'max'
      object.__setattr__(self, 'mode', mode)
    if self.mode not in ('max', 'min'):
      raise UserError(f"best_mode is {self.mode!r}; it takes 'max' or 'min'")
    if self.patience is not None and self.metric is None:
      raise UserError('early_stopping_patience needs a best_metric to watch')
    if self.patience is not None and self.patience < 1:
      raise UserError(
        f'early_stopping_patience must be 1 or more, got {self.patience}'
      )

  def require_nothing(self) -> None:
    """Raises UserError where it needs an evaluation, of which there is none."""
    if self.metric is not None:
      raise UserError(
        f'best_metric {self.metric!r} needs an evaluation, and there is none'
      )


@dataclasses.dataclass
class Best:
  """The best evaluation so far; a checkpoint's JSON holds it.

  Attributes:
    metric: the selection's, by which `value` is the best.
    mode: likewise.
    step: of the best evaluation; None: there was none.
    value: of the metric.
    metrics: all of that evaluation's; without a metric, the last one's.
    since: evaluations since then.
  """

  metric: str | None = None
  mode: str = 'max'
  step: int | None = None
  value: float | None = None
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  since: int = 0

  @classmethod
  def of(cls, selection: Selection, saved: Mapping[str, Any] | None) -> 'Best':
    """A new run's, or the one that a checkpoint holds."""
    if saved:
      return cls(**saved)
    return cls(selection.metric, selection.mode)

  def require_among(self, names: Collection[str]) -> None:
    """Raises UserError where an evaluation has no such metric."""
    if self.metric is not None and self.metric not in names:
      near = difflib.get_close_matches(self.metric, sorted(names), n=1)
      hint = f' (did you mean {near[0]}?)' if near else ''
      raise UserError(
        f'best_metric {self.metric!r} is not among the metrics of the'
        f' evaluation: {", ".join(sorted(names))}{hint}'
      )

  def note(self, step: int, found: Mapping[str, float]) -> None:
    """Takes the evaluation at a step into account.

    Raises:
      UserError: it has no such metric.
    """
    self.require_among(found)
    if self.metric is None:
      self.metrics = dict(found)
      return
    value = found[self.metric]
    sign = 1 if self.mode == 'max' else -1
    if math.isfinite(value) and (
      self.value is None or sign * value > sign * self.value
    ):
      self.step, self.value, self.since = step, value, 0
      self.metrics = dict(found)
    else:
      self.since += 1

  def stale(self, patience: int | None) -> bool:
    """Whether it is time to end."""
    return patience is not None and self.since >= patience
