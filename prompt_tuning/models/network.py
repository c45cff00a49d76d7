"""The T5 encoder-decoder as one Flax module (T5 1.0, T5 1.1, mT5, ByT5).

Parameter paths are T5X's (`encoder/layers_0/attention/query/kernel`,
`token_embedder/embedding`, `decoder/logits_dense/kernel`). Methods (see
`prompt_tuning.methods`) act on the calls of these modules from outside.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.models import attention
from prompt_tuning.models import layers
from prompt_tuning.models import parameters

REMAT_POLICIES = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'minimal': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The settings of a T5; names as in T5X.

  Attributes:
    vocab_size: rows V of the embedding table, at least the vocabulary's pieces.
    emb_dim: E, the width of the residual stream.
    num_heads: N.
    head_dim: D; N * D need not be E.
    mlp_dim: F.
    num_encoder_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
    mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
    logits_via_embedding: tied output layer, scaled by E^-0.5 (T5 1.0).
    dropout_rate: for all dropout of the network; active in training alone.
    dtype: of activations; norms, scores, softmax and logits are float32 anyway.
    num_buckets: relative-position buckets, in both stacks.
    max_distance: relative distances beyond it share a bucket.
    scan_layers: one compiled layer, run by a scan over stacked parameters
      (axis 1 of each kernel, as T5X's), instead of unrolled layers.
    remat_policy: what a layer keeps for its backward pass: 'none' keeps all,
      'minimal' the products with weights, 'full' the layer's input alone.
    attention: what makes it: 'formula', XLA's products of whole matrices, or
      'tpu_kernel' or 'gpu_kernel', a kernel whose memory is linear in the
      length, for frozen position biases (see `attention_kernel`);
      'interpreted_kernel' is that without a device, and slow.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  num_buckets: int = 32
  max_distance: int = 128
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'formula'

  def __post_init__(self):
    for name in (
      *('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim'),
      *('num_encoder_layers', 'num_decoder_layers', 'num_buckets'),
      'max_distance',
    ):
      if getattr(self, name) < 1:
        raise UserError(
          f'T5Config.{name} must be 1 or more, got {getattr(self, name)}'
        )
    if not 0 <= self.dropout_rate < 1:
      raise UserError(
        f'T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}'
      )
    for activation in self.mlp_activations:
      if activation not in layers.ACTIVATIONS:
        raise UserError(
          f'mlp_activations has {activation!r}; known are'
          f' {sorted(layers.ACTIVATIONS)}'
        )
    if self.attention not in attention.IMPLEMENTATIONS:
      raise UserError(
        f'T5Config.attention is {self.attention!r}; known are'
        f' {", ".join(attention.IMPLEMENTATIONS)}'
      )
    if self.remat_policy not in REMAT_POLICIES:
      raise UserError(
        f'remat_policy is {self.remat_policy!r}; known are'
        f' {sorted(REMAT_POLICIES)}'
      )


def _attention(
  config: T5Config, name: str, **settings: Any
) -> attention.Attention:
  return attention.Attention(
    config.num_heads,
    config.head_dim,
    config.dropout_rate,
    config.dtype,
    implementation=config.attention,
    name=name,
    **settings,
  )


def _mlp(config: T5Config) -> layers.MLP:
  return layers.MLP(
    config.mlp_dim,
    config.mlp_activations,
    config.dropout_rate,
    config.dtype,
    name='mlp',
  )


class EncoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Returns a pair, as `nn.scan` wants it; the second is always None.
  """

  config: T5Config
  deterministic: bool

  @nn.compact
  def __call__(self, x: Float[Array, 'B T E'], mask, bias):
    config, deterministic = self.config, self.deterministic
    y = layers.RMSNorm(config.dtype, name='pre_attention_layer_norm')(x)
    y = _attention(config, 'attention')(
      y, None, mask, bias, deterministic=deterministic
    )
    x += layers.dropout(config.dropout_rate)(y, deterministic=deterministic)
    y = layers.RMSNorm(config.dtype, name='pre_mlp_layer_norm')(x)
    y = _mlp(config)(y, deterministic=deterministic)
    x += layers.dropout(config.dropout_rate)(y, deterministic=deterministic)
    return layers.constrain(x, 'batch', 'length', 'embed'), None


class DecoderLayer(nn.Module):
  """Self-attention, attention over the encoder, mlp; each with its residual."""

  config: T5Config
  deterministic: bool
  decode: bool
  absorb: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B L E'],
    encoded: Float[Array, 'B T E'],
    mask,
    bias,
    encoder_mask,
    cache_index,
  ):
    config, deterministic = self.config, self.deterministic
    y = layers.RMSNorm(config.dtype, name='pre_self_attention_layer_norm')(x)
    y = _attention(config, 'self_attention')(
      y,
      None,
      mask,
      bias,
      deterministic=deterministic,
      decode=self.decode,
      cache_index=cache_index,
    )
    x += layers.dropout(config.dropout_rate)(y, deterministic=deterministic)
    y = layers.RMSNorm(config.dtype, name='pre_cross_attention_layer_norm')(x)
    y = _attention(config, 'encoder_decoder_attention', absorb=self.absorb)(
      y,
      encoded,
      encoder_mask,
      deterministic=deterministic,
      decode=self.decode,
    )
    x += layers.dropout(config.dropout_rate)(y, deterministic=deterministic)
    y = layers.RMSNorm(config.dtype, name='pre_mlp_layer_norm')(x)
    y = _mlp(config)(y, deterministic=deterministic)
    x += layers.dropout(config.dropout_rate)(y, deterministic=deterministic)
    return layers.constrain(x, 'batch', 'length', 'embed'), None


def _run_layers(
  config: T5Config, layer: type[nn.Module], length: int, name: str, **settings
):
  """The stack of `length` layers as a function of (x, *broadcast arguments).

  Unrolled layers are `layers_0`, `layers_1`, …; scanned ones are one module
  called `name` whose parameters carry the layer on axis 1.
  """
  if config.remat_policy != 'none':
    layer = nn.remat(
      layer,
      policy=REMAT_POLICIES[config.remat_policy],
      prevent_cse=not config.scan_layers,
    )
  if config.scan_layers:

    def run(x, *args):
      stack = nn.scan(
        layer,
        # The last one is for the collections of methods.
        variable_axes={parameters.PARAMS: parameters.LAYERS_AXIS, True: 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=nn.broadcast,
        length=length,
      )
      return stack(config, **settings, name=name)(x, *args)[0]

  else:

    def run(x, *args):
      for i in range(length):
        x, _ = layer(config, **settings, name=f'layers_{i}')(x, *args)
      return x

  return run


def _position_bias(config: T5Config, bidirectional: bool):
  return layers.RelativePositionBias(
    config.num_heads,
    config.num_buckets,
    config.max_distance,
    bidirectional,
    name='relpos_bias',
  )


def _given(config: T5Config, decode: bool, *said: Any) -> Iterator[Any]:
  """Masks and biases as the attention takes them, made once for all layers."""
  in_kernel = config.attention in attention.KERNELS and not decode
  return (x if in_kernel or x is None else x.array() for x in said)


class Encoder(nn.Module):
  """The stack over embedded inputs."""

  config: T5Config

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T E'],
    mask: attention.Mask,
    *,
    deterministic: bool,
  ) -> Float[Array, 'B T E']:
    config = self.config
    positions = jnp.arange(x.shape[1])
    bias = _position_bias(config, True)(positions, positions)
    mask, bias = _given(config, False, mask, bias)
    x = layers.dropout(config.dropout_rate)(x, deterministic=deterministic)
    x = _run_layers(
      config,
      EncoderLayer,
      config.num_encoder_layers,
      'encoder',
      deterministic=deterministic,
    )(x.astype(config.dtype), mask, bias)
    x = layers.RMSNorm(config.dtype, name='encoder_norm')(x)
    return layers.dropout(config.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
  """The stack over embedded targets; returns hidden states, or logits untied.

  The collection `cache` holds one `cache_index` for the whole stack.
  """

  config: T5Config
  absorb: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B L E'],
    encoded: Float[Array, 'B T E'],
    mask: attention.Mask | None,
    encoder_mask: attention.Mask,
    *,
    deterministic: bool,
    decode: bool = False,
    cache_length: int | None = None,
  ) -> Float[Array, 'B L _']:
    config = self.config
    key_positions = jnp.arange(cache_length or x.shape[1])
    query_positions = jnp.arange(x.shape[1])
    index = jnp.zeros((), jnp.int32)
    if decode:
      stepping = self.has_variable('cache', 'cache_index')
      cache_index = self.variable('cache', 'cache_index', lambda: index)
      if stepping:
        index = cache_index.value
        query_positions = index[None]
        segments = jnp.ones((1, 1), jnp.int32)
        mask = attention.Mask(
          segments,
          jnp.ones((1, key_positions.size), jnp.int32),
          query_positions,
          key_positions,
        )
        cache_index.value = index + 1
    bias = _position_bias(config, False)(query_positions, key_positions)
    mask, bias, encoder_mask = _given(config, decode, mask, bias, encoder_mask)
    x = layers.dropout(config.dropout_rate)(x, deterministic=deterministic)
    x = _run_layers(
      config,
      DecoderLayer,
      config.num_decoder_layers,
      'decoder',
      deterministic=deterministic,
      decode=decode,
      absorb=self.absorb,
    )(x.astype(config.dtype), encoded, mask, bias, encoder_mask, index)
    x = layers.RMSNorm(config.dtype, name='decoder_norm')(x)
    x = layers.dropout(config.dropout_rate)(x, deterministic=deterministic)
    if config.logits_via_embedding:
      return x
    # Logits are float32, whatever the activations are.
    x = layers.Dense(config.vocab_size, 'float32', name='logits_dense')(x)
    return layers.constrain(x, 'batch', 'length', 'vocab')


class TokenEmbedder(nn.Module):
  """The table of the vocabulary's embeddings, shared by both stacks."""

  config: T5Config

  def setup(self):
    self.embedding = self.param(
      'embedding',
      nn.initializers.normal(1.0),
      (self.config.vocab_size, self.config.emb_dim),
    )

  def __call__(self, ids: Int[Array, 'B T']) -> Float[Array, 'B T E']:
    # Rows are looked up whole: the table is gathered where its rows are split.
    table = layers.constrain(self.embedding, 'vocab', None)
    x = jnp.take(table, ids, axis=0).astype(self.config.dtype)
    return layers.constrain(x, 'batch', 'length', 'embed')

  def attend(self, x: Float[Array, 'B L E']) -> Float[Array, 'B L V']:
    x = x.astype(jnp.float32) @ self.embedding.astype(jnp.float32).T
    x = x / np.float32(np.sqrt(self.config.emb_dim))
    return layers.constrain(x, 'batch', 'length', 'vocab')


def _segments(
  ids: Int[Array, 'B T'], segments: Int[Array, 'B T'] | None
) -> Int[Array, 'B T']:
  """Number of each position's example, 0 for padding (id 0)."""
  return jnp.where(ids > 0, 1 if segments is None else segments, 0)


class Transformer(nn.Module):
  """T5; `encode` and `decode` are its halves, `__call__` runs both.

  Attributes:
    config: of the network.
    absorb: cross-attention may do without keys and values (see
      `attention.Attention`); False where something acts on those.
  """

  config: T5Config
  absorb: bool = False

  def setup(self):
    self.token_embedder = TokenEmbedder(self.config)
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config, self.absorb)

  def embed(self, ids: Int[Array, 'B T']) -> Float[Array, 'B T E']:
    """Embeddings of the inputs."""
    return self.token_embedder(ids)

  def encode(
    self,
    encoder_input_tokens: Int[Array, 'B T'],
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
    *,
    enable_dropout: bool = False,
  ) -> Float[Array, 'B T E']:
    """Encoder outputs; id 0 is padding, to be looked at by no token."""
    segments = _segments(encoder_input_tokens, encoder_segment_ids)
    mask = attention.Mask(segments, segments)
    return self.encoder(
      self.embed(encoder_input_tokens),
      mask,
      deterministic=not enable_dropout,
    )

  def decode(
    self,
    encoded: Float[Array, 'B T E'],
    encoder_input_tokens: Int[Array, 'B T'],
    decoder_input_tokens: Int[Array, 'B L'],
    decoder_target_tokens: Int[Array, 'B L'] | None = None,
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
    decoder_segment_ids: Int[Array, 'B L'] | None = None,
    *,
    enable_dropout: bool = False,
    cache_length: int | None = None,
  ) -> Float[Array, 'B L V']:
    """Logits, float32.

    Args:
      encoded: outputs of `encode`.
      encoder_input_tokens: what was encoded; its zeros are masked.
      decoder_input_tokens: targets shifted right, id 0 first; with a cache in
        place, the one token of this step.
      decoder_target_tokens: its zeros are padding; None takes all positions.
      encoder_segment_ids: number of each position's packed example, 0 for none.
      decoder_segment_ids: likewise.
      enable_dropout: needs a `dropout` rng.
      cache_length: decode one token at a time, with room for so many. The call
        that finds no cache creates it, and its logits are of no use.
    """
    seen = decoder_target_tokens
    if seen is None:
      seen = jnp.ones_like(decoder_input_tokens)
    segments = _segments(seen, decoder_segment_ids)
    encoder_mask = attention.Mask(
      segments, _segments(encoder_input_tokens, encoder_segment_ids)
    )
    mask = None
    if cache_length is None:
      positions = jnp.arange(seen.shape[1])
      mask = attention.Mask(segments, segments, positions, positions)
    x = self.decoder(
      self.token_embedder(decoder_input_tokens),
      encoded,
      mask,
      encoder_mask,
      deterministic=not enable_dropout,
      decode=cache_length is not None,
      cache_length=cache_length,
    )
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(x)
    return x

  def __call__(
    self,
    encoder_input_tokens: Int[Array, 'B T'],
    decoder_input_tokens: Int[Array, 'B L'],
    decoder_target_tokens: Int[Array, 'B L'],
    encoder_segment_ids: Int[Array, 'B T'] | None = None,
    decoder_segment_ids: Int[Array, 'B L'] | None = None,
    *,
    enable_dropout: bool = False,
  ) -> Float[Array, 'B L V']:
    """Logits of all targets at once (training, scoring)."""
    encoded = self.encode(
      encoder_input_tokens,
      encoder_segment_ids,
      enable_dropout=enable_dropout,
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      enable_dropout=enable_dropout,
    )


@functools.cache
def parameter_shapes(config: T5Config) -> dict:
  """The tree of `jax.ShapeDtypeStruct` of a network's parameters, float32."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), ids, ids, ids
  )
  return variables[parameters.PARAMS]
