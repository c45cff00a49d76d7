"""Sampling and beam search over any next-token function with a cache.

Both searches have one shape: `inputs` [B, L] says how far to go and what to
begin with, `cache` is the state of the decoder, and
`tokens_to_logits(ids int32 [B * N, 1], cache) -> (logits [B * N, V], cache)`
takes one step. N sequences are decoded per example; those of example b stand
at rows b * N ... b * N + N - 1. Both return the N sequences of each example
from worst to best, without the start id, and their scores, as T5X does.

Forced prefix. `inputs[:, 0]` is the start id (0 for T5). What follows it, up to
the first padding or EOS, is repeated in the output before decoding is free, and
adds nothing to the score. `inputs` of zeros decodes from scratch.

Length. The first EOS ends a sequence, and only padding (0) follows it. Id 0 has
a logit too: before EOS it is a token like any other, is fed back to the decoder
and counted in the score, as in T5X. So where a sequence ends is told by EOS,
never by the first 0; a sequence without EOS is L tokens long. (Scoring such a
sequence as targets gives another number: there, 0 is hidden from attention.)

Cache. A pytree in which every array has the examples at `cache_batch_axis` (0,
or 1 where layers are scanned and stacked in front); leaves called `cache_index`
are counters that all sequences share, and are left alone.

Examples do not influence each other, but sampling draws one block of random
numbers per step: a draw depends on the key and on the example's row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from prompt_tuning.errors import UserError

Cache = Any  # a pytree of arrays, Flax's collection 'cache'
TokensToLogits = Callable[[Array, Cache], tuple[Array, Cache]]

NEG_INF = -1e7  # T5X's; finite, so that masked scores never make a NaN
MIN_TEMPERATURE = 1e-4  # at or below it, decoding is greedy (T5X)


def repeat_for_decodes(cache: Cache, num_decodes: int, axis: int = 0) -> Cache:
  """Gives each of B examples N rows: batch axis B -> B * N, copies adjacent."""
  return _map_rows(lambda x: jnp.repeat(x, num_decodes, axis=axis), cache)


def gather_beams(
  cache: Cache, parents: Int[Array, 'B N'], axis: int = 0
) -> Cache:
  """Row n of example b becomes a copy of that example's row parents[b, n]."""
  batch, num_decodes = parents.shape

  def pick(rows, index):
    return jnp.take(rows, index, axis=axis, mode='clip')

  # Within an example only: where examples are sharded, nothing is sent around.
  def gather(array):
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    beams = array.reshape(*before, batch, num_decodes, *after)
    beams = jax.vmap(pick, in_axes=(axis, 0), out_axes=axis)(beams, parents)
    return beams.reshape(array.shape)

  return _map_rows(gather, cache)


def restrict_logits(
  logits: Float[Array, 'B V'], topk: int = 0, topp: float = 0.0
) -> Float[Array, 'B V']:
  """Sets to NEG_INF what top-k or top-p sampling never draws.

  Args:
    logits: of the distribution to sample from, temperature applied.
    topk: keep the k largest; 0 keeps all.
    topp: keep the fewest most probable ids with this probability in sum, at
      least one; 0 keeps all.

  Ids as probable as the last one kept are kept too, as in T5X.
  """
  if topk:
    k = min(topk, logits.shape[-1])
    smallest_kept = lax.top_k(logits, k)[0][:, -1:]
    logits = jnp.where(logits >= smallest_kept, logits, NEG_INF)
  if topp:
    probs = jax.nn.softmax(logits, axis=-1)
    ordered = -jnp.sort(-probs, axis=-1)
    mass_before = jnp.cumsum(ordered, axis=-1) - ordered
    smallest_kept = jnp.min(
      jnp.where(mass_before < topp, ordered, 1.0), axis=-1, keepdims=True
    )
    logits = jnp.where(probs >= smallest_kept, logits, NEG_INF)
  return logits


def temperature_sample(
  inputs: Int[Array, 'B L'],
  cache: Cache,
  tokens_to_logits: TokensToLogits,
  *,
  eos_id: int = 1,
  rng: Key[Array, ''] | UInt32[Array, '2'] | None = None,
  num_decodes: int = 1,
  temperature: float = 1.0,
  topk: int = 1,
  topp: float = 0.0,
  rescale_log_probs: bool = True,
  cache_batch_axis: int = 0,
) -> tuple[Int[Array, 'B N L'], Float[Array, 'B N']]:
  """Samples N sequences per example, independently; greedy by default.

  Names, defaults and results are those of T5X's `temperature_sample`; the
  settings are Python numbers, fixed when the function is compiled.

  Args:
    inputs: start id and forced prefix, see the module.
    cache: of B rows.
    tokens_to_logits: one step of the decoder.
    eos_id: ends a sequence.
    rng: key of the draws; None is the key of seed 0, as in T5X.
    num_decodes: N.
    temperature: divides the logits; 0 is greedy whatever topk and topp are.
    topk: see `restrict_logits`; 1 is greedy.
    topp: see `restrict_logits`; needs topk=0.
    rescale_log_probs: score by the distribution that is drawn from, so that
      greedy decoding has score 0; False scores by the model's own.
    cache_batch_axis: see the module.

  Returns:
    Sequences in order of increasing score, and the scores: the sum of the log
    probabilities, in nats, of all tokens drawn up to EOS, EOS included.

  Raises:
    UserError: for a setting out of range, or both topk and topp.
  """
  _check_sampling(num_decodes, temperature, topk, topp)
  batch, length = inputs.shape
  inputs = jnp.repeat(inputs, num_decodes, axis=0)
  forced = _forced_tokens(inputs, eos_id)

  def draw(logits, key):  # -> ids [B * N], their log-probabilities [B * N]
    if temperature <= MIN_TEMPERATURE:
      ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      if rescale_log_probs:
        return ids, jnp.zeros(ids.shape, jnp.float32)
    else:
      scaled = restrict_logits(logits / temperature, topk, topp)
      ids = jax.random.categorical(key, scaled).astype(jnp.int32)
      logits = scaled if rescale_log_probs else logits
    log_probs = jax.nn.log_softmax(logits)
    return ids, jnp.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]

  def unfinished(state: _Samples):
    return (state.step < length) & ~jnp.all(state.ended)

  def extend(state: _Samples) -> _Samples:
    logits, cache = tokens_to_logits(state.last[:, None], state.cache)
    now, later = jax.random.split(state.rng)
    drawn, log_probs = draw(logits.astype(jnp.float32), now)
    must = forced[:, state.step]
    free = (must == 0) & ~state.ended
    token = jnp.where(must == 0, drawn, must)
    token = jnp.where(state.ended, 0, token)
    return _Samples(
      step=state.step + 1,
      last=token,
      sequences=state.sequences.at[:, state.step].set(token),
      scores=state.scores + jnp.where(free, log_probs, 0.0),
      ended=state.ended | (token == eos_id),
      rng=later,
      cache=cache,
    )

  final = lax.while_loop(
    unfinished,
    extend,
    _Samples(
      step=jnp.int32(0),
      last=inputs[:, 0],
      sequences=jnp.zeros(inputs.shape, jnp.int32),
      scores=jnp.zeros(inputs.shape[:1], jnp.float32),
      ended=jnp.zeros(inputs.shape[:1], jnp.bool_),
      rng=jax.random.PRNGKey(0) if rng is None else rng,
      cache=repeat_for_decodes(cache, num_decodes, cache_batch_axis),
    ),
  )
  sequences = final.sequences.reshape(batch, num_decodes, length)
  scores = final.scores.reshape(batch, num_decodes)
  order = jnp.argsort(scores, axis=-1)
  return _select(sequences, order), _select(scores, order)


def beam_search(
  inputs: Int[Array, 'B L'],
  cache: Cache,
  tokens_to_logits: TokensToLogits,
  *,
  eos_id: int = 1,
  rng: Key[Array, ''] | UInt32[Array, '2'] | None = None,
  num_decodes: int = 4,
  alpha: float = 0.6,
  cache_batch_axis: int = 0,
) -> tuple[Int[Array, 'B N L'], Float[Array, 'B N']]:
  """Searches for the N best sequences that end within L tokens.

  The algorithm of T5X (and of Flax's translation example). N live beams have
  2 * N best extensions; those with EOS compete for N finished places by score,
  the N best others live on. The score of a sequence of n tokens, EOS and forced
  prefix counted, is its log-probability divided by ((5 + n) / 6)^alpha. The
  search stops when no live beam of any example can still win a finished place.
  N = 1 is not greedy: it may finish with the second-best token and go on with
  the best one.

  Args:
    inputs: start id and forced prefix, see the module.
    cache: of B rows.
    tokens_to_logits: one step of the decoder.
    eos_id: ends a sequence.
    rng: not used; taken so that both searches are called alike.
    num_decodes: N.
    alpha: strength of the brevity penalty; 0 compares log-probabilities.
    cache_batch_axis: see the module.

  Returns:
    Sequences from worst to best, and their scores. An example of which no beam
    has finished returns its live beams, with log-probabilities not divided.
    A place left empty has score -1e7 and padding for ids.

  Raises:
    UserError: for num_decodes < 1 or alpha < 0.
  """
  del rng
  if num_decodes < 1 or alpha < 0:
    raise UserError(
      'beam_search needs num_decodes >= 1 and alpha >= 0, got '
      f'num_decodes={num_decodes}, alpha={alpha}'
    )
  batch, length = inputs.shape
  forced = _forced_tokens(inputs, eos_id)

  def penalty(tokens):
    return ((5.0 + tokens) / 6.0) ** alpha

  def improvable(state: _Beams):
    # Log-probabilities only fall, so the longest sequence bounds the score.
    best_live = state.live_scores[:, -1] / penalty(length)
    worst_done = state.done_scores[:, 0]
    settled = ~_empty(worst_done) & (worst_done > best_live)
    return (state.step < length) & ~jnp.all(settled)

  def extend(state: _Beams) -> _Beams:
    logits, cache = tokens_to_logits(state.last.reshape(-1, 1), state.cache)
    vocab = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_probs = log_probs.reshape(batch, num_decodes, vocab)
    log_probs = (log_probs + state.live_scores[:, :, None]).reshape(batch, -1)

    # At most N of the 2 * N extensions have EOS, one per beam.
    scores, flat = lax.top_k(log_probs, 2 * num_decodes)  # best first
    parents, tokens = flat // vocab, flat % vocab  # [B, 2 N]
    # Inside the prefix all beams would be alike: one lives, with score 0.
    must = forced[:, state.step, None]  # [B, 1]
    one_alive = jnp.where(jnp.arange(2 * num_decodes) == 0, 0.0, NEG_INF)
    scores = jnp.where(must == 0, scores, one_alive[None])
    tokens = jnp.where(must == 0, tokens, must)
    sequences = _select(state.live, parents)  # [B, 2 N, L]
    sequences = sequences.at[:, :, state.step].set(tokens)

    ends = tokens == eos_id
    alive = jnp.where(ends, scores + NEG_INF, scores)
    keep = _best(alive, num_decodes)
    parents = _select(parents, keep)

    done_scores = jnp.where(
      ends, scores / penalty(state.step.astype(jnp.float32) + 1.0), NEG_INF
    )
    done_scores = jnp.concatenate([state.done_scores, done_scores], axis=1)
    done = jnp.concatenate([state.done, sequences], axis=1)
    place = _best(done_scores, num_decodes)
    return _Beams(
      step=state.step + 1,
      last=_select(tokens, keep),
      live=_select(sequences, keep),
      live_scores=_select(alive, keep),
      done=_select(done, place),
      done_scores=_select(done_scores, place),
      cache=gather_beams(cache, parents, cache_batch_axis),
    )

  # One live beam at the start, or all would find the same sequences.
  first_only = jnp.where(
    jnp.arange(num_decodes) == num_decodes - 1, 0.0, NEG_INF
  )
  nothing = jnp.zeros((batch, num_decodes, length), jnp.int32)
  final = lax.while_loop(
    improvable,
    extend,
    _Beams(
      step=jnp.int32(0),
      last=jnp.repeat(inputs[:, :1], num_decodes, axis=1),
      live=nothing,
      live_scores=jnp.tile(first_only[None], (batch, 1)),
      done=nothing,
      done_scores=jnp.full((batch, num_decodes), NEG_INF),
      cache=repeat_for_decodes(cache, num_decodes, cache_batch_axis),
    ),
  )
  any_done = ~_empty(final.done_scores[:, -1:])  # [B, 1]
  sequences = jnp.where(any_done[:, :, None], final.done, final.live)
  scores = jnp.where(any_done, final.done_scores, final.live_scores)
  empty = _empty(scores)
  return (
    jnp.where(empty[:, :, None], 0, sequences),
    jnp.where(empty, NEG_INF, scores),
  )


class _Samples(NamedTuple):
  step: Int[Array, '']
  last: Int[Array, 'BN']
  sequences: Int[Array, 'BN L']
  scores: Float[Array, 'BN']
  ended: Bool[Array, 'BN']
  rng: Array
  cache: Cache


class _Beams(NamedTuple):
  """Beams and finished sequences, each from worst to best."""

  step: Int[Array, '']
  last: Int[Array, 'B N']
  live: Int[Array, 'B N L']
  live_scores: Float[Array, 'B N']  # log-probabilities
  done: Int[Array, 'B N L']
  done_scores: Float[Array, 'B N']  # penalised; NEG_INF: place empty
  cache: Cache


def _check_sampling(num_decodes, temperature, topk, topp):
  if topk and topp:
    raise UserError(
      f'at most one of topk and topp can be used, got topk={topk} (1 is the '
      f'default) and topp={topp}: set the other one to 0'
    )
  if num_decodes < 1 or temperature < 0 or topk < 0 or not 0 <= topp <= 1:
    raise UserError(
      'temperature_sample needs num_decodes >= 1, temperature >= 0, topk >= 0'
      f' and 0 <= topp <= 1, got num_decodes={num_decodes}, '
      f'temperature={temperature}, topk={topk}, topp={topp}'
    )


def _forced_tokens(inputs: Int[Array, 'B L'], eos_id: int):
  """The token each step must give, 0 where it is free: int32 [B, L]."""
  following = jnp.pad(inputs[:, 1:], ((0, 0), (0, 1))).astype(jnp.int32)
  text = (following != 0) & (following != eos_id)
  return following * jnp.cumprod(text.astype(jnp.int32), axis=1)


def _map_rows(fn, cache: Cache) -> Cache:
  """Applies `fn` to the arrays that have rows."""

  def visit(path, array):
    shared = any(getattr(k, 'key', None) == 'cache_index' for k in path)
    return array if shared or jnp.ndim(array) == 0 else fn(array)

  return jax.tree_util.tree_map_with_path(visit, cache)


def _empty(scores):
  """Whether a score is that of no sequence (NEG_INF or sums with it)."""
  return scores < NEG_INF / 2


def _best(scores: Float[Array, 'B M'], count: int) -> Int[Array, 'B N']:
  """Indices of the `count` largest of each row, worst first."""
  return jnp.flip(lax.top_k(scores, count)[1], axis=1)


def _select(array, index: Int[Array, 'B N']):
  """array[b, index[b, n]]: [B, M, ...] -> [B, N, ...]."""
  return jax.vmap(lambda row, i: row[i])(array, index)
