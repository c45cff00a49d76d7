"""What a run steps with: batches, whole or in slices, and programs for them."""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import batches as batches_lib
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import optimizers
from prompt_tuning.training import partitioning
from prompt_tuning.training import slices
from prompt_tuning.training.run_record import RunRecord
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import gradients
from prompt_tuning.training.train_step import train_step
from prompt_tuning.training.train_step import update
from prompt_tuning.training.train_step import zeros


def step_function(
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformation,
  learning_rate: float | optimizers.Schedule,
  rng: jax.Array,
  layout: partitioning.Layout,
  microbatches: int,
  shardings: Any,
  first_step: int = 0,
) -> Callable:
  """`train_step`, jitted for a layout, with the learning rate in its metrics.

  A function (state, frozen, batch) -> (state, metrics); the state is donated,
  metrics are on every device. `shardings` are the state's.
  """

  def step(state, frozen, batch):
    rate = _rate(learning_rate, state.step - first_step)
    new_state, metrics = train_step(
      model, optimizer, state, frozen, batch, rng, microbatches=microbatches
    )
    return new_state, {**metrics, 'learning_rate': rate}

  return layout.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, layout.replicated),
  )


class SlicedStep:
  """`step_function` of a batch that is in slices of several shapes.

  A function for each shape adds a slice's gradients up, another one takes the
  update; where the batch is one slice, a function does both.
  """

  def __init__(
    self,
    model: EncoderDecoderModel,
    optimizer: optax.GradientTransformation,
    learning_rate: float | optimizers.Schedule,
    rng: jax.Array,
    layout: partitioning.Layout,
    shardings: Any,
    first_step: int = 0,
  ):
    def of_part(trainable, step, frozen, part):
      key = jax.random.fold_in(rng, step)
      key = jax.random.fold_in(key, part.number)
      return gradients(model, trainable, frozen, part.batch, part.weights, key)

    def add(total, *part):
      return jax.tree.map(jnp.add, total, of_part(*part))

    def finish(state, frozen, total):
      rate = _rate(learning_rate, state.step - first_step)
      state, metrics = update(model, optimizer, state, frozen, total)
      return state, {**metrics, 'learning_rate': rate}

    def at_once(state, frozen, part):
      total = of_part(state.trainable, state.step, frozen, part)
      return finish(state, frozen, total)

    summed = (layout.replicated, shardings.trainable)
    stepped = (shardings, layout.replicated)
    self._add = layout.jit(add, donate_argnums=0, out_shardings=summed)
    self._finish = layout.jit(finish, donate_argnums=0, out_shardings=stepped)
    self._at_once = layout.jit(at_once, donate_argnums=0, out_shardings=stepped)
    self._of_part, self._summed = of_part, summed
    self._zeros: Callable[[], Any] | None = None

  def __call__(
    self, state: TrainState, frozen: Any, parts: Sequence[batches_lib.Part]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    if len(parts) == 1:
      return self._at_once(state, frozen, parts[0])
    given = (state.trainable, state.step, frozen)
    if self._zeros is None:
      shapes = jax.eval_shape(self._of_part, *given, parts[0])
      self._zeros = jax.jit(
        functools.partial(zeros, shapes), out_shardings=self._summed
      )
    total = self._zeros()
    for part in parts:
      total = self._add(total, *given, part)
    return self._finish(state, frozen, total)


def _rate(
  learning_rate: float | optimizers.Schedule, step: jax.Array
) -> jax.Array:
  """The learning rate of a step of this run."""
  rate = learning_rate(step) if callable(learning_rate) else learning_rate
  return jnp.asarray(rate, jnp.float32)


def prefetched(
  data: batches_lib.TrainData,
  model: EncoderDecoderModel,
  virtual_tokens: VirtualTokens | None,
  record: RunRecord,
  layout: partitioning.Layout,
  microbatches: int | None,
  parts: int,
  row_lengths: Sequence[int] | None,
) -> tuple[batches_lib.Prefetch, slices.Shapes | None]:
  """The run's batches from where it stands, on their way to the devices.

  Args:
    data: its own.
    model: likewise.
    virtual_tokens: likewise.
    record: of the run; learns what the rows' lengths are.
    layout: of the run.
    microbatches: as `train` was given them.
    parts: as many as it takes.
    row_lengths: see `train`.

  Returns:
    The batches, and the shapes of their slices; None: they are whole.
  """

  def batches_of(rows):
    return data.batches(
      virtual_tokens=virtual_tokens,
      seed=record.seed,
      start=record.position,
      rows=rows,
      num_shards=record.data_shards,
    )

  rows = model.config.vocab_size
  if virtual_tokens is not None:
    rows += virtual_tokens.num_prompts * virtual_tokens.length
  batches = shapes = None
  if row_lengths != ():
    # Slices are cut out of the whole batch, so every process reads all of it.
    how = (layout, data.batch_size, microbatches, parts, row_lengths)
    batches, shapes = sliced(batches_of(None), record, *how)
  if batches is None or shapes is None and jax.process_count() > 1:
    batches = batches_of(layout.rows(data.batch_size))
  place = functools.partial(
    batches_lib.placed,
    layout=layout,
    batch_size=data.batch_size,
    rows=rows,
    shapes=shapes,
    token_weights=model.token_weights,
  )
  return batches_lib.Prefetch(batches, place), shapes


def padding(shapes: slices.Shapes | None, parts: int) -> str:
  """How the run's rows are padded, in a line."""
  if shapes is not None:
    return str(shapes)
  return f'rows are padded to their full length, in {parts} microbatch(es)'


# Rows, and batches at most, that are looked at before shapes are chosen.
_SAMPLE_ROWS, _SAMPLE_BATCHES = 512, 32


def sliced(
  batches: Iterator[Any],
  record: RunRecord,
  layout: partitioning.Layout,
  batch_size: int,
  microbatches: int | None,
  parts: int,
  row_lengths: Sequence[int] | None,
) -> tuple[Iterator[Any], slices.Shapes | None]:
  """The batches, from the first on, and the shapes of their slices.

  A sample of the first rows' lengths goes into the record, so that a run that
  goes on has the shapes it began with. On a CPU, where `microbatches` are not
  given, a slice has twice `CPU_TOKENS` at most for each device that shares it;
  elsewhere it has the rows of a microbatch.
  """
  seen = [next(batches)]
  longest = seen[0]['encoder_input_tokens'].shape[1]
  full_targets = seen[0]['decoder_target_tokens'].shape[1]
  if batch_size * longest <= slices.SMALL:
    return itertools.chain(seen, batches), None
  if record.lengths is None:
    count = min(-(-_SAMPLE_ROWS // batch_size), _SAMPLE_BATCHES)
    seen += itertools.islice(batches, count - 1)
    record.lengths = slices.histogram(
      np.concatenate([one['encoder_input_tokens'] for one in seen]),
      np.concatenate([one['decoder_target_tokens'] for one in seen]),
    )
  rows, tokens = batch_size // parts, None
  if microbatches is None and layout.on_cpu:
    rows = batch_size
    tokens = 2 * mesh_choice.CPU_TOKENS * layout.batch_shards
  shapes = slices.choose(
    slices.drawn(record.lengths, batch_size),
    longest,
    rows=rows,
    tokens=tokens,
    multiple=layout.batch_shards,
    targets=slices.of_targets(record.lengths, full_targets),
    lengths=row_lengths,
  )
  batches = itertools.chain(seen, batches)
  return batches, None if shapes.lengths == (longest,) else shapes
