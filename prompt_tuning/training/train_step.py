"""One step of training, as a pure function."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from prompt_tuning.models import parameters
from prompt_tuning.models.model import Batch
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training.train_state import TrainState


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
    The new state, and the sums of `model.loss_fn` with norms and what methods
    add to the loss ('penalty').
  """
  rng = jax.random.fold_in(rng, state.step)
  use_dropout = model.config.dropout_rate > 0

  def loss_fn(trainable, part, weights, rng):
    variables = {**frozen, **trainable}
    rng = rng if use_dropout else None
    loss, sums = model.loss_fn(variables, part, rng, weights)
    penalty = _penalty(model, variables) / microbatches  # once a step
    return loss + penalty, {**sums, 'penalty': penalty}

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  whole = (batch, model.token_weights(batch))
  if microbatches == 1:
    (_, sums), grads = grad_fn(state.trainable, *whole, rng)
  else:
    # Part i has every m-th row from i on: each device splits rows of its own.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), whole
    )

    def add_part(total, part):
      (_, sums), grads = grad_fn(state.trainable, *part)
      return jax.tree.map(jnp.add, total, (sums, grads)), None

    parts = (*parts, jax.random.split(rng, microbatches))
    first = jax.tree.map(lambda x: x[0], parts)
    (_, shapes), grad_shapes = jax.eval_shape(grad_fn, state.trainable, *first)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), (shapes, grad_shapes)
    )
    (sums, grads), _ = jax.lax.scan(add_part, zeros, parts)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  trainable = _refreshed(model, frozen, trainable)
  metrics = {
    **sums,
    'gradient_norm': optax.tree.norm(grads),
    'update_norm': optax.tree.norm(updates),
    'trained_norm': optax.tree.norm(_trained(model, trainable)),
  }
  return TrainState(state.step + 1, trainable, opt_state), metrics


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
