"""Our network and methods as the module of T5X's EncoderDecoderModel.

T5X knows one tree of parameters. T5's stand there by their own paths, a
prompt [P, E] where the public code has it ('encoder/prompt/prompt/prompt'),
and any other method's arrays below its name ('lora/encoder/layers_0/...').
T5X itself is not needed here.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

from etils import epath
from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import t5x
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.attention import require_trainable_biases
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.models.model import at_work
from prompt_tuning.training import setup

# Axes of methods' arrays: the public code's names for a prompt's, and names for
# those that every device holds whole, which no array may have twice.
PROMPT_AXES = ('prompt', 'prompt_embed')
WHOLE = tuple(f'whole_{axis}' for axis in range(4))


@dataclasses.dataclass(frozen=True)
class _Call:
  """A call of our network that stands for one of T5X's."""

  method: Callable[..., Any]
  encoder_input_tokens: jax.Array
  args: tuple[Any, ...]
  settings: dict[str, Any]
  encoder_segment_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Network:
  """Our Transformer and its methods as the `module` of a T5X model.

  It answers the calls that `t5x.models.EncoderDecoderModel` makes of a Flax
  module: `init`, and `apply` with `encode`, `decode` or itself.

  Attributes:
    config: of the network.
    methods: what acts on it; the first is the outermost.
    base: whose embeddings [V, E] the initialisers of prompts read, a base
      checkpoint or a numpy file; None: those that `init` draws, which is for
      initialisers that do not look at them.
    vocabulary: seqio's, for initialisers that encode words.
    labels: the words of `class_labels`, where it is not given its own.
  """

  config: network.T5Config
  methods: Sequence[Method] = ()
  base: str | None = None
  vocabulary: Any = None
  labels: Sequence[str] = ()

  def __post_init__(self):
    setup.virtual_tokens_of(self.methods, self.config)  # its checks
    if not beside_t5(self.methods):
      require_trainable_biases(self.config.attention)

  @property
  def scan_layers(self) -> bool:
    """T5X's decoding asks, for the axis of the cache's batch."""
    return self.config.scan_layers

  def init(self, rng: jax.Array, *args: Any, **settings: Any) -> dict[str, Any]:
    """{'params', 'params_axes'} of T5 and methods; inputs do not matter."""
    del args, settings
    params_key, methods_key = jax.random.split(rng)
    params = EncoderDecoderModel(self.config).init_params(params_key)
    arrays = parameters.flatten(params)
    axes = {path: parameters.logical_axes(path) for path in arrays}
    if self.base is not None:
      embedding = jnp.asarray(_embedding(os.fspath(self.base)))
      params = {**params, 'token_embedder': {'embedding': embedding}}
    encode = None if self.vocabulary is None else self.vocabulary.encode
    text = TaskText(encode, self.labels)
    for number, method in enumerate(beside_t5(self.methods)):
      key = jax.random.fold_in(methods_key, number)
      found = method.init(key, params, text)
      names = parameters.flatten(method.axes(found))
      for path, array in parameters.flatten(found).items():
        if method.rate(path) not in (0, 1):
          raise UserError(
            f"T5X's optimiser has one learning rate, {method.collection} wants"
            f' {path} trained at {method.rate(path):g} times that: give'
            ' learning_rate_scale = 1'
          )
        at, named = place(method, path), names[path]
        if at == t5x.PROMPT:
          named = (named[0], *PROMPT_AXES)
          if len(array) == 1:  # a single prompt is [P, E], as the public one
            array, named = array[0], named[1:]
        arrays[at] = array
        axes[at] = tuple(a or b for a, b in zip(named, WHOLE))
    return {
      'params': parameters.nest(arrays),
      'params_axes': parameters.nest(
        {
          f'{path}_axes': flax_partitioning.AxisMetadata(names)
          for path, names in axes.items()
        }
      ),
    }

  def variables(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of our network, of T5X's parameters.

    T5's own carry no gradient unless they are trained, so that T5X, which
    asks for the gradient of all, computes none of theirs.
    """
    collections: dict[str, dict[str, Any]] = {parameters.PARAMS: {}}
    for path, array in parameters.flatten(params).items():
      method, within = owner(self.methods, path)
      if path == t5x.PROMPT and array.ndim == 2:
        array = array[None]  # [K, P, E]
      name = parameters.PARAMS if method is None else method.collection
      collections.setdefault(name, {})[within] = array
    if not trains_t5(self.methods):
      frozen = jax.lax.stop_gradient(collections[parameters.PARAMS])
      collections[parameters.PARAMS] = frozen
    return {name: parameters.nest(flat) for name, flat in collections.items()}

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    method: Callable[..., _Call] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Any = False,
    **settings: Any,
  ) -> Any:
    """As Flax's `apply`; `method` is `self.encode` or `self.decode`."""
    call = (method or self.__call__)(*args, **settings)
    others = {k: v for k, v in variables.items() if k != parameters.PARAMS}
    variables = self.variables(variables[parameters.PARAMS]) | others
    inputs, segments = call.encoder_input_tokens, call.encoder_segment_ids
    with at_work(self.methods, inputs, segments):
      result = network.Transformer(self.config).apply(
        variables,
        *call.args,
        **call.settings,
        method=call.method,
        rngs=rngs,
        mutable=mutable,
      )
    if mutable is False:
      return result
    value, updated = result
    return value, {**updated, **_without_cross(updated)}

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    **positions: Any,
  ) -> _Call:
    """Logits of all targets; with `decode`, the cache and nothing of use.

    Positions [B, T] of packed rows are not needed: T5's are relative, and
    segments keep examples apart.
    """
    del positions
    if decode:
      shape = (*encoder_input_tokens.shape, self.config.emb_dim)
      return self.decode(
        jnp.zeros(shape, self.config.dtype),
        encoder_input_tokens,
        decoder_input_tokens,
        decode=True,
        max_decode_length=decoder_input_tokens.shape[1],
      )
    return _Call(
      network.Transformer.__call__,
      encoder_input_tokens,
      (
        encoder_input_tokens,
        decoder_input_tokens,
        decoder_target_tokens,
        encoder_segment_ids,
        decoder_segment_ids,
      ),
      {'enable_dropout': enable_dropout},
      encoder_segment_ids,
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
  ) -> _Call:
    """Encoder outputs [B, T, E]."""
    return _Call(
      network.Transformer.encode,
      encoder_input_tokens,
      (encoder_input_tokens, encoder_segment_ids),
      {'enable_dropout': enable_dropout},
      encoder_segment_ids,
    )

  def decode(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array | None = None,
    *,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> _Call:
    """Logits [B, L, V]; with `decode`, of the one token of this step."""
    # T5X gives a step's token as its target too, and its 0 is no padding.
    targets = None if decode else decoder_target_tokens
    return _Call(
      network.Transformer.decode,
      encoder_input_tokens,
      (encoded, encoder_input_tokens, decoder_input_tokens, targets),
      {
        'enable_dropout': enable_dropout,
        'cache_length': max_decode_length if decode else None,
      },
    )


def _without_cross(updated: Mapping[str, Any]) -> dict[str, Any]:
  """The cache as T5X wants it: self-attention's alone.

  T5X makes the cache before it has shown us the encoder's outputs, so their
  projections, which our network would keep there, are computed at each step,
  as they are in T5X's own network.
  """
  if 'cache' not in updated:
    return {}
  kept = {
    path: array
    for path, array in parameters.flatten(updated['cache']).items()
    if 'encoder_decoder_attention' not in path
  }
  return {'cache': parameters.nest(kept)}


@functools.lru_cache(maxsize=1)
def _embedding(path: str) -> np.ndarray:
  """The embeddings [V, E] of a base, float32; of a numpy file, what it has."""
  if path.endswith('.npy'):
    with epath.Path(path).open('rb') as file:
      return np.asarray(np.load(file, allow_pickle=False), np.float32)
  arrays = base_checkpoints.open_checkpoint(path).arrays
  return np.asarray(arrays['token_embedder/embedding'][...], np.float32)


# Whose a parameter is.


def beside_t5(methods: Sequence[Method]) -> list[Method]:
  """All but model tuning."""
  return [one for one in methods if one.collection != parameters.PARAMS]


def trains_t5(methods: Sequence[Method]) -> bool:
  """Whether model tuning is one of them."""
  return len(beside_t5(methods)) < len(methods)


def is_table(method: Method) -> bool:
  """Whether it has a prompt's table for its only array, as the public code."""
  return isinstance(method, Prompt) and method.reparametrization is None


def place(method: Method, path: str) -> str:
  """Where T5X has a method's array."""
  return t5x.PROMPT if is_table(method) else f'{method.collection}/{path}'


def owner(methods: Sequence[Method], path: str) -> tuple[Method | None, str]:
  """Whose array stands at a path of T5X's, None for T5's own, and its path."""
  for method in beside_t5(methods):
    if is_table(method):
      if path == t5x.PROMPT:
        return method, 'table'
    elif path.startswith(f'{method.collection}/'):
      return method, path.removeprefix(f'{method.collection}/')
  return None, path
