"""Deep prompts: a prompt of its own in front of every layer, in both stacks.

In the encoder the prompt's places are virtual tokens of the inputs, whose
states are replaced by rows of the layer's own where each layer begins. In the
decoder, which is causal, rows in front of a layer's inputs are seen by what
follows and see nothing of it: they are keys and values in front of the
self-attention's, at the positions -P to -1, their own queries and states being
replaced one layer later. (Per-layer prompts of the public code; P-tuning v2,
Liu et al. 2021, section 3.2.)
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import embed_virtual
from prompt_tuning.methods.prompt import put_rows
from prompt_tuning.models import layers
from prompt_tuning.models import parameters
from prompt_tuning.models.attention import see_keys_in_front
from prompt_tuning.models.network import T5Config


@dataclasses.dataclass(frozen=True)
class PerLayerPrompt(Method):
  """Its arrays are 'rows' [P, E] of each layer.

  Attributes:
    length: P.
    scale: rows start uniform in [-scale, scale).
  """

  collection: ClassVar[str] = 'per_layer'
  acts_on_keys: ClassVar[bool] = False
  reads_weights: ClassVar[bool] = True  # of norms, keys and values

  length: int = 20
  scale: float = 0.5

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    arrays = {}
    for path, norm in sorted(parameters.flatten(params).items()):
      if not path.endswith('attention_layer_norm/scale') or 'cross' in path:
        continue
      place = path.rpartition('/pre_')[0]
      embed, *stacked = norm.shape  # [E], of scanned layers [E, layers]
      key = jax.random.fold_in(rng, len(arrays))
      arrays[f'{place}/rows'] = self.scale * jax.random.uniform(
        key, (*stacked, self.length, embed), jnp.float32, -1.0, 1.0
      )
    return parameters.nest(arrays)

  def virtual_tokens(self, config: T5Config) -> VirtualTokens:
    return VirtualTokens(config.vocab_size, self.length)

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    if 'encoder_segment_ids' in batch:
      raise UserError(
        "per_layer's rows stand right before the one example of a row: bind"
        ' TaskData.pack = False'
      )
    ids = batch['encoder_input_tokens']

    def act(next_fun, args, kwargs, context):
      module, method = context.module, context.method_name
      kind = type(module).__name__
      in_decoder = 'decoder' in module.path
      if method == 'embed':
        return embed_virtual(next_fun, *args, module.config.vocab_size)
      if method == '__call__' and kind == 'EncoderLayer':
        rows = module.get_variable(self.collection, 'rows')
        x = put_rows(args[0], ids, module.config.vocab_size, rows)
        return next_fun(x, *args[1:], **kwargs)
      if method == '__call__' and kind == 'RelativePositionBias' and in_decoder:
        before = jnp.arange(-self.length, 0, dtype=args[1].dtype)
        return next_fun(args[0], jnp.concatenate([before, args[1]]))
      if method == 'attend' and module.name == 'self_attention':
        return self._attend(module, next_fun, *args, **kwargs)
      return next_fun(*args, **kwargs)

    return act

  def _attend(self, module, attend, query, key, value, mask, bias, **kwargs):
    """Self-attention of the decoder with the layer's rows in front."""
    layer = module.parent
    rows = layer.get_variable(self.collection, 'rows')
    norm = layer.get_variable('params', 'pre_self_attention_layer_norm')
    rows = layers.rms_norm(rows, norm['scale'], module.dtype)

    def in_front(name, x):  # x [B, S, N, D]
      kernel = module.get_variable('params', name)['kernel']
      y = (rows @ kernel.astype(module.dtype)).reshape(1, -1, *x.shape[2:])
      return jnp.concatenate([jnp.repeat(y, x.shape[0], 0), x], axis=1)

    mask = see_keys_in_front(mask, self.length)
    key, value = in_front('key', key), in_front('value', value)
    return attend(query, key, value, mask, bias, **kwargs)
