"""From one task or model to another: which prompt to start from, and maps.

Similarity of tasks by their prompts and the choice of a source are SPoT's (Vu
et al. 2022, section 4), maps between models prompt recycling's (Lester et al.
2022, arXiv 2208.05577, section 3): both models have one vocabulary, and a
function that takes each piece's embedding in the old one near to that in the
new one is given the prompt.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np
import optax

from prompt_tuning.errors import UserError
from prompt_tuning.interop.formats import MAPS
from prompt_tuning.interop.formats import Map

Similarity = Literal['mean_rows', 'pairs']

# The recipe of the authors' run_recycle.py.
FIRST, PAIRS = 1000, 4000
_HIDDEN, _RATE, _BATCH, _EPOCHS = 4, 3e-4, 50, 25


def similarity(
  one: Float[np.ndarray, 'P E'],
  other: Float[np.ndarray, 'Q E'],
  by: Similarity = 'mean_rows',
) -> float:
  """How near two tasks are, by their prompts; lengths may differ.

  Args:
    one: a prompt.
    other: another one, of the same model.
    by: 'mean_rows', the cosine of the prompts' mean rows, or 'pairs', the mean
      cosine of all pairs of rows (SPoT's two, section 4.1).
  """
  if by == 'mean_rows':
    one, other = (x.mean(axis=0, keepdims=True) for x in (one, other))
  elif by != 'pairs':
    raise UserError(f"prompts are near by 'mean_rows' or 'pairs', got {by!r}")
  first, second = (
    x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    for x in (one, other)
  )
  return float(np.mean(first @ second.T))


def by_similarity(
  target: Float[np.ndarray, 'P E'],
  sources: Mapping[str, Float[np.ndarray, '_ E']],
  by: Similarity = 'mean_rows',
) -> list[tuple[str, float]]:
  """(name, similarity) of source prompts, the most similar first.

  Args:
    target: a prompt of the new task, which SPoT trains for a while.
    sources: by name.
    by: see `similarity`.
  """
  found = {name: similarity(target, rows, by) for name, rows in sources.items()}
  return sorted(found.items(), key=lambda entry: -entry[1])


def recycled(
  prompt: Float[np.ndarray, '*N E'],
  old: Float[np.ndarray, 'V E'],
  new: Float[np.ndarray, 'W F'],
  kind: Map = 'linear',
  words: Bool[np.ndarray, '_'] | None = None,
  first: int = FIRST,
  pairs: int = PAIRS,
) -> Float[np.ndarray, '*N F']:
  """A prompt of one model, mapped to another of the same vocabulary.

  Args:
    prompt: of the old model.
    old: its embeddings.
    new: the new model's; rows that only one of both has are left out.
    kind: 'linear', a matrix by least squares (the authors' v2v-lin); 'mlp', of
      one hidden layer of 4 F units and ReLU, trained by Adam (v2v-nn); or
      'lin_comb' (lin-comb): each row as a combination of old embeddings, of
      which the new ones are combined alike. With the smallest weights, by
      least squares, as the authors' are, it is 'linear' but for rounding:
      both take a prompt P to P pinv(old) new.
    words: which pieces the map is fitted on (`nearest_pieces.word_pieces`; the
      authors took English words); None: all.
    first: so many of these, the most common ones, are left out.
    pairs: so many are taken at most.

  Raises:
    UserError: there is nothing to fit it on.
  """
  if kind not in MAPS:
    raise UserError(f'a map is one of {", ".join(MAPS)}, got {kind!r}')
  if prompt.shape[-1] != old.shape[1]:
    raise UserError(
      f'the prompt has embed {prompt.shape[-1]}, the model that it was trained'
      f' on {old.shape[1]}: give that model'
    )
  rows = min(len(old), len(new))
  chosen = np.arange(rows) if words is None else np.flatnonzero(words[:rows])
  chosen = chosen[first : first + pairs]
  if not len(chosen):
    raise UserError(
      f'no pieces are left to fit the map on: {rows} rows are of both models,'
      f' the first {first} pieces are left out'
    )
  prompt = prompt.astype(np.float32)
  inputs, outputs = (np.asarray(x, np.float32)[chosen] for x in (old, new))
  if kind == 'linear':
    return prompt @ np.linalg.lstsq(inputs, outputs, rcond=None)[0]
  if kind == 'lin_comb':
    rows = prompt.reshape(-1, prompt.shape[-1])
    weights = np.linalg.lstsq(inputs.T, rows.T, rcond=None)[0]
    return (weights.T @ outputs).reshape(*prompt.shape[:-1], -1)
  return np.asarray(_mlp(inputs, outputs)(jnp.asarray(prompt)))


def _mlp(
  inputs: Float[np.ndarray, 'M E'], outputs: Float[np.ndarray, 'M F']
) -> Callable[[jax.Array], jax.Array]:
  """A fitted function of rows."""
  key = jax.random.key(0)
  sizes = (inputs.shape[1], _HIDDEN * outputs.shape[1], outputs.shape[1])
  kernel = jax.nn.initializers.lecun_normal()
  params = [
    (kernel(jax.random.fold_in(key, i), shape), jnp.zeros(shape[1:]))
    for i, shape in enumerate(zip(sizes, sizes[1:]))
  ]
  tx = optax.adam(_RATE)

  def apply(params, x):
    (w, b), (v, c) = params
    wide = (1,) * (x.ndim - 1) + (-1,)
    return jax.nn.relu(x @ w + b.reshape(wide)) @ v + c.reshape(wide)

  def step(carry, rows):
    params, state = carry

    def loss(params):
      errors = apply(params, inputs[rows]) - outputs[rows]
      return 0.5 * jnp.mean(jnp.square(errors))

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  inputs, outputs = jnp.asarray(inputs), jnp.asarray(outputs)
  size = min(_BATCH, len(inputs))
  # Each epoch in an order of its own; what fills no batch waits for another.
  rng = np.random.default_rng(0)
  orders = [rng.permutation(len(inputs)) for _ in range(_EPOCHS)]
  batches = [x[: len(x) // size * size].reshape(-1, size) for x in orders]
  run = jax.jit(lambda *carry: jax.lax.scan(step, carry, np.vstack(batches))[0])
  params, _ = run(params, tx.init(params))
  return functools.partial(apply, params)
