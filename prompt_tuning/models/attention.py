"""Multi-head attention with T5's masks and a cache for decoding.

Who may look at whom (`Mask`) and how far apart they stand
(`layers.PositionBias`) are said by ids and positions; `attend` turns them into
the values that each query mixes, and is the one place where an implementation
is chosen.

T5 does not scale scores by 1 / sqrt(head_dim); the query's initialiser holds
that factor instead. Scores and softmax are float32 whatever the activations
are.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning.errors import UserError
from prompt_tuning.models import layers

MASKED = -1e10
# The number of a key's segment that every real query may look at.
ANY_SEGMENT = -1
# What `T5Config.attention` may be: `mix`, or `attention_kernel` for a backend.
KERNELS = {
  'tpu_kernel': {'backend': 'tpu'},
  'gpu_kernel': {'backend': 'gpu'},
  'interpreted_kernel': {'interpret': True},
}
IMPLEMENTATIONS = ('formula', *KERNELS)

_normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


def runs_on(implementation: str, platform: str) -> bool:
  """Whether devices of a platform ('cpu', 'gpu', 'tpu') can run it."""
  return KERNELS.get(implementation, {}).get('backend', platform) == platform


def require_trainable_biases(implementation: str) -> None:
  """UserError where it takes position biases as frozen; for who trains T5."""
  if implementation in KERNELS:
    raise UserError(
      f'T5Config.attention={implementation!r} takes position biases as frozen;'
      " train T5 itself with T5Config.attention='formula'"
    )


@struct.dataclass
class Mask:
  """Which queries may look at which keys.

  Attributes:
    query_segments: number of each query's packed example, 0 for padding.
    key_segments: likewise; ANY_SEGMENT is looked at by all.
    query_positions: with those of the keys: no query looks at a key after it.
      None: it may.
    key_positions: see there.
  """

  query_segments: Int[Array, 'B Q']
  key_segments: Int[Array, 'B S']
  query_positions: Int[Array, 'Q'] | None = None
  key_positions: Int[Array, 'S'] | None = None

  def array(self) -> Bool[Array, 'B 1 Q S']:
    """True where the query may look at the key."""
    query = self.query_segments[:, :, None]
    key = self.key_segments[:, None, :]
    seen = (query > 0) & ((query == key) | (key == ANY_SEGMENT))
    if self.query_positions is not None:
      earlier = self.key_positions[None, :] <= self.query_positions[:, None]
      seen &= earlier[None]
    return seen[:, None]


def see_keys_in_front(
  mask: Mask | Bool[Array, '#B 1 #Q S'] | None, count: int
) -> Mask | Bool[Array, '#B 1 #Q _'] | None:
  """The mask with so many more keys before all others, seen by every query."""
  if mask is None:
    return None
  if not isinstance(mask, Mask):
    before = ((0, 0), (0, 0), (0, 0), (count, 0))
    return jnp.pad(mask, before, constant_values=True)
  before = ((0, 0), (count, 0))
  segments = jnp.pad(mask.key_segments, before, constant_values=ANY_SEGMENT)
  positions = mask.key_positions
  if positions is not None:
    positions = jnp.concatenate([jnp.arange(-count, 0), positions])
  return mask.replace(key_segments=segments, key_positions=positions)


def _array(what):
  return what.array() if isinstance(what, Mask | layers.PositionBias) else what


@jax.custom_vjp
def mix(
  query: Float[Array, 'B N Q D'],
  key: Float[Array, 'B N S D'],
  value: Float[Array, 'B N S D'] | None,
  bias: Float[Array, '1 N Q S'] | None,
  mask: Bool[Array, '#B 1 #Q S'] | None,
  keep: Float[Array, 'B #N #Q S'] | None,
) -> Float[Array, 'B N Q D']:
  """Values mixed by the softmax of each query's scores, with their gradient.

  Heads stand before positions, so that each product is one of plain matrices.
  What is kept for the gradient is the weights and what goes in and out; what
  each product takes has the activations' type, what it sums up is float32.

  Args:
    query: of the activations' type, as keys and values.
    key: see there.
    value: see there; None: the keys are the values, and have one gradient,
      which devices that share the heads out add up once.
    bias: added to the scores; its gradient is computed if somebody asks.
    mask: False where a query may not look.
    keep: weights are multiplied by it, as dropout does.
  """
  return _mix_forward(query, key, value, bias, mask, keep)[0]


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _mix_forward(query, key, value, bias, mask, keep):
  scores = _product('bnqd,bnsd->bnqs', query, key)
  if bias is not None:
    scores += bias
  if mask is not None:
    # Added, not substituted: a row with nothing to look at keeps T5X's
    # distribution instead of a uniform one.
    scores += jnp.where(mask, 0.0, MASKED)
  weights = jax.nn.softmax(scores).astype(query.dtype)
  kept = weights if keep is None else weights * keep
  values = key if value is None else value
  mixed = _product('bnqs,bnsd->bnqd', kept, values).astype(query.dtype)
  biased = None if bias is None else ()
  return mixed, (query, key, value, weights, mixed, keep, biased)


def _mix_backward(saved, gradient):
  query, key, value, weights, mixed, keep, biased = saved
  dtype = query.dtype
  values = key if value is None else value
  by_weight = _product('bnqd,bnsd->bnqs', gradient, values)
  kept = weights
  if keep is not None:
    by_weight *= keep.astype(jnp.float32)
    kept *= keep
  # The softmax takes off what all weights of a row have in common.
  common = mixed.astype(jnp.float32) * gradient.astype(jnp.float32)
  common = jnp.sum(common, -1, keepdims=True)
  by_score = weights.astype(jnp.float32) * (by_weight - common)
  narrow = by_score.astype(dtype)
  by_key = _product('bnqs,bnqd->bnsd', narrow, query)
  by_value = _product('bnqs,bnqd->bnsd', kept, gradient)
  if value is None:
    by_key, by_value = by_key + by_value, None
  return (
    _product('bnqs,bnsd->bnqd', narrow, key).astype(dtype),
    by_key.astype(dtype),
    None if by_value is None else by_value.astype(dtype),
    None if biased is None else jnp.sum(by_score, 0, keepdims=True),
    None,
    None,
  )


mix.defvjp(_mix_forward, _mix_backward)


def _through_kernel(
  query: Float[Array, 'B Q N D'],
  key: Float[Array, 'B S N D'],
  value: Float[Array, 'B S N D'],
  mask: Mask,
  bias: layers.PositionBias | None,
  settings: Mapping[str, Any],
) -> Float[Array, 'B Q N D']:
  """`attention_kernel`, on the devices that the arrays are split over."""
  # Pallas is imported by those alone who run it.
  from prompt_tuning.models import attention_kernel

  arrays = (query, key, value, None if bias is None else bias.table)
  arrays = (*arrays, mask.query_segments, mask.key_segments)
  settings = {**settings, 'causal': mask.query_positions is not None}
  if bias is not None or settings['causal']:
    # Of a sequence that looks at itself: more keys than queries are in front.
    settings['key_offset'] = query.shape[1] - key.shape[1]
  if bias is not None:
    settings['bidirectional'] = bias.bidirectional
    settings['max_distance'] = bias.max_distance
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attention_kernel.attention(*arrays, **settings)
  batch, _, heads, _ = nn.logical_to_mesh_axes(
    ('batch', 'length', 'heads', 'kv')
  )
  return attention_kernel.sharded_attention(
    mesh, batch, heads, *arrays, **settings
  )


class Attention(nn.Module):
  """Attention of `inputs_q` over `inputs_kv`; kernels [E, N*D] and [N*D, E].

  With `decode`, keys and values live in the collection `cache`. A first call
  in which the cache does not exist creates it: room for all positions of
  `inputs_q` in self-attention, the projections of `inputs_kv` in
  cross-attention (computed once, not at every step). Each later call takes one
  position, `cache_index`.

  Few queries that look at much text need no keys and values of it: the
  projections are taken from the text to the queries, (q Wk') x' and (w x) Wv
  instead of q (x Wk)' and w (x Wv), which are the same numbers (`absorb`).
  Where there are fewer queries than D it is less work, and no cache is kept;
  in decoding that is all tokens of all beams (`predict_batch_with_aux` says
  so: what a first call has cached is read). Who acts on keys or values
  (`methods.Method.acts_on_keys`) finds none then.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: str = 'float32'
  absorb: bool = False
  implementation: str = 'formula'

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, 'B Q E'],
    inputs_kv: Float[Array, 'B S E'] | None,
    mask: Mask | Bool[Array, '#B 1 #Q S'] | None,
    # As long as the keys that `attend` sees, which a method may add to.
    bias: layers.PositionBias | Float[Array, '1 N Q _'] | None = None,
    *,
    deterministic: bool,
    decode: bool = False,
    cache_index: Int[Array, ''] | None = None,
  ) -> Float[Array, 'B Q E']:
    is_self = inputs_kv is None

    def project(name, x, init=_normal):
      y = layers.Dense(
        self.num_heads * self.head_dim, self.dtype, init, name=name
      )(x)
      y = y.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
      return layers.constrain(y, 'batch', 'length', 'heads', 'kv')

    def query_init(key, shape, dtype=jnp.float32):
      # The 1 / sqrt(head_dim) that the scores do without.
      return _normal(key, shape, dtype) * self.head_dim**-0.5

    query = project('query', inputs_q, query_init)  # [B, Q, N, D]
    cached = decode and self.has_variable('cache', 'cached_key')
    if (
      self.absorb
      and not (is_self or cached or self.is_initializing())
      and inputs_q.shape[1] < self.head_dim
    ):
      mixed = self._absorbed(query, inputs_kv, mask, deterministic)
    else:
      if cached and not is_self:
        key = self.get_variable('cache', 'cached_key')
        value = self.get_variable('cache', 'cached_value')
      else:
        keys_from = inputs_q if is_self else inputs_kv
        key = project('key', keys_from)  # [B, S, N, D]
        value = project('value', keys_from)
      if decode and not cached:
        empty = jnp.zeros_like if is_self else lambda x: x
        self.variable('cache', 'cached_key', empty, key)
        self.variable('cache', 'cached_value', empty, value)
      elif decode and is_self:
        at = (0, cache_index, 0, 0)
        key = jax.lax.dynamic_update_slice(
          self.get_variable('cache', 'cached_key'), key, at
        )
        value = jax.lax.dynamic_update_slice(
          self.get_variable('cache', 'cached_value'), value, at
        )
        self.put_variable('cache', 'cached_key', key)
        self.put_variable('cache', 'cached_value', value)
      mixed = self.attend(
        query, key, value, mask, bias, deterministic=deterministic
      )
    mixed = mixed.reshape(*mixed.shape[:2], self.num_heads * self.head_dim)
    mixed = layers.constrain(mixed, 'batch', 'length', 'joined_kv')
    return layers.Dense(
      inputs_q.shape[-1],
      self.dtype,
      _normal,
      name='out',
    )(mixed)

  def attend(
    self,
    query: Float[Array, 'B Q N D'],
    key: Float[Array, 'B S N D'],
    value: Float[Array, 'B S N D'],
    mask: Mask | Bool[Array, '#B 1 #Q S'] | None,
    bias: layers.PositionBias | Float[Array, '1 N Q S'] | None,
    *,
    deterministic: bool,
  ) -> Float[Array, 'B Q N D']:
    """The values that each query's softmax over the keys mixes.

    Every kernel goes through here: the one that `implementation` names takes a
    `Mask` (and a `PositionBias`), `mix` all else, as single steps of decoding.
    """
    keep = self._keep(key.shape[:2], deterministic)
    if self.implementation in KERNELS and isinstance(mask, Mask):
      if keep is not None:  # all queries drop the same keys
        value *= keep.transpose(0, 3, 1, 2)
      return _through_kernel(
        query, key, value, mask, bias, KERNELS[self.implementation]
      )
    mask, bias = _array(mask), _array(bias)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return mix(query, key, value, bias, mask, keep).swapaxes(1, 2)

  def _absorbed(
    self,
    query: Float[Array, 'B Q N D'],
    inputs: Float[Array, 'B S E'],
    mask: Mask | Bool[Array, '#B 1 #Q S'],
    deterministic: bool,
  ) -> Float[Array, 'B Q N D']:
    """As `attend` with the keys and values of `inputs`, without those."""
    batch, length, heads, size = query.shape

    def kernel(name):  # [E, N, D], gathered where its rows are split
      kernel = self.get_variable('params', name)['kernel'].astype(self.dtype)
      kernel = kernel.reshape(-1, heads, size)
      return layers.constrain(kernel, None, 'heads', 'kv')

    query = jnp.einsum('bqnd,end->bnqe', query, kernel('key'))
    query = layers.constrain(query, 'batch', 'heads', 'length', 'embed')
    keep = self._keep(inputs.shape[:2], deterministic)
    if keep is not None:
      keep = jnp.repeat(keep, length, axis=2)  # [B, N, Q, S]
      keep = keep.reshape(batch, 1, heads * length, -1)
    mask = _array(mask)
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, mask.shape[3]))
    # The heads' queries are the many of one head as wide as the stream.
    mixed = mix(
      query.reshape(batch, 1, heads * length, -1),
      inputs.astype(self.dtype)[:, None],
      None,
      None,
      jnp.tile(mask, (1, 1, heads, 1)),
      keep,
    )
    mixed = mixed.reshape(batch, heads, length, -1)
    mixed = layers.constrain(mixed, 'batch', 'heads', 'length', 'embed')
    return jnp.einsum('bnqe,end->bqnd', mixed, kernel('value'))

  def _keep(
    self, shape: tuple[int, int], deterministic: bool
  ) -> Float[Array, 'B N 1 S'] | None:
    """What dropout multiplies weights by; None: by nothing."""
    if deterministic or not self.dropout_rate:
      return None
    batch, keys = shape
    ones = jnp.ones((batch, self.num_heads, 1, keys), self.dtype)
    return layers.dropout(self.dropout_rate)(ones, deterministic=False)
