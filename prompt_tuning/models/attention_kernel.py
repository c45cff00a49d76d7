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
of the distances for each head (linear in the length); a tile of it is one
window of that vector, every row of it moved one on.

Compiled for TPUs (Mosaic); for GPUs (Triton) lowered to Triton's language and
run by Pallas's interpreter, but never compiled.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_tuning.errors import UserError
from prompt_tuning.models import layers

BACKENDS = ('tpu', 'gpu')
# The number of a key's segment that every real query may look at.
ANY_SEGMENT = -1
_MASKED = -1e10
# What a maximum starts at: a masked score beside it weighs exactly nothing, so
# a query with nothing to look at gets zeros, and gives no gradient.
_LOWEST = _MASKED / 2
_LANES = 128


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
  path, and so does who drops out weights. Batch and heads are independent:
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
  plan = _plan(query.shape, key.shape[1], block_q, block_k, backend)
  plan = dataclasses.replace(
    plan, key_offset=key_offset, causal=causal, interpret=interpret
  )

  def whole(x, length):
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))

  biases = ()
  if table is not None:
    # [G, H, Q + S]: of query minus key from 1 - S on; the last is never read.
    distance = jnp.arange(plan.keys - 1, -plan.queries - 1, -1) + key_offset
    bucket = layers.relative_position_bucket(
      distance,
      bidirectional=bidirectional,
      num_buckets=table.shape[1],
      max_distance=max_distance,
    )
    table = jax.lax.stop_gradient(table).astype(jnp.float32)
    biases = (table[:, bucket].reshape(-1, plan.group, bucket.size),)
  mixed = _attend(
    plan,
    whole(query, plan.queries),
    whole(key, plan.keys),
    whole(value, plan.keys),
    biases,
    whole(query_segments, plan.queries).reshape(batch, 1, -1),
    whole(key_segments, plan.keys),
  )
  return mixed[:, :queries].reshape(batch, queries, heads, head_dim)


def sharded_attention(
  mesh: jax.sharding.Mesh,
  batch_axes: str | tuple[str, ...] | None,
  head_axes: str | tuple[str, ...] | None,
  query: Float[Array, 'B Q N D'],
  key: Float[Array, 'B S N D'],
  value: Float[Array, 'B S N D'],
  table: Float[Array, 'N _'] | None,
  query_segments: Int[Array, 'B Q'],
  key_segments: Int[Array, 'B S'],
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
  )(query, key, value, table, query_segments, key_segments)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How a call is cut up; lengths are those of whole blocks.

  Attributes:
    group: H, heads of a block.
    head_dim: D.
    queries: Q, all of them.
    keys: S.
    block_q: queries of a tile.
    block_k: keys of a tile.
    backend: of `BACKENDS`.
    key_offset: see `attention`, as for the others.
  """

  group: int
  head_dim: int
  queries: int
  keys: int
  block_q: int
  block_k: int
  backend: str
  key_offset: int = 0
  causal: bool = False
  interpret: bool = False

  def head(self, x: jax.Array, h: int) -> jax.Array:
    """[_, H*D] with the columns of other heads than the block's h-th zeroed."""
    if self.group == 1:
      return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    own = (column >= h * self.head_dim) & (column < (h + 1) * self.head_dim)
    return jnp.where(own, x, jnp.zeros_like(x))

  def rows(self, x: jax.Array, h: int) -> jax.Array:
    """[H*D, _] to the rows of the block's h-th head."""
    if self.group == 1:
      return x
    return x[h * self.head_dim : (h + 1) * self.head_dim]

  def seen(self, i, j, query_segments, key_segments) -> jax.Array:
    """[block_k, block_q]: whether the query may look at the key."""
    same = (key_segments == query_segments) | (key_segments == ANY_SEGMENT)
    seen = same & (query_segments > 0)
    if self.causal:
      row = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 0)
      column = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1)
      first = j * self.block_k + self.key_offset - i * self.block_q
      seen &= first + row <= column
    return seen

  def scores(self, i, j, h, query, key, biases, seen) -> jax.Array:
    """[block_k, block_q] of a head; `query` is of this head alone."""
    scores = _product(key, query, 1, 1)
    for bias in biases:
      scores += self._bias(bias, i, j, h)
    return jnp.where(seen, scores, _MASKED)

  def _bias(self, bias, i, j, h) -> jax.Array:
    """A tile of bias[h, query - key + S - 1], of a reference to [H, Q + S]."""
    first = i * self.block_q - j * self.block_k + self.keys
    shape = (self.block_k, self.block_q)
    if self.backend == 'gpu':
      row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
      column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
      return bias[h, first - 1 + column - row]
    count = math.gcd(self.block_k, _LANES)
    tiles = []
    for row in range(0, self.block_k, count):
      # Row r of the tile wants the window from `count - 1 - r` on. Moved right
      # by r + 1, every row has it from `count` on.
      start = pl.multiple_of(first - row - count, count)
      window = bias[pl.ds(h, 1), pl.ds(start, count + self.block_q)]
      window = jnp.broadcast_to(window, (count, count + self.block_q))
      tile = pltpu.roll(window, 1, 1, stride=1, stride_axis=0)
      tiles.append(tile[:, count:])
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles)

  def key_blocks(self, i) -> Any:
    """How many blocks of keys the i-th block of queries may look at."""
    blocks = self.keys // self.block_k
    if not self.causal:
      return blocks
    last = (i + 1) * self.block_q - self.key_offset - 1
    return jnp.clip(last // self.block_k + 1, 0, blocks)

  def first_query_block(self, j) -> Any:
    """The first block of queries that may look at the j-th block of keys."""
    if not self.causal:
      return 0
    first = j * self.block_k + self.key_offset
    return jnp.clip(first // self.block_q, 0, self.queries // self.block_q)


def _product(a: jax.Array, b: jax.Array, at_a: int, at_b: int) -> jax.Array:
  """Matrix product over axis `at_a` of a and `at_b` of b, in float32."""
  return jax.lax.dot_general(
    a, b, (((at_a,), (at_b,)), ((), ())), preferred_element_type=jnp.float32
  )


def _block(index, size: int) -> Any:
  return pl.ds(pl.multiple_of(index * size, size), size)


def _forward_kernel(
  plan, query, key, value, biases, query_segments, key_segments, mixed, lse
):
  i = pl.program_id(2)
  queries = [plan.head(query[...], h) for h in range(plan.group)]

  def step(j, carry):
    at = _block(j, plan.block_k)
    keys, values = key[at, :], value[at, :].T
    seen = plan.seen(i, j, query_segments[...], key_segments[at, :])
    new = []
    for h, (highest, total, sums) in enumerate(carry):
      scores = plan.scores(i, j, h, queries[h], keys, biases, seen)
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
  carry = jax.lax.fori_loop(0, plan.key_blocks(i), step, carry)
  means = []
  for h, (highest, total, sums) in enumerate(carry):
    total = jnp.where(total == 0, 1.0, total)
    lse[pl.ds(h, 1), :] = highest + jnp.log(total)
    means.append(sums / total)
  mixed[...] = _joined(means).astype(mixed.dtype)


def _joined(heads: list[jax.Array]) -> jax.Array:
  """[_, H*D] of [D, _] for each head."""
  return (heads[0] if len(heads) == 1 else jnp.concatenate(heads)).T


def _query_gradient_kernel(
  plan,
  query,
  key,
  value,
  biases,
  query_segments,
  key_segments,
  gradient,
  lse,
  common,
  by_query,
):
  i = pl.program_id(2)
  queries = [plan.head(query[...], h) for h in range(plan.group)]
  gradients = [plan.head(gradient[...], h) for h in range(plan.group)]

  def step(j, carry):
    at = _block(j, plan.block_k)
    keys, values = key[at, :], value[at, :]
    columns = keys.T
    seen = plan.seen(i, j, query_segments[...], key_segments[at, :])
    new = []
    for h, sums in enumerate(carry):
      row = pl.ds(h, 1)
      scores = plan.scores(i, j, h, queries[h], keys, biases, seen)
      weights = jnp.exp(scores - lse[row, :])
      by_weight = _product(values, gradients[h], 1, 1)
      by_score = (weights * (by_weight - common[row, :])).astype(keys.dtype)
      new.append(sums + _product(plan.rows(columns, h), by_score, 1, 0))
    return tuple(new)

  sums = jnp.zeros((plan.head_dim, plan.block_q), jnp.float32)
  sums = jax.lax.fori_loop(0, plan.key_blocks(i), step, (sums,) * plan.group)
  by_query[...] = _joined(list(sums)).astype(by_query.dtype)


def _key_gradient_kernel(
  plan,
  query,
  key,
  value,
  biases,
  query_segments,
  key_segments,
  gradient,
  lse,
  common,
  by_key,
  by_value,
):
  j = pl.program_id(2)
  keys, values = key[...], value[...]

  def step(i, carry):
    to_key, to_value = carry
    at = _block(i, plan.block_q)
    seen = plan.seen(i, j, query_segments[:, at], key_segments[...])
    for h in range(plan.group):
      row = pl.ds(h, 1)
      own = plan.head(query[at, :], h)
      given = plan.head(gradient[at, :], h)
      scores = plan.scores(i, j, h, own, keys, biases, seen)
      weights = jnp.exp(scores - lse[row, at])
      by_weight = _product(values, given, 1, 1)
      by_score = (weights * (by_weight - common[row, at])).astype(own.dtype)
      to_key += _product(by_score, own, 1, 0)
      to_value += _product(weights.astype(given.dtype), given, 1, 0)
    return to_key, to_value

  none = jnp.zeros(keys.shape, jnp.float32)
  first, end = plan.first_query_block(j), plan.queries // plan.block_q
  to_key, to_value = jax.lax.fori_loop(first, end, step, (none, none))
  by_key[...] = to_key.astype(by_key.dtype)
  by_value[...] = to_value.astype(by_value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, biases, query_segments, key_segments):
  """[B, Q, N*D] of such, of biases [G, H, Q + S] and segments."""
  arguments = query, key, value, biases, query_segments, key_segments
  return _attend_forward(plan, *arguments)[0]


def _attend_forward(plan, query, *others):
  arguments = query, *others
  mixed, lse = _call(
    _forward_kernel, plan, 'query', ('query', 'row'), arguments
  )
  return mixed, (*arguments, mixed, lse)


def _attend_backward(plan, saved, gradient):
  *arguments, mixed, lse = saved
  # The softmax takes off what all weights of a query have in common.
  common = gradient.astype(jnp.float32) * mixed.astype(jnp.float32)
  heads = (*common.shape[:2], -1, plan.group, plan.head_dim)
  common = jnp.moveaxis(common.reshape(heads).sum(-1), 1, -1)
  arguments = (*arguments, gradient, lse, common)
  (by_query,) = _call(
    _query_gradient_kernel, plan, 'query', ('query',), arguments
  )
  by_key, by_value = _call(
    _key_gradient_kernel, plan, 'key', ('key', 'key'), arguments
  )
  return by_query, by_key, by_value, (None,) * len(saved[3]), None, None


_attend.defvjp(_attend_forward, _attend_backward)


# Products of matrices for each tile.
_PRODUCTS = {
  _forward_kernel: 2,
  _query_gradient_kernel: 3,
  _key_gradient_kernel: 4,
}


def _call(
  kernel: Callable[..., None],
  plan: _Plan,
  cut: str,
  results: tuple[str, ...],
  arguments: tuple[Any, ...],
) -> list[jax.Array]:
  """Runs a kernel for each example, group of heads and block.

  Args:
    kernel: takes the plan, then references to blocks of arguments and results.
    plan: see there.
    cut: 'query' or 'key': which come a block at a time; of the other the kernel
      has all.
    results: what it makes, of 'query', 'key' (arrays like these) and 'row'
      (float32, [B, G, H, Q]).
    arguments: query, key, value, biases, segments of queries and of keys; for a
      gradient then that of the output, and the rows `lse` and `common`.
  """
  query, key, _, biases = arguments[:4]
  batch, width = len(query), plan.group * plan.head_dim
  groups = query.shape[2] // width
  at_q, at_k = int(cut == 'query'), int(cut == 'key')
  some_q = plan.block_q if at_q else plan.queries
  some_k = plan.block_k if at_k else plan.keys
  row = (batch, groups, plan.group, plan.queries)
  shapes = {
    'query': jax.ShapeDtypeStruct(query.shape, query.dtype),
    'key': jax.ShapeDtypeStruct(key.shape, key.dtype),
    'row': jax.ShapeDtypeStruct(row, jnp.float32),
  }
  specs = {
    'query': pl.BlockSpec(
      (None, some_q, width), lambda b, g, i: (b, i * at_q, g)
    ),
    'key': pl.BlockSpec(
      (None, some_k, width), lambda b, g, i: (b, i * at_k, g)
    ),
    'bias': pl.BlockSpec(
      (None, plan.group, plan.queries + plan.keys), lambda b, g, i: (g, 0, 0)
    ),
    'query_segments': pl.BlockSpec(
      (None, 1, some_q), lambda b, g, i: (b, 0, i * at_q)
    ),
    'key_segments': pl.BlockSpec(
      (None, some_k, 1), lambda b, g, i: (b, i * at_k, 0)
    ),
    'row': pl.BlockSpec(
      (None, None, plan.group, some_q), lambda b, g, i: (b, g, 0, i * at_q)
    ),
  }
  names = ('query', 'key', 'key', 'bias', 'query_segments', 'key_segments')
  names = (*names, 'query', 'row', 'row')[: len(arguments)]
  weights = batch * groups * plan.group * plan.queries * plan.keys
  moved = [*jax.tree.leaves(arguments), *(shapes[name] for name in results)]
  blocks = plan.queries // plan.block_q if at_q else plan.keys // plan.block_k
  params = pltriton.CompilerParams(num_warps=4, num_stages=2)
  if plan.backend == 'tpu':
    params = pltpu.CompilerParams(dimension_semantics=('parallel',) * 3)
  return pl.pallas_call(
    functools.partial(kernel, plan),
    name=kernel.__name__.strip('_'),
    grid=(batch, groups, blocks),
    in_specs=[
      (specs[name],) * len(biases) if name == 'bias' else specs[name]
      for name in names
    ],
    out_specs=[specs[name] for name in results],
    out_shape=[shapes[name] for name in results],
    compiler_params=params,
    cost_estimate=pl.CostEstimate(
      flops=2 * _PRODUCTS[kernel] * weights * plan.head_dim,
      transcendentals=weights,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    ),
    interpret=plan.interpret,
  )(*arguments)


def _plan(shape, keys: int, block_q, block_k, backend: str) -> _Plan:
  """Cuts `keys` keys and a query of this shape into blocks."""
  _, queries, heads, head_dim = shape
  if backend not in BACKENDS:
    raise UserError(
      f'backend must be one of {", ".join(BACKENDS)}, got {backend!r}'
    )
  if backend == 'gpu':
    group, block_q, block_k = 1, block_q or 64, block_k or 64
    for name, size in (('block_q', block_q), ('block_k', block_k)):
      if size & (size - 1):
        raise UserError(f'{name} must be a power of 2 on a GPU, got {size}')
    if head_dim & (head_dim - 1):
      raise UserError(
        f'the head dimension must be a power of 2 on a GPU, got {head_dim}'
      )
  else:
    # A block's columns are whole lanes, or all that there are.
    fitting = (
      h for h in range(1, heads) if heads % h == 0 == h * head_dim % _LANES
    )
    group = next(fitting, heads)
    block_q = block_q or _whole_blocks(queries, 8)
    block_k = block_k or _whole_blocks(keys, 2)
  return _Plan(
    group=group,
    head_dim=head_dim,
    queries=-(-queries // block_q) * block_q,
    keys=-(-keys // block_k) * block_k,
    block_q=block_q,
    block_k=block_k,
    backend=backend,
  )


def _whole_blocks(length: int, most: int) -> int:
  """A block of up to so many times 128 that pads a length to 128s alone."""
  count = -(-length // _LANES)
  return _LANES * max(n for n in range(1, most + 1) if count % n == 0)
