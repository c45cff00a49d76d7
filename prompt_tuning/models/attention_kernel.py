"""T5's attention in one kernel, for a T5 whose bias table is frozen.

Scores, masks and bias of a tile of queries and keys are made in on-chip memory
and never leave it, as in FlashAttention-2 (Dao 2023): what is kept for the
gradient is the output and the logarithm of each query's softmax sum, so that
memory grows with the length and not with its square.

A tile holds keys along rows and queries along columns, so that what there is
one of per query (maximum, sum) lies along a TPU's lanes. Heads stay side by
side, as the projections leave them, [B, T, N*D]: a block is so many heads as
fill the 128 lanes, and one head of them is had by zeroing the others.

The bias depends on key minus query alone. Outside of the kernel it is a vector
of all distances for each head (linear in the length); a row of a tile is a
window of that vector, and the next row the window beside it.

Compiled for TPUs from v4 on (by Mosaic, which multiplies no bfloat16 on v2 and
v3) and for A100 and H100 (by Triton); run by Pallas's interpreter alone so far.
Keys and values of a block of heads are on chip as a whole, and so are queries
in the kernel of their gradient: 8192 positions fit a v5e.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_tuning.errors import UserError
from prompt_tuning.models import layers
from prompt_tuning.models.attention import ANY_SEGMENT
from prompt_tuning.models.attention import MASKED

BACKENDS = ('tpu', 'gpu')
# What a maximum starts at: a masked score beside it weighs exactly nothing, so
# a query with nothing to look at gets zeros, and gives no gradient.
_LOWEST = MASKED / 2
# What a TPU's registers hold.
_LANES, _SUBLANES = 128, 8


def attention(
  query: Float[Array, 'B Q N D'],
  key: Float[Array, 'B S N D'],
  value: Float[Array, 'B S N D'],
  table: Float[Array, 'N _'] | None,
  query_segments: Int[Array, 'B Q'],
  key_segments: Int[Array, 'B S'],
  *,
  key_offset: int = 0,
  causal: bool = False,
  bidirectional: bool = True,
  max_distance: int = 128,
  block_q: int | None = None,
  block_k: int | None = None,
  backend: str = 'tpu',
  interpret: bool = False,
) -> Float[Array, 'B Q N D']:
  """The values that each query's softmax over the keys mixes, by T5's rules.

  Differentiable by query, key and value. The table is taken as frozen: its
  gradient is not computed and comes out as zero, so who trains it takes another
  path. T5's dropout, which takes the same keys from all queries of a head, is a
  matter of the values. Batch and heads are independent:
  over several devices it runs inside `jax.shard_map`, split by these (see
  `sharded_attention`).

  Lengths are padded to whole blocks, which copies what is not so long already.

  Args:
    query: bfloat16 or float32, not to be scaled by 1 / sqrt(D); sums are
      float32 either way.
    key: of the query's type.
    value: likewise.
    table: bias by head and bucket of relative position; None: no bias.
    query_segments: number of each query's packed example, 0 for padding, which
      gets zeros.
    key_segments: likewise; a key of ANY_SEGMENT is looked at by all real
      queries. A real query with no key to look at gets zeros too.
    key_offset: the first key's position less the first query's: -P with P keys
      in front of a sequence.
    causal: no query looks at a key after it.
    bidirectional: see `layers.relative_position_bucket`.
    max_distance: likewise; the table's width is `num_buckets`.
    block_q: queries of a tile, of a TPU in steps of 128, of a GPU a power of 2;
      None: as suits the backend.
    block_k: keys of a tile, likewise.
    backend: what it is compiled for, of `BACKENDS`.
    interpret: run by Pallas's interpreter, on any device.

  Raises:
    UserError: unknown backend, or blocks that it cannot take.
  """
  batch, queries, heads, head_dim = query.shape
  keys = key.shape[1]
  group, block_q, block_k = _blocks(
    backend, interpret, heads, head_dim, (queries, block_q), (keys, block_k)
  )
  plan = _Plan(
    group=group,
    head_dim=head_dim,
    queries=pl.cdiv(queries, block_q) * block_q,
    keys=pl.cdiv(keys, block_k) * block_k,
    block_q=block_q,
    block_k=block_k,
    key_offset=key_offset,
    causal=causal,
    backend=backend,
    interpret=interpret,
  )

  def whole(x, length):
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))

  biases = ()
  if table is not None:
    distance = jnp.arange(plan.keys - 1, -plan.queries - 1, -1) + key_offset
    bucket = layers.relative_position_bucket(
      distance[None] + jnp.arange(_SUBLANES)[:, None],
      bidirectional=bidirectional,
      num_buckets=table.shape[1],
      max_distance=max_distance,
    )
    table = jax.lax.stop_gradient(table).astype(jnp.float32)
    biases = (table[:, bucket],)
  inputs = _Inputs(
    whole(query, plan.queries),
    whole(key, plan.keys),
    whole(value, plan.keys),
    biases,
    whole(query_segments, plan.queries).reshape(batch, 1, -1),
    whole(key_segments, plan.keys),
  )
  mixed = _attend(plan, inputs)[:, :queries]
  return mixed.reshape(batch, queries, heads, head_dim)


def sharded_attention(
  mesh: jax.sharding.Mesh,
  batch_axes: str | tuple[str, ...] | None,
  head_axes: str | tuple[str, ...] | None,
  *arrays: Array | None,
  **settings: Any,
) -> Float[Array, 'B Q N D']:
  """`attention` with batch and heads split over these axes of a mesh."""
  split = jax.sharding.PartitionSpec
  heads, rows = split(batch_axes, None, head_axes), split(batch_axes)
  return jax.shard_map(
    functools.partial(attention, **settings),
    mesh=mesh,
    in_specs=(heads, heads, heads, split(head_axes), rows, rows),
    out_specs=heads,
    check_vma=False,  # a Pallas call does not say over what it varies
  )(*arrays)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How a call is cut up; `queries` and `keys` are in whole blocks.

  Of a call's parts i is the block of queries, j that of keys, h the head.
  """

  group: int  # heads of a block, H
  head_dim: int
  queries: int
  keys: int
  block_q: int
  block_k: int
  key_offset: int
  causal: bool
  backend: str
  interpret: bool

  def head(self, x: jax.Array, h: int) -> jax.Array:
    """[_, H*D] with the columns of other heads than the block's h-th zeroed."""
    if self.group == 1:
      return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    own = (column >= h * self.head_dim) & (column < (h + 1) * self.head_dim)
    return jnp.where(own, x, jnp.zeros_like(x))

  def rows(self, x: jax.Array, h: int) -> jax.Array:
    """[H*D, _] to the D rows of the block's h-th head."""
    return x[h * self.head_dim : (h + 1) * self.head_dim]

  def seen(self, i, j, query_segments, key_segments) -> jax.Array:
    """[block_k, block_q]: whether the query may look at the key."""
    same = (key_segments == query_segments) | (key_segments == ANY_SEGMENT)
    seen = same & (query_segments > 0)
    if self.causal:
      before = self._queries_less_keys() + i * self.block_q - j * self.block_k
      seen &= before >= self.key_offset
    return seen

  def scores(self, i, j, h, query, key, biases, seen) -> jax.Array:
    """[block_k, block_q] of a head; `query` is of this head alone."""
    scores = _product(key, query, 1, 1)
    for bias in biases:
      scores += self._bias(bias, i, j, h)
    return jnp.where(seen, scores, MASKED)

  def _queries_less_keys(self) -> jax.Array:
    shape = (self.block_k, self.block_q)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return column - jax.lax.broadcasted_iota(jnp.int32, shape, 0)

  def _bias(self, bias, i, j, h) -> jax.Array:
    """[block_k, block_q] of the bias by distance, [H, 8, Q + S].

    It has all queries less keys from 1 - S on, in row r moved right by r.
    """
    first = i * self.block_q - j * self.block_k + self.keys
    if self.backend == 'gpu':
      return bias[h, 0, first - 1 + self._queries_less_keys()]
    # A TPU loads from whole lanes on. Eight rows have one window, moved on by
    # their rows; the next eight want it eight further to the left.
    count, rows = math.gcd(self.block_k, _LANES), []
    for top in range(count, self.block_k + 1, count):
      at = pl.ds(pl.multiple_of(first - top, count), count + self.block_q)
      window = bias[h, :, at]
      for left in range(count - 1, 0, -_SUBLANES):
        rows.append(window[:, left : left + self.block_q])
    return jnp.concatenate(rows)


class _Inputs(NamedTuple):
  """What each kernel looks at; arrays, references or how they are cut."""

  query: Any  # [B, Q, N*D]
  key: Any  # [B, S, N*D]
  value: Any
  biases: tuple  # none, or one of [N, 8, Q + S]
  query_segments: Any  # [B, 1, Q]
  key_segments: Any  # [B, S, 1]


def _product(a: jax.Array, b: jax.Array, at_a: int, at_b: int) -> jax.Array:
  """Matrix product over axis `at_a` of a and `at_b` of b, in float32."""
  return jax.lax.dot_general(
    a, b, (((at_a,), (at_b,)), ((), ())), preferred_element_type=jnp.float32
  )


def _block(index, size: int) -> Any:
  return pl.ds(pl.multiple_of(index * size, size), size)


def _joined(heads: Sequence[jax.Array]) -> jax.Array:
  """[_, H*D] of [D, _] for each head."""
  return jnp.concatenate(heads).T


def _forward(plan: _Plan, x: _Inputs, mixed, lse):
  """A block of queries: mixed [block_q, H*D], lse [H, block_q]."""
  i = pl.program_id(2)
  queries = [plan.head(x.query[...], h) for h in range(plan.group)]

  def step(j, carry):
    at = _block(j, plan.block_k)
    keys, values = x.key[at, :], x.value[at, :].T
    seen = plan.seen(i, j, x.query_segments[...], x.key_segments[at, :])
    new = []
    for h, (highest, total, sums) in enumerate(carry):
      scores = plan.scores(i, j, h, queries[h], keys, x.biases, seen)
      before, highest = highest, jnp.maximum(highest, scores.max(0)[None])
      weights = jnp.exp(scores - highest)
      shrunk = jnp.exp(before - highest)
      total = total * shrunk + weights.sum(0)[None]
      own = plan.rows(values, h)
      sums = sums * shrunk + _product(own, weights.astype(own.dtype), 1, 0)
      new.append((highest, total, sums))
    return tuple(new)

  none = jnp.zeros((1, plan.block_q), jnp.float32)
  sums = jnp.zeros((plan.head_dim, plan.block_q), jnp.float32)
  carry = ((none + _LOWEST, none, sums),) * plan.group
  carry = jax.lax.fori_loop(0, plan.keys // plan.block_k, step, carry)
  means = []
  for h, (highest, total, sums) in enumerate(carry):
    total = jnp.where(total == 0, 1.0, total)
    lse[pl.ds(h, 1), :] = highest + jnp.log(total)
    means.append(sums / total)
  mixed[...] = _joined(means).astype(mixed.dtype)


def _query_gradient(plan, x: _Inputs, gradient, lse, mixed, by_query, common):
  """A block of queries: by_query [block_q, H*D], common [H, block_q].

  `common` is what the softmax takes off all that comes back to a query.
  """
  i = pl.program_id(2)
  queries = [plan.head(x.query[...], h) for h in range(plan.group)]
  gradients = [plan.head(gradient[...], h) for h in range(plan.group)]
  of_mixed = gradient[...].astype(jnp.float32) * mixed[...].astype(jnp.float32)
  of_mixed = of_mixed.T
  commons = [plan.rows(of_mixed, h).sum(0)[None] for h in range(plan.group)]

  def step(j, carry):
    at = _block(j, plan.block_k)
    keys, values = x.key[at, :], x.value[at, :]
    columns = keys.T
    seen = plan.seen(i, j, x.query_segments[...], x.key_segments[at, :])
    new = []
    for h, sums in enumerate(carry):
      scores = plan.scores(i, j, h, queries[h], keys, x.biases, seen)
      weights = jnp.exp(scores - lse[pl.ds(h, 1), :])
      by_weight = _product(values, gradients[h], 1, 1)
      by_score = (weights * (by_weight - commons[h])).astype(keys.dtype)
      new.append(sums + _product(plan.rows(columns, h), by_score, 1, 0))
    return tuple(new)

  sums = jnp.zeros((plan.head_dim, plan.block_q), jnp.float32)
  blocks = plan.keys // plan.block_k
  sums = jax.lax.fori_loop(0, blocks, step, (sums,) * plan.group)
  by_query[...] = _joined(sums).astype(by_query.dtype)
  for h in range(plan.group):
    common[pl.ds(h, 1), :] = commons[h]


def _key_gradient(plan, x: _Inputs, gradient, lse, common, by_key, by_value):
  """A block of keys: by_key and by_value [block_k, H*D]."""
  j = pl.program_id(2)
  keys, values = x.key[...], x.value[...]

  def step(i, carry):
    to_key, to_value = carry
    at = _block(i, plan.block_q)
    seen = plan.seen(i, j, x.query_segments[:, at], x.key_segments[...])
    for h in range(plan.group):
      row = pl.ds(h, 1)
      query = plan.head(x.query[at, :], h)
      own = plan.head(gradient[at, :], h)
      scores = plan.scores(i, j, h, query, keys, x.biases, seen)
      weights = jnp.exp(scores - lse[row, at])
      by_weight = _product(values, own, 1, 1)
      by_score = (weights * (by_weight - common[row, at])).astype(query.dtype)
      to_key += _product(by_score, query, 1, 0)
      to_value += _product(weights.astype(own.dtype), own, 1, 0)
    return to_key, to_value

  none = jnp.zeros(keys.shape, jnp.float32)
  blocks = plan.queries // plan.block_q
  to_key, to_value = jax.lax.fori_loop(0, blocks, step, (none, none))
  by_key[...] = to_key.astype(by_key.dtype)
  by_value[...] = to_value.astype(by_value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, x: _Inputs) -> Float[Array, 'B Q _']:
  return _attend_forward(plan, x)[0]


def _attend_forward(plan, x):
  mixed, lse = _call(_forward, plan, 'query', ('query', 'row'), 2, x)
  return mixed, (x, lse, mixed)


def _attend_backward(plan, saved, gradient):
  x, lse, mixed = saved
  others = ('query', 'row', 'query'), (gradient, lse, mixed)
  by_query, common = _call(
    _query_gradient, plan, 'query', ('query', 'row'), 3, x, *others
  )
  others = ('query', 'row', 'row'), (gradient, lse, common)
  by_key, by_value = _call(
    _key_gradient, plan, 'key', ('key', 'key'), 4, x, *others
  )
  return (
    _Inputs(by_query, by_key, by_value, (None,) * len(x.biases), None, None),
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, plan, cut, results, products, x, names=(), arrays=()):
  """Runs a kernel for each example, group of heads and block.

  Args:
    kernel: takes the plan, then references to blocks of x, arrays and results.
    plan: see there.
    cut: 'query' or 'key': which come a block at a time; of the other the kernel
      has all.
    results: what it makes, of 'query', 'key' (such arrays) and 'row' (float32
      [B, G, H, Q]).
    products: of matrices for each tile, for the compiler's schedule.
    x: arrays.
    names: of `results`'s kinds, what the arrays are.
    arrays: what it takes beside x.
  """
  batch, width = len(x.query), plan.group * plan.head_dim
  groups = x.query.shape[2] // width
  q, k = int(cut == 'query'), int(cut == 'key')
  size_q = plan.block_q if q else plan.queries
  size_k = plan.block_k if k else plan.keys
  row = (batch, groups, plan.group, plan.queries)
  shapes = {
    'query': jax.ShapeDtypeStruct(x.query.shape, x.query.dtype),
    'key': jax.ShapeDtypeStruct(x.key.shape, x.key.dtype),
    'row': jax.ShapeDtypeStruct(row, jnp.float32),
  }
  specs = {
    'query': pl.BlockSpec((None, size_q, width), lambda b, g, i: (b, i * q, g)),
    'key': pl.BlockSpec((None, size_k, width), lambda b, g, i: (b, i * k, g)),
    'row': pl.BlockSpec(
      (None, None, plan.group, size_q), lambda b, g, i: (b, g, 0, i * q)
    ),
  }
  bias = (plan.group, _SUBLANES, plan.queries + plan.keys)
  inputs = _Inputs(
    *(specs['query'], specs['key'], specs['key']),
    (pl.BlockSpec(bias, lambda b, g, i: (g, 0, 0)),) * len(x.biases),
    pl.BlockSpec((None, 1, size_q), lambda b, g, i: (b, 0, i * q)),
    pl.BlockSpec((None, size_k, 1), lambda b, g, i: (b, i * k, 0)),
  )
  weights = batch * groups * plan.group * plan.queries * plan.keys
  moved = jax.tree.leaves((x, arrays, [shapes[name] for name in results]))
  blocks = plan.queries // plan.block_q if q else plan.keys // plan.block_k
  params = pltriton.CompilerParams(num_warps=4, num_stages=2)
  if plan.backend == 'tpu':
    params = pltpu.CompilerParams(dimension_semantics=('parallel',) * 3)
  return pl.pallas_call(
    functools.partial(kernel, plan),
    name=f'attention{kernel.__name__}',
    grid=(batch, groups, blocks),
    in_specs=[inputs, *(specs[name] for name in names)],
    out_specs=[specs[name] for name in results],
    out_shape=[shapes[name] for name in results],
    compiler_params=params,
    cost_estimate=pl.CostEstimate(
      flops=2 * products * weights * plan.head_dim,
      transcendentals=weights,
      bytes_accessed=sum(one.size * one.dtype.itemsize for one in moved),
    ),
    interpret=plan.interpret,
  )(x, *arrays)


def _blocks(
  backend: str, interpret: bool, heads: int, head_dim: int, queries, keys
) -> tuple[int, int, int]:
  """(heads of a block, queries of a tile, keys of a tile).

  `queries` and `keys` are (how many there are, how many of a tile were asked
  for or None).
  """
  if backend == 'tpu':
    # A block's columns are whole lanes, or all that there are.
    fitting = (
      h for h in range(1, heads) if heads % h == 0 == h * head_dim % _LANES
    )
    group, step = next(fitting, heads), _SUBLANES if interpret else _LANES
    block_q = queries[1] or _whole_blocks(queries[0], 8)
    block_k = keys[1] or _whole_blocks(keys[0], 2)
    if block_q % step or block_k % step:
      raise UserError(
        f'block_q and block_k must be multiples of {step} on a TPU, got'
        f' {block_q} and {block_k}'
      )
  elif backend == 'gpu':
    group, block_q, block_k = 1, queries[1] or 64, keys[1] or 64
    for size in (block_q, block_k, head_dim):
      if size & (size - 1):
        raise UserError(
          'block_q, block_k and the head dimension must be powers of 2 on a'
          f' GPU, got {size}'
        )
  else:
    raise UserError(
      f'backend must be one of {", ".join(BACKENDS)}, got {backend!r}'
    )
  return group, block_q, block_k


def _whole_blocks(length: int, most: int) -> int:
  """A block of up to so many times 128 that pads a length to 128s alone."""
  count = -(-length // _LANES)
  return _LANES * max(n for n in range(1, most + 1) if count % n == 0)
