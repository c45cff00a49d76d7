"""T5's building blocks: RMS norm, projection, feed-forward, position bias.

Parameter names and shapes are those of T5X, so public checkpoints load as
they are. No layer of T5 has a bias term.
"""

from collections.abc import Callable, Sequence

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prompt_tuning.models import quantization

# Every kernel starts with variance 1 / fan_in, as in T5X.
kernel_init = nn.initializers.variance_scaling(
  1.0, 'fan_in', 'truncated_normal'
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: nn.gelu(x, approximate=True),  # T5's is the tanh form.
  'relu': nn.relu,
  'silu': nn.silu,
  'linear': lambda x: x,
}


def constrain(x: Float[Array, '*S'], *names: str | None) -> Float[Array, '*S']:
  """Says which logical axes an array has, for who splits it over devices.

  An axis called None is whole.

  Outside of `partitioning.Layout.jit` (or T5X's partitioner) it does nothing.
  """
  return nn.with_logical_constraint(x, names)


def rms_norm(
  x: Float[Array, '*B E'],
  scale: Float[Array, 'E'],
  dtype: str,
  epsilon: float = 1e-6,
) -> Float[Array, '*B E']:
  """Scales to unit root mean square; no mean is taken off, no bias is added.

  Computed in float32 whatever `dtype` is, and returned in `dtype`.
  """
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
  x = x * lax.rsqrt(mean_square + epsilon)
  # A frozen scale may be stored in bfloat16: it is widened here.
  scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (x * scale).astype(dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with a learnt scale."""

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, '*B E']) -> Float[Array, '*B E']:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return rms_norm(x, scale, self.dtype)


class Dense(nn.Module):
  """A matrix product without bias: kernel [inputs, features]."""

  features: int
  dtype: str = 'float32'
  init: Callable = kernel_init

  @nn.compact
  def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
    kernel = self.param('kernel', self.init, (x.shape[-1], self.features))
    x = x.astype(self.dtype)
    if isinstance(kernel, quantization.Quantized):
      return quantization.matmul(x, kernel)
    return x @ kernel.astype(self.dtype)


class MLP(nn.Module):
  """Feed-forward block; two activations make it gated (T5 1.1's gelu, linear).

  Kernels are named `wi` for one activation and `wi_0`, `wi_1` for a gate.
  """

  mlp_dim: int
  activations: Sequence[str]
  dropout_rate: float
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T E'], *, deterministic: bool
  ) -> Float[Array, 'B T E']:
    embed = x.shape[-1]
    gate = None
    for i, activation in enumerate(self.activations):
      name = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      y = ACTIVATIONS[activation](Dense(self.mlp_dim, self.dtype, name=name)(x))
      gate = y if gate is None else gate * y
    gate = dropout(self.dropout_rate)(gate, deterministic=deterministic)
    gate = constrain(gate, 'batch', 'length', 'mlp')
    return Dense(embed, self.dtype, name='wo')(gate)


def dropout(rate: float) -> nn.Dropout:
  """T5's dropout: one mask for all positions of a sequence."""
  return nn.Dropout(rate, broadcast_dims=(-2,))


def relative_position_bucket(
  relative_position: Int[Array, '*S'],
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> Int[Array, '*S']:
  """Bucket of a relative position (key minus query), as in T5 (section 2.1).

  Half of the buckets hold one exact distance each, the other half ranges that
  grow logarithmically up to `max_distance`; beyond it all share the last one.
  A bidirectional stack spends half of the buckets on each sign.
  """
  distance = -relative_position
  offset = jnp.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = jnp.where(distance < 0, num_buckets, 0).astype(distance.dtype)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(distance, 0)
  exact = num_buckets // 2
  # The small constant keeps log(0) out; those distances take the exact branch.
  ratio = jnp.log(distance.astype(jnp.float32) / exact + 1e-6)
  ratio = ratio / jnp.log(jnp.float32(max_distance / exact))
  far = exact + (ratio * (num_buckets - exact)).astype(distance.dtype)
  far = jnp.minimum(far, num_buckets - 1)
  return offset + jnp.where(distance < exact, distance, far)


@struct.dataclass
class PositionBias:
  """What is added to scores: the table's entry for each relative position.

  Attributes:
    table: a number for each head and bucket.
    query_positions: of the queries.
    key_positions: of the keys.
    bidirectional: see `relative_position_bucket`.
    max_distance: likewise.
  """

  table: Float[Array, 'N _']
  query_positions: Int[Array, 'Q']
  key_positions: Int[Array, 'S']
  bidirectional: bool = struct.field(pytree_node=False)
  max_distance: int = struct.field(pytree_node=False)

  def array(self) -> Float[Array, '1 N Q S']:
    """float32, since it is added to float32 scores."""
    buckets = relative_position_bucket(
      self.key_positions[None, :] - self.query_positions[:, None],
      bidirectional=self.bidirectional,
      num_buckets=self.table.shape[1],
      max_distance=self.max_distance,
    )
    return self.table.astype(jnp.float32)[None, :, buckets]


class RelativePositionBias(nn.Module):
  """One learnt bias for each head and bucket, shared by a stack's layers."""

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool

  @nn.compact
  def __call__(
    self,
    query_positions: Int[Array, 'Q'],
    key_positions: Int[Array, 'S'],
  ) -> PositionBias:
    table = self.param(
      'rel_embedding',
      nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (self.num_heads, self.num_buckets),
    )
    return PositionBias(
      table,
      query_positions,
      key_positions,
      self.bidirectional,
      self.max_distance,
    )
