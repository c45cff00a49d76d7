"""Hugging Face T5 models, read: T5 1.0, 1.1, mT5, ByT5, Flan-T5.

A model is a folder with `config.json` and `model.safetensors` (or its shards
and their index, or `pytorch_model.bin`, read by torch with weights_only), or
the id of one on the hub, looked up in the local cache first. Kernels are stored
transposed there, the relative-position table too; the numbers are the same.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.interop import faults
from prompt_tuning.models.parameters import LazyArray
from prompt_tuning.training import tensor_files
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import UnknownStepError

CONFIG = 'config.json'
SAFETENSORS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_BIN = 'pytorch_model.bin'
_BIN_INDEX = 'pytorch_model.bin.index.json'
_MODEL_TYPES = ('t5', 'mt5')

# T5X's name of a part of a layer, the norm before it and what its kernels are
# called by both; Hugging Face's of the part.
_ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
_MLP = {name: name for name in ('wi', 'wi_0', 'wi_1', 'wo')}
_LAYERS = {
  'encoder': (
    ('attention', 'attention', _ATTENTION, 'SelfAttention'),
    ('mlp', 'mlp', _MLP, 'DenseReluDense'),
  ),
  'decoder': (
    ('self_attention', 'self_attention', _ATTENTION, 'SelfAttention'),
    (
      'encoder_decoder_attention',
      'cross_attention',
      _ATTENTION,
      'EncDecAttention',
    ),
    ('mlp', 'mlp', _MLP, 'DenseReluDense'),
  ),
}
# What old files have besides: copies of the table, and a bias that none uses.
_SPARE = (
  'encoder.embed_tokens.weight',
  'decoder.embed_tokens.weight',
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',
)


def _names() -> Iterator[tuple[str, str]]:
  """T5X's path and Hugging Face's name, layers with # for their number."""
  yield 'token_embedder/embedding', 'shared.weight'
  yield 'decoder/logits_dense/kernel', 'lm_head.weight'
  for stack, parts in _LAYERS.items():
    ours, theirs = f'{stack}/layers_#', f'{stack}.block.#.layer'
    yield f'{stack}/{stack}_norm/scale', f'{stack}.final_layer_norm.weight'
    yield (
      f'{stack}/relpos_bias/rel_embedding',
      f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    )
    for number, (part, normed, kernels, their_part) in enumerate(parts):
      yield (
        f'{ours}/pre_{normed}_layer_norm/scale',
        f'{theirs}.{number}.layer_norm.weight',
      )
      for kernel, their_kernel in kernels.items():
        yield (
          f'{ours}/{part}/{kernel}/kernel',
          f'{theirs}.{number}.{their_part}.{their_kernel}.weight',
        )


_THEIRS = dict(_names())
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
  if name in names:
    return names[name]
  number = re.search(r'(?<=/layers_)\d+|(?<=\.block\.)\d+', name)
  if number is None:
    return None
  found = names.get(f'{name[: number.start()]}#{name[number.end() :]}')
  return found and found.replace('#', number[0])


def their_name(path: str) -> str:
  """Hugging Face's name of a parameter, from T5X's path.

  'encoder/layers_0/mlp/wo/kernel' is
  'encoder.block.0.layer.1.DenseReluDense.wo.weight'.
  """
  if name := _renamed(path, _THEIRS):
    return name
  raise UserError(f"{path} is no parameter of T5, Hugging Face's has none")


def our_path(name: str) -> str | None:
  """T5X's path of a parameter; None for one that T5 does not need."""
  if name in _SPARE:
    return None
  if path := _renamed(name, _OURS):
    return path
  raise UserError(f'{name} is no parameter of a T5 that this package has')


def turned(path: str, array: Any) -> Any:
  """A parameter as the other of T5X and Hugging Face stores it, lazily."""
  if not path.endswith(('/kernel', '/rel_embedding')):
    return array

  def read(index):
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) <= 2 and all(isinstance(part, slice) for part in parts):
      rows, columns = (*parts, slice(None))[:2]
      return np.asarray(array[columns, rows]).T
    return np.asarray(array[...]).T[index]

  return LazyArray(array.shape[::-1], array.dtype, read)


def is_model(path: str | os.PathLike) -> bool:
  """True for a folder with a Hugging Face model."""
  return (pathlib.Path(path).expanduser() / CONFIG).is_file()


def is_hub_id(name: str) -> bool:
  """True for what may be the id of a model on the hub: google/t5-v1_1-base."""
  return (
    bool(re.fullmatch(r'[\w.-]+/[\w.-]+', name))
    and not pathlib.Path(name.split('/')[0]).exists()
  )


def download(hub_id: str) -> pathlib.Path:
  """The local folder of a model on the hub: from the cache, else fetched.

  Raises:
    UserError: if huggingface_hub is missing, or the model neither cached nor
      reachable.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(
      f'{hub_id} may be a model of the hub, which needs huggingface_hub; run: '
      'pip install "prompt_tuning[hub]", or give a local folder'
    ) from None
  patterns = ['*.json', '*.safetensors', 'spiece.model']
  for offline in (True, False):
    try:
      return pathlib.Path(
        huggingface_hub.snapshot_download(
          hub_id, allow_patterns=patterns, local_files_only=offline
        )
      )
    except Exception as error:  # its kinds differ between versions
      reason = str(error).strip().splitlines()
  raise UserError(
    f'{hub_id} is neither a local path nor cached, and the hub does not give it'
    f' ({reason[0][:120] if reason else "no reason given"})'
  )


def open_model(
  path: str | os.PathLike, step: int | None = None
) -> BaseCheckpoint:
  """A Hugging Face T5 as base checkpoint; arrays are read when asked for.

  A model is tied where its file has no output layer, whatever its
  configuration says; a stored copy of the embedding table is none.

  Args:
    path: the model's folder.
    step: to which it was trained, which their files do not say (1,000,000 for
      T5 1.1, 1,100,000 for its LM-adapted checkpoints). Files written by this
      package say it.

  Raises:
    UserError: no T5, no step, unknown or missing arrays, a damaged file.
  """
  folder = pathlib.Path(files.place(path))
  config = _read_config(folder)
  if step is None:
    step = config.get('prompt_tuning_step')
  if not isinstance(step, int) or step < 0:
    hint = ' (1000000 for T5 1.1, 1100000 for LM-adapted ones)'
    raise UnknownStepError(os.fspath(path), hint)
  arrays, theirs = {}, dict(_arrays(folder))
  for name, array in theirs.items():
    ours = our_path(name)
    if ours is not None:
      arrays[ours] = turned(ours, array)
  if 'shared.weight' not in theirs:
    raise UserError(f'{path} has no shared.weight; it is no whole T5')
  table, output = theirs['shared.weight'], theirs.get('lm_head.weight')
  if output is not None and config.get('tie_word_embeddings', True):
    if output.shape == table.shape and np.array_equal(output[:64], table[:64]):
      del arrays['decoder/logits_dense/kernel']
  facts = {'format': 'hugging_face', 'config': config}
  return BaseCheckpoint(
    os.fspath(path), step, arrays, facts, _stated(folder / CONFIG, config)
  )


# T5Config's attributes by the names that Hugging Face has for them.
_STATED = {
  'vocab_size': 'vocab_size',
  'd_model': 'emb_dim',
  'num_heads': 'num_heads',
  'd_kv': 'head_dim',
  'd_ff': 'mlp_dim',
  'num_layers': 'num_encoder_layers',
  'num_decoder_layers': 'num_decoder_layers',
  'relative_attention_num_buckets': 'num_buckets',
  'relative_attention_max_distance': 'max_distance',
  'dropout_rate': 'dropout_rate',
}
ACTIVATIONS = {
  'gated-gelu': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
  'relu': ('relu',),
}
NORM_EPSILON = 1e-6  # of `models.layers.rms_norm`, which has no other


def _stated(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """What a configuration says of the network, by T5Config's names.

  Whether the output layer is tied is left out: files say it better (see
  `open_model`).
  """
  stated = {
    ours: config[theirs] for theirs, ours in _STATED.items() if theirs in config
  }
  for name, value in stated.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise UserError(f'{file} says {name} {value!r}; a number is needed')
  if (kind := config.get('feed_forward_proj')) is not None:
    if kind not in ACTIVATIONS:
      raise UserError(
        f'{file} says feed_forward_proj {kind!r}; this package has'
        f' {", ".join(ACTIVATIONS)}'
      )
    stated['mlp_activations'] = ACTIVATIONS[kind]
  epsilon = config.get('layer_norm_epsilon', NORM_EPSILON)
  if epsilon != NORM_EPSILON:
    raise UserError(
      f'{file} says layer_norm_epsilon {epsilon!r}; this package has'
      f' {NORM_EPSILON}'
    )
  return stated


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / CONFIG
  if not file.is_file():
    raise UserError(f'{folder} holds no Hugging Face model: it has no {CONFIG}')
  with faults.reading(file):
    config = json.loads(file.read_text('utf-8'))
    kind = config.get('model_type')
  if kind not in _MODEL_TYPES:
    raise UserError(
      f'{file} says model_type {kind!r}; this package reads '
      f'{", ".join(_MODEL_TYPES)}'
    )
  return config


def _arrays(folder: pathlib.Path) -> Iterator[tuple[str, LazyArray]]:
  """Arrays by Hugging Face's names, from whichever files are there."""
  for index, single, read in (
    (INDEX, SAFETENSORS, lambda file: tensor_files.read(file)[0]),
    (_BIN_INDEX, _BIN, _torch_arrays),
  ):
    if (folder / index).is_file():
      with faults.reading(folder / index):
        weight_map = json.loads((folder / index).read_text())['weight_map']
        # A file's name, and no path to somewhere else.
        files = sorted({pathlib.PurePath(f).name for f in weight_map.values()})
      found = {}
      for file in files:
        if not (folder / file).is_file():
          raise UserError(f'{folder} lacks {file}, which {index} names')
        found.update(read(folder / file))
      if missing := sorted(set(weight_map) - set(found)):
        raise UserError(f'{folder}: no file holds {", ".join(missing[:3])}')
      yield from found.items()
      return
    if (folder / single).is_file():
      yield from dict(read(folder / single)).items()
      return
  raise UserError(
    f'{folder} has no weights: {SAFETENSORS}, its shards with {INDEX}, or '
    f'{_BIN} is required'
  )


def _torch_arrays(file: pathlib.Path) -> Iterator[tuple[str, LazyArray]]:
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{file} is a torch file, which needs torch; install it, or convert the '
      f'model to {SAFETENSORS}'
    ) from None
  with faults.reading(file):
    tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    for name, tensor in tensors.items():
      yield name, _torch_array(tensor)


def _torch_array(tensor: Any) -> LazyArray:
  dtype = np.dtype(str(tensor.dtype).removeprefix('torch.'))

  def read(index):
    # By way of a type that both know and that holds all values of the others.
    return tensor[index].double().numpy().astype(dtype)

  return LazyArray(tuple(tensor.shape), dtype, read)
