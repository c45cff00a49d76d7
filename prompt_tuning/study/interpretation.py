"""What prompts came to be like (Lester et al. 2021, section 7).

Each row of a prompt has its nearest pieces in the frozen vocabulary; which of
the labels that a prompt started from are still near, which rows have become
alike, and which prompts.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from sklearn import cluster
from sklearn import decomposition
from sklearn import neighbors

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import transfer
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.study.grid import SEED
from prompt_tuning.study.grid import TRY
from prompt_tuning.study.runs import VALIDATION
from prompt_tuning.study.runs import Run
from prompt_tuning.study.views import Results
from prompt_tuning.study.views import Section
from prompt_tuning.study.views import View

_EMBEDDING = 'token_embedder/embedding'
Measure = Literal['cosine', 'euclidean']
# Rows whose cosine is above this are of one cluster.
_ALIKE = 0.5
# No text is made of these, padding, EOS, unknown; nor of sentinels, on top.
_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Read:
  """A prompt with what it takes to read it.

  Attributes:
    table: [P, E], of the first prompt.
    embedding: [V, E] of its base, float32.
    vocabulary: of its base.
    labels: of its task.
  """

  table: np.ndarray
  embedding: np.ndarray
  vocabulary: Any
  labels: Sequence[str]

  def nearest(
    self, k: int, measure: Measure = 'cosine'
  ) -> tuple[np.ndarray, np.ndarray]:
    """Distances and ids [P, k] of each row's nearest pieces, nearest first."""
    words = self.vocabulary.size - self.vocabulary.extra_ids
    known = self.embedding[_SPECIAL:words]
    index = neighbors.NearestNeighbors(metric=measure, algorithm='brute')
    distances, ids = index.fit(known).kneighbors(self.table, n_neighbors=k)
    return distances, ids + _SPECIAL

  def words(self, ids: Sequence[int]) -> list[str]:
    return [self.vocabulary.piece(int(one)).replace('▁', ' ') for one in ids]

  def label_ids(self) -> dict[str, set[int]]:
    """The pieces of each label."""
    return {label: {*self.vocabulary.encode(label)} for label in self.labels}

  def persisting(self, k: int) -> list[str]:
    """Labels of which a piece is among the k nearest of any row."""
    near = {*self.nearest(k)[1].ravel().tolist()}
    return [label for label, ids in self.label_ids().items() if ids & near]

  def clusters(self) -> list[list[int]]:
    """Rows that are alike by their cosine, two or more; largest first."""
    if len(self.table) < 2:
      return []
    found = cluster.AgglomerativeClustering(
      n_clusters=None,
      distance_threshold=1 - _ALIKE,
      metric='cosine',
      linkage='average',
    ).fit_predict(self.table)
    groups = [np.flatnonzero(found == one).tolist() for one in set(found)]
    return sorted((g for g in groups if len(g) > 1), key=len, reverse=True)


@functools.lru_cache(maxsize=8)
def _base(path: str) -> np.ndarray:
  return np.asarray(load_checkpoint(path).arrays[_EMBEDDING], np.float32)


def read(run: Run, settings: Mapping[str, Any]) -> Read | None:
  """The prompt of a run, or one that acts alike; None where there is none.

  Args:
    run: a training.
    settings: of its command; they name the vocabulary.
  """
  if not run.is_training:
    return None
  found = [
    prompt
    for one in load_trained(run.folder)
    if (prompt := one if isinstance(one.method, Prompt) else one.as_prompt())
  ]
  if not found:
    return None
  table, facts = np.asarray(found[0].arrays['table']), found[0].facts
  vocabulary = settings.get('Task.vocabulary')
  if vocabulary is None:
    raise UserError(
      f'to read the prompt of {run.folder} as text its VOCABULARY is needed'
    )
  return Read(
    table[0],
    _base(run.facts['base']),
    load_vocabulary(vocabulary),
    facts.get('labels') or (),
  )


def waywardness(
  axis: str,
  metric: str = 'score',
  evaluation: str = VALIDATION,
  title: str = 'Score and distance to the text',
) -> View:
  """Score, distance to a text and reading of tied prompts (2112.08348, fig. 2).

  Args:
    axis: the weights of the tie.
    metric: see `Run.value`.
    evaluation: likewise.
    title: of the section.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    results.require(evaluation)
    rows, points = [], {}
    for cell in results.cells:
      run = results.runs.get(cell.name)
      one = None if run is None else read(run, results.settings(cell))
      if one is None:
        continue
      weight, settings = cell.labels[axis], results.settings(cell)
      ids = one.vocabulary.encode(settings['TiedPrompt.text'])
      difference = one.table - one.embedding[ids]
      distance = float(np.mean(np.sum(np.square(difference), axis=-1)))
      nearest = one.nearest(1)[1][:, 0]
      kept = float(np.mean(nearest == np.asarray(ids)))
      value = run.value(metric, evaluation)
      points.setdefault(weight, []).append((value, distance))
      rows.append(
        [
          weight,
          cell.labels.get(SEED, ''),
          f'{value:.1f}',
          f'{distance:.3g}',
          f'{100 * kept:.0f}%',
          ''.join(one.words(nearest)).strip(),
        ]
      )
    drawn = Figure(figsize=(6, 4), layout='constrained')
    plot = drawn.subplots()
    means = {w: np.mean(found, axis=0) for w, found in points.items()}
    places = np.arange(len(means))
    plot.plot(places, [m[0] for m in means.values()], 'o-', label=metric)
    plot.set_xticks(places, list(means))
    plot.set(xlabel=axis, ylabel=metric)
    other = plot.twinx()
    other.plot(places, [m[1] for m in means.values()], 's--', color='tab:red')
    other.set(ylabel='squared distance to the text (dashed)', yscale='log')
    plot.grid(alpha=0.3)
    text = (
      f'{metric} ({evaluation}); mean squared distance of rows to the pieces of'
      " the text; share of rows whose nearest piece is the text's; the nearest"
      ' pieces as text.'
    )
    header = [axis, 'seed', metric, 'distance', 'kept', 'reads as']
    return Section(title, text, header, rows, drawn)

  return view


def _all(results: Results) -> list[tuple[str, Read]]:
  """The prompts of a study, by their labels in a few words."""
  found = []
  for cell in results.cells:
    run = results.runs.get(cell.name)
    if cell.chosen and run is not None:
      one = read(run, results.settings(cell))
      if one is not None:
        shown = [v for k, v in cell.labels.items() if k != TRY]
        found.append((' '.join(shown), one))
  return found


def interpretation(
  k: Sequence[int] = (1, 5), title: str = 'What the prompts are like'
) -> View:
  """A line for each prompt: its norm, its nearest pieces, labels, clusters.

  Args:
    k: how many nearest pieces a label may be among to persist.
    title: of the section.
  """

  def view(results: Results) -> Section:
    rows = []
    for name, one in _all(results):
      distances, ids = one.nearest(1)
      clusters = one.clusters()
      largest = one.words(ids[clusters[0], 0]) if clusters else []
      rows.append(
        [
          name,
          len(one.table),
          f'{np.linalg.norm(one.table, axis=-1).mean():.1f}',
          f'{1 - distances.mean():.2f}',
          *(f'{len(one.persisting(n))} of {len(one.labels)}' for n in k),
          len(clusters),
          ', '.join(dict.fromkeys(largest)),
        ]
      )
    header = [
      *('prompt', 'rows', 'norm of a row', 'cosine of the nearest piece'),
      *(f'labels among {n}' for n in k),
      *('clusters', 'nearest pieces of the largest'),
    ]
    text = (
      'Mean norm of rows; mean cosine of a row with its nearest piece; labels'
      ' of which a piece is among the k nearest of any row; groups of rows'
      f' whose mean cosine is above {_ALIKE}.'
    )
    return Section(title, text, header, rows)

  return view


def row_neighbours(
  k: int = 5,
  measure: Measure = 'cosine',
  most: int = 20,
  title: str = 'Nearest pieces',
) -> View:
  """The nearest pieces of each row of each prompt.

  Args:
    k: how many.
    measure: 'cosine' or 'euclidean'.
    most: rows of a prompt that are shown.
    title: of the section.
  """

  def view(results: Results) -> Section:
    rows = []
    for name, one in _all(results):
      distances, ids = one.nearest(k, measure)
      for number in range(min(most, len(one.table))):
        rows.append(
          [
            name,
            number,
            f'{distances[number, 0]:.2f}',
            ' |'.join(one.words(ids[number])),
          ]
        )
    text = f'By {measure} distance, the nearest first; rows from the start.'
    header = ['prompt', 'row', 'distance', 'pieces']
    return Section(f'{title}, {measure}', text, header, rows)

  return view


def similarity(title: str = 'How alike the prompts are') -> View:
  """Two similarities of each two prompts (Vu et al. 2022, section 3)."""

  def view(results: Results) -> Section:
    prompts = _all(results)
    rows = []
    for i, (name, one) in enumerate(prompts):
      for other_name, other in prompts[i + 1 :]:
        if one.table.shape[1] == other.table.shape[1]:
          of_means = transfer.similarity(one.table, other.table)
          of_rows = transfer.similarity(one.table, other.table, 'pairs')
          rows.append([name, other_name, f'{of_means:.3f}', f'{of_rows:.3f}'])
    text = 'Cosine of the mean rows, and the mean cosine of all pairs of rows.'
    header = ['prompt', 'and', 'cosine of means', 'mean of cosines']
    return Section(title, text, header, rows)

  return view


def prompt_map(title: str = 'A map of the prompts') -> View:
  """Rows of all prompts and the labels' embeddings on two principal axes.

  Args:
    title: of the section.
  """

  def view(results: Results) -> Section:
    from matplotlib.figure import Figure

    prompts = _all(results)
    if not prompts:
      return Section(title, 'There is no prompt yet.')
    size = prompts[0][1].table.shape[1]
    prompts = [(n, one) for n, one in prompts if one.table.shape[1] == size]

    def unit(x):
      return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)

    axes = decomposition.PCA(2).fit(
      unit(np.concatenate([one.table for _, one in prompts]))
    )
    drawn = Figure(figsize=(7, 5.5), layout='constrained')
    plot = drawn.subplots()
    for name, one in prompts:
      points = axes.transform(unit(one.table))
      plot.scatter(*points.T, s=14, alpha=0.6, label=name)
    first = prompts[0][1]
    for label, ids in first.label_ids().items():
      mean = first.embedding[sorted(ids)].mean(axis=0, keepdims=True)
      ((x, y),) = axes.transform(unit(mean))
      plot.annotate(label, (x, y), fontsize='small', weight='bold')
      plot.scatter(x, y, marker='x', color='black', s=20)
    plot.legend(fontsize='x-small')
    plot.set(xlabel='first principal axis', ylabel='second')
    plot.grid(alpha=0.3)
    text = (
      'Directions of rows (a point each) and of label embeddings (crosses), on'
      f' the two principal axes of the rows, which hold'
      f' {100 * axes.explained_variance_ratio_.sum():.0f}% of their variance.'
    )
    return Section(title, text, figure=drawn)

  return view
