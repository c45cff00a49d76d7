"""Figures of a study, each with its numbers (see `views`)."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.study import published as published_lib
from prompt_tuning.study import sizes
from prompt_tuning.study.runs import VALIDATION
from prompt_tuning.study.views import Results
from prompt_tuning.study.views import Section
from prompt_tuning.study.views import View
from prompt_tuning.study.views import of


def bars(
  axis: str,
  metric: str = 'score',
  evaluation: str = VALIDATION,
  title: str = '',
) -> View:
  """A bar for each label of an axis, and their numbers.

  Args:
    axis: of the study.
    metric: see `Run.value`.
    evaluation: likewise.
    title: of the section.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    found = {
      label: summary
      for label in results.labels(axis)
      if (summary := results.summary({axis: label}, metric, evaluation))
    }
    drawn = Figure(figsize=(5.5, 3.5), layout='constrained')
    plot = drawn.subplots()
    plot.bar(
      list(found),
      [summary.mean for summary in found.values()],
      yerr=[summary.deviation or 0 for summary in found.values()],
      capsize=4,
      alpha=0.7,
    )
    plot.set(ylabel=metric, xlabel=axis)
    plot.tick_params(axis='x', labelsize='small')
    plot.grid(alpha=0.3, axis='y')
    rows = []
    for label, summary in found.items():
      right = results.interval({axis: label}, evaluation)
      said = '' if right is None else '{:.1f} to {:.1f}'.format(*right)
      rows.append([label, str(summary), len(summary.values), said])
    text = (
      f'{of(metric, evaluation)}; bars: standard deviation over runs. The'
      ' interval is of the share of right answers, in percent: 95%, bootstrap'
      ' over examples.'
    )
    header = [axis, metric, 'runs', 'right answers']
    return Section(title or axis, text, header, rows, drawn)

  return view


def figure(
  x: str,
  lines: str,
  panels: str | None = None,
  metric: str = 'score',
  evaluation: str = VALIDATION,
  title: str = '',
  x_values: Mapping[str, float] | None = None,
  reference: str | None = None,
) -> View:
  """A plot: a line for each label of an axis, over the labels of another.

  Args:
    x: an axis; labels that are numbers stand in their place.
    lines: an axis.
    panels: an axis, a plot for each of its labels; None: one plot, of the mean
      over all other axes.
    metric: see `Run.value`.
    evaluation: likewise.
    title: of the section.
    x_values: places of `x`'s labels on a logarithmic axis, such as sizes.
    reference: published figures, drawn dashed, by their own labels of x.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    names = results.labels(panels) if panels else [None]
    places = _places(results.labels(x), x_values)
    width = 5.5 if len(names) == 1 else 3.6 * len(names)
    drawn = Figure(figsize=(width, 4), layout='constrained')
    plots = drawn.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for plot, name in zip(plots, names):
      for label in results.labels(lines):
        _line(
          plot,
          results,
          places,
          x,
          {lines: label} | ({panels: name} if panels else {}),
          metric,
          evaluation,
          label,
        )
      if x_values:
        plot.set_xscale('log')
      plot.set_xticks(list(places.values()), list(places))
      plot.minorticks_off()
      plot.set(xlabel=x, title=name or '')
      plot.grid(alpha=0.3)
    plots[0].set(ylabel=metric)
    text = f'{of(metric, evaluation)}; bars: standard deviation over runs.'
    if reference is not None:
      source, figures = published_lib.figures(reference)
      text += f' For comparison: {source}.'
      for label, by_x in figures.items():
        known = {n: v for n, v in by_x.items() if n in places}
        if known:
          plots[0].plot(
            [places[n] for n in known],
            [published_lib.number(v) for v in known.values()],
            '--',
            alpha=0.5,
            label=f'{label}, published',
          )
    handles, said = plots[0].get_legend_handles_labels()
    if handles:  # something is done
      plots[-1].legend(handles, said, fontsize='small')
    return Section(title or f'{metric} over {x}', text, figure=drawn)

  return view


def _line(plot, results, places, x, chosen, metric, evaluation, label):
  """Draws one line with its deviations, where there are values."""
  points = [
    (place, summary)
    for name, place in places.items()
    if (summary := results.summary({**chosen, x: name}, metric, evaluation))
  ]
  if not points:
    return
  plot.errorbar(
    [place for place, _ in points],
    [summary.mean for _, summary in points],
    [summary.deviation or 0 for _, summary in points],
    marker='o',
    capsize=3,
    label=label,
  )


def _places(
  labels: Sequence[str], x_values: Mapping[str, float] | None
) -> dict[str, float]:
  if x_values:
    missing = [label for label in labels if label not in x_values]
    if missing:
      raise UserError(f'figure.x_values has no {missing[0]!r}')
    return {label: x_values[label] for label in labels}
  try:
    return {label: float(label) for label in labels}
  except ValueError:
    return {label: float(i) for i, label in enumerate(labels)}


def tradeoff(
  axis: str,
  metric: str = 'score',
  evaluation: str = VALIDATION,
  title: str = '',
) -> View:
  """A metric against trained parameters, and what else a method costs.

  Args:
    axis: its labels are points.
    metric: see `Run.value`; of several tasks the mean.
    evaluation: likewise.
    title: of the section.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout='constrained')
    plot = drawn.subplots()
    rows, points = [], {}
    for label in results.labels(axis):
      summary = results.summary({axis: label}, metric, evaluation)
      runs = [
        run for found, run in results.chosen() if found.get(axis) == label
      ]
      runs = [run for run in runs if run.is_training]
      if summary is None or not runs:
        continue
      trained = max(run.facts['trained_parameters'] for run in runs)
      peak = [run.facts.get('peak_memory_bytes') for run in runs]
      seconds = [run.seconds_per_step for run in runs if run.seconds_per_step]
      size = max(run.size or 0 for run in runs)
      rows.append(
        [
          label,
          str(summary),
          f'{trained:,}',
          f'{statistics.median(seconds):.3f}' if seconds else '',
          f'{max(peak) / 1e6:,.0f}' if all(peak) else '',
          f'{size / 1e3:,.0f}',
        ]
      )
      plot.errorbar(
        trained, summary.mean, summary.deviation or 0, marker='o', capsize=3
      )
      points[label] = (trained, summary.mean)
    plot.set(xscale='log', xlabel='trained parameters', ylabel=metric)
    plot.margins(x=0.15, y=0.08)
    plot.grid(alpha=0.3)
    _label(plot, points)
    text = (
      f'{of(metric, evaluation)}, mean over tasks ± standard deviation over'
      ' seeds; trained parameters; median seconds of a step; most memory of a'
      ' process; size of the files.'
    )
    header = [axis, metric, 'trained', 's/step', 'peak MB', 'kB']
    said = title or f'{metric} against trained parameters'
    return Section(said, text, header, rows, drawn)

  return view


# Where a point's label may stand: offset in points, and alignments.
_PLACES = (
  ((5, 3), 'left', 'bottom'),
  ((5, -3), 'left', 'top'),
  ((-5, 3), 'right', 'bottom'),
  ((-5, -3), 'right', 'top'),
  ((0, 9), 'center', 'bottom'),
  ((0, -9), 'center', 'top'),
)


def _label(plot: Any, points: Mapping[str, tuple[float, float]]) -> None:
  """Writes each label beside its point, where no other one stands."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  renderer = FigureCanvasAgg(plot.figure).get_renderer()
  plot.figure.draw(renderer)  # axes have their place from then on
  taken = []
  for label, point in points.items():
    for offset, across, along in _PLACES:
      text = plot.annotate(
        label,
        point,
        xytext=offset,
        textcoords='offset points',
        fontsize='x-small',
        ha=across,
        va=along,
      )
      box = text.get_window_extent(renderer)
      if not any(box.overlaps(other) for other in taken):
        break
      text.remove()
    else:
      text = plot.annotate(label, point, fontsize='x-small')
      box = text.get_window_extent(renderer)
    taken.append(box)


def parameters(
  rows: str = 'method', columns: str = 'model', title: str = 'Parameters'
) -> View:
  """Trained parameters and their share, out of shapes alone: no run is needed.

  Args:
    rows: an axis.
    columns: an axis.
    title: of the section.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    names = results.labels(columns)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for cell in results.cells:
      at = cell.labels.get(rows), cell.labels.get(columns)
      if cell.command == 'train' and None not in at and at not in counts:
        counts[at] = sizes.parameters(results.settings(cell))
    drawn = Figure(figsize=(5.5, 4), layout='constrained')
    plot = drawn.subplots()
    lines = []
    for label in results.labels(rows):
      known = {n: counts[label, n] for n in names if (label, n) in counts}
      if not known:
        continue
      lines.append(
        [
          label,
          *(
            f'{known[n][0]:,} ({_percent(*known[n])})' if n in known else ''
            for n in names
          ),
        ]
      )
      plot.plot(
        [total for _, total in known.values()],
        [trained for trained, _ in known.values()],
        marker='o',
        label=label,
      )
    plot.set(xscale='log', yscale='log', xlabel='parameters of the model')
    plot.set(ylabel='trained parameters')
    plot.grid(alpha=0.3)
    plot.legend(fontsize='small')
    text = 'Trained parameters, and their share of all; counted from shapes.'
    return Section(title, text, [rows, *names], lines, drawn)

  return view


def _percent(trained: int, total: int) -> str:
  return f'{100 * trained / total:.3g}%'
