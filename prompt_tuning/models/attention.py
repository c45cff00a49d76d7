"""Multi-head attention with T5's masks and a cache for decoding.

T5 does not scale scores by 1 / sqrt(head_dim); the query's initialiser holds
that factor instead. Scores and softmax are float32 whatever `dtype` is.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning.models import layers

MASKED = -1e10

_normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


def padding_mask(
  query_valid: Bool[Array, 'B Q'], key_valid: Bool[Array, 'B S']
) -> Bool[Array, 'B 1 Q S']:
  """True where a real query may look at a real key."""
  return (query_valid[:, :, None] & key_valid[:, None, :])[:, None]


def segment_mask(
  query_segments: Int[Array, 'B Q'], key_segments: Int[Array, 'B S']
) -> Bool[Array, 'B 1 Q S']:
  """True where query and key belong to the same packed example."""
  return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def causal_mask(length: int) -> Bool[Array, '1 1 L L']:
  """True where the key is not after the query."""
  return jnp.tril(jnp.ones((length, length), bool))[None, None]


class Attention(nn.Module):
  """Attention of `inputs_q` over `inputs_kv`; kernels [E, N*D] and [N*D, E].

  With `decode`, keys and values live in the collection `cache`. A first call
  in which the cache does not exist creates it: room for all positions of
  `inputs_q` in self-attention, the projections of `inputs_kv` in
  cross-attention (computed once, not at every step). Each later call takes one
  position, `cache_index`.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, 'B Q E'],
    inputs_kv: Float[Array, 'B S E'] | None,
    mask: Bool[Array, '#B 1 #Q S'] | None,
    # As long as the keys that `attend` sees, which a method may add to.
    bias: Float[Array, '1 N Q _'] | None = None,
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
    keys_from = inputs_q if is_self else inputs_kv
    cached = decode and self.has_variable('cache', 'cached_key')
    if not (cached and not is_self):
      key = project('key', keys_from)  # [B, S, N, D]
      value = project('value', keys_from)
    if decode:
      if cached and not is_self:
        key = self.get_variable('cache', 'cached_key')
        value = self.get_variable('cache', 'cached_value')
      elif cached:
        at = (0, cache_index, 0, 0)
        key = jax.lax.dynamic_update_slice(
          self.get_variable('cache', 'cached_key'), key, at
        )
        value = jax.lax.dynamic_update_slice(
          self.get_variable('cache', 'cached_value'), value, at
        )
        self.put_variable('cache', 'cached_key', key)
        self.put_variable('cache', 'cached_value', value)
      else:
        empty = jnp.zeros_like if is_self else lambda x: x
        self.variable('cache', 'cached_key', empty, key)
        self.variable('cache', 'cached_value', empty, value)

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
    mask: Bool[Array, '#B 1 #Q S'] | None,
    bias: Float[Array, '1 N Q S'] | None,
    *,
    deterministic: bool,
  ) -> Float[Array, 'B Q N D']:
    """The values that each query's softmax over the keys mixes."""
    scores = jnp.einsum(
      'bqnd,bsnd->bnqs', query, key, preferred_element_type=jnp.float32
    )
    if bias is not None:
      scores += bias
    if mask is not None:
      # Added, not substituted: a row with nothing to look at keeps T5X's
      # distribution instead of a uniform one.
      scores += jnp.where(mask, 0.0, MASKED)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    weights = layers.dropout(self.dropout_rate)(
      weights, deterministic=deterministic
    )
    return jnp.einsum('bnqs,bsnd->bqnd', weights, value)
