"""Sampling and beam search over small chains, against enumeration by numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.models import decoding

EOS = 1
EMPTY = -1e7


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


class Chain:
  """A toy decoder: the next token depends on the example and the last two ids.

  The last id but one is known from the cache alone, and the example too, so
  that a cache which does not follow its beam gives other probabilities.
  With `axis` 1 the cache has two stacked layers, as under scanned layers.
  """

  def __init__(self, batch, vocab=4, seed=0, axis=0, length=8):
    rng = np.random.default_rng(seed)
    self.vocab, self.axis, self.length = vocab, axis, length
    # [example, last but one, last, next]
    self.table = rng.normal(0, 1.5, (batch, vocab, vocab, vocab))
    self.log_probs = log_softmax(self.table)

  def cache(self, rows=None):
    rows = np.arange(len(self.table)) if rows is None else np.asarray(rows)
    leaves = {
      'example': jnp.asarray(rows[:, None], jnp.int32),
      'history': jnp.zeros((len(rows), self.length), jnp.int32),
    }
    index = jnp.int32(0)
    if self.axis:
      leaves = {k: jnp.stack([v, v]) for k, v in leaves.items()}
      index = jnp.zeros((2,), jnp.int32)
    return {'layer': leaves | {'cache_index': index}}

  @staticmethod
  def step(table, axis, ids, cache):
    leaves, index = cache['layer'], cache['layer']['cache_index']
    step = index[0] if axis else index
    first = (lambda x: x[0]) if axis else (lambda x: x)
    history, example = first(leaves['history']), first(leaves['example'])
    assert ids.shape == (history.shape[0], 1) and ids.dtype == jnp.int32
    before = history[:, jnp.maximum(step - 1, 0)]
    history = history.at[:, step].set(ids[:, 0])
    logits = table[example[:, 0], before, ids[:, 0]]
    if axis:
      history = jnp.stack([history, history])
    leaves = leaves | {'history': history, 'cache_index': index + 1}
    return logits, {'layer': leaves}

  def log_prob(self, example, tokens, free_from=0):
    """Sum of log-probabilities of tokens[free_from:], by hand."""
    total, before, last = 0.0, 0, 0
    for i, token in enumerate(tokens):
      if i >= free_from:
        total += self.log_probs[example, before, last, token]
      before, last = last, token
    return total

  def finished(self, example, length, alpha, prefix=()):
    """All sequences that end within `length`: {padded ids: score}."""
    found = {}
    others = [t for t in range(self.vocab) if t != EOS]
    for n in range(length - len(prefix)):
      for middle in itertools.product(others, repeat=n):
        ids = (*prefix, *middle, EOS)
        score = self.log_prob(example, ids, len(prefix))
        score /= ((5 + len(ids)) / 6) ** alpha
        found[ids + (0,) * (length - len(ids))] = score
    return found


def starts(batch, length, prefixes=()):
  inputs = np.zeros((batch, length), np.int32)
  for row, prefix in zip(inputs, prefixes):
    row[1 : 1 + len(prefix)] = prefix
  return jnp.asarray(inputs)


@functools.cache
def compiled(decode_fn, axis, settings):
  """Decoding of any chain: one program for all of the same shape."""

  def run(inputs, cache, table, rng):
    return decode_fn(
      inputs,
      cache,
      functools.partial(Chain.step, table, axis),
      eos_id=EOS,
      cache_batch_axis=axis,
      rng=rng,
      **dict(settings),
    )

  return jax.jit(run)


def decoder(decode_fn, chain, rng=None, **settings):
  """inputs, rows of the chain -> decodes and scores, compiled."""
  run = compiled(decode_fn, chain.axis, tuple(sorted(settings.items())))
  table = jnp.asarray(chain.table, jnp.float32)

  def decode(inputs, rows=None):
    decodes, scores = run(inputs, chain.cache(rows), table, rng)
    return np.asarray(decodes), np.asarray(scores)

  return decode


def decode(decode_fn, chain, inputs, **settings):
  return decoder(decode_fn, chain, **settings)(inputs)


def assert_holds(expected, decodes, scores):
  """An example's places hold the expected {ids: score}, worst first."""
  best = sorted(expected, key=expected.get)
  taken = scores > EMPTY / 2
  assert [tuple(ids) for ids in decodes[taken].tolist()] == best
  np.testing.assert_allclose(
    scores[taken], [expected[ids] for ids in best], atol=1e-5
  )
  assert taken[-len(best) :].all()
  np.testing.assert_array_equal(scores[~taken], EMPTY)
  np.testing.assert_array_equal(decodes[~taken], 0)


def restricted(logits, **settings):
  """Which ids of one distribution may be drawn."""
  logits = decoding.restrict_logits(
    jnp.asarray(logits, jnp.float32)[None], **settings
  )
  return [i for i, x in enumerate(np.asarray(logits[0])) if x > EMPTY]


# Beam search


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(alpha, axis):
  # 3 ids are not EOS. 1 + 3 + 9 + 27 sequences end within 4 tokens; the 27
  # prefixes of 3 tokens have 108 extensions, all of which 54 beams consider.
  chain = Chain(batch=3, axis=axis)
  decodes, scores = decode(
    decoding.beam_search, chain, starts(3, 4), num_decodes=54, alpha=alpha
  )
  for example in range(3):
    expected = chain.finished(example, 4, alpha)
    assert len(expected) == 40
    assert_holds(expected, decodes[example], scores[example])


@pytest.mark.parametrize('seed', range(5))
def test_stopping_early_loses_nothing(seed):
  # EOS is likely, so that few steps of the 7 are needed.
  chain = Chain(batch=2, vocab=3, seed=seed)
  chain.table[..., EOS] += 4.0
  chain.log_probs = log_softmax(chain.table)
  decodes, scores = decode(
    decoding.beam_search, chain, starts(2, 7), num_decodes=3
  )
  for example in range(2):
    expected = chain.finished(example, 7, 0.6)
    best = sorted(expected, key=expected.get)[-3:]
    expected = {ids: expected[ids] for ids in best}
    assert_holds(expected, decodes[example], scores[example])


def test_the_search_stops_when_no_beam_can_win():
  logits = jnp.log(jnp.asarray([[0.05, 0.9, 0.05]]))  # EOS at once

  def step(ids, cache):
    return jnp.repeat(logits, ids.shape[0], axis=0), cache

  steps = []

  def counted(ids, cache):
    jax.debug.callback(lambda: steps.append(1))
    return step(ids, cache)

  decodes, _ = decoding.beam_search(
    starts(1, 100), {}, counted, eos_id=EOS, num_decodes=1
  )
  jax.effects_barrier()
  assert decodes[0, 0, :3].tolist() == [EOS, 0, 0]
  assert len(steps) == 1


def test_a_beam_of_one_is_not_greedy():
  # Greedy: 2 (0.6), then 2 forever, at 0.6 each. But EOS is the second best
  # extension (0.4), takes the finished place with log 0.4 / 1, and nothing of
  # two tokens beats it: log(0.6 * 0.4) / (7/6)^0.6 = -1.30 < -0.92.
  logits = jnp.log(jnp.asarray([[1e-9, 0.4, 0.6]]))

  def step(ids, cache):
    return jnp.repeat(logits, ids.shape[0], axis=0), cache

  decodes, scores = decoding.beam_search(
    starts(1, 3), {}, step, eos_id=EOS, num_decodes=1
  )
  assert decodes.tolist() == [[[1, 0, 0]]]
  np.testing.assert_allclose(scores, [[np.log(0.4)]], atol=1e-6)
  greedy, _ = decoding.temperature_sample(starts(1, 3), {}, step, eos_id=EOS)
  assert greedy.tolist() == [[[2, 2, 2]]]


def end_or_2(end):
  """EOS with this probability, or 2 and then EOS for certain."""

  def step(ids, cache):
    probs = jnp.where(
      ids == 2,
      jnp.asarray([[1e-9, 1.0, 1e-9]]),
      jnp.asarray([[1e-9, end, 1 - end]]),
    )
    return jnp.log(probs), cache

  return step


def test_scores_are_divided_by_the_brevity_penalty():
  decodes, scores = decoding.beam_search(
    starts(1, 3), {}, end_or_2(0.5), eos_id=EOS, num_decodes=2, alpha=0.6
  )
  assert decodes[0].tolist() == [[1, 0, 0], [2, 1, 0]]
  expected = [np.log(0.5), np.log(0.5) / (7 / 6) ** 0.6]
  np.testing.assert_allclose(scores[0], expected, atol=1e-6)


def test_the_search_goes_on_while_length_can_still_win():
  # After one step log 0.55 is finished and log 0.45 alive: the live beam is
  # behind, and ahead once its length counts: -0.80 / (7/6)^3 = -0.50 > -0.60.
  decodes, scores = decoding.beam_search(
    starts(1, 3), {}, end_or_2(0.55), eos_id=EOS, num_decodes=1, alpha=3.0
  )
  assert decodes[0].tolist() == [[2, 1, 0]]
  np.testing.assert_allclose(
    scores[0], [np.log(0.45) / (7 / 6) ** 3], atol=1e-6
  )


def test_beams_that_never_end_return_log_probabilities():
  chain = Chain(batch=2, vocab=10)
  chain.table[..., EOS] -= 50.0
  chain.log_probs = log_softmax(chain.table)
  decodes, scores = decode(
    decoding.beam_search, chain, starts(2, 4), num_decodes=4, alpha=0.6
  )
  for example in range(2):
    # Four beams may miss the best four of 9^4; what they find is scored right.
    assert (decodes[example] != EOS).all()
    assert len({tuple(ids) for ids in decodes[example]}) == 4
    expected = [chain.log_prob(example, ids) for ids in decodes[example]]
    np.testing.assert_allclose(scores[example], expected, atol=1e-5)
    assert (np.diff(scores[example]) >= 0).all()


def test_places_left_empty_hold_padding_and_the_lowest_score():
  # Two tokens, vocabulary of 3: EOS, 0 EOS and 2 EOS are all there is.
  chain = Chain(batch=1, vocab=3)
  decodes, scores = decode(
    decoding.beam_search, chain, starts(1, 2), num_decodes=6
  )
  np.testing.assert_array_equal(scores[0, :3], EMPTY)
  assert_holds(chain.finished(0, 2, 0.6), decodes[0], scores[0])


def test_beam_search_goes_on_after_a_forced_prefix():
  prefixes = [(), (3,), (2, 3)]
  chain = Chain(batch=3)
  decodes, scores = decode(
    decoding.beam_search, chain, starts(3, 4, prefixes), num_decodes=54
  )
  for example, prefix in enumerate(prefixes):
    # The prefix adds nothing to the log-probability but counts as length.
    expected = chain.finished(example, 4, 0.6, prefix)
    assert_holds(expected, decodes[example], scores[example])


# Sampling


def greedy_by_hand(chain, example, length, prefix=()):
  ids = []
  before, last = 0, 0
  for i in range(length):
    token = int(np.argmax(chain.table[example, before, last]))
    token = prefix[i] if i < len(prefix) else token
    ids.append(token)
    if token == EOS:
      break
    before, last = last, token
  return ids


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize(
  'settings', [{}, {'temperature': 0.0}, {'temperature': 0.0, 'topk': 0}]
)
def test_default_and_temperature_0_are_greedy(settings, axis):
  chain = Chain(batch=5, seed=3, axis=axis)
  ours, scores = decode(
    decoding.temperature_sample, chain, starts(5, 6), **settings
  )
  raw, raw_scores = decode(
    decoding.temperature_sample,
    chain,
    starts(5, 6),
    rescale_log_probs=False,
    **settings,
  )
  np.testing.assert_array_equal(ours, raw)
  np.testing.assert_array_equal(scores, 0.0)
  lengths = set()
  for example in range(5):
    expected = greedy_by_hand(chain, example, 6)
    lengths.add(len(expected))
    padded = expected + [0] * (6 - len(expected))
    assert ours[example, 0].tolist() == padded
    np.testing.assert_allclose(
      raw_scores[example, 0], chain.log_prob(example, expected), atol=1e-5
    )
  assert len(lengths) > 1  # some ended early


def test_only_padding_follows_eos_and_id_0_may_come_before_it():
  chain = Chain(batch=4, vocab=3, seed=1)
  decodes, scores = decode(
    decoding.temperature_sample,
    chain,
    starts(4, 6),
    num_decodes=50,
    topk=0,
    rng=jax.random.key(0),
  )
  zero_inside = 0
  for example in range(4):
    for ids, score in zip(decodes[example].tolist(), scores[example]):
      if EOS in ids:
        end = ids.index(EOS) + 1
        assert not any(ids[end:])
        ids = ids[:end]
      zero_inside += 0 in ids[:-1]
      # A 0 that was drawn is scored, and conditions what comes after it.
      np.testing.assert_allclose(
        score, chain.log_prob(example, ids), rtol=0, atol=1e-5
      )
  assert zero_inside > 10


def test_samples_come_in_order_of_their_scores():
  chain = Chain(batch=3)
  _, scores = decode(
    decoding.temperature_sample, chain, starts(3, 4), num_decodes=9, topk=0
  )
  assert (np.diff(scores, axis=1) >= 0).all()
  assert (np.diff(scores, axis=1) > 0).any()


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'topk': 0}, [0.4, 0.1, 0.3, 0.2]),
    ({'topk': 2}, [4 / 7, 0, 3 / 7, 0]),
    ({'topk': 0, 'topp': 0.8}, [4 / 9, 0, 3 / 9, 2 / 9]),
    # Squared probabilities: 16, 1, 9, 4 of 30.
    ({'topk': 0, 'temperature': 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
    # Top-p acts after the temperature: 16 + 9 of 30 are more than 0.8.
    ({'topk': 0, 'topp': 0.8, 'temperature': 0.5}, [16 / 25, 0, 9 / 25, 0]),
  ],
)
def test_sampling_follows_the_distribution_asked_for(settings, expected):
  logits = jnp.log(jnp.asarray([[0.4, 0.1, 0.3, 0.2]]))

  def step(ids, cache):
    return jnp.repeat(logits, ids.shape[0], axis=0), cache

  draws = 4000
  sample = functools.partial(
    decoding.temperature_sample,
    starts(1, 1),
    {},
    step,
    num_decodes=draws,
    rng=jax.random.key(5),
    **settings,
  )
  decodes, scores = sample()
  counts = np.bincount(decodes.ravel(), minlength=4)
  expected = np.asarray(expected)
  deviation = np.sqrt(draws * expected * (1 - expected))
  assert (np.abs(counts - draws * expected) <= 4 * deviation).all()
  np.testing.assert_allclose(
    np.exp(scores).ravel(), expected[decodes.ravel()], rtol=1e-5
  )
  # Not rescaled: the same draws, scored by the model's own distribution.
  same, scores = sample(rescale_log_probs=False)
  np.testing.assert_array_equal(np.sort(same.ravel()), np.sort(decodes.ravel()))
  own = np.asarray([0.4, 0.1, 0.3, 0.2])
  np.testing.assert_allclose(
    np.exp(scores).ravel(), own[same.ravel()], rtol=1e-5
  )


def test_top_k_keeps_the_k_largest_and_their_ties():
  logits = [0.0, 3.0, 1.0, 2.0, 1.0]
  assert restricted(logits, topk=1) == [1]
  assert restricted(logits, topk=2) == [1, 3]
  assert restricted(logits, topk=3) == [1, 2, 3, 4]
  assert restricted(logits, topk=0) == [0, 1, 2, 3, 4]
  assert restricted(logits, topk=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_that_reach_p():
  logits = np.log([0.1, 0.4, 0.2, 0.3])
  assert restricted(logits, topp=0.01) == [1]
  assert restricted(logits, topp=0.39) == [1]
  assert restricted(logits, topp=0.41) == [1, 3]
  assert restricted(logits, topp=0.69) == [1, 3]
  assert restricted(logits, topp=0.71) == [1, 2, 3]
  assert restricted(logits, topp=0.95) == [0, 1, 2, 3]
  assert restricted(logits, topp=1.0) == [0, 1, 2, 3]
  assert restricted(logits, topp=0.0) == [0, 1, 2, 3]


def test_sampling_goes_on_after_a_forced_prefix():
  prefixes = [(), (3,), (2, 0, 3), (2, EOS, 3), (3, 3, 2, 2, 3)]
  repeated = [(), (3,), (2,), (2,), (3, 3, 2, 2, 3)]
  chain = Chain(batch=5, seed=3)
  decodes, scores = decode(
    decoding.temperature_sample,
    chain,
    starts(5, 6, prefixes),
    temperature=0.0,
    rescale_log_probs=False,
  )
  for example, prefix in enumerate(repeated):
    # A prefix ends at the first padding or EOS.
    expected = greedy_by_hand(chain, example, 6, prefix)
    padded = expected + [0] * (6 - len(expected))
    assert decodes[example, 0].tolist() == padded
    np.testing.assert_allclose(
      scores[example, 0],
      chain.log_prob(example, expected, free_from=len(prefix)),
      atol=1e-5,
    )


def test_old_and_new_keys_draw_alike_and_the_default_is_seed_0():
  chain = Chain(batch=2)
  sample = functools.partial(
    decode,
    decoding.temperature_sample,
    chain,
    starts(2, 5),
    num_decodes=6,
    topk=0,
  )
  default, _ = sample()
  for key in (jax.random.PRNGKey(0), jax.random.key(0)):
    np.testing.assert_array_equal(sample(rng=key)[0], default)
  assert (sample(rng=jax.random.key(1))[0] != default).any()


# Both


@pytest.mark.parametrize(
  ('decode_fn', 'settings'),
  [
    (decoding.beam_search, {'num_decodes': 3}),
    (decoding.temperature_sample, {'num_decodes': 2, 'temperature': 0.0}),
  ],
)
def test_examples_decode_alone_as_in_any_batch(decode_fn, settings):
  chain = Chain(batch=6, seed=2)
  chain.table[0, ..., EOS] += 9.0  # the others go on when this one is done
  chain.table[1, ..., EOS] -= 30.0
  prefixes = [(), (), (3,), (2, 2), (), (3, 2)]
  inputs = starts(6, 5, prefixes)
  run = decoder(decode_fn, chain, **settings)
  together, scores = run(inputs)
  for rows in ([0], [1], [2], [3], [4], [5], [5, 1, 0, 3]):
    part, part_scores = run(inputs[np.asarray(rows)], rows)
    np.testing.assert_array_equal(part, together[rows])
    np.testing.assert_allclose(part_scores, scores[rows], atol=1e-6)


@pytest.mark.parametrize('axis', [0, 1])
def test_caches_follow_their_beams(axis):
  """Rows of [layers,] B * N, shuffled within each example and not across."""
  rows = jnp.arange(6).reshape(6, 1) * jnp.asarray([[1, 10]])
  index = jnp.asarray([4, 4])
  cache = {'a': {'cached_key': rows, 'cache_index': index[0]}}
  if axis:
    cache = {
      'a': {'cached_key': jnp.stack([rows, -rows]), 'cache_index': index}
    }
  parents = jnp.asarray([[2, 0, 2], [1, 1, 0]])
  moved = decoding.gather_beams(cache, parents, axis)
  expected = np.asarray([2, 0, 2, 4, 4, 3])[:, None] * [[1, 10]]
  if axis:
    expected = np.stack([expected, -expected])
  np.testing.assert_array_equal(moved['a']['cached_key'], expected)
  np.testing.assert_array_equal(
    moved['a']['cache_index'], cache['a']['cache_index']
  )


@pytest.mark.parametrize('axis', [0, 1])
def test_copies_of_a_cache_stand_side_by_side(axis):
  rows = jnp.asarray([[1, 2], [3, 4]])
  index = jnp.asarray([0, 0])
  cache = {'cached_key': rows, 'cache_index': index[0]}
  if axis:
    cache = {'cached_key': jnp.stack([rows, rows + 10]), 'cache_index': index}
  copied = decoding.repeat_for_decodes(cache, 2, axis)
  expected = np.asarray([[1, 2], [1, 2], [3, 4], [3, 4]])
  if axis:
    expected = np.stack([expected, expected + 10])
  np.testing.assert_array_equal(copied['cached_key'], expected)
  assert copied['cache_index'] is cache['cache_index']


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'topp': 0.9}, 'topk=1 (1 is the default) and topp=0.9: set'),
    ({'topk': 0, 'topp': 1.5}, 'topp=1.5'),
    ({'topk': -1}, 'topk=-1'),
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'num_decodes': 0}, 'num_decodes=0'),
  ],
)
def test_sampling_settings_out_of_range_are_told(settings, said):
  with pytest.raises(UserError) as fault:
    decode(decoding.temperature_sample, Chain(1), starts(1, 3), **settings)
  assert said in str(fault.value) and '\n' not in str(fault.value)


@pytest.mark.parametrize('settings', [{'num_decodes': 0}, {'alpha': -0.5}])
def test_beam_settings_out_of_range_are_told(settings):
  with pytest.raises(UserError, match='num_decodes >= 1 and alpha >= 0'):
    decode(decoding.beam_search, Chain(1), starts(1, 3), **settings)
