"""T5 with a soft prompt as loss, predictions and scores of a batch.

A batch is a dict of arrays with T5X's names: `encoder_input_tokens` [B, T]
(virtual tokens included), `decoder_input_tokens`, `decoder_target_tokens` and
`decoder_loss_weights` [B, L], and where examples are packed
`encoder_segment_ids`, `decoder_segment_ids` and the positions.
Variables are T5's `params` and a collection for each method that acts on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.models import decoding
from prompt_tuning.models import losses
from prompt_tuning.models import network
from prompt_tuning.models import parameters

Batch = Mapping[str, jax.Array | np.ndarray]
Variables = Mapping[str, dict]


class Outputs(NamedTuple):
  """What the network makes of a batch.

  Attributes:
    logits: of every target, float32.
    states: the decoder's last ones, behind its norm.
  """

  logits: Float[Array, 'B L V']
  states: Float[Array, 'B L E']


@runtime_checkable
class ActsOnNetwork(Protocol):
  """What the model needs of a method (see `prompt_tuning.methods`).

  Attributes:
    collection: of its variables.
    acts_on_keys: its interceptor looks at the keys or values of the attention
      over the encoder, which are computed then.
  """

  collection: str
  acts_on_keys: bool

  def intercept(self, batch: Batch) -> Callable[..., Any] | None:
    """Flax's interceptor of the network's calls, for this batch."""

  def token_penalty(self) -> Callable[..., Float[Array, 'B L']] | None:
    """Gives what is added to each token's loss, of arrays and outputs."""


def _on_device(batch: Batch) -> dict[str, jax.Array]:
  """numpy's arrays as JAX's; under jit that costs nothing."""
  return {name: jnp.asarray(value) for name, value in batch.items()}


@contextlib.contextmanager
def at_work(
  methods: Sequence[ActsOnNetwork],
  inputs: Int[Array, 'B T'],
  segments: Int[Array, 'B T'] | None = None,
) -> Iterator[None]:
  """Methods act on what is called of the network in here; the first outermost.

  Args:
    methods: which.
    inputs: ids of the encoder.
    segments: number of each position's packed example; None: they are not.
  """
  batch = {'encoder_input_tokens': inputs}
  if segments is not None:
    batch['encoder_segment_ids'] = segments
  with contextlib.ExitStack() as stack:
    for method in methods:
      interceptor = method.intercept(batch)
      if interceptor is not None:
        stack.enter_context(nn.intercept_methods(interceptor))
    yield


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
  """A T5 and the settings of its loss and decoding.

  Attributes:
    config: the network.
    z_loss: coefficient of log(Z)^2.
    label_smoothing: see `losses.cross_entropy`.
    loss_normalizing_factor: see `losses.token_weights`; None sums over tokens.
    decode_fn: `decoding.beam_search` or `decoding.temperature_sample`.
    num_decodes: sequences looked for; the best one is returned.
    decoder_params: keyword arguments of `decode_fn`.
    eos_id: the id that ends a sequence.
    methods: what acts on the network; the first is the outermost.
  """

  config: network.T5Config
  z_loss: float = 1e-4
  label_smoothing: float = 0.0
  loss_normalizing_factor: losses.Normalizer = None
  decode_fn: Callable = decoding.beam_search
  num_decodes: int = 1
  decoder_params: Mapping | None = None
  eos_id: int = 1
  methods: Sequence[ActsOnNetwork] = ()

  @functools.cached_property
  def module(self) -> network.Transformer:
    absorb = not any(method.acts_on_keys for method in self.methods)
    return network.Transformer(self.config, absorb)

  def init_params(self, rng: jax.Array) -> dict:
    """Fresh parameters, float32."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return self.module.init(rng, ids, ids, ids)[parameters.PARAMS]

  def _apply(
    self,
    variables: Variables,
    inputs: Int[Array, 'B T'],
    *args,
    segments: Int[Array, 'B T'] | None = None,
    module: network.Transformer | None = None,
    **kwargs,
  ) -> Any:
    """The network, its methods at work; `module` in place of its own."""
    with at_work(self.methods, inputs, segments):
      return (module or self.module).apply(variables, *args, **kwargs)

  def logits(
    self, variables: Variables, batch: Batch, dropout_rng=None
  ) -> Float[Array, 'B L V']:
    """float32 logits of every target; dropout is on if it is given a key."""
    return self.outputs(variables, batch, dropout_rng).logits

  def outputs(
    self, variables: Variables, batch: Batch, dropout_rng=None
  ) -> Outputs:
    """As `logits`, and the states that they are made of."""
    batch = _on_device(batch)
    inputs = batch['encoder_input_tokens']
    logits, noted = self._apply(
      variables,
      inputs,
      inputs,
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      batch.get('encoder_segment_ids'),
      batch.get('decoder_segment_ids'),
      segments=batch.get('encoder_segment_ids'),
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      capture_intermediates=lambda module, _: module.name == 'decoder_norm',
      mutable=['intermediates'],
    )
    (states,) = noted['intermediates']['decoder']['decoder_norm']['__call__']
    return Outputs(logits, states)

  def token_weights(self, batch: Batch) -> Float[Array, 'B L']:
    """Each token's weight in the loss, normaliser included."""
    return losses.token_weights(batch, self.loss_normalizing_factor)

  def loss_fn(
    self,
    variables: Variables,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    token_weights: Float[Array, 'B L'] | None = None,
    penalties: bool = False,
  ) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
    """The loss, z-loss included, and sums for metrics.

    Args:
      variables: collections of the network.
      batch: see the module.
      dropout_rng: None switches dropout off.
      token_weights: `self.token_weights` of the whole batch, where this one is
        only a part of it; None takes this batch's.
      penalties: adds what methods add to each token's loss, as training does.

    Returns:
      The loss and {'loss', 'z_loss', 'weights': as they enter the loss;
      'cross_entropy', 'correct', 'tokens': sums over tokens of weight > 0}, and
      with penalties, where a method has any, 'penalty': theirs, which is not
      in 'loss'.
    """
    batch = _on_device(batch)
    if token_weights is None:
      token_weights = self.token_weights(batch)
    outputs = self.outputs(variables, batch, dropout_rng)
    logits, targets = outputs.logits, batch['decoder_target_tokens']
    token_loss, token_z_loss = losses.cross_entropy(
      logits,
      targets,
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
    )
    z_loss = jnp.sum(token_z_loss * token_weights)
    loss = jnp.sum(token_loss * token_weights) + z_loss
    counted = (token_weights > 0).astype(jnp.float32)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    sums = {
      'loss': loss,
      'z_loss': z_loss,
      'weights': jnp.sum(token_weights),
      'cross_entropy': jnp.sum(token_loss * counted),
      'correct': jnp.sum(correct * counted),
      'tokens': jnp.sum(counted),
    }
    if not penalties:
      return loss, sums
    of_tokens = self._token_penalties(variables, batch, outputs)
    if not of_tokens:
      return loss, sums
    penalty = jnp.sum(sum(of_tokens) * token_weights)
    return loss + penalty, {**sums, 'penalty': penalty}

  def _token_penalties(
    self, variables: Variables, batch: Batch, outputs: Outputs
  ) -> list[Float[Array, 'B L']]:
    """What each method that does so adds to each token's loss."""

    def alone(method, arrays):
      params = variables[parameters.PARAMS]
      given = {parameters.PARAMS: params, method.collection: arrays}
      model = dataclasses.replace(self, methods=(method,))
      return model.outputs(jax.lax.stop_gradient(given), batch)

    return [
      penalty(variables[method.collection], outputs, alone)
      for method in self.methods
      if (penalty := method.token_penalty()) is not None
    ]

  def score_batch(
    self, variables: Variables, batch: Batch
  ) -> Float[Array, 'B']:
    """Log-likelihood of each example's targets, in nats, without z-loss."""
    batch = _on_device(batch)
    logits = self.logits(variables, batch)
    token_loss, _ = losses.cross_entropy(logits, batch['decoder_target_tokens'])
    weights = losses.token_weights(batch, None)
    return -jnp.sum(token_loss * weights, axis=-1)

  def rank_classify(
    self,
    variables: Variables,
    batch: Batch,
    label_tokens: Int[Array, 'C L'],
  ) -> Float[Array, 'B C']:
    """Log-likelihood of every label as the target of every example.

    Args:
      variables: collections of the network.
      batch: its `encoder_input_tokens` are used, encoded once for all labels.
      label_tokens: each label's ids with EOS, padded with 0.
    """
    inputs = jnp.asarray(batch['encoder_input_tokens'])
    encoded = self._apply(
      variables, inputs, inputs, method=network.Transformer.encode
    )

    def score(label):  # [L]
      targets = jnp.broadcast_to(label, (inputs.shape[0], label.shape[0]))
      shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
      logits = self._apply(
        variables,
        inputs,
        encoded,
        inputs,
        shifted,
        targets,
        method=network.Transformer.decode,
      )
      token_loss, _ = losses.cross_entropy(logits, targets)
      return -jnp.sum(token_loss * (targets > 0).astype(jnp.float32), axis=-1)

    return jax.lax.map(score, label_tokens).T

  def predict_batch_with_aux(
    self,
    variables: Variables,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    num_decodes: int | None = None,
    return_all_decodes: bool = False,
    decoder_params: Mapping | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[Int[Array, 'B *N L'], dict[str, Float[Array, 'B *N']]]:
    """Decodes L tokens at most, L the length of `decoder_input_tokens`.

    Args:
      variables: collections of the network.
      batch: `encoder_input_tokens` and, for its shape, `decoder_input_tokens`.
      rng: needed where the decoding samples.
      num_decodes: N; None takes the model's.
      return_all_decodes: all N sequences, worst first, and not the best alone.
      decoder_params: added to the model's own.
      prompt_with_targets: decoding starts by repeating `decoder_input_tokens`
        up to its first padding.

    Returns:
      ids [B, L] and {'scores': [B]}, or [B, N, L] and [B, N] for all.
    """
    num_decodes = num_decodes or self.num_decodes
    inputs = jnp.asarray(batch['encoder_input_tokens'])
    start = jnp.asarray(batch['decoder_input_tokens'])
    if not prompt_with_targets:
      start = jnp.zeros_like(start)
    length = start.shape[1]
    encoded = self._apply(
      variables, inputs, inputs, method=network.Transformer.encode
    )
    # For many tokens to decode, all beams' together, the keys and values of
    # `encoded` are made once: the cache holds them, and is read from then on.
    many = num_decodes * length >= self.config.head_dim
    _, cache = self._apply(
      variables,
      inputs,
      encoded,
      inputs,
      start,
      cache_length=length,
      method=network.Transformer.decode,
      mutable=['cache'],
      module=network.Transformer(self.config) if many else None,
    )
    inputs = jnp.repeat(inputs, num_decodes, axis=0)  # [B * N, T]
    encoded = jnp.repeat(encoded, num_decodes, axis=0)

    def tokens_to_logits(ids, cache):
      logits, updated = self._apply(
        {**variables, 'cache': cache},
        inputs,
        encoded,
        inputs,
        ids,
        cache_length=length,
        method=network.Transformer.decode,
        mutable=['cache'],
      )
      return logits[:, -1], updated['cache']

    decodes, scores = self.decode_fn(
      start,
      cache['cache'],
      tokens_to_logits,
      eos_id=self.eos_id,
      num_decodes=num_decodes,
      rng=rng,
      cache_batch_axis=1 if self.config.scan_layers else 0,
      **{**(self.decoder_params or {}), **(decoder_params or {})},
    )
    if return_all_decodes:
      return decodes, {'scores': scores}
    return decodes[:, -1], {'scores': scores[:, -1]}

  def predict_batch(
    self, variables: Variables, batch: Batch, rng: jax.Array | None = None
  ) -> Int[Array, 'B L']:
    """The best sequence of each example, EOS included, then padding."""
    return self.predict_batch_with_aux(variables, batch, rng)[0]
