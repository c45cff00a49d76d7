"""Who runs the cells of a study: this machine, Slurm, or a launcher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import rich.console
import rich.live
import rich.table

from prompt_tuning.errors import RestartError
from prompt_tuning.errors import UserError
from prompt_tuning.study.runs import read_lines
from prompt_tuning.training.reporting import duration
from prompt_tuning.training.run_lock import RunLock

_CLAIMS = '.claims'
WAITS, RUNS, ELSEWHERE, DONE = 'waits', 'runs', 'runs elsewhere', 'done'
LAUNCHED = 'launched'
# One process for a cell's commands: libraries are loaded once.
_IN_TURN = """
import json, shlex, sys
from prompt_tuning import cli
for words in json.loads(sys.argv[1]):
  print('$ prompt-tuning', shlex.join(words), flush=True)
  if code := cli.main(words):
    sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Job:
  """The commands of a cell, one after the other.

  Attributes:
    name: of the cell.
    folder: of the cell.
    commands: arguments of `prompt-tuning`, a list for each; none is run again
      that was done.
  """

  name: str
  folder: pathlib.Path
  commands: Sequence[Sequence[str]]

  @property
  def log(self) -> pathlib.Path:
    return self.folder.parent / '.logs' / f'{self.name}.log'

  def last_line(self) -> str:
    """What it said last: of one that failed, why."""
    try:
      lines = self.log.read_text(errors='replace').splitlines()
    except OSError:
      return ''
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith('error: ')]
    return (errors or said or [''])[-1]

  def steps(self) -> tuple[int, int]:
    """Steps done in this run of it, and examples' lines so far."""
    lines = read_lines(self.folder / 'metrics.jsonl')
    steps = [line['step'] for line in lines if 'step' in line]
    return (steps[-1] - steps[0], len(steps)) if steps else (0, 0)


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[bool]:
  """Whether the cell is this process's; another study may be at it."""
  folder = job.folder.parent / _CLAIMS / job.name
  folder.mkdir(parents=True, exist_ok=True)
  lock = RunLock(folder)
  try:
    lock.__enter__()
  except UserError:
    yield False
    return
  with contextlib.ExitStack() as stack:
    stack.push(lock.__exit__)
    yield True


def run(
  job: Job,
  environment: Mapping[str, str] | None = None,
  started: Callable[[subprocess.Popen], None] = lambda process: None,
) -> int:
  """The exit code of a cell: of the first command that fails, else 0.

  Args:
    job: the cell.
    environment: variables beside those of this process.
    started: is told of the process.
  """
  job.log.parent.mkdir(parents=True, exist_ok=True)
  with job.log.open('w') as log:
    process = subprocess.Popen(
      [sys.executable, '-c', _IN_TURN, json.dumps(job.commands)],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **(environment or {})},
    )
    started(process)
    return process.wait()


class Local:
  """Runs cells here, some at a time, each with its share of the devices."""

  def __init__(self, at_once: int):
    """Shares out the devices among `at_once` cells, side by side."""
    if at_once < 1:
      raise UserError(f'study.at_once must be 1 or more, got {at_once}')
    gpus = _gpus()
    self._slots = [
      (_share_of_gpus(gpus, slot, at_once), _share_of_cores(slot, at_once))
      for slot in range(at_once)
    ]
    self._stopped = threading.Event()
    self._processes: dict[str, subprocess.Popen] = {}

  def run(
    self,
    jobs: Sequence[Job],
    states: 'States',
    left: Callable[[str], Sequence[Sequence[str]]] | None = None,
  ) -> dict[str, str]:
    """Runs cells; returns {name: last line} of those that failed.

    Args:
      jobs: the cells.
      states: is told how it goes.
      left: gives the commands of a cell that are not done when its turn comes;
        another study may have done some. None: all are.

    Raises:
      RestartError: asked to stop (SIGTERM, Ctrl-C); what ran has saved.
    """
    failed = {}
    free = list(range(len(self._slots)))
    guard = threading.Lock()

    def work(job: Job) -> None:
      if self._stopped.is_set():
        return
      with claimed(job) as ours:
        if not ours:
          states.set(job, ELSEWHERE)
          return
        if left is not None:
          with guard:
            job = dataclasses.replace(job, commands=left(job.name))
          if not job.commands:
            states.set(job, DONE)
            return
        with guard:
          slot = free.pop()
        environment, cores = self._slots[slot]
        states.set(job, RUNS)
        try:
          if cores:  # Of this thread, and so of the process that it starts.
            os.sched_setaffinity(0, cores)
          began = functools.partial(self._began, job)
          code = run(job, environment, began)
        finally:
          with guard:
            free.append(slot)
        if code and self._stopped.is_set():
          states.set(job, 'stopped')
        elif code:
          failed[job.name] = job.last_line()
          states.set(job, f'failed ({code}): {failed[job.name]}')
        else:
          states.set(job, DONE)

    with self._stopping(), states.shown():
      with concurrent.futures.ThreadPoolExecutor(len(self._slots)) as pool:
        done = [pool.submit(work, job) for job in jobs]
        for one in concurrent.futures.as_completed(done):
          one.result()
    if self._stopped.is_set():
      raise RestartError(
        'asked to stop; the cells that ran have saved, and the same command'
        ' goes on'
      )
    return failed

  def _began(self, job: Job, process: subprocess.Popen) -> None:
    self._processes[job.name] = process
    if self._stopped.is_set():  # asked to while it was being started
      process.send_signal(signal.SIGTERM)

  @contextlib.contextmanager
  def _stopping(self):
    """Hands SIGTERM and Ctrl-C on to the cells that run."""

    def stop(number, frame):
      self._stopped.set()
      for process in list(self._processes.values()):
        if process.poll() is None:
          process.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
      yield
      return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
      yield
    finally:
      for kind, handler in before.items():
        signal.signal(kind, handler)


class States:
  """What runs, what is done and when it ends: a live table, or lines."""

  def __init__(self, jobs: Sequence[Job], at_once: int, done: int = 0):
    self._jobs = jobs
    self._states = dict.fromkeys((job.name for job in jobs), WAITS)
    self._began: dict[str, float] = {}
    self._took: list[float] = []
    self._at_once = at_once
    self._done = done
    self._console = rich.console.Console(stderr=True)
    self._live = self._console.is_terminal
    self._guard = threading.Lock()

  def set(self, job: Job, state: str) -> None:
    with self._guard:
      self._states[job.name] = state
      now = time.monotonic()
      if state == RUNS:
        self._began[job.name] = now
      elif job.name in self._began:
        self._took.append(now - self._began.pop(job.name))
    if not self._live:
      left = self._left()
      now = datetime.datetime.now().strftime('%H:%M:%S')
      print(f'{now}  {job.name}  {state}  {left}', file=sys.stderr, flush=True)

  def found(self) -> list[str]:
    """The states, in the order of the jobs."""
    return list(self._states.values())

  def _left(self) -> str:
    """How far it is, and when it ends at this pace."""
    waiting = sum(state == WAITS for state in self._states.values())
    running = len(self._began)
    ended = sum(state == DONE for state in self._states.values())
    done = ended + self._done
    text = f'[{done}/{len(self._states) + self._done} done'
    if self._took:
      mean = sum(self._took) / len(self._took)
      passed = sum(time.monotonic() - t for t in list(self._began.values()))
      left = max(mean * (waiting + running) - passed, 0) / self._at_once
      end = datetime.datetime.now() + datetime.timedelta(seconds=left)
      text += f', about {duration(left)} left, until {end:%a %H:%M}'
    return text + ']'

  def __rich__(self) -> rich.table.Table:
    table = rich.table.Table('cell', 'state', 'time', caption=self._left())
    with self._guard:
      # As many as there is room for: what runs, then what is told of others.
      ranks = {RUNS: 0, WAITS: 2, DONE: 3}
      order = sorted(
        self._jobs, key=lambda job: ranks.get(self._states[job.name], 1)
      )
      for job in order[: max(self._console.height - 6, 5)]:
        began = self._began.get(job.name)
        took = '' if began is None else duration(time.monotonic() - began)
        state = self._states[job.name]
        if state == RUNS and job.steps()[1]:
          state = f'runs, {job.steps()[0]:,} steps'
        table.add_row(job.name, state, took)
    return table

  @contextlib.contextmanager
  def shown(self):
    if not self._live:
      yield
      return
    with rich.live.Live(self, console=self._console, refresh_per_second=1):
      yield


def on_slurm(
  jobs: Sequence[Job], folder: pathlib.Path, at_once: int, options: Mapping
) -> str:
  """Hands the cells to Slurm as one array; returns the jobs' numbers.

  submitit submits it, and submits a cell again whose time was over: that goes
  on from its checkpoint.

  Args:
    jobs: the cells.
    folder: of the study; gets submitit's logs.
    at_once: of the array's jobs.
    options: of submitit's `update_parameters`: timeout_min, gpus_per_node,
      slurm_partition and so on.

  Raises:
    UserError: submitit or Slurm is not there, or refuses.
  """
  try:
    import submitit
  except ImportError as error:
    raise UserError(
      '--executor=slurm needs submitit: pip install "prompt_tuning[slurm]"'
    ) from error
  try:
    executor = submitit.AutoExecutor(folder / '.slurm', cluster='slurm')
    executor.update_parameters(
      name='prompt_tuning_study', slurm_array_parallelism=at_once, **options
    )
    submitted = executor.map_array(OnSlurm(), jobs)
  except (RuntimeError, NameError, TypeError, ValueError) as error:
    raise UserError(
      f'Slurm cannot be given the cells: {str(error).splitlines()[0]}'
    ) from error
  return ', '.join(job.job_id for job in submitted)


class OnSlurm:
  """A cell as a job of Slurm."""

  def __call__(self, job: Job) -> int:
    with claimed(job) as ours:
      code = run(job) if ours else 0
    if code:
      raise RuntimeError(job.last_line())
    return code

  def checkpoint(self, job: Job):
    """What to submit when its time is over."""
    import submitit

    return submitit.helpers.DelayedSubmission(self, job)


def by_launcher(
  jobs: Sequence[Job], launcher: str, states: States
) -> dict[str, str]:
  """Starts each cell's training by a launcher, as those of scripts/launch.

  Args:
    jobs: the cells; their further evaluations are a later run's.
    launcher: a command that takes the arguments of `prompt-tuning train`. It
      is told the cell's name as NAME.
    states: is told how it goes.

  Returns:
    {name: last line} of those that it refused.
  """
  failed = {}
  for job in jobs:
    command, *words = job.commands[0]
    if command != 'train':
      states.set(job, 'waits for its runs')
      continue
    job.log.parent.mkdir(parents=True, exist_ok=True)
    name = ''.join(c if c.isalnum() else '-' for c in job.name.lower())[:50]
    with job.log.open('w') as log:
      try:
        code = subprocess.run(
          [*shlex.split(launcher), *words],
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
          env={**os.environ, 'NAME': name.strip('-')},
        ).returncode
      except OSError as error:
        raise UserError(
          f'--executor={launcher}: {error.strerror}; it takes local, slurm or'
          ' the command of a launcher'
        ) from error
    if code:
      failed[job.name] = job.last_line()
    states.set(job, f'failed ({code})' if code else LAUNCHED)
  return failed


def _share_of_cores(slot: int, slots: int) -> list[int] | None:
  """Cores of the CPU for one of several; where they are too few, all."""
  if not hasattr(os, 'sched_getaffinity') or slots == 1:
    return None
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < slots:
    return None
  return cores[slot::slots]


def _gpus() -> list[str]:
  """NVIDIA's GPUs that this process may use."""
  if (named := os.environ.get('CUDA_VISIBLE_DEVICES')) is not None:
    return [name for name in named.split(',') if name]
  return [
    str(number)
    for number, _ in enumerate(
      pathlib.Path('/proc/driver/nvidia/gpus').glob('*')
    )
  ]


def _share_of_gpus(
  gpus: Sequence[str], slot: int, slots: int
) -> dict[str, str]:
  if not gpus:
    return {}
  if slots > len(gpus):
    raise UserError(
      f'study.at_once {slots} is more than the {len(gpus)} GPU(s) here: a cell'
      ' takes one or more'
    )
  return {'CUDA_VISIBLE_DEVICES': ','.join(gpus[slot::slots])}
