"""What a study shows: tables and figures of its runs.

A view is a function of `Results` that gives a `Section`; the functions here
make views, and gin names them in `study.views`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.study import published as published_lib
from prompt_tuning.study import statistics
from prompt_tuning.study.grid import SEED
from prompt_tuning.study.grid import TRY
from prompt_tuning.study.grid import Cell
from prompt_tuning.study.runs import VALIDATION
from prompt_tuning.study.runs import Run

Labels = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Results:
  """Cells and what came of them.

  Attributes:
    cells: of the study.
    runs: {name of a cell: its run}, of those that are done.
    settings: of a cell's command, {'Prompt.length': 20, ...}.
    evaluations: what views may name; None: anything.
  """

  cells: Sequence[Cell]
  runs: Mapping[str, Run]
  settings: Callable[[Cell], Mapping[str, Any]] = lambda cell: {}
  evaluations: Sequence[str] | None = None

  def require(self, evaluation: str) -> None:
    """UserError where the study has no such evaluation."""
    if self.evaluations is not None and evaluation not in self.evaluations:
      raise UserError(
        f'a view names the evaluation {evaluation!r}, the study has'
        f' {", ".join(self.evaluations)} (study.evaluations)'
      )

  def chosen(self) -> list[tuple[Labels, Run]]:
    """Labels and runs of experiments.

    Not those of tries that were not the best, nor of what combines others.
    """
    return [
      (cell.labels, self.runs[cell.name])
      for cell in self.cells
      if cell.chosen and not cell.needs and cell.name in self.runs
    ]

  def labels(self, axis: str) -> list[str]:
    """Of an axis, in the order of the study.

    Raises:
      UserError: the study has no such axis.
    """
    found = dict.fromkeys(
      cell.labels[axis] for cell in self.cells if axis in cell.labels
    )
    if not found:
      axes = dict.fromkeys(axis for cell in self.cells for axis in cell.labels)
      raise UserError(
        f'a view names the axis {axis!r}, the study has {", ".join(axes)}'
      )
    return list(found)

  def summary(
    self, labels: Labels, metric: str, evaluation: str
  ) -> statistics.Summary | None:
    """Over the seeds, of the runs that have these labels.

    A seed's value is the mean over all other axes; a seed that lacks a run of
    them is left out, so what is not done is not averaged over.
    """
    self.require(evaluation)
    expected = {
      self._others(cell.labels, labels)
      for cell in self.cells
      if not cell.needs and labels.items() <= cell.labels.items()
    }
    by_seed: dict[str, dict[frozenset, float]] = {}
    for found, run in self.chosen():
      if labels.items() <= found.items():
        value = run.value(metric, evaluation)
        if value is not None:
          one = by_seed.setdefault(found.get(SEED, ''), {})
          one[self._others(found, labels)] = value
    values = [
      sum(one.values()) / len(one)
      for one in by_seed.values()
      if one.keys() == expected
    ]
    return statistics.Summary.of(values) if values else None

  def _others(self, labels: Labels, chosen: Labels) -> frozenset:
    """Labels beside those that were chosen, of axes that are averaged over."""
    return frozenset(labels.items() - chosen.items()) - {
      (axis, labels[axis]) for axis in (SEED, TRY) if axis in labels
    }

  def interval(
    self, labels: Labels, evaluation: str
  ) -> tuple[float, float] | None:
    """Of the share of right answers of the runs that have these labels.

    None where they do not share examples (see `statistics.interval`).
    """
    right = [
      run.answers(evaluation)
      for found, run in self.chosen()
      if labels.items() <= found.items()
    ]
    return statistics.interval(right)


@dataclasses.dataclass
class Section:
  """A part of a report.

  Attributes:
    title: of it.
    text: Markdown without markup but links.
    header: of its table.
    rows: of its table; plain values, that a CSV has too.
    figure: of matplotlib.
  """

  title: str
  text: str = ''
  header: Sequence[str] = ()
  rows: Sequence[Sequence[Any]] = ()
  figure: Any = None


View = Callable[[Results], Section]


def table(
  rows: str | Sequence[str],
  columns: str,
  metric: str = 'score',
  evaluation: str = VALIDATION,
  title: str = '',
  reference: str | None = None,
  average: str | None = None,
) -> View:
  """Mean and deviation over seeds, for each label of `rows` and `columns`.

  Args:
    rows: axes; a line for each product of their labels.
    columns: an axis.
    metric: see `Run.value`.
    evaluation: likewise.
    title: of the section.
    reference: the name of published figures (see `published`) that get lines
      of their own, where their labels are the study's.
    average: the label of a last line, the mean over all rows of a column.
  """
  axes = (rows,) if isinstance(rows, str) else tuple(rows)

  def view(results: Results) -> Section:
    names = results.labels(columns)
    lines = []
    for labels in itertools.product(*map(results.labels, axes)):
      chosen = dict(zip(axes, labels))
      found = [
        results.summary({**chosen, columns: name}, metric, evaluation)
        for name in names
      ]
      if any(found):
        lines.append([*labels, *('' if s is None else str(s) for s in found)])
    if average is not None:
      found = [results.summary({columns: n}, metric, evaluation) for n in names]
      values = ['' if one is None else str(one) for one in found]
      lines.append([average, *[''] * (len(axes) - 1), *values])
    text = f'{of(metric, evaluation)}; mean ± standard deviation over runs.'
    if reference is not None:
      source, figures = published_lib.figures(reference)
      text += f' Published: {source}.'
      for label, by_column in figures.items():
        values = [by_column.get(name, '') for name in names]
        if any(values):
          lines.append(
            [f'published: {label}', *[''] * (len(axes) - 1), *values]
          )
    header = [*axes, *names]
    return Section(title or f'{metric} by {columns}', text, header, lines)

  return view


def every_metric(
  columns: str, evaluation: str = VALIDATION, title: str = 'Every metric'
) -> View:
  """All metrics of all tasks, those evaluated zero-shot too.

  Args:
    columns: an axis.
    evaluation: see `Run.value`.
    title: of the section.
  """

  def view(results: Results) -> Section:
    results.require(evaluation)
    names = results.labels(columns)
    found: dict[tuple, dict[str, dict[str, list[float]]]] = {}
    for labels, run in results.chosen():
      kept = tuple(
        v for k, v in labels.items() if k not in (columns, SEED, TRY)
      )
      for metric, value in run.evaluations.get(evaluation, {}).items():
        if '/' in metric and not metric.endswith('_share'):
          by_label = found.setdefault(kept, {}).setdefault(metric, {})
          by_label.setdefault(labels.get(columns, ''), []).append(value)
    rows = [
      [
        *kept,
        metric,
        *(
          str(statistics.Summary.of(by_label[n])) if n in by_label else ''
          for n in names
        ),
      ]
      for kept, metrics in found.items()
      for metric, by_label in sorted(metrics.items())
    ]
    axes = [
      axis
      for axis in next((labels for labels, _ in results.chosen()), {})
      if axis not in (columns, SEED, TRY)
    ]
    text = f'{evaluation}; mean ± standard deviation over runs.'
    return Section(title, text, [*axes, 'metric', *names], rows)

  return view


def compare(
  axis: str,
  labels: Sequence[str],
  evaluation: str = VALIDATION,
  title: str = '',
) -> View:
  """Two labels of an axis against each other, on the examples they share.

  Args:
    axis: of the two.
    labels: the two.
    evaluation: whose answers.
    title: of the section.
  """
  if len(labels) != 2:
    raise UserError(f'compare.labels takes two labels, got {list(labels)}')

  def view(results: Results) -> Section:
    results.require(evaluation)
    groups: dict[tuple, dict[tuple, dict[str, Run]]] = {}
    for found, run in results.chosen():
      if found.get(axis) in labels:
        kept = {k: v for k, v in found.items() if k not in (axis, SEED, TRY)}
        pairs = groups.setdefault(tuple(kept.items()), {})
        pairs.setdefault(found.get(SEED), {})[found[axis]] = run
    rows = []
    for kept, by_seed in groups.items():
      pairs = [
        tuple(runs[label].answers(evaluation) for label in labels)
        for runs in by_seed.values()
        if len(runs) == 2
      ]
      one = statistics.compare(pairs)
      if one is not None:
        rows.append(
          [
            *(label for _, label in kept),
            f'{one.difference:+.1f}',
            f'{one.low:+.1f} to {one.high:+.1f}',
            f'{one.p_value:.2g}',
            one.examples,
            one.pairs,
          ]
        )
    names = [name for name, _ in next(iter(groups), ())]
    header = [*names, 'difference', '95%', 'p', 'examples', 'pairs of runs']
    text = (
      f'{labels[0]} minus {labels[1]}, percent of right answers'
      f" ({evaluation}); bootstrap interval over examples; p of McNemar's exact"
      ' test on the first pair of runs.'
    )
    said = title or f'{labels[0]} against {labels[1]}'
    return Section(said, text, header, rows)

  return view


def ensembles(
  evaluation: str = VALIDATION, title: str = 'Prompt ensembles'
) -> View:
  """Average and best of the members beside their vote (paper, table 3).

  Args:
    evaluation: of the runs of `Evaluation.ensemble`.
    title: of the section.
  """

  def view(results: Results) -> Section:
    results.require(evaluation)
    rows, axes = [], []
    for cell in results.cells:
      run, labels = results.runs.get(cell.name), cell.labels
      found = {} if run is None else run.evaluations.get(evaluation, {})
      if 'members/mean_score' not in found:
        continue
      axes = [axis for axis in labels if axis != SEED]
      members = sum(
        name.startswith('members/') and name.count('/') == 2 for name in found
      )
      rows.append(
        [
          *(labels[axis] for axis in axes),
          members,
          *(
            f'{found[name]:.1f}'
            for name in ('members/mean_score', 'members/best_score', 'score')
          ),
          _number(run.facts.get('seconds'), '.0f'),
          _number(_scaled(run.facts.get('peak_memory_bytes'), 1e6), '.0f'),
        ]
      )
    header = [
      *axes,
      *('prompts', 'average', 'best', 'ensemble', 's', 'peak MB'),
    ]
    text = (
      f'score ({evaluation}): of single prompts in the mean and at best, and of'
      ' the majority of their answers (of equally many votes the first'
      " prompt's). One pass over the data for all prompts: seconds, and most"
      ' memory of the process.'
    )
    return Section(title, text, header, rows)

  return view


def tries(metric: str = 'score', title: str = 'The search') -> View:
  """What each try of a search gave with the first seed, and the best."""

  def view(results: Results) -> Section:
    rows, axes = [], []
    first = next(
      (c.labels[SEED] for c in results.cells if SEED in c.labels), ''
    )
    for cell in results.cells:
      if TRY in cell.labels and cell.labels.get(SEED, '') == first:
        axes = [axis for axis in cell.labels if axis not in (TRY, SEED)]
        run = results.runs.get(cell.name)
        value = None if run is None else run.value(metric)
        rows.append(
          [
            *(cell.labels[axis] for axis in axes),
            cell.labels[TRY],
            '' if value is None else f'{value:.1f}',
            'taken' if cell.chosen else '',
          ]
        )
    text = f'{of(metric, VALIDATION)}, first seed.'
    return Section(title, text, [*axes, 'try', metric, ''], rows)

  return view


def published(name: str, title: str = '') -> View:
  """Figures that others published, as they stand there.

  Args:
    name: see `published.FIGURES`.
    title: of the section.
  """
  source, figures = published_lib.figures(name)

  def view(results: Results) -> Section:
    del results
    names = list(
      dict.fromkeys(column for by in figures.values() for column in by)
    )
    rows = [
      [label, *(by.get(column, '') for column in names)]
      for label, by in figures.items()
    ]
    return Section(title or f'Published: {name}', source, ['', *names], rows)

  return view


def all_runs(results: Results) -> Section:
  """Which run each number is from, and what it took."""
  axes = list(
    dict.fromkeys(axis for cell in results.cells for axis in cell.labels)
  )
  rows = []
  for cell in results.cells:
    if (run := results.runs.get(cell.name)) is None:
      continue
    facts = run.facts
    rows.append(
      [
        *(cell.labels.get(axis, '') for axis in axes),
        _number(run.value('score') if _has_score(run) else None, '.1f'),
        _number(facts.get('trained_parameters'), ',d'),
        _number(facts.get('best_step'), ',d'),
        _number(facts.get('steps'), ',d'),
        _number(run.seconds_per_step, '.3f'),
        _number(facts.get('seconds'), '.0f'),
        _number(_scaled(facts.get('peak_memory_bytes'), 1e6), '.0f'),
        _number(_scaled(run.size, 1e3), ',.0f'),
        facts.get('commit') or facts.get('prompt_tuning_version') or '',
        str(run.folder),
      ]
    )
  header = [
    *axes,
    *('score', 'trained', 'best step', 'steps', 's/step', 's'),
    *('peak MB', 'kB', 'commit', 'run'),
  ]
  text = (
    'Score on validation data at the best step; trained parameters; median'
    ' seconds of a step, seconds of the run, most memory of the process, size'
    ' of what was trained as files. config.gin in each folder is the whole'
    ' configuration, its seed included.'
  )
  return Section('Runs', text, header, rows)


def _has_score(run: Run) -> bool:
  return 'score' in run.evaluations[VALIDATION]


def _scaled(value: float | None, by: float) -> float | None:
  return None if value is None else value / by


def _number(value: Any, form: str) -> str:
  return '' if value is None else format(value, form)


def of(metric: str, evaluation: str) -> str:
  """What a section's numbers are."""
  return f'{metric} ({evaluation})'
