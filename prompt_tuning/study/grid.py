"""The cells of a study: every command that a grid of words makes.

An axis is a mapping from labels to words of a command line, or a sequence of
values, where the axis's name is what they are bound to:

  {'model': {'small': 'models/t5_1_1_small', 'base': 'models/t5_1_1_base'},
   'PROMPT_LENGTH': (1, 20, 100)}

A cell is a choice of one label on each axis; its command is `prompt-tuning
train` with the words of all of them, or `eval` where one of the words is
`eval`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import re
import shlex
from typing import Any

from prompt_tuning.errors import UserError

Axis = Mapping[str, str] | Sequence[Any]
# The axis whose labels repeat an experiment.
SEED = 'SEED'
# The axis that a search of `Grid.tries` adds.
TRY = 'try'


@dataclasses.dataclass(frozen=True)
class Cell:
  """One command of a study.

  Attributes:
    name: of its folder in the study's; the same for the same labels.
    labels: {axis: label}.
    words: of the command, without its folder.
    common: bindings of all commands that have a use for them; those of `words`
      count more.
    needs: names of the cells that must be done before it.
    chosen: False for a try that another one was better than, or may be.
  """

  name: str
  labels: Mapping[str, str]
  words: tuple[str, ...]
  common: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  chosen: bool = True

  @property
  def command(self) -> str:
    """'train', or 'eval' where it trains nothing."""
    return 'eval' if 'eval' in self.words else 'train'

  def with_words(self, words: Sequence[str]) -> 'Cell':
    """It with further words, which count more than those before."""
    return dataclasses.replace(self, words=(*self.words, *words))

  def arguments(self, folder: str) -> list[str]:
    """Of `prompt-tuning`."""
    home = {'train': 'MODEL_DIR', 'eval': 'EVAL_OUTPUT_DIR'}[self.command]
    words = [word for word in self.words if word != 'eval']
    return [self.command, *self.common, *words, f'{home}={folder}']


@dataclasses.dataclass(frozen=True)
class Grid:
  """Axes, and which of their products are cells.

  Attributes:
    axes: {name: axis}; the axis 'SEED' repeats, and comes last.
    words: of every command: files, and bindings where they are of use.
    tries: {label: words of each try}: a label's search, with the first seed;
      the other seeds take the words that were best by the validation score.
    skip: labels whose product is no cell, each a {axis: label or labels}.
    combined: {label: words} of one more command for all cells that differ in
      their seed alone, after them; `{runs}` in it stands for their folders,
      `{run}` for the first. The label takes the place of the seed's.
    seeds: labels of the seeds to look at; None: all of them. A search is of the
      axis's first seed all the same, and what combines all seeds is left out.
  """

  axes: Mapping[str, Axis]
  words: str = ''
  tries: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  skip: Sequence[Mapping[str, str | Sequence[str]]] = ()
  combined: Mapping[str, str] = dataclasses.field(default_factory=dict)
  seeds: Sequence[str] | None = None

  def __post_init__(self):
    known = {label for axis in self._choices().values() for label in axis}
    skipped = [
      x for one in self.skip for ax in one.values() for x in _several(ax)
    ]
    for label in sorted({*skipped, *self.tries} - known):
      raise UserError(
        f'{label!r} is no label of the study; it has {", ".join(sorted(known))}'
      )
    for name, axis in self._choices().items():
      if not axis:
        raise UserError(f'the axis {name!r} of the study has no labels')

  def _choices(self) -> dict[str, dict[str, str]]:
    """{axis: {label: words}}, the seeds last."""
    found = {
      name: {str(label): words for label, words in axis.items()}
      if isinstance(axis, Mapping)
      else {str(value): f'{name}={value}' for value in axis}
      for name, axis in self.axes.items()
    }
    seeds = found.pop(SEED, None)
    return found | ({} if seeds is None else {SEED: seeds})

  def labels(self, axis: str) -> list[str]:
    """Of one of its axes; none where it has no such axis."""
    return list(self._choices().get(axis, ()))

  def only(self, chosen: Mapping[str, str | Sequence[str]]) -> 'Grid | None':
    """The part of it that has these labels, {axis: label or labels}.

    An axis that it lacks leaves nothing out; None: no cell has such labels.
    """
    axes, seeds = self._choices(), self.seeds
    for name, labels in chosen.items():
      if name in axes:
        found = {x: axes[name][x] for x in _several(labels) if x in axes[name]}
        if not found:
          return None
        if name == SEED:
          seeds = tuple(found) if len(found) < len(axes[name]) else None
        else:
          axes[name] = found
    kept = {label for axis in axes.values() for label in axis}
    return dataclasses.replace(
      self,
      axes=axes,
      seeds=seeds,
      tries={label: t for label, t in self.tries.items() if label in kept},
      skip=[
        one
        for one in self.skip
        if all({*_several(ax)} <= kept for ax in one.values())
      ],
    )

  def cells(
    self,
    folder: Callable[[str], str],
    score: Callable[[Cell], float | None],
  ) -> list[Cell]:
    """All that can be said by now; a search that is under way has more.

    Args:
      folder: of a cell, by its name.
      score: of a cell on validation data, higher is better; None: not done.
    """
    choices = self._choices()
    all_seeds = choices.pop(SEED, {'': ''})
    cells = []
    for labels, words in _product(choices):
      seeds = {
        seed: text
        for seed, text in all_seeds.items()
        if not any(_has({**labels, SEED: seed}, one) for one in self.skip)
      }
      if not seeds:
        continue
      group = list(self._group(labels, words, seeds, score))
      done = [cell for cell in group if cell.chosen]
      if self.seeds is None:
        cells += group
        if len(done) == len(seeds):
          cells += self._combined(labels, done, folder)
      else:  # Without a choice, the search is what they wait for.
        cells += [
          cell
          for cell in group
          if not done or cell.labels.get(SEED) in self.seeds
        ]
    return cells

  def _group(
    self,
    labels: Mapping[str, str],
    words: Sequence[str],
    seeds: Mapping[str, str],
    score: Callable[[Cell], float | None],
  ) -> Iterator[Cell]:
    """The cells that differ in their seed, and in the try of the first."""

    def cell(seed: str, search: str | None = None) -> Cell:
      named = {**labels, **({SEED: seed} if seed else {})}
      if search is not None:
        named[TRY] = search
      more = shlex.split(f'{seeds[seed]} {search or ""}')
      common = tuple(shlex.split(self.words))
      return Cell(_name(named), named, (*words, *more), common)

    found = [self.tries[x] for x in labels.values() if x in self.tries]
    if not found:
      yield from map(cell, seeds)
      return
    first, *others = seeds
    tried = [cell(first, search) for search in found[0]]
    scores = [score(one) for one in tried]
    if None in scores:
      yield from (dataclasses.replace(one, chosen=False) for one in tried)
      return
    # A correlation with answers that are all alike is no number.
    scores = [-math.inf if math.isnan(one) else one for one in scores]
    best = max(range(len(tried)), key=lambda i: scores[i])
    for i, one in enumerate(tried):
      yield dataclasses.replace(one, chosen=i == best)
    for seed in others:
      yield cell(seed, found[0][best])

  def _combined(
    self,
    labels: Mapping[str, str],
    done: Sequence[Cell],
    folder: Callable[[str], str],
  ) -> Iterator[Cell]:
    folders = [folder(cell.name) for cell in done]
    runs = repr(folders).replace(' ', '')
    for label, text in self.combined.items():
      words = [
        word.replace('{runs}', runs).replace('{run}', folders[0])
        for word in shlex.split(text)
      ]
      named = {**labels, SEED: label}
      needs = tuple(cell.name for cell in done)
      yield Cell(_name(named), named, tuple(words), needs=needs)


def _has(
  labels: Mapping[str, str], chosen: Mapping[str, str | Sequence[str]]
) -> bool:
  return all(labels.get(name) in _several(ax) for name, ax in chosen.items())


def _several(labels: str | Sequence[str]) -> Sequence[str]:
  return (labels,) if isinstance(labels, str) else labels


def _product(
  choices: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[dict[str, str], list[str]]]:
  for labels in itertools.product(*choices.values()):
    words = [
      word
      for axis, label in zip(choices.values(), labels)
      for word in shlex.split(axis[label])
    ]
    yield dict(zip(choices, labels)), words


def _name(labels: Mapping[str, str]) -> str:
  """A folder's name."""
  parts = (re.sub(r'[^A-Za-z0-9_+-]+', '_', text) for text in labels.values())
  return '.'.join(part.strip('_') or '_' for part in parts)
