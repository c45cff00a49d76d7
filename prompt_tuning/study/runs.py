"""What came of a training or an evaluation, out of its folder."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import statistics
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.training.evaluator import METRICS_FILE
from prompt_tuning.training.reporting import RESULT_FILE

# The evaluation of a run that chose its best step.
VALIDATION = 'validation'


@dataclasses.dataclass(frozen=True)
class Run:
  """A folder that a command has finished with.

  Attributes:
    folder: MODEL_DIR of a training, EVAL_OUTPUT_DIR of an evaluation.
    facts: of its result.json.
    evaluations: {name: {'task/metric': value}}: 'validation' of a training's
      best step, and its further evaluations by the ends of their folders,
      `eval_<name>`; of an evaluation the one it made, called 'validation'.
  """

  folder: pathlib.Path
  facts: Mapping[str, Any]
  evaluations: Mapping[str, Mapping[str, float]]

  def value(self, metric: str, evaluation: str = VALIDATION) -> float | None:
    """A metric, by its whole name or the part after the task's.

    Raises:
      UserError: no such metric is there, or several tasks have it.
    """
    if evaluation not in self.evaluations:
      return None
    found = self.evaluations[evaluation]
    if metric in found:
      return found[metric]
    names = [
      name
      for name in found
      if name.endswith(f'/{metric}') and not name.startswith('members/')
    ]
    if len(names) != 1:
      raise UserError(
        f'{self.folder} has {", ".join(names) or "nothing"} for the metric'
        f' {metric}; it has {", ".join(sorted(found))}'
      )
    return found[names[0]]

  @property
  def is_training(self) -> bool:
    return 'steps' in self.facts

  @functools.cached_property
  def seconds_per_step(self) -> float | None:
    """The median of its lines of metrics; the first holds the compilation."""
    lines = [
      line['seconds_per_step']
      for line in read_lines(self.folder / 'metrics.jsonl')
      if line.get('split') == 'train' and 'seconds_per_step' in line
    ]
    return statistics.median(lines) if lines else None

  @functools.cached_property
  def size(self) -> int | None:
    """Bytes of the files of what was trained; of T5 itself, of a checkpoint."""
    if not self.is_training:
      return None
    folders = [self.folder / name for name in self.facts['methods']]
    if not any(folder.is_dir() for folder in folders):
      folders = sorted(self.folder.glob('checkpoints/[0-9]*'))[-1:]
    return sum(
      file.stat().st_size
      for folder in folders
      for file in folder.rglob('*')
      if file.is_file() and file.suffix != '.npy'
    )

  def answers(self, evaluation: str = VALIDATION) -> dict[str, bool]:
    """Which examples were answered rightly, by task, number and input.

    Right is a prediction that is the target, as texts.
    """
    folder, step = self.folder, '*'
    if self.is_training:
      folder = folder / 'eval'
      step = str(self.facts['base_step'] + self.facts['best_step'])
    if evaluation != VALIDATION:
      folder, step = self.folder / f'eval_{evaluation}', '*'
    found = {}
    for file in sorted((folder / 'inference').glob(f'*-{step}.jsonl')):
      task = file.name.rpartition('-')[0]
      for number, line in enumerate(read_lines(file)):
        if 'prediction' in line:
          name = f'{task} {number} {line["input"]}'
          found[name] = line['prediction'] == line['target']
    return found


def read_lines(file: str | os.PathLike) -> list[dict[str, Any]]:
  """JSONL, as far as it is whole: who writes it may be killed."""
  found = []
  try:
    text = pathlib.Path(file).read_text()
  except OSError:
    return found
  for line in text.split('\n'):  # a text in it may hold U+2028
    try:
      found.append(json.loads(line))
    except ValueError:
      pass
  return found


def read_run(
  folder: str | os.PathLike, evaluations: Sequence[str] = ()
) -> Run | None:
  """The run of a folder, if all is there.

  Args:
    folder: of a training or of an evaluation.
    evaluations: that it must have, `eval_<name>` each.
  """
  folder = pathlib.Path(folder)
  found = {path.name[5:]: _evaluated(path) for path in folder.glob('eval_*')}
  found = {name: values for name, values in found.items() if values}
  facts = _facts(folder)
  found[VALIDATION] = facts.get('metrics') or _evaluated(folder)
  if not found[VALIDATION]:
    return None
  if not {*evaluations} <= {*found}:
    return None
  return Run(folder, facts, found)


def trained(folder: str | os.PathLike) -> bool:
  """Whether a training ended there."""
  return 'steps' in _facts(pathlib.Path(folder))


def _facts(folder: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads((folder / RESULT_FILE).read_text())
  except (OSError, ValueError):
    return {}


def _evaluated(folder: pathlib.Path) -> dict[str, float]:
  """The last line of an evaluation's metrics."""
  lines = read_lines(folder / METRICS_FILE)
  return {
    name: value
    for name, value in (lines[-1] if lines else {}).items()
    if isinstance(value, int | float) and name not in ('step', 'split')
  }
