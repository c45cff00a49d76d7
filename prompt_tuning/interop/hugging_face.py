"""Hugging Face T5 models, read and written: T5 1.0, 1.1, mT5, ByT5, Flan-T5.

A model is a folder with `config.json` and `model.safetensors` (or its shards
and their index, or `pytorch_model.bin`, read by torch with weights_only), or
the id of one on the hub, looked up in the local cache first. Kernels are stored
transposed there, the relative-position table too; the numbers are the same.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
import re
from typing import Any

from jaxtyping import Float
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

import prompt_tuning
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.training.checkpoints import BaseCheckpoint
from prompt_tuning.training.checkpoints import LazyArray

CONFIG = 'config.json'
SAFETENSORS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_BIN = 'pytorch_model.bin'
_BIN_INDEX = 'pytorch_model.bin.index.json'
_MODEL_TYPES = ('t5', 'mt5')
# A file of a sharded model is no larger, as Hugging Face's are.
_SHARD_BYTES = 5 * 10**9

_ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
# T5X's name of a part of a layer: number and name of Hugging Face's.
_LAYERS = {
  'encoder': {
    'attention': (0, 'SelfAttention'),
    'mlp': (1, 'DenseReluDense'),
    'pre_attention_layer_norm': (0, 'layer_norm'),
    'pre_mlp_layer_norm': (1, 'layer_norm'),
  },
  'decoder': {
    'self_attention': (0, 'SelfAttention'),
    'encoder_decoder_attention': (1, 'EncDecAttention'),
    'mlp': (2, 'DenseReluDense'),
    'pre_self_attention_layer_norm': (0, 'layer_norm'),
    'pre_cross_attention_layer_norm': (1, 'layer_norm'),
    'pre_mlp_layer_norm': (2, 'layer_norm'),
  },
}


def their_name(path: str) -> str:
  """Hugging Face's name of a parameter, from T5X's path.

  'encoder/layers_0/mlp/wo/kernel' is
  'encoder.block.0.layer.1.DenseReluDense.wo.weight'.
  """
  stack, _, rest = path.partition('/')
  if path == 'token_embedder/embedding':
    return 'shared.weight'
  if path == 'decoder/logits_dense/kernel':
    return 'lm_head.weight'
  if rest == f'{stack}_norm/scale':
    return f'{stack}.final_layer_norm.weight'
  if rest == 'relpos_bias/rel_embedding':
    return (
      f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    )
  match = re.fullmatch(r'layers_(\d+)/(\w+)/(?:(\w+)/)?(kernel|scale)', rest)
  if not match or match[2] not in _LAYERS.get(stack, {}):
    raise UserError(f"{path} is no parameter of T5, Hugging Face's has none")
  number, part = _LAYERS[stack][match[2]]
  name = f'{stack}.block.{match[1]}.layer.{number}.{part}'
  if match[3]:
    name += f'.{_ATTENTION.get(match[3], match[3])}'
  return f'{name}.weight'


def our_path(name: str) -> str | None:
  """T5X's path of a parameter; None for a copy of the embedding table."""
  if name in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'):
    return None
  if name == 'shared.weight':
    return 'token_embedder/embedding'
  if name == 'lm_head.weight':
    return 'decoder/logits_dense/kernel'
  match = re.fullmatch(r'(encoder|decoder)\.final_layer_norm\.weight', name)
  if match:
    return f'{match[1]}/{match[1]}_norm/scale'
  match = re.fullmatch(
    r'(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(\w+)(?:\.(\w+))?\.weight',
    name,
  )
  if match:
    stack, block, number, part, leaf = match.groups()
    if leaf == 'relative_attention_bias' and block == '0':
      return f'{stack}/relpos_bias/rel_embedding'
    for ours, theirs in _LAYERS[stack].items():
      if theirs == (int(number), part):
        if leaf is None:
          return f'{stack}/layers_{block}/{ours}/scale'
        names = {theirs: ours for ours, theirs in _ATTENTION.items()}
        return f'{stack}/layers_{block}/{ours}/{names.get(leaf, leaf)}/kernel'
  raise UserError(f'{name} is no parameter of a T5 that this package has')


def _transposed(path: str) -> bool:
  return path.endswith(('/kernel', '/rel_embedding'))


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
  folder = pathlib.Path(path).expanduser()
  config = _read_config(folder)
  if step is None:
    step = config.get('prompt_tuning_step')
  if not isinstance(step, int):
    raise UserError(
      f'{path} does not say to which step it was trained; bind '
      'load_checkpoint.step (1000000 for T5 1.1, 1100000 for LM-adapted ones)'
    )
  arrays, theirs = {}, dict(_arrays(folder))
  for name, array in theirs.items():
    ours = our_path(name)
    if ours is not None:
      arrays[ours] = _transpose(array) if _transposed(ours) else array
  if config.get('tie_word_embeddings', True) and 'lm_head.weight' in theirs:
    if _same(theirs['lm_head.weight'], theirs.get('shared.weight')):
      del arrays['decoder/logits_dense/kernel']
  if 'token_embedder/embedding' not in arrays:
    raise UserError(f'{path} has no shared.weight; it is no whole T5')
  return BaseCheckpoint(
    os.fspath(path), step, arrays, {'format': 'hugging_face', 'config': config}
  )


def _same(one: LazyArray, other: LazyArray | None) -> bool:
  return (
    other is not None
    and one.shape == other.shape
    and np.array_equal(one[:64], other[:64])
  )


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / CONFIG
  if not file.is_file():
    raise UserError(f'{folder} holds no Hugging Face model: it has no {CONFIG}')
  with _reading(file):
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
    (_INDEX, SAFETENSORS, _safetensors_arrays),
    (_BIN_INDEX, _BIN, _torch_arrays),
  ):
    if (folder / index).is_file():
      with _reading(folder / index):
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
      yield from read(folder / single)
      return
  raise UserError(
    f'{folder} has no weights: {SAFETENSORS}, its shards with {_INDEX}, or '
    f'{_BIN} is required'
  )


_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


def _safetensors_arrays(
  file: pathlib.Path,
) -> Iterator[tuple[str, LazyArray]]:
  with _reading(file):
    with safetensors.safe_open(file, framework='numpy') as opened:
      for name in opened.keys():
        part = opened.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in _DTYPES:
          raise ValueError(f'{name} is {dtype}')
        yield (
          name,
          LazyArray(
            tuple(part.get_shape()),
            _DTYPES[dtype],
            safetensors_reader(file, name),
          ),
        )


def safetensors_reader(
  file: pathlib.Path, name: str
) -> Callable[[Any], np.ndarray]:
  """Reads one array of a safetensors file; of slices, those alone."""

  def read(index):
    with _reading(file):
      with safetensors.safe_open(file, framework='numpy') as opened:
        if index is Ellipsis:
          return opened.get_tensor(name)
        part = opened.get_slice(name)
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(i, slice) and i.step in (None, 1) for i in parts):
          shape = part.get_shape()
          return part[
            tuple(
              slice(*i.indices(size)[:2])
              for i, size in zip(parts, shape, strict=False)
            )
          ]
        return opened.get_tensor(name)[index]

  return read


def _torch_arrays(file: pathlib.Path) -> Iterator[tuple[str, LazyArray]]:
  try:
    import torch
  except ImportError:
    raise UserError(
      f'{file} is a torch file, which needs torch; install it, or convert the '
      f'model to {SAFETENSORS}'
    ) from None
  with _reading(file):
    tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    for name, tensor in tensors.items():
      yield name, _torch_array(tensor)


def _torch_array(tensor: Any) -> LazyArray:
  import torch

  bits = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
  stored, dtype = bits.get(tensor.dtype, (tensor.dtype, None))
  if dtype is None:
    dtype = torch.empty((), dtype=tensor.dtype).numpy().dtype

  def read(index):
    return np.array(tensor.view(stored)[index].numpy()).view(dtype)

  return LazyArray(tuple(tensor.shape), np.dtype(dtype), read)


def _transpose(array: LazyArray) -> LazyArray:
  """The matrix's transpose; a slice of it reads that slice alone."""

  def read(index):
    if index is Ellipsis:
      return array[...].T
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) <= 2 and all(isinstance(part, slice) for part in parts):
      rows, columns = (*parts, slice(None))[:2]
      return array[columns, rows].T
    return array[...].T[index]

  return LazyArray(array.shape[::-1], array.dtype, read)


def config_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Hugging Face's configuration of a T5, from the shapes of its parameters.

  Args:
    arrays: by T5X path, unrolled.
  """
  vocab_size, embed = arrays['token_embedder/embedding'].shape
  heads = arrays['encoder/relpos_bias/rel_embedding'].shape[0]
  buckets = arrays['encoder/relpos_bias/rel_embedding'].shape[1]
  query = arrays['encoder/layers_0/attention/query/kernel'].shape
  gated = 'encoder/layers_0/mlp/wi_0/kernel' in arrays
  wi = 'wi_0' if gated else 'wi'

  def layers(stack):
    found = [re.match(rf'{stack}/layers_(\d+)/', name) for name in arrays]
    return 1 + max(int(match[1]) for match in found if match)

  return {
    'architectures': ['T5ForConditionalGeneration'],
    'model_type': 't5',
    'is_encoder_decoder': True,
    'vocab_size': int(vocab_size),
    'd_model': int(embed),
    'd_kv': int(np.prod(query[1:]) // heads),
    'd_ff': int(arrays[f'encoder/layers_0/mlp/{wi}/kernel'].shape[1]),
    'num_layers': layers('encoder'),
    'num_decoder_layers': layers('decoder'),
    'num_heads': int(heads),
    'relative_attention_num_buckets': int(buckets),
    'relative_attention_max_distance': 128,
    'feed_forward_proj': 'gated-gelu' if gated else 'relu',
    'tie_word_embeddings': 'decoder/logits_dense/kernel' not in arrays,
    'layer_norm_epsilon': 1e-6,
    'dropout_rate': 0.1,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'decoder_start_token_id': 0,
  }


def save_model(
  path: str | os.PathLike,
  arrays: Mapping[str, Any],
  step: int,
  *,
  dtype: str = 'float32',
  vocabulary_file: str | os.PathLike | None = None,
) -> list[pathlib.Path]:
  """Writes a Hugging Face folder: configuration, weights, vocabulary.

  Args:
    path: the folder; files of these names in it are replaced.
    arrays: by T5X path, unrolled (lazy ones too), read one at a time.
    step: to which the model was trained, kept as `prompt_tuning_step`.
    dtype: 'float32' or 'bfloat16'.
    vocabulary_file: a SentencePiece model to copy to `spiece.model`.

  Returns:
    The files.

  Raises:
    UserError: not the parameters of a T5, or the folder cannot be written.
  """
  folder = pathlib.Path(path).expanduser()
  types = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
  if dtype not in types:
    raise UserError(f'dtype must be float32 or bfloat16, got {dtype!r}')
  names = {name: their_name(name) for name in sorted(arrays)}
  config = config_of(arrays) | {
    'torch_dtype': dtype,
    'prompt_tuning_step': int(step),
    'prompt_tuning_version': prompt_tuning.__version__,
  }

  def converted(ours):
    array = np.asarray(arrays[ours]).astype(types[dtype])
    if array.ndim > 2:
      raise UserError(f'{ours} has shape {array.shape}, a matrix is required')
    return np.ascontiguousarray(array.T if _transposed(ours) else array)

  try:
    folder.mkdir(parents=True, exist_ok=True)
    files = _save_shards(folder, names, arrays, converted, types[dtype])
    text = json.dumps(config, indent=2) + '\n'
    (folder / CONFIG).write_text(text, 'utf-8')
    files.append(folder / CONFIG)
    if vocabulary_file is not None:
      data = pathlib.Path(vocabulary_file).read_bytes()
      (folder / 'spiece.model').write_bytes(data)
      files.append(folder / 'spiece.model')
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise UserError(
      f'cannot write {folder}: {reason}; free the disk or choose another folder'
    ) from error
  return files


def save_with_prompt_tokens(
  path: str | os.PathLike,
  arrays: Mapping[str, Any],
  step: int,
  prompt: Float[np.ndarray, 'P E'],
  vocabulary: Vocabulary,
  *,
  dtype: str = 'float32',
) -> list[pathlib.Path]:
  """Writes a model whose vocabulary has the prompt in it, for plain T5 servers.

  Row i of the prompt is the embedding of the token <prompt_i>, whose id follows
  the vocabulary's last: rows that only round the table up are taken first. Put
  all of them in front of a text and the model does what it does with the
  prompt, wherever T5 runs. The output layer gets copies of padding's column for
  them, which nothing is trained to write, and `generation_config.json`
  suppresses them.

  Args:
    path: see `save_model`, like arrays, step and dtype.
    prompt: rows of the prompt, which stands in front of the text.
    vocabulary: the model's.
  """
  folder = pathlib.Path(path).expanduser()
  first = vocabulary.size
  embedding = np.asarray(arrays['token_embedder/embedding'])
  if prompt.shape[1] != embedding.shape[1]:
    raise UserError(
      f'the prompt has embed {prompt.shape[1]}, the model {embedding.shape[1]}'
    )
  rows = max(len(embedding), first + len(prompt))
  # A prompt in bfloat16 is another prompt: `dtype` alone rounds it.
  table = np.zeros((rows, embedding.shape[1]), np.float32)
  table[: len(embedding)] = embedding
  table[first : first + len(prompt)] = prompt
  changed = {**arrays, 'token_embedder/embedding': table}
  output = 'decoder/logits_dense/kernel'
  if output in arrays:
    kernel = np.asarray(arrays[output])
    columns = np.repeat(kernel[:, :1], rows, axis=1)
    columns[:, :first] = kernel[:, :first]
    changed[output] = columns
  files = save_model(
    folder, changed, step, dtype=dtype, vocabulary_file=vocabulary.path
  )
  ids = {f'<prompt_{i}>': first + i for i in range(len(prompt))}
  token = {
    'lstrip': False,
    'normalized': False,
    'rstrip': False,
    'single_word': False,
    'special': True,
  }
  texts = {
    'tokenizer_config.json': {
      'tokenizer_class': 'T5Tokenizer',
      'extra_ids': vocabulary.extra_ids,
      'pad_token': '<pad>',
      'eos_token': '</s>',
      'unk_token': '<unk>',
      'added_tokens_decoder': {
        str(number): {'content': name, **token} for name, number in ids.items()
      },
    },
    'added_tokens.json': ids,
    'generation_config.json': {
      'pad_token_id': 0,
      'eos_token_id': 1,
      'decoder_start_token_id': 0,
      'suppress_tokens': sorted(ids.values()),
    },
  }
  for name, content in texts.items():
    (folder / name).write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
    files.append(folder / name)
  return files


def _save_shards(folder, names, arrays, converted, dtype) -> list[pathlib.Path]:
  """Writes the weights, a file a shard, holding one shard in memory."""
  shards, size = [[]], 0
  for ours in names:
    needed = int(np.prod(arrays[ours].shape)) * np.dtype(dtype).itemsize
    if shards[-1] and size + needed > _SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(ours)
    size += needed
  files, weight_map = [], {}
  for number, shard in enumerate(shards, start=1):
    name = SAFETENSORS
    if len(shards) > 1:
      name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    unfinished = folder / f'{name}.unfinished'
    safetensors.numpy.save_file(
      {names[ours]: converted(ours) for ours in shard},
      unfinished,
      metadata={'format': 'pt'},
    )
    unfinished.replace(folder / name)
    files.append(folder / name)
    weight_map.update({names[ours]: name for ours in shard})
  if len(shards) > 1:
    index = {'metadata': {}, 'weight_map': weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')
    files.append(folder / _INDEX)
  return files


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # safetensors, json and torch have many kinds
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f'cannot read {file} ({lines[0][:120]}); the file is damaged or of '
      'another kind, get it again'
    ) from error
