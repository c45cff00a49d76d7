"""The engines of benchmark_runs.py, and what measures them in a process.

A new engine is a function that does the `Work` and tells the `Meter` of steps
and checkpoints, and an entry of ENGINES. Before an engine runs nothing but the
standard library is imported.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.util
import os
import pathlib
import resource
import runpy
import statistics
import sys
import time
import types
from typing import Any
from unittest import mock

TASK = 'benchmark'
BASE_STEP = 1_100_000  # where public checkpoints stand after LM adaptation


@dataclasses.dataclass
class Work:
  """What every engine is to do; shapes in rows and ids.

  Attributes:
    steps: after the first one.
    shared: folder with base checkpoint, prompt to start from and vocabulary.
    model_dir: of this run.
    reads: this run is to say what is read, not how long it takes.
    started: when its process was started, time.time().
  """

  model: str
  batch: int
  inputs: int
  prompt: int
  targets: int
  microbatches: int
  steps: int
  sources: str | None
  shared: str
  model_dir: str = ''
  reads: bool = False
  started: float = 0.0

  @property
  def lengths(self) -> dict[str, int]:
    return {'inputs': self.inputs, 'targets': self.targets}

  @property
  def clones(self) -> list[str]:
    return [
      f'{self.sources}/{name}' for name in ('prompt-tuning', 'flaxformer')
    ]

  def file(self, name: str) -> str:
    return f'{self.shared}/{name}'


class Meter:
  """The figures of this process; an engine tells it of steps and saves."""

  def __init__(self, work: Work):
    self.work = work
    self.figures: dict[str, Any] = {}
    self._ends: list[tuple[float, float]] = []  # of steps: time, CPU time
    self._compiled: dict[str, dict[str, float]] = {}
    self._opened: set[str] = set()
    self._ran: set[str] = set()
    if work.reads:
      sys.addaudithook(self._note_opened)

  def watch_jax(self) -> None:
    """Notes what JAX compiles from now on."""
    import jax

    jax.monitoring.register_event_duration_secs_listener(self._note_compiled)

  def timed(self, step: Callable) -> Callable:
    """A jitted step -> (state, metrics) that is waited for."""
    import jax

    def call(*args):
      state, metrics = jax.block_until_ready(step(*args))
      self._ends.append((time.time(), time.process_time()))
      if len(self._ends) == 1:
        loss = getattr(metrics['loss'], 'total', metrics['loss'])  # T5X's
        self.figures['first_loss'] = float(jax.device_get(loss))
      return state, metrics

    return call

  def traced(self, step: Callable) -> Callable:
    """The step before it is jitted; notes whose code runs in it."""

    @functools.wraps(step)
    def call(*args, **settings):
      if self.work.reads:
        note = lambda frame, *_: self._ran.add(frame.f_code.co_filename)
        sys.setprofile(note)
      try:
        return step(*args, **settings)
      finally:
        sys.setprofile(None)

    return call

  def saved(self, since: float, *patterns: str) -> None:
    """A checkpoint is on disk, in these places of MODEL_DIR."""
    self.figures['checkpoint_s'] = time.time() - since
    self.figures['checkpoint_kb'] = sum(
      file.stat().st_size / 1e3
      for pattern in patterns
      for file in pathlib.Path(self.work.model_dir).glob(f'{pattern}/**/*')
      if file.is_file()
    )

  def result(self, own: Sequence[str]) -> dict[str, Any]:
    backend = lambda parts: parts.get('backend_compile', 0)
    step = max(self._compiled.values(), key=backend, default={})
    unit = 1e6 if sys.platform == 'darwin' else 1e3
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    figures = self.figures | {
      'startup_s': self._ends[0][0] - self.work.started,
      'compile_s': sum(step.values()),
      'peak_mb': memory,
    }
    if not self.work.reads:
      for name, ends in zip(('', 'cpu_'), zip(*self._ends)):
        steps = [1e3 * (b - a) for a, b in zip(ends, ends[1:])]
        figures[f'step_{name}ms'] = statistics.median(steps)
        figures[f'steps_{name}ms'] = steps
      return figures
    folders = tuple(
      f'{place}/'
      for name in own
      for place in importlib.util.find_spec(name).submodule_search_locations
    )
    gin = [_lines(file) for file in self._opened if os.path.isfile(file)]
    ran = sorted(file for file in self._ran if file.startswith(folders))
    python = [_lines(file, comments=True) for file in ran]
    figures |= {'gin_files': len(gin), 'gin_lines': sum(gin), 'files': ran}
    return figures | {'python_files': len(ran), 'python_lines': sum(python)}

  def _note_opened(self, event: str, args: tuple[Any, ...]) -> None:
    if event == 'open' and args[1] == 'r' and str(args[0]).endswith('.gin'):
      self._opened.add(os.path.realpath(args[0]))

  def _note_compiled(self, event: str, seconds: float, **facts: Any) -> None:
    if '/core/compile/' in event and 'fun_name' in facts:
      name = facts['fun_name'].removeprefix('jit(').removesuffix(')')
      part = event.rpartition('/')[2].removesuffix('_duration')
      parts = self._compiled.setdefault(name, {})
      parts[part] = parts.get(part, 0) + seconds


def _lines(file: str, comments: bool = False) -> int:
  lines = [line.strip() for line in open(file)]
  return sum(comments or line[:1] not in ('', '#') for line in lines)


# Engines. Each does the work in a process of its own.


def register_task(work: Work) -> None:
  """A seqio task of full rows of ids."""
  import numpy as np
  import seqio
  import tensorflow as tf

  rng = np.random.default_rng(0)
  rows = {
    name: rng.integers(3, 8000, (16 * work.batch, length), np.int32)
    for name, length in work.lengths.items()
  }
  vocabulary = seqio.SentencePieceVocabulary(work.file('spiece.model'))
  seqio.TaskRegistry.add(
    TASK,
    seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: (
        tf.data.Dataset.from_tensor_slices(rows)
      ),
      splits=('train',),
    ),
    preprocessors=[],
    output_features=dict.fromkeys(rows, seqio.Feature(vocabulary)),
  )


def ours(work: Work, meter: Meter, as_it_comes: bool = False) -> None:
  """`prompt-tuning train`."""
  from prompt_tuning import cli
  from prompt_tuning.training import checkpoints
  from prompt_tuning.training import stepping

  meter.watch_jax()
  register_task(work)
  typed = [
    *(f'models/{work.model}', 'prompts/from_file', 'runs/prompt_tune'),
    f'INITIAL_CHECKPOINT_PATH={work.file(f"checkpoint_{BASE_STEP}")}',
    f'VOCABULARY={work.file("spiece.model")}',
    f'PROMPT_FILE={work.file("prompt.npy")}',
    f'MIXTURE_OR_TASK_NAME={TASK}',
    f'TASK_FEATURE_LENGTHS={work.lengths}',
    f'PROMPT_LENGTH={work.prompt}',
    f'BATCH_SIZE={work.batch}',
    f'TRAIN_STEPS_RELATIVE={work.steps + 1}',
    f'MODEL_DIR={work.model_dir}',
    'T5Config.dtype=float32',
    *([] if as_it_comes else [f'train.microbatches={work.microbatches}']),
  ]
  meter.figures['typed'] = len(typed)
  made, save = stepping.step_function, checkpoints.Checkpoints.save

  def timed_save(*args):
    start = time.time()
    save(*args)
    meter.saved(start, 'checkpoints/*')

  stepping.train_step = meter.traced(stepping.train_step)
  stepping.step_function = lambda *args: meter.timed(made(*args))
  checkpoints.Checkpoints.save = timed_save
  measuring = ['train.evaluation=None', 'TaskData.shuffle=False']
  if code := cli.main(['train', *typed, *measuring]):
    raise SystemExit(code)


def by_t5x(work: Work, meter: Meter, place: str, paths: Sequence[str]) -> None:
  """T5X's own train, with the gin files in `place` of the search paths."""
  from t5x import checkpoints
  from t5x import trainer

  meter.watch_jax()
  register_task(work)
  files = (f'models/{work.model}_prompt', 'prompts/from_file')
  files = [f'{place}/{file}.gin' for file in (*files, 'runs/prompt_finetune')]
  vocabulary = 'seqio.SentencePieceVocabulary.sentencepiece_model_file'
  typed = {
    'INITIAL_CHECKPOINT_PATH': work.file(f'checkpoint_{BASE_STEP}'),
    vocabulary: work.file('spiece.model'),
    'PROMPT_FILE': work.file('prompt.npy'),
    'MIXTURE_OR_TASK_NAME': TASK,
    'TASK_FEATURE_LENGTHS': work.lengths,
    'PROMPT_LENGTH': work.prompt,
    'BATCH_SIZE': work.batch,
    'TRAIN_STEPS': BASE_STEP + work.steps + 1,
    'MODEL_DIR': work.model_dir,
    'DROPOUT_RATE': 0.0,
    'ACTIVATION_DTYPE': 'float32',
    'USE_CACHED_TASKS': False,
    'trainer.Trainer.num_microbatches': work.microbatches,
  }
  meter.figures['typed'] = len(files) + len(typed)
  measuring = {
    'train.train_eval_dataset_cfg': None,
    'train.infer_eval_dataset_cfg': None,
    'train/utils.DatasetConfig.shuffle': False,
  }
  compile_train = trainer.Trainer.compile_train
  manager = checkpoints.OrbaxCheckpointManagerInterface
  save, finish = manager.save, manager.wait_until_finished
  started = []

  def timed_train(self, batch):
    compile_train(self, batch)
    self._compiled_train_step = meter.timed(self._compiled_train_step)

  def timed_save(*args):
    started.append(time.time())
    return save(*args)

  def timed_finish(self):
    finish(self)
    places = ('checkpoint_*', 'numpy_checkpoints/checkpoint_*')
    meter.saved(started[-1], *places)

  trainer.train_with_lr = meter.traced(trainer.train_with_lr)
  trainer.Trainer.compile_train = timed_train
  manager.save, manager.wait_until_finished = timed_save, timed_finish
  settings = (typed | measuring).items()
  sys.argv[1:] = [f'--gin_search_paths={",".join(paths)}']
  sys.argv += [f'--gin_file={file}' for file in files]
  sys.argv += [f'--gin.{name}={value!r}' for name, value in settings]
  try:
    runpy.run_module('t5x.train', run_name='__main__', alter_sys=True)
  except SystemExit as end:
    if end.code:
      raise


def t5x(work: Work, meter: Meter) -> None:
  """T5X with this package's network, methods and gin files."""
  from prompt_tuning import gin_files

  by_t5x(work, meter, 't5x', [f'{gin_files.configs_folder()}'])


def upstream(work: Work, meter: Meter) -> None:
  """The public prompt tuning on T5X, with Flaxformer."""
  by_t5x(work, meter, 'prompt_tuning/configs', work.clones)


def find_upstream(work: Work) -> None:
  """Puts the clones first, and in place what they import and is gone."""
  sys.path[:0] = work.clones
  for name in ('aqt', 'aqt.jax_legacy', 'aqt.jax_legacy.jax'):
    sys.modules[name] = mock.MagicMock(__path__=[])
  empty = {'MultiOptimizer': object, 'OptimizerDef': object}
  sys.modules['flax.optim'] = types.SimpleNamespace(**empty)


@dataclasses.dataclass(frozen=True)
class Engine:
  """A way to do the work.

  Attributes:
    run: does it, and tells the meter of each step and of checkpoints.
    needs: modules without which it is not installed.
    own: packages that are read to understand it.
    find: makes them importable.
  """

  run: Callable[[Work, Meter], None]
  needs: tuple[str, ...]
  own: tuple[str, ...]
  find: Callable[[Work], None] = lambda work: None


PACKAGE = ('prompt_tuning',)
ENGINES = {
  'ours': Engine(ours, ('prompt_tuning.training',), PACKAGE),
  'ours_as_it_comes': Engine(
    functools.partial(ours, as_it_comes=True),
    *(('prompt_tuning.training',), PACKAGE),
  ),
  't5x': Engine(t5x, ('t5x', 'prompt_tuning.interop'), ('t5x', *PACKAGE)),
  'upstream': Engine(
    upstream,
    ('t5x', 'flaxformer', 'prompt_tuning.train', 'chex'),
    ('t5x', 'flaxformer', *PACKAGE),
    find_upstream,
  ),
}
