"""T5 1.1 with methods, once more: in numpy and float64, one example, no batch.

Written from the papers and not from the package, so that both can be compared.
Parameters come by T5X's paths. `Lora`, `IA3` and deep prompts are what their
papers say they are: an update of a kernel's product, scales of projections, and
rows put in front of the sequence at every layer; a prefix puts keys and values
in front of those of an attention, a prompt rows in front of the inputs'
embeddings; adapters stand behind sublayers, offsets beside scales.
"""

import math

import numpy as np


def logits(
  params,
  config,
  inputs,
  targets,
  *,
  lora=None,
  ia3=None,
  per_layer=None,
  prefix=None,
  prompt=None,
  adapters=None,
  norm_scales=None,
):
  """float64 logits [L, V] of one example's targets.

  Args:
    params: {path: array}, layers unrolled.
    config: T5Config.
    inputs: ids of the encoder, without virtual tokens; or the embeddings
      [T, E] in their place.
    targets: ids of the decoder's targets.
    lora: (arrays by path, alpha / rank).
    ia3: arrays by path.
    per_layer: {'encoder/layers_0/rows': [P, E], ...}.
    prefix: {'encoder/layers_0/attention/keys': [P, N*D], ...}.
    prompt: [P, E].
    adapters: (arrays by path, nonlinearity).
    norm_scales: {'encoder/encoder_norm/offset': [E], ...}.
  """
  t5 = _T5(params, config, lora, ia3, per_layer or {}, prefix or {})
  t5.prompt = t5.prompt if prompt is None else prompt
  t5.adapters, t5.activation = adapters or ({}, None)
  t5.offsets = norm_scales or {}
  return t5.logits(t5.states(inputs, targets))


def logits_and_states(params, config, inputs, targets, prompt):
  """As `logits` with a prompt, and what they are made of [L, E]."""
  t5 = _T5(params, config)
  t5.prompt = prompt
  states = t5.states(inputs, targets)
  return t5.logits(states), states


class _T5:
  def __init__(self, params, config, lora=None, ia3=None, rows=(), prefix=()):
    self.params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    self.config = config
    self.lora, self.scale = lora or ({}, 0.0)
    self.ia3 = ia3 or {}
    self.rows = {k: np.float64(v) for k, v in dict(rows).items()}
    self.prefix = {k: np.float64(v) for k, v in dict(prefix).items()}
    self.prompt = np.zeros((0, config.emb_dim))
    self.adapters, self.activation, self.offsets = {}, None, {}

  def logits(self, states):
    return states @ self.params['decoder/logits_dense/kernel']

  def states(self, inputs, targets):
    table = self.params['token_embedder/embedding']
    x = np.asarray(inputs)
    x = table[x] if x.ndim == 1 else x.astype(np.float64)
    x = np.concatenate([self.prompt, x])
    front = self._front('encoder', 0)
    x = np.concatenate([np.zeros_like(front), x])
    bias = self._bias('encoder', len(x), bidirectional=True)
    for i in range(self.config.num_encoder_layers):
      at = f'encoder/layers_{i}'
      x = np.concatenate([self._front('encoder', i), x[len(front) :]])
      y = self._norm(f'{at}/pre_attention_layer_norm', x)
      x = x + self._attend(f'{at}/attention', y, y, bias)
      x = x + self._mlp(at, self._norm(f'{at}/pre_mlp_layer_norm', x))
    encoded = self._norm('encoder/encoder_norm', x)

    x = table[np.asarray([0, *targets[:-1]])]
    front = self._front('decoder', 0)
    x = np.concatenate([np.zeros_like(front), x])
    bias = self._bias('decoder', len(x), bidirectional=False)
    causal = np.tril(np.ones((len(x), len(x)), bool))
    for i in range(self.config.num_decoder_layers):
      at = f'decoder/layers_{i}'
      x = np.concatenate([self._front('decoder', i), x[len(front) :]])
      y = self._norm(f'{at}/pre_self_attention_layer_norm', x)
      x = x + self._attend(f'{at}/self_attention', y, y, bias, causal)
      y = self._norm(f'{at}/pre_cross_attention_layer_norm', x)
      x = x + self._attend(f'{at}/encoder_decoder_attention', y, encoded, 0.0)
      x = x + self._mlp(at, self._norm(f'{at}/pre_mlp_layer_norm', x))
    return self._norm('decoder/decoder_norm', x[len(front) :])

  def _front(self, stack, layer):
    nothing = np.zeros((0, self.config.emb_dim))
    return self.rows.get(f'{stack}/layers_{layer}/rows', nothing)

  def _norm(self, at, x):
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return (
      x
      / rms
      * (self.params[f'{at}/scale'] + self.offsets.get(f'{at}/offset', 0))
    )

  def _adapted(self, at, y):
    if f'{at}/down' not in self.adapters:
      return y
    names = ('down', 'down_bias', 'up', 'up_bias')
    found = (np.asarray(self.adapters[f'{at}/{n}'], np.float64) for n in names)
    down, down_bias, up, up_bias = found
    return y + self.activation(y @ down + down_bias) @ up + up_bias

  def _project(self, at, x):
    scale = self.ia3.get(f'{at}/scale')
    if scale is not None and at.endswith('/wo'):
      x = x * np.asarray(scale, np.float64)
    y = x @ self.params[f'{at}/kernel']
    if f'{at}/a' in self.lora:
      a, b = (np.asarray(self.lora[f'{at}/{n}'], np.float64) for n in 'ab')
      y = y + self.scale * (x @ a @ b)
    if scale is not None and not at.endswith('/wo'):
      y = y * np.asarray(scale, np.float64)
    return y

  def _attend(self, at, queries, keys, bias, mask=True):
    def heads(name, x):
      y = self._project(f'{at}/{name}', x)
      y = np.concatenate([self.prefix.get(f'{at}/{name}s', y[:0]), y])
      return y.reshape(len(y), self.config.num_heads, -1).swapaxes(0, 1)

    q, k, v = heads('query', queries), heads('key', keys), heads('value', keys)
    scores = q @ k.swapaxes(1, 2)
    front = scores.shape[2] - len(keys)
    if front and not np.isscalar(bias):
      # The sequence begins at position 0, the prefix in front of it at -P.
      stack = at.partition('/')[0]
      longer = self._bias(stack, front + len(keys), stack == 'encoder')
      bias = longer[:, front:]
    if front and not np.isscalar(mask):
      mask = np.pad(mask, ((0, 0), (front, 0)), constant_values=True)
    scores = np.where(mask, scores + bias, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).swapaxes(0, 1).reshape(len(queries), -1)
    return self._adapted(at, self._project(f'{at}/out', mixed))

  def _mlp(self, at, x):
    gate = self._project(f'{at}/mlp/wi_0', x)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gate = 0.5 * gate * (1 + np.tanh(inner))
    hidden = gate * self._project(f'{at}/mlp/wi_1', x)
    return self._adapted(f'{at}/mlp', self._project(f'{at}/mlp/wo', hidden))

  def _bias(self, stack, length, bidirectional):
    table = self.params[f'{stack}/relpos_bias/rel_embedding']
    buckets = [
      [self._bucket(key - query, bidirectional) for key in range(length)]
      for query in range(length)
    ]
    return table[:, np.asarray(buckets)]

  def _bucket(self, offset, bidirectional):
    count, first = self.config.num_buckets, 0
    if bidirectional:
      count //= 2
      first = count if offset > 0 else 0
      distance = abs(offset)
    else:
      distance = max(-offset, 0)
    if distance < count // 2:
      return first + distance
    ratio = math.log(distance / (count // 2))
    ratio /= math.log(self.config.max_distance / (count // 2))
    return first + min(
      count // 2 + int(ratio * (count - count // 2)), count - 1
    )
