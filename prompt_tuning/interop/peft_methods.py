"""PEFT's adapters as this package's methods.

What PEFT's configuration says beyond what these methods are (DoRA, trained
biases, ranks of single modules, ...) is refused, not left out. What its files
hold, `adapters` says, which writes them.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import os
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import faults
from prompt_tuning.interop import hugging_face
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.training import tensor_files
from prompt_tuning.training.trained import Trained

_PREFIX = 'base_model.model.'
# Settings that change nothing of what an adapter computes, or that are read
# below: those of PEFT 0.21.2. Any other that is set is refused, later ones too.
_KNOWN = frozenset(
  'auto_mapping base_model_name_or_path revision peft_type peft_version'
  ' task_type inference_mode'
  # LoRA and IA3: where they act, the arrays say.
  ' r lora_alpha lora_dropout use_rslora fan_in_fan_out target_modules'
  ' exclude_modules feedforward_modules layers_to_transform layers_pattern'
  ' init_ia3_weights megatron_config megatron_core runtime_config'
  ' ephemeral_gpu_offload loftq_config eva_config qalora_group_size'
  ' velora_config ensure_weight_tying'
  # Prompts and prefixes: how they began or were made.
  ' num_virtual_tokens token_dim num_transformer_submodules num_layers'
  ' num_attention_heads prompt_tuning_init prompt_tuning_init_text'
  ' prompt_tuning_init_state_dict_path prompt_tuning_init_task num_ranks'
  ' num_tasks tokenizer_name_or_path tokenizer_kwargs init_weights'
  ' encoder_reparameterization_type encoder_hidden_size encoder_num_layers'
  ' encoder_dropout prefix_projection'.split()
)
# Those of which some values are harmless. Other starts of LoRA (pissa, corda,
# olora, loftq, lora_ga) take what they start with off the base's own weights.
_HARMLESS = {
  'bias': ('none',),
  'init_lora_weights': (True, 'gaussian', 'orthogonal', 'eva', 'mica'),
}


def load(folder: str | os.PathLike) -> Trained:
  """What a PEFT adapter holds.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`; a
      `.bin` file is not read, since it may run code.

  Returns:
    It, with the adapter's base model among its facts.

  Raises:
    UserError: it is damaged, of a kind that is no method here, or does more
      than the method.
  """
  folder = pathlib.Path(folder)
  file = folder / adapters.ADAPTER_CONFIG
  with faults.reading(file, 'no PEFT configuration (peft_type)'):
    config = json.loads(file.read_text('utf-8'))
    kind = str(config['peft_type'])
  if kind not in _KINDS:
    raise UserError(
      f'{folder} is a PEFT adapter of type {kind}; read are {", ".join(_KINDS)}'
    )
  for name, value in sorted(config.items()):
    if value and name not in _KNOWN and value not in _HARMLESS.get(name, ()):
      raise UserError(
        f'{folder} has {name} {value!r}, which {kind} here does not know:'
        ' merge the adapter into its model with PEFT'
      )
  if not (folder / adapters.ADAPTER).is_file():
    raise UserError(
      f'{folder} has no {adapters.ADAPTER}; save the adapter again with '
      'safe_serialization=True'
    )
  with faults.reading(folder):
    stored = tensor_files.read(folder / adapters.ADAPTER)[0]
    arrays = {name: np.asarray(x, np.float32) for name, x in stored.items()}
    method, arrays = _KINDS[kind](config, arrays)
  for name, array in arrays.items():
    if bad := int((~np.isfinite(array)).sum()):
      raise UserError(
        f'{folder} has {bad} values in {name} that are not finite; save an'
        ' earlier one'
      )
  facts = {'base': config.get('base_model_name_or_path')}
  facts = {k: v for k, v in facts.items() if v is not None}
  return Trained(method, arrays, {**facts, 'format': f'peft {kind}'})


def _prompt(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Method, Mapping[str, np.ndarray]]:
  """Of two submodules the rows of the encoder."""
  length = _size(config, 'num_virtual_tokens')
  submodules = config.get('num_transformer_submodules') or 2
  stored = arrays[adapters.EMBEDDINGS]
  if stored.ndim != 2 or len(stored) not in (length, length * submodules):
    raise ValueError(
      f'shape {list(stored.shape)}, the configuration says {length} virtual'
      f' tokens and {submodules} submodules'
    )
  return Prompt.from_file({'prompt': stored[:length]}, {}, {})


def _prefix(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Method, dict[str, np.ndarray]]:
  """The keys and values that each layer of a T5's decoder gets."""
  sizes = ('num_virtual_tokens', 'num_layers', 'token_dim')
  length, layers, size = (_size(config, name) for name in sizes)
  if (config.get('num_transformer_submodules') or 2) != 2:
    raise UserError(
      'a PEFT prefix has num_transformer_submodules 1, with which PEFT puts the'
      " decoder's own keys into its cross-attention too; nothing here acts so"
    )
  stored = arrays[adapters.EMBEDDINGS]
  if stored.shape != (length, layers * 2 * size):
    raise ValueError(
      f'shape {list(stored.shape)}, the configuration says {length} virtual'
      f' tokens, {layers} layers and token_dim {size}'
    )
  pairs = stored.reshape(length, layers, 2, size)
  found = {}
  for i in range(_decoder_layers(config, pairs)):
    place = f'decoder/layers_{i}/self_attention'
    keys, values = np.moveaxis(pairs[:, 2 * i % layers], 1, 0)
    found |= {f'{place}/keys': keys, f'{place}/values': values}
  return Prefix(length, ('decoder',)), found


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


def _lora(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Method, dict[str, np.ndarray]]:
  rank, alpha = int(config['r']), float(config['lora_alpha'])
  if config.get('use_rslora'):  # scaled by alpha / sqrt(rank)
    alpha *= rank**0.5
  found = {}
  for place, end, array in _placed(arrays):
    letter = {'lora_A.weight': 'a', 'lora_B.weight': 'b'}[end]
    found[f'{place}/{letter}'] = array.T
  return Lora(rank, alpha, _names(found)), found


def _ia3(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Method, dict[str, np.ndarray]]:
  found, inputs = {}, {}
  for place, end, array in _placed(arrays):
    if end != 'ia3_l' or 1 not in array.shape:
      raise ValueError(f'{end} of shape {list(array.shape)} is no scale')
    path = f'{place}/scale'
    found[path] = array.reshape(-1)
    if array.shape[0] == 1:  # a row: of what enters the projection
      inputs[path] = array
  outputs = {path: x for path, x in found.items() if path not in inputs}
  return IA3(_names(outputs), _names(inputs)), found


def _multitask_prompt(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Method, dict[str, np.ndarray]]:
  """Of two submodules the rows of the encoder, as PEFT's own `generate`."""
  length = int(config['num_virtual_tokens'])
  tasks, rank = int(config['num_tasks']), int(config['num_ranks'])
  found = {
    'shared': arrays[adapters.EMBEDDINGS][:length],
    'columns': arrays['prefix_task_cols'][:, :length],
    'rows': arrays['prefix_task_rows'],
  }
  embed = found['shared'].shape[-1]
  wanted = ((length, embed), (tasks, length, rank), (tasks, rank, embed))
  for (name, array), shape in zip(found.items(), wanted):
    if array.shape != shape:
      raise ValueError(f'{name} has shape {array.shape}, expected {shape}')
  return MultitaskPrompt(Prompt(length, tasks), rank), found


_KINDS: dict[str, Callable[..., tuple[Method, Mapping[str, np.ndarray]]]] = {
  'PROMPT_TUNING': _prompt,
  'P_TUNING': _prompt,
  'MULTITASK_PROMPT_TUNING': _multitask_prompt,
  'PREFIX_TUNING': _prefix,
  'LORA': _lora,
  'IA3': _ia3,
}


def _placed(
  arrays: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, str, np.ndarray]]:
  """(T5X's path of a projection, the rest of PEFT's name, array)."""
  for name, array in arrays.items():
    module, mark, end = name.removeprefix(_PREFIX).partition('.lora_')
    if mark:
      end = f'lora_{end}'
    else:
      module, _, end = name.removeprefix(_PREFIX).rpartition('.')
    path = hugging_face.our_path(f'{module}.weight')
    if path is None or not path.endswith('/kernel'):
      raise ValueError(f'{name} acts on no projection of a T5')
    yield path.removesuffix('/kernel'), end, array


def _names(paths: Mapping[str, Any]) -> tuple[str, ...]:
  """The projections that paths are of: 'query', 'wo', ..."""
  return tuple(sorted({path.split('/')[-2] for path in paths}))
