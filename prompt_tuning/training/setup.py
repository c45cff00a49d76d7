"""What a run does before its first step: variables, state, record, data."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import os
from typing import Any

from etils import epath
import jax
import optax

import prompt_tuning
from prompt_tuning import files
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.models import attention
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import batches as batches_lib
from prompt_tuning.training import best as best_lib
from prompt_tuning.training import checks
from prompt_tuning.training import hosts
from prompt_tuning.training import identity
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training import stepping
from prompt_tuning.training.base import FROZEN_DTYPES
from prompt_tuning.training.base import STATED
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import fingerprint
from prompt_tuning.training.base import storage_dtype
from prompt_tuning.training.base import untold
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.evaluator import Evaluation
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.mesh_choice import Workload
from prompt_tuning.training.run_record import RunRecord
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.validation import Validation


def virtual_tokens_of(
  methods: Sequence[Method], config: network.T5Config
) -> VirtualTokens | None:
  """The virtual tokens of the one method that has some.

  Raises:
    UserError: several have, two methods are of one collection, or one cannot
      stand beside others.
  """
  collections = [method.collection for method in methods]
  for name in collections:
    if collections.count(name) > 1:
      raise UserError(f'two methods share the collection {name!r}; give one')
  found = {
    method.collection: tokens
    for method in methods
    if (tokens := method.virtual_tokens(config)) is not None
  }
  if len(found) > 1:
    raise UserError(
      f'{" and ".join(found)} both put virtual tokens among the inputs; give'
      ' one of them'
    )
  others = [n for n in collections if n != parameters.PARAMS]
  for method in methods:
    if method.reads_weights and len(others) > 1:
      raise UserError(
        f"{method.collection} computes with T5's own weights, past what"
        f' {", ".join(n for n in others if n != method.collection)} make of'
        ' them; give it alone'
      )
  return next(iter(found.values()), None)


def made(model_dir: str | os.PathLike) -> epath.Path:
  """The folder of a run, made if need be."""
  model_dir = files.place(model_dir)
  try:
    model_dir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'MODEL_DIR {model_dir} cannot be made: {error}') from error
  return model_dir


def layout(
  model: EncoderDecoderModel,
  data: batches_lib.TrainData,
  partitioner: Partitioner | None,
  frozen_dtype: str | None,
  microbatches: int | None,
) -> tuple[partitioning.Layout, str, int]:
  """Where a run's arrays live, why there, and the microbatches it takes."""
  lengths = data.feature_lengths
  if isinstance(data, batches_lib.Packs):
    virtual_tokens = virtual_tokens_of(model.methods, model.config)
    lengths = {**lengths, 'targets': data.targets_length(virtual_tokens)}
  workload = Workload.of(
    model.config,
    model.methods,
    lengths,
    param_dtype=storage_dtype(frozen_dtype, FROZEN_DTYPES),
    batch_size=data.batch_size,
    microbatches=microbatches,
  )
  found, reason = (partitioner or Partitioner()).layout(workload)
  made = model.config.attention
  if not attention.runs_on(made, found.platform):
    raise UserError(
      f'T5Config.attention={made} does not run on {found.platform}; formula'
      ' does, and computes the same'
    )
  return found, reason, workload.parts(found, mesh_choice.memory_of_job())


def variables(
  model: EncoderDecoderModel,
  data: batches_lib.TrainData,
  base: BaseCheckpoint | None,
  key: jax.Array,
  frozen_dtype: str | None,
  layout: partitioning.Layout,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Trained and frozen collections at step 0 of this run, and their axes."""
  params_key, methods_key = jax.random.split(key)
  collections = {method.collection for method in model.methods}
  trains_base = parameters.PARAMS in collections
  if base is None:
    shapes = network.parameter_shapes(model.config)
    params = jax.jit(model.init_params, out_shardings=layout.params(shapes))(
      params_key
    )
  else:
    params = base.load(
      model.config, layout, dtype=frozen_dtype, trained=trains_base
    )
  encode = None
  if data.vocabulary is not None:
    encode = load_vocabulary(data.vocabulary).encode
  text = TaskText(encode, data.class_labels() or ())
  trainable, axes = {}, {}
  for number, method in enumerate(model.methods):
    name = method.collection
    if name == parameters.PARAMS:
      axes[name], trainable[name] = method.axes(params), params
      continue
    key = methods_key
    if number:
      key = jax.random.fold_in(methods_key, number)
    init = functools.partial(method.init, text=text)
    shapes = jax.eval_shape(init, key, params)
    axes[name] = method.axes(shapes)
    shardings = layout.shardings(axes[name], shapes)
    trainable[name] = jax.jit(init, out_shardings=shardings)(key, params)
  frozen = {} if trains_base else {parameters.PARAMS: params}
  return trainable, frozen, axes


def rates_of(
  methods: Sequence[Method], trainable: Mapping[str, Any]
) -> dict[str, float]:
  """{'collection/path': `Method.rate`} of their arrays, or of their shapes."""
  return {
    f'{method.collection}/{path}': float(method.rate(path))
    for method in methods
    for path in parameters.flatten(trainable[method.collection])
  }


def count_trained(
  trainable: Mapping[str, Any], rates: Mapping[str, float]
) -> int:
  """Parameters that updates change, of arrays or their shapes (`rates_of`)."""
  arrays = parameters.flatten(trainable)
  return sum(array.size for path, array in arrays.items() if rates[path] > 0)


@dataclasses.dataclass
class Start:
  """A run before its first step, or where it goes on.

  Attributes:
    state: on its devices.
    frozen: collections that are not trained.
    record: of the run.
    step_fn: (state, frozen, content of a batch) -> (state, metrics).
    trained: how many parameters are trained.
    resumed: the checkpoint that it goes on from; None: it begins.
  """

  state: TrainState
  frozen: dict[str, Any]
  record: RunRecord
  step_fn: Callable[..., Any]
  trained: int
  resumed: int | None


def begin(
  model: EncoderDecoderModel,
  data: batches_lib.TrainData,
  base: BaseCheckpoint | None,
  layout: partitioning.Layout,
  checkpoints: Checkpoints,
  model_dir: epath.Path,
  *,
  seed: int,
  selection: best_lib.Selection,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: float | optimizers.Schedule,
  microbatches: int,
  frozen_dtype: str | None,
  **evaluations: Any,
) -> Start:
  """Reads or draws the variables, and the run's last checkpoint if it has one.

  Args are those of `train`; `evaluations` decide which step is the best.
  """
  first_step = base.step if base is not None else 0
  init_key, run_key = jax.random.split(jax.random.key(seed))
  trainable, frozen, axes = variables(
    model, data, base, init_key, frozen_dtype, layout
  )
  record = run_record(
    model,
    data,
    base,
    trainable,
    seed,
    selection,
    layout,
    # Its rate is told by itself, those of methods among theirs.
    optimizer=optimizers.build_optimizer(optimizer, 0.0, first_step, axes),
    learning_rate=learning_rate,
    frozen_dtype=storage_dtype(frozen_dtype, FROZEN_DTYPES),
    **evaluations,
  )
  rates = rates_of(model.methods, trainable)
  tx = optimizers.build_optimizer(
    optimizer, learning_rate, first_step, axes, rates
  )
  trained = count_trained(trainable, rates)
  state, shardings = first_state(trainable, tx, first_step, layout, axes)
  del trainable  # the first step takes their buffers over
  checks.disk_has_room(model_dir, state)
  resumed = resumed_step(checkpoints, model_dir)
  if resumed is not None:
    record = record.resumed(checkpoints.extra(resumed), model_dir)
    state, _ = checkpoints.restore(resumed, state)
  how = (model, tx, learning_rate, run_key, layout)
  whole = stepping.step_function(*how, microbatches, shardings, first_step)
  sliced = stepping.SlicedStep(*how, shardings, first_step)

  def step_fn(state, frozen, content):
    step = sliced if isinstance(content, list) else whole
    return step(state, frozen, content)

  return Start(state, frozen, record, step_fn, trained, resumed)


def run_record(
  model: EncoderDecoderModel,
  data: batches_lib.TrainData,
  base: BaseCheckpoint | None,
  trainable: Mapping[str, Any],
  seed: int,
  selection: best_lib.Selection,
  layout: partitioning.Layout,
  **settings: Any,
) -> RunRecord:
  """The record of a run that begins; `settings` are further ones of `train`."""
  facts: dict[str, Any] = {}
  digests: dict[str, Any] = {'batch size': data.batch_size}
  if isinstance(data, batches_lib.Described):
    facts = dict(data.facts())
    digests |= {'data': data, 'data files': data.digest()}
  if data.vocabulary is not None:
    vocabulary = load_vocabulary(data.vocabulary)
    facts['vocabulary'] = data.vocabulary
    facts['vocabulary_digest'] = digests['vocabulary'] = vocabulary.digest
  evaluation = settings.get('evaluation')
  if isinstance(evaluation, Evaluation):
    digests['evaluation files'] = evaluation.task.digest(evaluation.split)
  methods = {method.collection: method for method in model.methods}
  if parameters.PARAMS in methods and (unsaid := untold(model.config)):
    facts[STATED] = json.dumps(unsaid)
  return RunRecord(
    seed=seed,
    base=base.path if base is not None else 'random parameters',
    base_fingerprint=(
      base.fingerprint()
      if base is not None
      else fingerprint(trainable[parameters.PARAMS])
    ),
    task=data.name,
    feature_lengths=dict(data.feature_lengths),
    methods={name: method.settings() for name, method in methods.items()},
    settings=identity.describe(
      {
        'model': dataclasses.replace(model, methods=()),
        'methods': methods,
        **settings,
        **digests,
      }
    ),
    versions={
      'prompt_tuning': prompt_tuning.__version__,
      'jax': jax.__version__,
      'optax': optax.__version__,
    },
    facts=facts,
    data_shards=data.num_shards or layout.reading_parts(data.batch_size),
    best=best_lib.Best(selection.metric, selection.mode),
  )


def state_shardings(
  layout: partitioning.Layout, state: TrainState, axes: Mapping[str, Any]
) -> Any:
  """Where a state lives: as the methods' axes say.

  What an optimiser keeps of an array's own shape is split as that is; its
  factored moments are small, and whole.

  Args:
    layout: of the run.
    state: arrays or their shapes.
    axes: {collection: `Method.axes`}.
  """
  split = {}
  for collection, arrays in state.trainable.items():
    shardings = layout.shardings(axes[collection], arrays)
    for path, sharding in parameters.flatten(shardings).items():
      shape = parameters.flatten(arrays)[path].shape
      split[f'/{collection}/{path}/'] = (shape, sharding)

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for parameter, (shape, sharding) in split.items():
      if parameter in f'/{name}/' and shape == leaf.shape:
        return sharding
    return layout.replicated

  return jax.tree_util.tree_map_with_path(place, state)


def first_state(
  trainable: dict[str, Any],
  tx: optax.GradientTransformation,
  first_step: int,
  layout: partitioning.Layout,
  axes: Mapping[str, Any],
) -> tuple[TrainState, Any]:
  """The state at the start, and its shardings."""
  create = functools.partial(
    TrainState.create, optimizer=tx, initial_step=first_step
  )
  shapes = jax.eval_shape(create, trainable)
  shardings = state_shardings(layout, shapes, axes)
  # Out of one compiled function: its outputs are buffers of their own.
  return jax.jit(create, out_shardings=shardings)(trainable), shardings


def resumed_step(
  checkpoints: Checkpoints, model_dir: str | os.PathLike
) -> int | None:
  """The checkpoint to go on from, the same one in all processes."""
  resumed = checkpoints.newest_unchanged_step()
  # Nobody goes on, and writes, before all have looked.
  found = -1 if resumed is None else resumed
  if hosts.agree(found) != found:
    raise UserError(
      f'MODEL_DIR {model_dir} is not the same folder for all processes: this'
      f' one finds its newest checkpoint at step {resumed}; give a folder that'
      ' all share, or gs://'
    )
  return resumed


def evaluators(
  model: EncoderDecoderModel,
  virtual_tokens: VirtualTokens | None,
  layout: partitioning.Layout,
  output_dir: epath.Path,
  validation_data: batches_lib.TrainData | None,
  validation_batches: int,
  evaluation: Any,
) -> dict[str, Any]:
  """What evaluates, by the split that its metrics are written under."""
  found = {}
  if validation_data is not None:
    found['validation'] = Validation(
      model, validation_data, virtual_tokens, validation_batches, layout
    )
  if evaluation is not None:
    found['eval'] = evaluation.build(model, virtual_tokens, output_dir, layout)
  return found
