"""The training loop: a base, a data source and methods in; their arrays out.

`train` reads as its phases: settings are checked, variables are made, the run
is resumed if it was begun, steps are taken, and files are written.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import optax

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import batches as batches_lib
from prompt_tuning.training import best as best_lib
from prompt_tuning.training import checks
from prompt_tuning.training import hosts
from prompt_tuning.training import optimizers
from prompt_tuning.training import reporting
from prompt_tuning.training import setup
from prompt_tuning.training import stepping
from prompt_tuning.training import trained as trained_lib
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.evaluator import Evaluation
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.run_lock import RunLock
from prompt_tuning.training.run_record import RunRecord
from prompt_tuning.training.train_state import TrainState

# Lester et al. 2021, section 3.
PAPERS_OPTIMIZER = functools.partial(
  optimizers.adafactor,
  multiply_by_parameter_scale=False,
  weight_decay_rate=1e-5,
)


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a run leaves.

  Attributes:
    step: of the last update, base steps included.
    variables: trained collections: the best ones by `best_metric`, where that
      is given, else the last ones. numpy arrays; what is split over several
      processes stays a jax.Array.
    best_step: step of `variables`.
    metrics: the evaluation of `variables`, 'task/metric' -> value.
    interrupted: it was asked to stop (SIGTERM, Ctrl-C) before its last step.
    files: what was written of the methods, in MODEL_DIR/<collection>; of T5's
      own parameters nothing but checkpoints.
  """

  step: int
  variables: dict
  best_step: int
  metrics: dict[str, float]
  interrupted: bool
  files: list[str]


def train(
  *,
  data: batches_lib.TrainData,
  model_dir: str | os.PathLike,
  model: EncoderDecoderModel | None = None,
  base: BaseCheckpoint | None = None,
  methods: Sequence[Method] = (Prompt(),),
  optimizer: Callable[..., optax.GradientTransformation] = PAPERS_OPTIMIZER,
  learning_rate: float | optimizers.Schedule = 0.3,
  train_steps_relative: int | None = None,
  train_steps: int | None = None,
  seed: int = 0,
  microbatches: int | None = None,
  row_lengths: Sequence[int] | None = None,
  frozen_dtype: str | None = None,
  partitioner: Partitioner | None = None,
  evaluation: Evaluation | None = None,
  eval_period: int = 500,
  validation_data: batches_lib.TrainData | None = None,
  validation_batches: int = 8,
  best_metric: str | None = best_lib.SCORE,
  best_mode: str | None = None,
  early_stopping_patience: int | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int = 2,
  log_period: int = 50,
  progress: bool = True,
  resolved_config: Callable[[], str] | None = None,
) -> TrainResult:
  """Trains the arrays of methods and keeps the best of them.

  The same call continues a run of which `model_dir` holds a checkpoint, bit for
  bit. SIGTERM or Ctrl-C lets the step end, saves and returns.

  Args:
    data: training batches.
    model_dir: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `eval/` and
      in the end `result.json` and a folder of files for each method; a folder
      that all processes share, or gs://.
    model: network, loss and decoding; None: the base's own network.
    base: T5's parameters, frozen or to start from; None starts from random
      ones, which only makes sense where they are trained.
    methods: what is trained: a prompt, other methods, `ModelTuning` for all of
      T5's own parameters; several at once, virtual tokens in one of them.
    optimizer: takes `learning_rate` (and `initial_step`); any of optax's. The
      default is the paper's for prompts: no parameter scaling, decay 1e-5.
    learning_rate: a number or a function of the step, counted from the start of
      this run.
    train_steps_relative: updates of this run.
    train_steps: the step to end at, base steps included (T5X's TRAIN_STEPS).
      Exactly one of both is given.
    seed: of initialisation, data order and dropout.
    microbatches: parts of a batch whose gradients are added up; None: as many
      as it takes, of about a thousand tokens on a CPU, and elsewhere as few as
      fit the memory. But for rounding (and what dropout draws) they change
      nothing.
    row_lengths: what encoder rows are padded to, virtual tokens included: each
      to the least of these that holds it, or to the full length. None: a few
      that fit the data (see `slices`), (): the full length alone. They change
      as little.
    frozen_dtype: storage of frozen parameters; None: bfloat16 on accelerators,
      float32 on CPU. 'int8' rounds kernels (see `models.quantization`). What
      is trained is float32.
    partitioner: how the devices of the job share the work; None: see
      `Partitioner`, which then chooses all by itself.
    evaluation: decodes and scores a task every `eval_period` steps.
    eval_period: updates between evaluations.
    validation_data: its loss is computed at each evaluation.
    validation_batches: how many batches of it.
    best_metric: a name of `evaluation` ('task/metric', or 'score', its task's
      own) or 'validation/loss'; the checkpoint that is best by it is kept
      beside the latest ones. Without an evaluation 'score' is None: the last.
    best_mode: 'max' or 'min'; None: 'min' for a loss, 'max' for all else.
    early_stopping_patience: evaluations without a better value after which
      the run ends; None: never.
    checkpoint_period: updates between checkpoints.
    keep_checkpoints: latest checkpoints kept.
    log_period: updates between lines of metrics.
    progress: shows progress on stderr.
    resolved_config: gives the text of MODEL_DIR/config.gin; None writes none.

  Raises:
    UserError: settings contradict each other or the base, or the loss is no
      longer finite.
  """
  if best_metric == best_lib.SCORE and evaluation is None:
    best_metric = None
  selection = best_lib.Selection(
    best_metric, best_mode, early_stopping_patience
  )
  if evaluation is None and validation_data is None:
    selection.require_nothing()
  periods = {
    'eval_period': eval_period,
    'checkpoint_period': checkpoint_period,
    'log_period': log_period,
  }
  checks.positive(
    **periods,
    microbatches=1 if microbatches is None else microbatches,
    validation_batches=validation_batches,
  )
  checks.seed_in_range(seed)
  if model is None:
    if base is None:
      raise UserError('train needs a model, or a base to know it by')
    model = EncoderDecoderModel(base.config())
  virtual_tokens = setup.virtual_tokens_of(methods, model.config)
  checks.settings(model, data, base, methods, learning_rate)
  first_step = base.step if base is not None else 0
  last_step = checks.last_step(first_step, train_steps_relative, train_steps)
  model_dir = setup.made(model_dir)
  model = dataclasses.replace(model, methods=tuple(methods))
  layout, reason, parts = setup.layout(
    model, data, partitioner, frozen_dtype, microbatches
  )
  silent = not hosts.is_primary()
  show = reporting.Progress(silent=silent or not progress)

  with contextlib.ExitStack() as stack:
    lock = stack.enter_context(RunLock(model_dir))
    checkpoints = stack.enter_context(
      Checkpoints(model_dir / 'checkpoints', keep=keep_checkpoints)
    )
    # What may be wrong with data comes to light before weights are read.
    show.say('reading the data')
    evaluators = setup.evaluators(
      model,
      virtual_tokens,
      layout,
      model_dir / 'eval',
      validation_data,
      validation_batches,
      evaluation,
    )
    checks.metric_is_measured(selection, evaluators)
    show.say(f'reading the base {base.path}' if base else 'drawing the base')
    start = setup.begin(
      model,
      data,
      base,
      layout,
      checkpoints,
      model_dir,
      seed=seed,
      selection=selection,
      optimizer=optimizer,
      learning_rate=learning_rate,
      microbatches=parts,
      frozen_dtype=frozen_dtype,
      evaluation=evaluation,
      validation_data=validation_data,
      validation_batches=validation_batches,
    )
    prefetch, shapes = stepping.prefetched(
      data,
      model,
      virtual_tokens,
      start.record,
      layout,
      microbatches,
      parts,
      row_lengths,
    )
    stack.callback(prefetch.close)
    writer = reporting.MetricsWriter(
      model_dir, int(start.state.step), silent=silent
    )
    stack.callback(writer.close)
    run = _Run(
      state=start.state,
      frozen=start.frozen,
      record=start.record,
      step_fn=start.step_fn,
      evaluators=evaluators,
      checkpoints=checkpoints,
      writer=writer,
      show=show,
      first_step=first_step,
      last_step=last_step,
      trained=start.trained,
      patience=selection.patience,
      **periods,
    )
    padding = stepping.padding(shapes, parts)
    made = f'attention: {model.config.attention}'
    run.announce(layout, (reason, made, padding, lock.remark), start)
    if resolved_config is not None and hosts.is_primary():
      with files.replacing(model_dir / 'config.gin') as file:
        file.write(resolved_config())
    with hosts.StopSignal() as stop:
      run.take_steps(prefetch, stop)
      return run.result(model_dir)


@dataclasses.dataclass
class _Run:
  """A run that is under way."""

  state: TrainState
  frozen: Mapping[str, Any]
  record: RunRecord
  step_fn: Callable[..., Any]
  evaluators: Mapping[str, Any]
  checkpoints: Checkpoints
  writer: reporting.MetricsWriter
  show: reporting.Progress
  first_step: int
  last_step: int
  trained: int
  patience: int | None
  eval_period: int
  checkpoint_period: int
  log_period: int
  step: int = 0
  ended: bool = False

  def __post_init__(self):
    self.started = time.monotonic()
    reporting.source_commit()  # files may change while it runs
    self.step = int(self.state.step)
    self.ended = self.step >= self.last_step or self._stale()

  def _stale(self) -> bool:
    return self.record.best.stale(self.patience)

  def _due(self, period: int) -> bool:
    return self.ended or (self.step - self.first_step) % period == 0

  def announce(
    self, layout, remarks: Sequence[str], start: setup.Start
  ) -> None:
    frozen = reporting.count_parameters(self.frozen)
    done = self.step - self.first_step
    self.show.begin(self.last_step - self.first_step, done)
    self.show.say(
      f'trained: {", ".join(self.state.trainable)},'
      f' {self.trained:,} parameters; frozen:'
      f' {frozen:,}; base {self.record.base} at step'
      f' {self.first_step:,}; {layout.mesh.size} device(s),'
      f' {jax.process_count()} process(es)'
      + ('' if start.resumed is None else f'; resumed after {done} steps')
    )
    for remark in filter(None, remarks):
      self.show.say(remark)
    if not self.ended:
      self.show.say('compiling the step')

  def take_steps(self, batches: batches_lib.Prefetch, stop) -> None:
    """Updates until the last step, or until the run is to end or to stop."""
    clock = reporting.Clock()
    pending = None  # Metrics on the device, fetched one step late.
    while not self.ended and not stop.requested(self.step):
      batch, waited = batches.next()
      clock.add(batch, waited)
      with jax.transfer_guard('disallow'):
        self.state, metrics = self.step_fn(
          self.state, self.frozen, batch.content
        )
      self.step += 1
      self.record.position += 1
      if pending is not None:
        self._require_finite(pending, self.step - 1)
      pending = metrics
      self.ended = self.step == self.last_step
      if self._due(self.log_period):
        line = reporting.summary(metrics, clock.take())
        self.writer.write(self.step, 'train', line)
        self.show.update(self.step - self.first_step, line)
      found = None
      if self.evaluators and self._due(self.eval_period):
        self._require_finite(metrics, self.step)
        found = self._evaluate()
        self.ended |= self._stale()
        clock.take()
      is_best = self.record.best.step == self.step
      if self._due(self.checkpoint_period) or is_best:
        self._require_finite(metrics, self.step)
        self._save(found)
    if not self.ended and pending is not None:
      self._require_finite(pending, self.step)
      self._save()

  def _evaluate(self) -> dict[str, float]:
    variables = {**self.frozen, **self.state.trainable}
    found = {}
    for split, evaluator in self.evaluators.items():
      scores = evaluator.evaluate(variables, self.step)
      self.writer.write(self.step, split, scores)
      found |= scores
    values = '  '.join(f'{name} {value:.4g}' for name, value in found.items())
    self.show.say(f'step {self.step - self.first_step}  {values}')
    try:
      self.record.best.note(self.step, found)
    except UserError:
      self._save(found)  # What was learnt so far is no part of the fault.
      raise
    return found

  def _save(self, found: Mapping[str, float] | None = None) -> None:
    record = dataclasses.asdict(self.record)
    self.checkpoints.save(self.step, self.state, record, found)

  def _require_finite(self, metrics, step: int) -> None:
    # The norm is that of the state which is about to be saved or trained on.
    checked = jax.device_get((metrics['loss'], metrics['trained_norm']))
    if not np.isfinite(checked).all():
      last = self.checkpoints.latest_step()
      kept = (
        'no checkpoint was saved yet'
        if last is None
        else (f'the checkpoint of step {last} is kept')
      )
      raise UserError(
        f'the loss or update is not finite at step {step}; {kept}; lower the'
        ' learning rate or look at the data'
      )

  def _facts(self, best_step: int) -> dict[str, Any]:
    """Of the run that ended, for `reporting.write_result`."""
    record, count = self.record, reporting.count_parameters
    return {
      'base': record.base,
      'base_fingerprint': record.base_fingerprint,
      'base_step': self.first_step,
      'task': record.task,
      'seed': record.seed,
      'methods': record.methods,
      'steps': self.step - self.first_step,
      'best_step': best_step - self.first_step,
      'best_metric': record.best.metric,
      'metrics': record.best.metrics,
      'trained_parameters': self.trained,
      'frozen_parameters': count(self.frozen),
      'seconds': time.monotonic() - self.started,
    }

  def result(self, model_dir: epath.Path) -> TrainResult:
    """Says how it ended, writes the methods' files, gives the best arrays."""
    best = self.record.best
    steps, done = self.last_step - self.first_step, self.step - self.first_step
    if not self.ended:
      self.show.say(
        f'stopped after {done} of {steps} steps; the same command continues'
      )
    elif self.step < self.last_step:
      since = 0 if best.step is None else best.step - self.first_step
      self.show.say(
        f'stopped early after {done} steps: {best.metric} has not improved for'
        f' {self.patience} evaluations, since step {since}'
      )
    best_step = self.step if best.step is None else best.step
    if best_step != self.step:
      self.state, _ = self.checkpoints.restore(best_step, self.state)
    if self.ended and hosts.is_primary():
      reporting.write_result(model_dir, self._facts(best_step))
    return TrainResult(
      step=self.step,
      variables=jax.tree.map(_on_host, self.state.trainable),
      best_step=best_step,
      metrics=best.metrics,
      interrupted=not self.ended,
      files=_write_files(model_dir, best_step) if self.ended else [],
    )


def _write_files(model_dir: epath.Path, step: int) -> list[str]:
  """Files of all that was trained but T5 itself, whose home is a checkpoint."""
  written = []
  if hosts.is_primary():
    for one in trained_lib.of_run(model_dir, step):
      if not one.is_base:
        folder = model_dir / one.method.collection
        written += trained_lib.save_trained(folder, one)
  hosts.wait_for_all('files of methods')
  return [str(file) for file in written]


def _on_host(array: jax.Array) -> np.ndarray | jax.Array:
  if array.is_fully_addressable or array.is_fully_replicated:
    return jax.device_get(array)
  return array
