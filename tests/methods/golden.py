"""What reference implementations gave on a tiny T5, and what they were given.

`golden_methods.npz` holds the outputs alone. The inputs are drawn here, so that
both sides can draw them: T5's parameters and a method's arrays by numpy's
RandomState, in the order of their paths. The T5 was written as a Hugging Face
folder (this package's `convert --to=hugging_face`, tied output layer off,
dropout 0) and read by transformers 5.24.0 with torch 2.13.0 on a CPU, float32.
Then, of each case, with the arrays below put into the reference's own
parameters:

- residual, residual_separate: `ResMLP` ('MLP1', layer norm) and
  `PromptTuner.train_step_lester` of arazd/ResidualPrompts (53087ca), with empty
  modules for the data sets and metrics that its file imports.
- dept: `PeftModelForSeq2SeqLM` of the peft of ZhengxiangShi/DePT (f0266a7),
  PROMPT_TUNING_LORA. It wants inputs of exactly its max_length, 7 here, and an
  attribute of the model that only generation used, which transformers has lost.
- adept: the same of HungerPWAY/ADePT (c5e3629), PROMPT_TUNING_LORAX, in
  evaluation mode, that is without its dropout.
- prefix, prefix_hidden: peft 0.21.2, PREFIX_TUNING with num_layers 4, without
  and with prefix_projection, whose pairs 0 and 2 are those of the two layers.

`<case>/logits` are those of both texts [2, 3, V]; `<case>/<path>` is the
gradient by that array of the sum of the logits times `weights()`.
"""

import pathlib

import numpy as np

from prompt_tuning.methods.dept import ADePT
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.reparametrization import Residual
from prompt_tuning.models import network
from prompt_tuning.models import parameters

FILE = pathlib.Path(__file__).with_name('golden_methods.npz')
CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=12,
  num_encoder_layers=2,
  num_decoder_layers=2,
  num_buckets=8,
  max_distance=12,
)
CASES = {
  'residual': Prompt(3, reparametrization=Residual(5)),
  'residual_separate': Prompt(3, reparametrization=Residual(5, separate=True)),
  'dept': DePT(3, 2, inputs_length=7),
  'adept': ADePT(3, 2),
  'prefix': Prefix(3, ('decoder',)),
  'prefix_hidden': Prefix(3, ('decoder',), hidden=5),
}
# Padded by 0; the decoder's inputs begin with 0.
INPUTS = np.array([[5, 6, 7, 8, 9, 30, 1], [9, 30, 12, 1, 0, 0, 0]], 'i4')
DECODER = np.array([[0, 11, 12], [0, 13, 14]], 'i4')


def drawn(shapes, seed):
  """float32 arrays of normal numbers, {path: array}."""
  return {
    path: np.random.RandomState(seed + i)
    .normal(size=shapes[path])
    .astype(np.float32)
    for i, path in enumerate(sorted(shapes))
  }


def params():
  """T5's parameters by path: normal, in a sound scale."""
  shapes = parameters.flatten(network.parameter_shapes(CONFIG))
  found = drawn({path: spec.shape for path, spec in shapes.items()}, 1000)
  for path, array in found.items():
    if path.endswith('/kernel'):
      array *= np.float32(len(array) ** -0.5)
    elif path.endswith('/scale'):
      found[path] = 1 + np.float32(0.1) * array
  return found


def arrays(shapes):
  """A method's arrays, of {path: shape}."""
  return {k: np.float32(0.5) * v for k, v in drawn(shapes, 2000).items()}


def weights():
  """Of the logits, in what the gradients are of."""
  return np.random.RandomState(3000).normal(size=(2, 3, 40)).astype('f')
