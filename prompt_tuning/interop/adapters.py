"""Prompts and other methods in the formats of other systems: PEFT, serving.

PEFT's prompt tuning prepends to a T5's encoder, as ours does with a prompt as
prefix. It stores [num_transformer_submodules * P, E], of which the encoder uses
the first P rows; ours are written with one submodule, [P, E]. Its LoRA and IA3
hold arrays by the name of the module they act on, as Hugging Face calls it.

Its prefix tuning holds [P, num_layers * 2 * token_dim], the keys and values of
so many layers, and cuts them for a T5 as if half of them were those of
cross-attention, to throw that half away: layer i of the decoder gets the pair
2 * i, counted round from the start again after the last. With its own
num_layers, the encoder's, layers share pairs and half of what is trained does
nothing. Ours are written with twice the decoder's layers, the odd ones empty.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.interop import faults
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop.hugging_face_writing import write_json
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models.network import T5Config
from prompt_tuning.training import tensor_files
from prompt_tuning.training.trained import Trained

ADAPTER_CONFIG = 'adapter_config.json'
ADAPTER = 'adapter_model.safetensors'
_EMBEDDINGS = 'prompt_embeddings'


def is_peft(folder: str | os.PathLike) -> bool:
  """True for the folder of a PEFT adapter."""
  return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def load_peft(folder: str | os.PathLike) -> Trained:
  """What a PEFT adapter of prompt tuning, P-tuning or prefix tuning trained.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`; a
      `.bin` file is not read, since it may run code.

  Returns:
    It, with the adapter's base model among its facts.

  Raises:
    UserError: another kind of adapter, or a damaged file.
  """
  folder = pathlib.Path(folder)
  file = folder / ADAPTER_CONFIG
  with faults.reading(file, 'no PEFT configuration (peft_type)'):
    config = json.loads(file.read_text('utf-8'))
    kind = str(config['peft_type'])
  if kind not in _READERS:
    raise UserError(
      f'{folder} is a PEFT adapter of type {kind}; read are '
      f'{", ".join(_READERS)}'
    )
  if not (folder / ADAPTER).is_file():
    raise UserError(
      f'{folder} has no {ADAPTER}; save the adapter again with '
      'safe_serialization=True'
    )
  with faults.reading(folder):
    stored = np.asarray(tensor_files.read(folder / ADAPTER)[0][_EMBEDDINGS])
    method, arrays = _READERS[kind](folder, config, stored)
    bad = int((~np.isfinite(np.asarray(stored, np.float32))).sum())
  if bad:
    raise UserError(
      f'{folder} has {bad} values that are not finite; save an earlier one'
    )
  facts = {
    'base': config.get('base_model_name_or_path'),
    'format': f'peft {kind}',
  }
  return Trained(
    method, arrays, {k: v for k, v in facts.items() if v is not None}
  )


def _prompt_in(
  folder: pathlib.Path, config: Mapping[str, Any], stored: np.ndarray
) -> tuple[Prompt, dict[str, Any]]:
  """The rows that the encoder gets."""
  length = _size(config, 'num_virtual_tokens')
  submodules = config.get('num_transformer_submodules') or 2
  if stored.ndim != 2 or len(stored) not in (length, length * submodules):
    raise UserError(
      f'{folder / ADAPTER} has shape {list(stored.shape)}, the configuration '
      f'says {length} virtual tokens and {submodules} submodules'
    )
  return Prompt.from_file({'prompt': stored[:length]}, {}, {})


def _prefix_in(
  folder: pathlib.Path, config: Mapping[str, Any], stored: np.ndarray
) -> tuple[Prefix, dict[str, Any]]:
  """The keys and values that each layer of a T5's decoder gets."""
  sizes = ('num_virtual_tokens', 'num_layers', 'token_dim')
  length, layers, size = (_size(config, name) for name in sizes)
  if (config.get('num_transformer_submodules') or 2) != 2:
    raise UserError(
      f'{folder} has num_transformer_submodules 1, with which PEFT puts the'
      " decoder's own keys into its cross-attention too; nothing here acts so"
    )
  if stored.shape != (length, layers * 2 * size):
    raise UserError(
      f'{folder / ADAPTER} has shape {list(stored.shape)}, the configuration '
      f'says {length} virtual tokens, {layers} layers and token_dim {size}'
    )
  pairs = stored.astype(np.float32).reshape(length, layers, 2, size)
  arrays = {}
  for i in range(_decoder_layers(config, pairs)):
    place = f'decoder/layers_{i}/self_attention'
    keys, values = np.moveaxis(pairs[:, 2 * i % layers], 1, 0)
    arrays |= {f'{place}/keys': keys, f'{place}/values': values}
  return Prefix(length, ('decoder',)), arrays


def _decoder_layers(
  config: Mapping[str, Any], pairs: Float[np.ndarray, 'P L 2 N']
) -> int:
  """Of the adapter's base: as its configuration says if it is a folder here."""
  layers = pairs.shape[1]
  base = pathlib.Path(str(config.get('base_model_name_or_path')), 'config.json')
  if base.is_file():
    stated = json.loads(base.read_text('utf-8'))
    wanted = int(stated.get('num_decoder_layers') or stated['num_layers'])
    if wanted > layers:
      raise ValueError(f'{layers} layers for a decoder of {wanted}')
    return wanted
  written_here = layers % 2 == 0 and not pairs[:, 1::2].any()
  return layers // 2 if written_here else layers


def _size(config: Mapping[str, Any], name: str) -> int:
  value = config[name]
  if not isinstance(value, int) or value < 1:
    raise ValueError(f'{name} is {value!r}')
  return value


_READERS = {
  'PROMPT_TUNING': _prompt_in,
  'P_TUNING': _prompt_in,
  'PREFIX_TUNING': _prefix_in,
}


def save_peft(
  folder: str | os.PathLike, trained: Trained, *, base: str, config: T5Config
) -> list[pathlib.Path]:
  """Writes a PEFT adapter that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: created if need be.
    trained: a prompt, LoRA, IA3, or a prefix of the decoder.
    base: the Hugging Face model it belongs to, a path or an id.
    config: the base's network.

  Returns:
    The two files.

  Raises:
    UserError: PEFT has nothing that acts like it, or they cannot be written.
  """
  if type(trained.method) not in _ADAPTERS:
    names = ', '.join(method.collection for method in _ADAPTERS)
    raise UserError(
      f'peft has an adapter for {names}, got {trained.method.collection}'
    )
  method, arrays = trained.method.plain(trained.arrays)
  arrays, facts = _ADAPTERS[type(method)](method, arrays, config)
  facts |= {
    'auto_mapping': None,
    'base_model_name_or_path': base,
    'inference_mode': True,
    'revision': None,
    'task_type': 'SEQ_2_SEQ_LM',
  }
  folder = pathlib.Path(files.place(folder))
  tensor_files.write(folder / ADAPTER, arrays, {'format': 'pt'}, 'float32')
  write_json(folder / ADAPTER_CONFIG, dict(sorted(facts.items())))
  return [folder / ADAPTER, folder / ADAPTER_CONFIG]


def _of_prompt(
  method: Prompt, arrays: Mapping[str, Any], config: T5Config
) -> tuple[dict, dict]:
  table = one_prompt(arrays['table'], 'the prompt', config.emb_dim)
  if method.placement != 'prefix':
    raise UserError(
      'PEFT puts a prompt in front of the text, this one stands as '
      f'{method.placement}'
    )
  return {_EMBEDDINGS: table}, {
    'num_attention_heads': config.num_heads,
    'num_layers': config.num_encoder_layers,
    'num_transformer_submodules': 1,
    'num_virtual_tokens': len(table),
    'peft_type': 'PROMPT_TUNING',
    'prompt_tuning_init': 'RANDOM',
    'prompt_tuning_init_text': None,
    'token_dim': config.emb_dim,
    'tokenizer_name_or_path': None,
  }


def _of_lora(
  method: Lora, arrays: Mapping[str, Any], config: T5Config
) -> tuple[dict, dict]:
  """A is [r, I] there and B [O, r], as torch's kernels are."""
  del config
  found = {}
  for path, array in arrays.items():
    place, _, name = path.rpartition('/')
    key = f'{_module(place)}.lora_{name.upper()}.weight'
    found[key] = np.asarray(array).T
  return found, {
    'bias': 'none',
    'fan_in_fan_out': False,
    'lora_alpha': method.alpha,
    'lora_dropout': 0.0,
    'peft_type': 'LORA',
    'r': method.rank,
    'target_modules': _targets(arrays),
  }


def _of_ia3(
  method: IA3, arrays: Mapping[str, Any], config: T5Config
) -> tuple[dict, dict]:
  """A scale of outputs is a column there, one of inputs a row."""
  del config
  found = {}
  inputs = [path for path in arrays if path.split('/')[-2] in method.inputs]
  for path, array in arrays.items():
    shape = (1, -1) if path in inputs else (-1, 1)
    key = f'{_module(path.rpartition("/")[0])}.ia3_l'
    found[key] = np.asarray(array).reshape(shape)
  return found, {
    'fan_in_fan_out': False,
    'feedforward_modules': _targets(inputs),
    'peft_type': 'IA3',
    'target_modules': _targets(arrays),
  }


def _of_prefix(
  method: Prefix, arrays: Mapping[str, Any], config: T5Config
) -> tuple[dict, dict]:
  """Pair 2 * i is what layer i of the decoder gets, see the module."""
  if tuple(method.attentions) != ('decoder',):
    raise UserError(
      "PEFT's prefix tuning reaches the decoder's self-attention alone (peft"
      f' issue 2989), this prefix has {", ".join(method.attentions)}: train'
      " one with Prefix.attentions = ('decoder',)"
    )
  size = config.num_heads * config.head_dim
  layers = 2 * config.num_decoder_layers
  pairs = np.zeros((method.length, layers, 2, size), np.float32)
  for i in range(config.num_decoder_layers):
    for k, name in enumerate(('keys', 'values')):
      array = arrays[f'decoder/layers_{i}/self_attention/{name}']
      pairs[:, 2 * i, k] = np.asarray(array)
  return {_EMBEDDINGS: pairs.reshape(method.length, -1)}, {
    'encoder_hidden_size': None,
    'num_attention_heads': config.num_heads,
    'num_layers': layers,
    'num_transformer_submodules': 2,
    'num_virtual_tokens': method.length,
    'peft_type': 'PREFIX_TUNING',
    'prefix_projection': False,
    'token_dim': size,
  }


_ADAPTERS = {
  Prompt: _of_prompt,
  Lora: _of_lora,
  IA3: _of_ia3,
  Prefix: _of_prefix,
}


def _module(place: str) -> str:
  """PEFT's name of the module of a projection, from its T5X path."""
  name = hugging_face.their_name(f'{place}/kernel')
  return f'base_model.model.{name.removesuffix(".weight")}'


def _targets(paths: Iterable[str]) -> list[str]:
  """What PEFT finds the modules of arrays by: the ends of their names."""
  places = {path.rpartition('/')[0] for path in paths}
  return sorted({_module(place).rpartition('.')[2] for place in places})


def one_prompt(
  table: Float[Any, 'K P E'], source: str, embed: int | None = None
) -> Float[np.ndarray, 'P E']:
  """The rows of a table of one prompt.

  Args:
    table: its array.
    source: what errors call it.
    embed: the E that is needed; None: any.

  Raises:
    UserError: there are several, or of another E.
  """
  if len(table) != 1:
    raise UserError(
      f'{source} is a table of {len(table)} prompts; give a file of one'
    )
  if embed is not None and table.shape[2] != embed:
    raise UserError(
      f'{source} has embed {table.shape[2]}, the model needs {embed}'
    )
  return np.asarray(table)[0]


def save_serving_table(
  file: str | os.PathLike, prompts: Sequence[Float[np.ndarray, 'P E']]
) -> pathlib.Path:
  """TensorRT-LLM's prompt table, [tasks, longest P, E] float32, zero-padded.

  Task i's virtual tokens have the ids V, V + 1, ... there.

  Args:
    file: a .npy file to write.
    prompts: one for each task, of one E.
  """
  file = pathlib.Path(files.place(file))
  widths = {prompt.shape[-1] for prompt in prompts}
  if len(widths) != 1 or any(prompt.ndim != 2 for prompt in prompts):
    shapes = [list(prompt.shape) for prompt in prompts]
    raise UserError(
      f'a table needs prompts [P, E] of one embed, got shapes {shapes}'
    )
  longest = max(len(prompt) for prompt in prompts)
  table = np.zeros((len(prompts), longest, widths.pop()), np.float32)
  for row, prompt in zip(table, prompts, strict=True):
    row[: len(prompt)] = prompt
  with faults.writing(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file, 'wb') as opened:
      np.save(opened, table, allow_pickle=False)
  return file
