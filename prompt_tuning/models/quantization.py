"""Frozen kernels as 8-bit integers with a scale for each output channel.

The 8 bits are for storage alone: a product takes the integers in the
activations' type, in which each of them is exact, and multiplies the channels
of what comes out by their scales. Embeddings, output layer, norms and position
biases stay as they are: they are small, or read by more than products.
"""

from typing import Any

from flax import struct
import jax
from jax.experimental.layout import Format
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

LARGEST = 127


@struct.dataclass
class Quantized:
  """A kernel [inputs, outputs], or of scanned layers [inputs, layers, outputs].

  Attributes:
    values: whole numbers from -127 to 127, int8.
    scale: what a number of each output channel counts, float32; its axis of
      inputs has size 1.
  """

  # No array types: a tree of shardings has this class as well.
  values: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def size(self) -> int:
    return self.values.size

  def astype(self, dtype: Any) -> Float[Array, 'I *layers O']:
    """The kernel as numbers again."""
    return self.values.astype(dtype) * self.scale.astype(dtype)


def is_quantized(leaf: Any) -> bool:
  """For the `is_leaf` of who takes a kernel as one array."""
  return isinstance(leaf, Quantized)


def applies(dtype: str | None, path: str) -> bool:
  """Whether frozen weights of this type have the path's parameter so."""
  is_kernel = path.endswith('/kernel') and 'logits_dense' not in path
  return dtype == 'int8' and is_kernel


def quantize(kernel: Float[Array, 'I *layers O']) -> Quantized:
  """Rounds to the nearest of 255 numbers between a channel's largest."""
  kernel = kernel.astype(jnp.float32)
  largest = jnp.max(jnp.abs(kernel), axis=0, keepdims=True)
  # A channel of zeros has any scale.
  scale = jnp.where(largest == 0, 1.0, largest) / LARGEST
  values = jnp.clip(jnp.round(kernel / scale), -LARGEST, LARGEST)
  return Quantized(values.astype(jnp.int8), scale)


def matmul(x: Float[Array, '*B I'], kernel: Quantized) -> Float[Array, '*B O']:
  """A product in the type of `x`, after which the scales come."""
  y = x @ kernel.values.astype(x.dtype)
  # Without the barrier libtpu 0.0.42 joins products into each other until its
  # stack overflows, at a batch of one row.
  y = jax.lax.optimization_barrier(y)
  scale = kernel.scale.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y * scale


def stored(kernel: jax.Array) -> Quantized:
  """`quantize` of an array on its devices, which is let go of."""
  places = of_place(kernel.format, kernel.ndim)
  found = jax.jit(quantize, out_shardings=places)(kernel)
  kernel.delete()
  return found


def of_place(place: Any, ndim: int) -> Quantized:
  """Where the parts are of a kernel that has a sharding, or a `Format`."""
  sharding = place.sharding if isinstance(place, Format) else place
  scale = sharding
  if isinstance(sharding, NamedSharding):
    axes = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    scale = NamedSharding(sharding.mesh, PartitionSpec(None, *axes[1:]))
  return Quantized(place, scale)
