"""One step of training, as a pure function."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from prompt_tuning.models import parameters
from prompt_tuning.models.model import Batch
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training.train_state import TrainState

# Sums for metrics, and gradients of the trained collections.
Gradients = tuple[dict[str, Float[Array, '']], dict[str, dict]]


def gradients(
  model: EncoderDecoderModel,
  trainable: Mapping[str, dict],
  frozen: Mapping[str, dict],
  part: Batch,
  weights: Float[Array, 'B L'],
  rng: jax.Array,
) -> Gradients:
  """What a part of a batch adds to a step.

  Args:
    model: its loss is minimised.
    trainable: the collections that gradients are taken of.
    frozen: the others.
    part: some rows of the batch.
    weights: `model.token_weights` of the whole batch, for these rows.
    rng: key of the part's dropout.
  """
  if model.config.dropout_rate == 0:
    rng = None

  def loss_fn(trainable):
    variables = {**frozen, **trainable}
    return model.loss_fn(variables, part, rng, weights, penalties=True)

  grads, sums = jax.grad(loss_fn, has_aux=True)(dict(trainable))
  return sums, grads


def update(
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Mapping[str, dict],
  total: Gradients,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """The optimiser's update for what all parts of a batch added up to.

  Returns:
    The new state, and the sums with norms and what methods add to the loss
    ('penalty').
  """
  sums, grads = total
  penalty, penalty_grads = jax.value_and_grad(
    lambda trainable: _penalty(model, {**frozen, **trainable})
  )(state.trainable)
  grads = jax.tree.map(jnp.add, grads, penalty_grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  trainable = _refreshed(model, frozen, trainable)
  metrics = {
    **sums,
    'penalty': sums.get('penalty', 0.0) + penalty,
    'gradient_norm': optax.tree.norm(grads),
    'update_norm': optax.tree.norm(updates),
    'trained_norm': optax.tree.norm(_trained(model, trainable)),
  }
  return TrainState(state.step + 1, trainable, opt_state), metrics


def train_step(
  model: EncoderDecoderModel,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Mapping[str, dict],
  batch: Batch,
  rng: jax.Array,
  *,
  microbatches: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """Gradient of the trained collections alone, and the optimiser's update.

  Args:
    model: its loss is minimised.
    optimizer: an optax transformation.
    state: step, trained collections, optimiser state.
    frozen: the collections that are not trained; they are only read.
    batch: B examples; B divides by `microbatches`.
    rng: key of this run; dropout of step n uses `fold_in(rng, n)`.
    microbatches: the batch is taken in so many parts, one after the other,
      whose gradients are added. The loss's normaliser is the whole batch's, so
      without dropout the number of parts changes nothing but rounding.

  Returns:
    See `update`.
  """
  rng = jax.random.fold_in(rng, state.step)
  whole = (batch, model.token_weights(batch))
  if microbatches == 1:
    total = gradients(model, state.trainable, frozen, *whole, rng)
  else:
    # Part i has every m-th row from i on: each device splits rows of its own.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), whole
    )

    def add_part(total, part):
      found = gradients(model, state.trainable, frozen, *part)
      return jax.tree.map(jnp.add, total, found), None

    parts = (*parts, jax.random.split(rng, microbatches))
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(
      functools.partial(gradients, model), state.trainable, frozen, *first
    )
    total, _ = jax.lax.scan(add_part, zeros(shapes), parts)
  return update(model, optimizer, state, frozen, total)


def zeros(shapes: Any) -> Any:
  """Arrays of these shapes, to add to."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _penalty(
  model: EncoderDecoderModel, variables: Mapping[str, dict]
) -> Float[Array, '']:
  """What the methods add to the loss."""
  total = jnp.zeros((), jnp.float32)
  for method in model.methods:
    params = variables[parameters.PARAMS]
    penalty = method.penalty(variables[method.collection], params)
    total += 0.0 if penalty is None else penalty
  return total


def _trained(
  model: EncoderDecoderModel, trainable: Mapping[str, dict]
) -> list[jax.Array]:
  """The arrays that gradients change."""
  return [
    array
    for method in model.methods
    for path, array in parameters.flatten(
      trainable.get(method.collection, {})
    ).items()
    if method.rate(path) != 0
  ]


def _refreshed(
  model: EncoderDecoderModel,
  frozen: Mapping[str, dict],
  trainable: Mapping[str, dict],
) -> dict[str, dict]:
  """The arrays after an update, with those that methods make of the others."""
  refreshed = dict(trainable)
  params = {**frozen, **trainable}.get(parameters.PARAMS, {})
  for method in model.methods:
    if arrays := trainable.get(method.collection):
      refreshed[method.collection] = arrays | method.refreshed(arrays, params)
  return refreshed
