"""The training loop: a base, a data source and settings in; a prompt out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import queue
import threading
import time
from typing import Any, Protocol, runtime_checkable

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.models.prompt import Prompt
from prompt_tuning.training import hosts
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training.checkpoints import BaseCheckpoint
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.checkpoints import fingerprint
from prompt_tuning.training.checkpoints import frozen_dtype as storage_dtype
from prompt_tuning.training.checkpoints import load_params
from prompt_tuning.training.reporting import MetricsWriter
from prompt_tuning.training.reporting import Progress
from prompt_tuning.training.sizing import Partitioner
from prompt_tuning.training.sizing import Workload
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import train_step


@runtime_checkable
class TrainData(Protocol):
  """A source of training batches (`data.TaskData`, `data.TokenArrayData`)."""

  batch_size: int
  vocabulary: str | None

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None,
    seed: int,
    start: int,
    rows: np.ndarray | None,
    num_shards: int,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, a function of seed, index and num_shards.

    Args:
      virtual_tokens: to be placed in the inputs.
      seed: of the order.
      start: batches to skip.
      rows: numbers of the rows of each batch that this process needs, and that
        are yielded; None: all.
      num_shards: parts that the data may be read in, so that a process reads
        only some; who reads single rows at will need not look at it.
    """

  def class_labels(self) -> Sequence[str] | None:
    """The task's labels, where it has a fixed set of them."""


@runtime_checkable
class Evaluation(Protocol):
  """Scores decoded text (`training.evaluator.Evaluation`)."""

  def build(self, model, virtual_tokens, output_dir, layout) -> Any:
    """An evaluator with `evaluate(variables, step) -> {'task/metric': x}`."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a run leaves, besides its files.

  Attributes:
    step: of the last update, base steps included.
    variables: trained collections: the best ones by `best_metric`, where that
      is given, else the last ones. numpy arrays; what is split over several
      processes stays a jax.Array.
    best_step: step of `variables`.
    metrics: the evaluation of `variables`, 'task/metric' -> value.
    interrupted: it was asked to stop (SIGTERM, Ctrl-C) before its last step.
  """

  step: int
  variables: dict
  best_step: int
  metrics: dict[str, float]
  interrupted: bool


def count_parameters(tree: Any) -> int:
  """Scalars in all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def load_base(
  model: EncoderDecoderModel,
  base: BaseCheckpoint,
  layout: partitioning.Layout,
  dtype: str,
) -> dict:
  """The base's parameters on the mesh, in the model's layout and `dtype`."""
  shapes = network.parameter_shapes(model.config)
  return load_params(base, shapes, dtype=dtype, shardings=layout.frozen(shapes))


def step_function(
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformation,
  learning_rate: float | optimizers.Schedule,
  rng: jax.Array,
  layout: partitioning.Layout,
  microbatches: int,
  shardings: Any,
) -> Callable:
  """`train_step`, jitted for a layout, with the learning rate in its metrics.

  A function (state, frozen, batch) -> (state, metrics); the state is donated,
  metrics are on every device. `shardings` are the state's.
  """

  def step(state, frozen, batch):
    rate = learning_rate
    if callable(rate):
      rate = rate(state.step)
    new_state, metrics = train_step(
      model, optimizer, state, frozen, batch, rng, microbatches=microbatches
    )
    metrics['learning_rate'] = jnp.asarray(rate, jnp.float32)
    return new_state, metrics

  return layout.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, layout.replicated),
  )


def state_shardings(layout: partitioning.Layout, state: TrainState) -> Any:
  """Where a state lives: prompts whole on every device, parameters split.

  What an optimiser keeps of a parameter's own shape is split as that is; its
  factored moments are small, and whole.

  Args:
    layout: of the run.
    state: arrays or their shapes.
  """
  split = {}
  if 'params' in state.trainable:
    params = state.trainable['params']
    split = {
      f'/params/{"/".join(key.key for key in path)}/': (leaf.shape, sharding)
      for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(layout.params(params)),
        strict=True,
      )
    }

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for parameter, (shape, sharding) in split.items():
      if parameter in f'/{name}/' and shape == leaf.shape:
        return sharding
    return layout.replicated

  return jax.tree_util.tree_map_with_path(place, state)


def train(
  *,
  model: EncoderDecoderModel,
  data: TrainData,
  model_dir: str | os.PathLike,
  base: BaseCheckpoint | None = None,
  prompt: Prompt | None = None,
  trained: Sequence[str] = ('prompt',),
  optimizer: Callable[..., optax.GradientTransformation] = optimizers.adafactor,
  learning_rate: float | optimizers.Schedule = 0.3,
  train_steps_relative: int | None = None,
  train_steps: int | None = None,
  seed: int = 0,
  microbatches: int = 1,
  frozen_dtype: str | None = None,
  partitioner: Partitioner | None = None,
  evaluation: Evaluation | None = None,
  eval_period: int = 500,
  validation_data: TrainData | None = None,
  validation_batches: int = 8,
  best_metric: str | None = None,
  best_mode: str | None = None,
  early_stopping_patience: int | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int = 2,
  log_period: int = 50,
  progress: bool = True,
  resolved_config: Callable[[], str] | None = None,
) -> TrainResult:
  """Trains the named collections of a model and keeps the best of them.

  The same call continues a run of which `model_dir` holds a checkpoint, bit for
  bit. SIGTERM or Ctrl-C lets the step end, saves and returns.

  Args:
    model: network, loss and decoding.
    data: training batches.
    model_dir: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `eval/`; a
      folder that all processes share, or gs://.
    base: the frozen (or starting) parameters; None starts from random ones,
      which only makes sense where 'params' is trained.
    prompt: the soft prompt; None trains a T5 without one.
    trained: variable collections that change: ('prompt',) is prompt tuning,
      ('params',) model tuning or pre-training.
    optimizer: takes `learning_rate` (and `initial_step`); any of optax's.
    learning_rate: a number or a function of the step, base steps included.
    train_steps_relative: updates of this run.
    train_steps: the step to end at, base steps included (T5X's TRAIN_STEPS).
      Exactly one of both is given.
    seed: of initialisation, data order and dropout.
    microbatches: parts of a batch whose gradients are added up.
    frozen_dtype: storage of frozen parameters; None: bfloat16 on accelerators,
      float32 on CPU. Trained parameters are float32.
    partitioner: how the devices of the job share the work; None: see
      `Partitioner`, which then chooses all by itself.
    evaluation: decodes and scores a task every `eval_period` steps.
    eval_period: updates between evaluations.
    validation_data: its loss is computed at each evaluation.
    validation_batches: how many batches of it.
    best_metric: a name of `evaluation` ('task/metric') or 'validation/loss';
      the checkpoint that is best by it is kept beside the latest ones.
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
  if best_mode is None:
    best_mode = 'min' if (best_metric or '').endswith('loss') else 'max'
  if best_mode not in ('max', 'min'):
    raise UserError(f"best_mode is {best_mode!r}; it takes 'max' or 'min'")
  if best_metric and evaluation is None and validation_data is None:
    raise UserError(
      f'best_metric {best_metric!r} needs an evaluation, and there is none'
    )
  if early_stopping_patience is not None and best_metric is None:
    raise UserError('early_stopping_patience needs a best_metric to watch')
  for name, value in {
    'eval_period': eval_period,
    'checkpoint_period': checkpoint_period,
    'log_period': log_period,
    'microbatches': microbatches,
    'validation_batches': validation_batches,
    'early_stopping_patience': early_stopping_patience or 1,
  }.items():
    if value < 1:
      raise UserError(f'{name} must be 1 or more, got {value}')
  _check(model, data, base, prompt, trained)
  lengths = dict(getattr(data, 'task_feature_lengths', {}))
  layout, reason = (partitioner or Partitioner()).layout(
    Workload(
      config=model.config,
      batch_size=data.batch_size,
      inputs_length=lengths.get('inputs', 512)
      + (prompt.length if prompt is not None else 0),
      targets_length=lengths.get('targets', 32),
      trained=tuple(trained),
      microbatches=microbatches,
      param_dtype=_param_dtype(trained, frozen_dtype),
    )
  )
  first_step = base.step if base is not None else 0
  last_step = _last_step(first_step, train_steps_relative, train_steps)
  model_dir = epath.Path(model_dir).expanduser()
  try:
    model_dir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'MODEL_DIR {model_dir} cannot be made: {error}') from error

  init_key, run_key = jax.random.split(jax.random.key(seed))
  variables = _initial_variables(
    model, data, base, prompt, trained, init_key, frozen_dtype, layout
  )
  run = _RunRecord(
    seed=seed,
    base=base.path if base is not None else 'random parameters',
    base_fingerprint=(
      base.fingerprint()
      if base is not None
      else fingerprint(variables['params'])
    ),
    task=getattr(data, 'mixture_or_task_name', None),
    task_feature_lengths=lengths,
    data_shards=getattr(data, 'num_shards', None)
    or layout.reading_parts(data.batch_size),
    placement=prompt.placement if prompt is not None else None,
    best_metric=best_metric,
  )
  frozen = {k: v for k, v in variables.items() if k not in trained}
  tx = optimizers.build_optimizer(optimizer, learning_rate, first_step)
  # Out of one compiled function: its outputs are buffers of their own, which
  # the first step may take over (`variables` goes).
  trainable = {name: variables.pop(name) for name in trained}
  create = functools.partial(
    TrainState.create, optimizer=tx, initial_step=first_step
  )
  shardings = state_shardings(layout, jax.eval_shape(create, trainable))
  state = jax.jit(create, out_shardings=shardings)(trainable)

  checkpoints = Checkpoints(
    model_dir / 'checkpoints',
    keep=keep_checkpoints,
    best_metric=best_metric,
    best_mode=best_mode,
  )
  resumed = checkpoints.latest_step()
  # Nobody goes on, and writes, before all have looked.
  found = -1 if resumed is None else resumed
  if hosts.agree(found) != found:
    raise UserError(
      f'MODEL_DIR {model_dir} is not the same folder for all processes: this'
      f' one finds its newest checkpoint at step {resumed}; give a folder that'
      ' all share, or gs://'
    )
  if resumed is not None:
    state, extra = checkpoints.restore(resumed, state)
    run = run.resume(extra, model_dir)
  step = int(state.step)

  step_fn = step_function(
    model,
    tx,
    learning_rate,
    run_key,
    layout,
    microbatches,
    shardings,
  )

  # What may be wrong with data comes to light before a file is touched.
  virtual_tokens = _virtual_tokens(model, prompt)
  evaluators = {}
  if validation_data is not None:
    evaluators['validation'] = _Validation(
      model, validation_data, virtual_tokens, validation_batches, layout
    )
  if evaluation is not None:
    evaluators['eval'] = evaluation.build(
      model, virtual_tokens, model_dir / 'eval', layout
    )
  data_batches = data.batches(
    virtual_tokens=virtual_tokens,
    seed=seed,
    start=run.position,
    rows=layout.rows(data.batch_size),
    num_shards=run.data_shards,
  )
  rows = model.config.vocab_size
  if virtual_tokens is not None:
    rows += virtual_tokens.num_prompts * virtual_tokens.length
  batches = _Prefetch(
    data_batches, functools.partial(_place, layout, data.batch_size, rows)
  )
  writer = MetricsWriter(model_dir, step, silent=not hosts.is_primary())
  show = Progress(
    last_step - first_step,
    step - first_step,
    silent=not (progress and hosts.is_primary()),
  )
  show.say(
    f'trained: {", ".join(trained)},'
    f' {count_parameters(state.trainable):,} parameters; frozen:'
    f' {count_parameters(frozen):,}; base {run.base} at step {first_step:,};'
    f' {layout.mesh.size} device(s), {jax.process_count()} process(es)'
    + (f'; resumed after {step - first_step:,} steps' if resumed else '')
  )
  show.say(reason)
  if resolved_config is not None and hosts.is_primary():
    (model_dir / 'config.gin').write_text(resolved_config())
  pending = None  # Metrics on the device, fetched one step late.
  clock = _Clock()
  ended = step >= last_step or run.stale(early_stopping_patience)
  with (
    hosts.StopSignal() as stop,
    _closing(batches, writer, checkpoints),
  ):
    while not ended and not stop.requested(step):
      batch, waited = batches.next()
      clock.add(batch, waited)
      with jax.transfer_guard('disallow'):
        state, metrics = step_fn(state, frozen, batch)
      step += 1
      run.position += 1
      done = step - first_step
      if pending is not None:
        _require_finite(pending, step - 1, checkpoints)
      pending = metrics
      ended = step == last_step

      if ended or done % log_period == 0:
        line = _summary(metrics, clock.take())
        writer.write(step, 'train', line)
        show.update(done, line)
      found = None
      if evaluators and (ended or done % eval_period == 0):
        _require_finite(metrics, step, checkpoints)
        variables = {**frozen, **state.trainable}
        found = {}
        for split, evaluator in evaluators.items():
          scores = evaluator.evaluate(variables, step)
          writer.write(step, split, scores)
          found |= scores
        show.say(
          f'step {done}  '
          + '  '.join(f'{name} {value:.4g}' for name, value in found.items())
        )
        if best_metric is not None and best_metric not in found:
          checkpoints.save(step, state, dataclasses.asdict(run), found)
          raise UserError(
            f'best_metric {best_metric!r} is not among the metrics of the'
            f' evaluation: {", ".join(sorted(found))}'
          )
        run.note(step, found, best_mode)
        ended |= run.stale(early_stopping_patience)
        clock.take()
      if ended or done % checkpoint_period == 0 or run.best_step == step:
        _require_finite(metrics, step, checkpoints)
        checkpoints.save(step, state, dataclasses.asdict(run), found)
    if not ended and pending is not None:
      _require_finite(pending, step, checkpoints)
      checkpoints.save(step, state, dataclasses.asdict(run))
    if not ended:
      show.say(
        f'stopped after {step - first_step} of {last_step - first_step} steps;'
        ' the same command continues'
      )
    elif step < last_step:
      show.say(
        f'stopped early after {step - first_step} steps: {best_metric} has not'
        f' improved for {early_stopping_patience} evaluations, since step'
        f' {run.best_step - first_step}'
      )
    best = step if run.best_step is None else run.best_step
    if best != step:
      state, _ = checkpoints.restore(best, state)
    return TrainResult(
      step=step,
      variables=jax.tree.map(_on_host, state.trainable),
      best_step=best,
      metrics=run.best_metrics,
      interrupted=not ended,
    )


def _on_host(array: jax.Array) -> np.ndarray | jax.Array:
  if array.is_fully_addressable or array.is_fully_replicated:
    return jax.device_get(array)
  return array


def _param_dtype(trained, frozen_dtype) -> str:
  return 'float32' if 'params' in trained else storage_dtype(frozen_dtype)


def _virtual_tokens(model, prompt) -> VirtualTokens | None:
  if prompt is None:
    return None
  return VirtualTokens(
    first_id=model.config.vocab_size,
    length=prompt.length,
    num_prompts=prompt.num_prompts,
    placement=prompt.placement,
  )


def _initial_variables(
  model, data, base, prompt, trained, key, frozen_dtype, layout
) -> dict[str, dict]:
  """All collections of the network at step 0 of this run, on the mesh."""
  params_key, prompt_key = jax.random.split(key)
  if base is None:
    shapes = network.parameter_shapes(model.config)
    params = jax.jit(model.init_params, out_shardings=layout.params(shapes))(
      params_key
    )
  else:
    params = load_base(model, base, layout, _param_dtype(trained, frozen_dtype))
  if prompt is None:
    return {'params': params}
  encode = None
  if data.vocabulary is not None:
    encode = load_vocabulary(data.vocabulary).encode
  labels = data.class_labels() or ()
  start = jax.jit(
    lambda key, embedding: prompt.init(
      key, embedding, encode=encode, labels=labels
    ),
    out_shardings=layout.replicated,
  )(prompt_key, params['token_embedder']['embedding'])
  return {'params': params, 'prompt': start}


def _check(model, data, base, prompt, trained):
  """Contradictions that would only show after minutes."""
  known = {'params': True, 'prompt': prompt is not None}
  for name in trained:
    if not known.get(name):
      needs = ' (bind train.prompt)' if name == 'prompt' else ''
      raise UserError(
        f'trained names {name!r}, the model has'
        f' {[k for k, v in known.items() if v]}{needs}'
      )
  if not trained:
    raise UserError("trained is empty; it takes 'prompt', 'params' or both")
  if base is None and 'params' not in trained:
    raise UserError(
      'a frozen model needs trained parameters: give INITIAL_CHECKPOINT_PATH'
    )
  if data.vocabulary is not None:
    size = load_vocabulary(data.vocabulary).size
    if size > model.config.vocab_size:
      raise UserError(
        f'vocabulary {data.vocabulary} has {size} pieces, the model has'
        f' vocab_size {model.config.vocab_size}; give the vocabulary that'
        ' the base was trained with'
      )


def _last_step(first_step, relative, absolute):
  if (relative is None) == (absolute is None):
    raise UserError(
      'give either TRAIN_STEPS_RELATIVE (updates of this run) or TRAIN_STEPS'
      " (the base checkpoint's steps included)"
    )
  last = first_step + relative if absolute is None else absolute
  if last <= first_step:
    raise UserError(
      f"TRAIN_STEPS {last} is not beyond the base checkpoint's step"
      f" {first_step}; it counts the base's steps too, TRAIN_STEPS_RELATIVE"
      " counts this run's alone"
    )
  return last


def _place(layout, batch_size: int, rows: int, batch) -> dict[str, jax.Array]:
  """The batch on the mesh, if the network has a row for every id."""
  largest = int(batch['encoder_input_tokens'].max())
  if largest >= rows:
    raise UserError(
      f'the data has id {largest}, the model embeds ids below {rows}; give the'
      ' vocabulary of the model'
    )
  return layout.shard_batch(batch, batch_size)


@dataclasses.dataclass
class _RunRecord:
  """What a checkpoint remembers of its run besides the state."""

  seed: int
  base: str
  base_fingerprint: str
  task: str | None = None
  task_feature_lengths: dict[str, int] = dataclasses.field(default_factory=dict)
  placement: str | None = None
  best_metric: str | None = None
  data_shards: int = 1  # Parts that the data are read in.
  position: int = 0  # Batches consumed.
  best_step: int | None = None
  best_value: float | None = None
  best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  evaluations_since_best: int = 0

  def resume(self, extra: Mapping[str, Any], model_dir) -> '_RunRecord':
    """The record of an earlier start of this same run."""
    for name, called in (
      ('seed', 'seed'),
      ('base_fingerprint', 'base (its fingerprint)'),
      ('task', 'task'),
      ('placement', 'placement'),
      ('best_metric', 'best_metric'),
    ):
      if extra[name] != getattr(self, name):
        raise UserError(
          f'MODEL_DIR {model_dir} holds a run with another {called}:'
          f' {extra[name]}, this one has {getattr(self, name)}; choose'
          ' another MODEL_DIR'
        )
    names = {field.name for field in dataclasses.fields(self)}
    kept = {k: v for k, v in extra.items() if k in names}
    return _RunRecord(**kept | {'base': self.base})

  def note(self, step, found, mode):
    """Takes the evaluation at `step` into account."""
    if self.best_metric is None:
      self.best_metrics = dict(found)
      return
    value = found[self.best_metric]
    sign = 1 if mode == 'max' else -1
    if math.isfinite(value) and (
      self.best_value is None or sign * value > sign * self.best_value
    ):
      self.best_step, self.best_value = step, value
      self.best_metrics = dict(found)
      self.evaluations_since_best = 0
    else:
      self.evaluations_since_best += 1

  def stale(self, patience: int | None) -> bool:
    return patience is not None and self.evaluations_since_best >= patience


class _Prefetch:
  """Makes the next batches in a thread while the devices work."""

  def __init__(self, batches: Iterator, place: Callable, ahead: int = 2):
    self._queue = queue.Queue(ahead)
    self._closed = threading.Event()

    def fill():
      try:
        for batch in batches:
          item = (place(batch), None)
          while not self._closed.is_set():
            try:
              self._queue.put(item, timeout=0.1)
              break
            except queue.Full:
              continue
          if self._closed.is_set():
            return
        raise UserError('the training data ended; it must repeat')
      except BaseException as error:  # Raised again where `next` is called.
        self._queue.put((None, error))

    self._thread = threading.Thread(target=fill, daemon=True)
    self._thread.start()

  def next(self) -> tuple[dict[str, jax.Array], float]:
    """A batch, and the seconds it was waited for."""
    start = time.monotonic()
    batch, error = self._queue.get()
    if error is not None:
      raise error
    return batch, time.monotonic() - start

  def close(self):
    self._closed.set()
    while not self._queue.empty():
      self._queue.get_nowait()
    self._thread.join(timeout=5)


class _Clock:
  """Counts what went through between two lines of metrics."""

  def __init__(self):
    self.take()

  def add(self, batch, waited: float):
    self._examples += batch['encoder_input_tokens'].shape[0]
    self._tokens += sum(
      batch[name].size
      for name in ('encoder_input_tokens', 'decoder_target_tokens')
    )
    self._waited += waited

  def take(self) -> dict[str, float]:
    """Rates since the last call; tokens are counted with their padding."""
    now = time.monotonic()
    rates = {}
    if hasattr(self, '_start'):
      passed = max(now - self._start, 1e-9)
      rates = {
        'examples_per_second': self._examples / passed,
        'tokens_per_second': self._tokens / passed,
        'input_wait_share': self._waited / passed,
      }
    self._start, self._examples, self._tokens, self._waited = now, 0, 0, 0.0
    return rates


def _require_finite(metrics, step, checkpoints):
  # The norm is that of the state which is about to be saved or trained on.
  checked = jax.device_get((metrics['loss'], metrics['trained_norm']))
  if not np.isfinite(checked).all():
    last = checkpoints.latest_step()
    kept = (
      'no checkpoint was saved yet'
      if last is None
      else (f'the checkpoint of step {last} is kept')
    )
    raise UserError(
      f'the loss or update is not finite at step {step}; {kept}; lower the'
      ' learning rate or look at the data'
    )


def _per_token(sums) -> dict[str, float]:
  tokens = max(float(sums['tokens']), 1.0)
  return {
    'loss_per_token': float(sums['cross_entropy']) / tokens,
    'accuracy': float(sums['correct']) / tokens,
  }


def _summary(metrics, rates) -> dict[str, float]:
  metrics = jax.device_get(metrics)
  kept = (
    'loss',
    'z_loss',
    'tokens',
    'learning_rate',
    'gradient_norm',
    'update_norm',
    'trained_norm',
  )
  values = {name: float(metrics[name]) for name in kept}
  return _per_token(metrics) | values | rates


class _Validation:
  """Mean loss per token of a few fixed batches."""

  def __init__(self, model, data, virtual_tokens, num_batches, layout):
    if data.batch_size % layout.batch_shards:
      raise UserError(
        f'the validation data have batch_size {data.batch_size}, which the'
        f' {layout.batch_shards} devices that share a batch do not divide'
      )
    batches = data.batches(
      virtual_tokens=virtual_tokens,
      seed=0,
      start=0,
      rows=layout.rows(data.batch_size),
      num_shards=getattr(data, 'num_shards', None) or 1,
    )
    self._batches = [
      layout.shard_batch(next(batches), data.batch_size)
      for _ in range(num_batches)
    ]
    self._sums = layout.jit(
      lambda variables, batch: model.loss_fn(variables, batch)[1],
      out_shardings=layout.replicated,
    )

  def evaluate(self, variables, step: int) -> dict[str, float]:
    del step
    sums = [
      jax.device_get(self._sums(variables, batch)) for batch in self._batches
    ]
    total = _per_token(jax.tree.map(lambda *x: sum(x), *sums))
    return {
      'validation/loss': total['loss_per_token'],
      'validation/accuracy': total['accuracy'],
    }


@contextlib.contextmanager
def _closing(*things):
  """Closes all of them, whatever happens."""
  with contextlib.ExitStack() as stack:
    for thing in things:
      stack.callback(thing.close)
    yield
