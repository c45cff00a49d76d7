"""A study: a grid of commands, run where they are not done, and its report.

A cell is an ordinary command with a folder of its own. What is known of it is
read out of that folder, so runs that were made by hand or on another machine
count too.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import shlex
from typing import Any, Literal, Protocol

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.study import execution
from prompt_tuning.study import report
from prompt_tuning.study import runs as runs_lib
from prompt_tuning.study.grid import Cell
from prompt_tuning.study.grid import Grid
from prompt_tuning.study.runs import Run
from prompt_tuning.study.views import Results
from prompt_tuning.study.views import Section
from prompt_tuning.study.views import View
from prompt_tuning.study.views import all_runs


class Commands(Protocol):
  """What is known of commands without running them."""

  def settings(self, arguments: Sequence[str]) -> Mapping[str, Any]:
    """What a command's arguments come to; UserError if they are at fault."""

  def using(self, arguments: Sequence[str], words: Sequence[str]) -> list[str]:
    """Those of further words that a command has a use for."""

  def of_config(self, text: str) -> Mapping[str, Any]:
    """What the config.gin of a run says."""

  def key(self, settings: Mapping[str, Any]) -> str:
    """Equal for settings of the same run."""

  def differences(
    self, wanted: Mapping[str, Any], found: Mapping[str, Any]
  ) -> list[str]:
    """In what a run is not the command's; [] where it is."""


def study(
  title: str,
  grids: Sequence[Grid],
  study_dir: str,
  *,
  views: Sequence[View] = (),
  text: str = '',
  evaluations: Mapping[str, str] | None = None,
  metric: str = 'score',
  action: Literal['run', 'list', 'collect'] = 'run',
  executor: str = 'local',
  at_once: int = 1,
  slurm: Mapping[str, Any] | None = None,
  adopt: Sequence[str] = (),
  only: Mapping[str, str | Sequence[str]] | None = None,
  words: str = '',
  commands: Commands | None = None,
) -> dict[str, Any]:
  """Runs what is not done of a study's cells, and writes its report.

  The same call goes on where it stopped; several at once share the cells. What
  a search or a combination waits for comes in a later round of the same call.

  Args:
    title: of the report.
    grids: what the cells are; a cell of two grids is one run.
    study_dir: has a folder for each cell, `.logs/`, and the report in
      `report/`: report.md, report.html (which is all by itself), figures, CSV
      tables, and `runs/<cell>.json`.
    views: the report's sections; a table of all runs is its last.
    text: the report's first words.
    evaluations: {name: words of `eval`} of each cell when it is done, in its
      `eval_<name>`.
    metric: by which a search takes the best try, on validation data.
    action: 'list' gives the commands alone; 'collect' runs nothing.
    executor: 'local', 'slurm' (an array of jobs), or a command that takes the
      arguments of `prompt-tuning train`, such as a launcher of scripts/launch.
    at_once: cells that run side by side; here they share out the devices.
    slurm: options for submitit: {'timeout_min': 600, 'gpus_per_node': 1}.
    adopt: folders below which runs of the same settings are looked for.
    only: {axis: label or labels} of the cells to look at; None: all.
    words: further ones, of every command that has a use for them.
    commands: knows what commands come to; None: a folder's contents are taken
      to be what its name says, and nothing is adopted.

  Returns:
    {'cells', 'done', 'failed': {cell: last line}, 'report': path}; of 'list'
    {'commands': lines}.

  Raises:
    UserError: the grid or a command is at fault, a folder holds another run, or
      cells failed.
  """
  known = {axis for grid in grids for axis in grid.axes}
  for axis in only or {}:
    if axis not in known:
      raise UserError(
        f'study.only has {axis!r}, the axes are {", ".join(sorted(known))}'
      )
    labels = dict.fromkeys(x for grid in grids for x in grid.labels(axis))
    wanted = only[axis]
    for label in [wanted] if isinstance(wanted, str) else wanted:
      if label not in labels:
        raise UserError(
          f'{axis!r} has no {label!r}; it has {", ".join(labels)}'
        )
  one = _Study(
    pathlib.Path(files.place(study_dir)),
    grids,
    only or {},
    {**(evaluations or {})},
    metric,
    words,
    commands,
  )
  if action == 'list':
    return {'commands': list(one.lines())}
  try:
    one.folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'STUDY_DIR {one.folder} cannot be made: {error.strerror}; choose another'
    ) from error
  one.adopt(adopt)
  _sections(one, views)  # What is wrong with a view comes to light at once.
  failed: dict[str, str] = {}
  remark = ''
  while action == 'run':
    done = one.done()
    jobs = [
      execution.Job(cell.name, one.home(cell.name), list(one.commands(cell)))
      for cell in one.cells()
      if cell.name not in {*done, *failed} and one.may_run(cell, done)
    ]
    if not jobs:
      break
    states = execution.States(jobs, at_once, len(done))
    if executor == 'local':
      local = execution.Local(at_once)
      failed |= local.run(jobs, states, one.left)
      if all(state == execution.ELSEWHERE for state in states.found()):
        remark = f'{len(jobs)} cells run elsewhere'
        break
      continue
    if executor == 'slurm':
      numbers = execution.on_slurm(jobs, one.folder, at_once, slurm or {})
      remark = f'submitted to Slurm: {numbers}'
    else:
      failed |= execution.by_launcher(jobs, executor, states)
      remark = f'launched: {states.found().count(execution.LAUNCHED)}'
    break
  cells = one.cells()
  sections = _sections(one, views)
  folder = one.folder / 'report'
  count = len(one.done())
  counts = f'{count} of {len(cells)} cells are done.'
  report.write(folder, title, f'{text} {counts}'.strip(), sections)
  one.write_json(folder / 'runs', cells)
  if failed:
    name, line = next(iter(failed.items()))
    raise UserError(
      f'{len(failed)} of {len(cells)} cells failed, the first is {name}: {line}'
      f' ({one.folder}/.logs has more; the same command tries again); the'
      f' report of the others is {folder / "report.html"}'
    )
  found = {'cells': len(cells), 'done': count, 'failed': {}}
  found |= {'remark': remark} if remark else {}
  return found | {'report': str(folder / 'report.html')}


def _sections(one: '_Study', views: Sequence[View]) -> list[Section]:
  """The report of what is done."""
  results = Results(one.cells(), one.done(), one.settings, one.evaluations)
  if not isinstance(views, list | tuple):
    raise UserError('study.views is a list: study.views = (@table(),)')
  sections = [view(results) for view in views]
  if not all(isinstance(section, Section) for section in sections):
    raise UserError('study.views takes what is made: @table(), not @table')
  return sections + ([all_runs(results)] if results.runs else [])


class _Study:
  """Cells, and the folders in which they are done."""

  def __init__(
    self,
    folder: pathlib.Path,
    grids: Sequence[Grid],
    only: Mapping[str, str | Sequence[str]],
    evaluations: Mapping[str, str],
    metric: str,
    words: str,
    commands: Commands | None,
  ):
    self.folder = folder
    self._whole_grids = grids
    self._grids = [part for grid in grids if (part := grid.only(only))]
    self._evaluations = evaluations
    self._metric = metric
    self._words = shlex.split(words)
    self._commands = commands
    self._settings: dict[str, Mapping[str, Any]] = {}
    self._grid_words: set[str] = set()
    self._used: dict[str, list[str]] = {}
    self._first: dict[str, str] = {}  # cell of those settings
    self._homes: dict[str, pathlib.Path] = {}
    self._shared: set[str] = set()  # cells that have another's folder
    self._known: dict[str, Run] = {}

  def cells(self) -> list[Cell]:
    """All that can be said by now, each once."""
    found: dict[str, Cell] = {}
    for grid in self._grids:
      for cell in grid.cells(lambda name: str(self.home(name)), self._score):
        cell = self._with_words(cell)
        other = found.setdefault(cell.name, cell)
        if other.words != cell.words:
          raise UserError(
            f'two cells of the study are called {cell.name}: give their grids'
            ' other labels'
          )
    self._require_use()
    for cell in found.values():
      self._place(cell)
    return list(found.values())

  def _require_use(self) -> None:
    """UserError where no cell has a use for a word."""
    if self._commands is None:
      return

    def unused(words: Iterable[str]) -> set[str]:
      return {*words}.difference(*self._used.values())

    useless = unused(self._words)
    if unused(self._grid_words):  # A cell that `only` leaves out may use it.
      for grid in self._whole_grids:
        for cell in grid.cells(lambda name: name, lambda cell: None):
          self._with_words(cell)
      useless |= unused(self._grid_words)
    for word in sorted(useless):
      raise UserError(f'{word} is of no use to any command of the study')

  def _with_words(self, cell: Cell) -> Cell:
    """It with all words that it has a use for, the command line's last."""
    if cell.needs:
      return cell
    if self._commands is None:
      return cell.with_words(self._words)
    if cell.name not in self._used:
      # Files are no bindings: who names one wants it everywhere.
      files = [word for word in cell.common if '=' not in word]
      words = [word for word in cell.common if '=' in word]
      bare = dataclasses.replace(cell, common=tuple(files))
      arguments = bare.arguments(str(self.folder / cell.name))
      self._grid_words |= {*words}
      self._used[cell.name] = self._commands.using(
        arguments, [*words, *self._words]
      )
    used = self._used[cell.name]
    common = [word for word in cell.common if '=' not in word or word in used]
    cell = dataclasses.replace(cell, common=tuple(common))
    return cell.with_words([word for word in self._words if word in used])

  @property
  def evaluations(self) -> tuple[str, ...]:
    """What a run has: the one that chose its step, and further ones."""
    return runs_lib.VALIDATION, *self._evaluations

  def home(self, name: str) -> pathlib.Path:
    """The folder of a cell: its own, or that of a run which is the same."""
    return self._homes.get(name, self.folder / name)

  def _place(self, cell: Cell) -> None:
    """Looks at a new cell's words, and gives equal cells one folder."""
    if self._commands is None or cell.name in self._settings or cell.needs:
      return  # of what needs others, the folder is theirs to say
    own = self._commands.settings(cell.arguments(str(self.folder / cell.name)))
    self._settings[cell.name] = own
    key = self._commands.key(own)
    first = self._first.setdefault(key, cell.name)
    if first != cell.name:
      self._homes[cell.name] = self.home(first)
      self._shared.add(cell.name)

  def settings(self, cell: Cell) -> Mapping[str, Any]:
    """What its command comes to, as far as anybody knows."""
    return self._settings.get(cell.name, {})

  def adopt(self, folders: Iterable[str]) -> None:
    """Finds runs of other folders that are cells of the study."""
    found = [
      config.parent
      for folder in folders
      for config in sorted(pathlib.Path(folder).rglob('config.gin'))
    ]
    if folders and self._commands is None:
      raise UserError('study.adopt compares configurations: it needs commands')
    for cell in self.cells():
      has_own = runs_lib.read_run(self.home(cell.name)) is not None
      if has_own or cell.name in self._shared:
        continue
      for folder in found:
        if runs_lib.read_run(folder) is not None and not self._other(
          cell, folder
        ):
          self._homes[cell.name] = folder
          break

  def _other(self, cell: Cell, folder: pathlib.Path) -> list[str]:
    """In what a folder's run is not the cell's."""
    if self._commands is None or cell.name not in self._settings:
      return []
    return self._differences(self._settings[cell.name], folder)

  def _other_evaluation(self, cell: Cell, name: str) -> list[str]:
    """In what a further evaluation, which is done, is not the one wanted."""
    if self._commands is None:
      return []
    wanted = self._commands.settings(self._evaluation(cell, name))
    home = self.home(cell.name)
    if cell.command == 'train':  # of its own run, wherever that was copied from
      wanted.pop('load_trained.path', None)
    return self._differences(wanted, home / f'eval_{name}')

  def _differences(
    self, wanted: Mapping[str, Any], folder: pathlib.Path
  ) -> list[str]:
    config = folder / 'config.gin'
    try:
      found = self._commands.of_config(config.read_text())
    except FileNotFoundError:
      return [f'configuration: {config} is not there']
    return self._commands.differences(wanted, found)

  def run(self, cell: Cell) -> Run | None:
    """What came of a cell, if it and its evaluations are done.

    Raises:
      UserError: its folder holds a run of other settings.
    """
    home = self.home(cell.name)
    key = str(home)
    if key not in self._known:
      found = runs_lib.read_run(home, tuple(self._evaluations))
      if found is None:
        return None
      if other := self._other(cell, home):
        raise UserError(
          f'{home} holds a run with another {"; another ".join(other[:4])} than'
          f' the cell {cell.name}; choose another STUDY_DIR, or move it away'
        )
      for name in self._evaluations:
        if other := self._other_evaluation(cell, name):
          raise UserError(
            f'{home}/eval_{name} holds an evaluation with another'
            f' {"; another ".join(other[:4])} than study.evaluations has; give'
            ' that another name, or move the folder away'
          )
      self._known[key] = found
    return self._known[key]

  def done(self) -> dict[str, Run]:
    return {
      cell.name: run
      for cell in self.cells()
      if (run := self.run(cell)) is not None
    }

  def _score(self, cell: Cell) -> float | None:
    cell = self._with_words(cell)
    self._place(cell)
    run = self.run(cell)
    return None if run is None else run.value(self._metric)

  def commands(self, cell: Cell) -> Iterator[list[str]]:
    """Those of a cell that are not done."""
    home = self.home(cell.name)
    if cell.command == 'train':
      if not runs_lib.trained(home):
        yield cell.arguments(str(home))
    elif runs_lib.read_run(home) is None:
      yield cell.arguments(str(home))
    for name in self._evaluations:
      if runs_lib.read_run(home / f'eval_{name}') is None:
        yield self._evaluation(cell, name)

  def _evaluation(self, cell: Cell, name: str) -> list[str]:
    """Arguments of a further evaluation of a cell."""
    home = self.home(cell.name)
    words, folder = shlex.split(self._evaluations[name]), home / f'eval_{name}'
    if cell.command == 'train':
      return ['eval', str(home), *words, f'EVAL_OUTPUT_DIR={folder}']
    return cell.with_words(words).arguments(str(folder))

  def left(self, name: str) -> list[list[str]]:
    """The commands of a cell that are not done, by its name."""
    (cell,) = (cell for cell in self.cells() if cell.name == name)
    return list(self.commands(cell))

  def may_run(self, cell: Cell, done: Collection[str]) -> bool:
    """Whether it is its turn: no other cell's, and what it needs is done."""
    return cell.name not in self._shared and {*cell.needs} <= {*done}

  def lines(self) -> Iterator[str]:
    """Commands as a shell takes them; of what is done, the first."""
    for cell in self.cells():
      if cell.name not in self._shared:
        left = list(self.commands(cell))
        for words in left or [cell.arguments(str(self.home(cell.name)))]:
          yield f'prompt-tuning {shlex.join(words)}' + '  # done' * (not left)

  def write_json(self, folder: pathlib.Path, cells: Sequence[Cell]) -> None:
    """A file for each run: where each number is from."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
      if (run := self.run(cell)) is None:
        continue
      content = {
        'cell': cell.name,
        'labels': cell.labels,
        'command': shlex.join(cell.arguments(str(run.folder))),
        'folder': str(run.folder),
        'config': str(run.folder / 'config.gin'),
        'evaluations': run.evaluations,
        'seconds_per_step': run.seconds_per_step,
        'bytes': run.size,
        'result': run.facts,
      }
      with files.replacing(folder / f'{cell.name}.json') as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + '\n')
