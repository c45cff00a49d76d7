"""A T5 and a batch whose every number is a formula: nothing is drawn or stored.

Who has another implementation of T5 can build the same one: `test_reference`
compares with numbers that others' code gave for it.
"""

import math
import zlib

import numpy as np

from prompt_tuning.models import network
from prompt_tuning.models import parameters

CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=12,
  num_encoder_layers=2,
  num_decoder_layers=2,
  num_buckets=8,
  max_distance=128,
)
INPUTS = np.array([[5, 6, 7, 8, 1], [9, 30, 1, 0, 0]], np.int32)
# Without padding, which some code takes for text.
FULL_INPUTS = np.array([[5, 6, 7, 8, 1], [9, 30, 12, 21, 1]], np.int32)
TARGETS = np.array([[11, 12, 1], [13, 14, 1]], np.int32)


def seeded(name, shape, scale=1.0):
  """scale * sin(1.7 n + a phase of the name's CRC-32), n = 1, 2, ..."""
  phase = zlib.crc32(name.encode()) % 1000
  numbers = np.arange(1, math.prod(shape) + 1)
  values = scale * np.sin(1.7 * numbers + phase)
  return values.reshape(shape).astype(np.float32)


def params():
  """T5's parameters by path."""
  shapes = parameters.flatten(network.parameter_shapes(CONFIG))
  found = {}
  for path, spec in shapes.items():
    if path.endswith('scale'):
      found[path] = 1 + seeded(path, spec.shape, 0.3)
    elif path.endswith('token_embedder/embedding'):
      found[path] = seeded(path, spec.shape, 1.5)
    else:
      found[path] = seeded(path, spec.shape, 0.5)
  return found


def batch(inputs=INPUTS, virtual=None):
  """The batch, ids of virtual tokens [B, P] in front."""
  if virtual is not None:
    inputs = np.concatenate([virtual, inputs], axis=1)
  return {
    'encoder_input_tokens': inputs.astype(np.int32),
    'decoder_input_tokens': np.pad(TARGETS[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': TARGETS,
    'decoder_loss_weights': (TARGETS > 0).astype(np.int32),
  }
