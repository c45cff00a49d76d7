"""Hugging Face T5 models, written; a prompt may become part of the vocabulary.

What is read and how parameters are called stands in `hugging_face`.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

import prompt_tuning
from prompt_tuning import files
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import faults
from prompt_tuning.interop import hugging_face
from prompt_tuning.training import tensor_files
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import storage_dtype

# A file of a sharded model is no larger, as Hugging Face's are.
_SHARD_BYTES = 5 * 10**9
_SPECIAL_IDS = {
  'pad_token_id': 0,
  'eos_token_id': 1,
  'decoder_start_token_id': 0,
}


def config_of(
  arrays: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Hugging Face's configuration of a T5, from the shapes of its parameters.

  Args:
    arrays: by T5X path.
    stated: what shapes do not tell (see `BaseCheckpoint`).
  """
  stated = dict(stated or {})
  config = BaseCheckpoint('the model', 0, arrays, stated=stated).config()
  kinds = {v: k for k, v in hugging_face.ACTIVATIONS.items()}
  return {
    'architectures': ['T5ForConditionalGeneration'],
    'model_type': 't5',
    'is_encoder_decoder': True,
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'd_kv': config.head_dim,
    'd_ff': config.mlp_dim,
    'num_layers': config.num_encoder_layers,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'relative_attention_num_buckets': config.num_buckets,
    'relative_attention_max_distance': config.max_distance,
    'feed_forward_proj': kinds[tuple(config.mlp_activations)],
    'tie_word_embeddings': config.logits_via_embedding,
    'layer_norm_epsilon': hugging_face.NORM_EPSILON,
    'dropout_rate': stated.get('dropout_rate', 0.1),
    **_SPECIAL_IDS,
  }


def save_model(
  path: str | os.PathLike,
  arrays: Mapping[str, Any],
  step: int,
  *,
  dtype: str = 'float32',
  vocabulary_file: str | os.PathLike | None = None,
  stated: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
  """Writes a Hugging Face folder: configuration, weights, vocabulary.

  Args:
    path: the folder; files of these names in it are replaced.
    arrays: by T5X path, unrolled (lazy ones too), read a shard at a time.
    step: to which the model was trained, kept as `prompt_tuning_step`.
    dtype: 'float32' or 'bfloat16'.
    vocabulary_file: a SentencePiece model to copy to `spiece.model`.
    stated: see `config_of`.

  Returns:
    The files.

  Raises:
    UserError: not the parameters of a T5, or the folder cannot be written.
  """
  folder = pathlib.Path(files.place(path))
  itemsize = np.dtype(storage_dtype(dtype)).itemsize
  config = config_of(arrays, stated) | {
    'torch_dtype': dtype,
    'prompt_tuning_step': int(step),
    'prompt_tuning_version': prompt_tuning.__version__,
  }
  shards, room = [], 0
  for ours in sorted(arrays):
    needed = math.prod(arrays[ours].shape) * itemsize
    if not shards or needed > room:
      shards.append({})
      room = _SHARD_BYTES
    room -= needed
    array = hugging_face.turned(ours, arrays[ours])
    shards[-1][hugging_face.their_name(ours)] = array
  written = []
  weight_map = {}
  for number, shard in enumerate(shards, start=1):
    name = hugging_face.SAFETENSORS
    if len(shards) > 1:
      name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    tensor_files.write(folder / name, shard, {'format': 'pt'}, dtype)
    written.append(folder / name)
    weight_map |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    index = {'metadata': {}, 'weight_map': weight_map}
    written.append(write_json(folder / hugging_face.INDEX, index))
  # Of a model that stood there, which readers would take for part of this one.
  for file in (folder / hugging_face.INDEX, *folder.glob('model*.safetensors')):
    if file not in written:
      file.unlink(missing_ok=True)
  written.append(write_json(folder / hugging_face.CONFIG, config))
  if vocabulary_file is not None:
    file = folder / 'spiece.model'
    with faults.writing(folder), files.replacing(file, 'wb') as opened:
      opened.write(pathlib.Path(vocabulary_file).read_bytes())
    written.append(file)
  return written


def write_json(file: pathlib.Path, content: Any) -> pathlib.Path:
  """Writes a configuration as Hugging Face does; its folder exists."""
  with faults.writing(file.parent), files.replacing(file) as opened:
    opened.write(json.dumps(content, indent=2) + '\n')
  return file


def save_byte_tokenizer(path: str | os.PathLike) -> pathlib.Path:
  """Says beside a model that its vocabulary is ByT5's, which needs no file."""
  tokens = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  tokenizer = {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125, **tokens}
  folder = pathlib.Path(files.place(path))
  return write_json(folder / 'tokenizer_config.json', tokenizer)


def save_with_prompt_tokens(
  path: str | os.PathLike,
  arrays: Mapping[str, Any],
  step: int,
  prompt: Float[np.ndarray, 'P E'],
  vocabulary: Vocabulary,
  *,
  dtype: str = 'float32',
  stated: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
  """Writes a model whose vocabulary has the prompt in it, for plain T5 servers.

  Row i of the prompt is the embedding of the token <prompt_i>, whose id follows
  the vocabulary's last: rows that only round the table up are taken first. Put
  all of them in front of a text and the model does what it does with the
  prompt, wherever T5 runs. The output layer gets copies of padding's column for
  them, which nothing is trained to write, and `generation_config.json`
  suppresses them.

  Args:
    path: see `save_model`, like arrays, step, dtype and stated.
    prompt: rows of the prompt, which stands in front of the text.
    vocabulary: the model's.
  """
  folder = pathlib.Path(files.place(path))
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
  written = save_model(
    folder,
    changed,
    step,
    dtype=dtype,
    vocabulary_file=vocabulary.path,
    stated={k: v for k, v in (stated or {}).items() if k != 'vocab_size'},
  )
  ids = {f'<prompt_{i}>': first + i for i in range(len(prompt))}
  no = dict.fromkeys(('lstrip', 'normalized', 'rstrip', 'single_word'), False)
  tokenizer = {
    'tokenizer_class': 'T5Tokenizer',
    'extra_ids': vocabulary.extra_ids,
    'pad_token': '<pad>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'added_tokens_decoder': {
      str(number): {'content': name, **no, 'special': True}
      for name, number in ids.items()
    },
  }
  generation = {
    **_SPECIAL_IDS,
    'suppress_tokens': sorted(ids.values()),
  }
  written.append(write_json(folder / 'tokenizer_config.json', tokenizer))
  written.append(write_json(folder / 'added_tokens.json', ids))
  written.append(write_json(folder / 'generation_config.json', generation))
  return written
