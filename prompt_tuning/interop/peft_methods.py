"""PEFT's LoRA, IA3 and multitask prompts as this package's methods.

What PEFT's configuration says beyond what these methods are (DoRA, trained
biases, ranks of single modules, ...) is refused, not left out.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import os
import pathlib
from typing import Any

import numpy as np

from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import faults
from prompt_tuning.interop import hugging_face
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.training import tensor_files
from prompt_tuning.training.trained import Trained

_PREFIX = 'base_model.model.'
# Settings that change what LoRA or IA3 is, and the values that do not.
_PLAIN = {
  'bias': ('none',),
  'use_dora': (False,),
  'rank_pattern': ({},),
  'alpha_pattern': ({},),
  'modules_to_save': ([],),
  'target_parameters': ([],),
  'trainable_token_indices': ([], {}),
  'lora_bias': (False,),
}


def load(folder: str | os.PathLike) -> Trained | None:
  """What a PEFT adapter of one of these kinds holds; None: of another kind.

  Raises:
    UserError: it is damaged, or does more than the method.
  """
  folder = pathlib.Path(folder)
  file = folder / adapters.ADAPTER_CONFIG
  with faults.reading(file, 'no PEFT configuration (peft_type)'):
    config = json.loads(file.read_text('utf-8'))
    kind = config['peft_type']
  if not isinstance(kind, str) or kind not in _KINDS:
    return None
  for name, allowed in _PLAIN.items():
    if (value := config.get(name)) not in (None, *allowed):
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
  if bad := [n for n, x in arrays.items() if not np.isfinite(x).all()]:
    raise UserError(f'{folder} has values in {bad[0]} that are not finite')
  facts = {'base': config.get('base_model_name_or_path')}
  facts = {k: v for k, v in facts.items() if v is not None}
  return Trained(method, arrays, {**facts, 'format': f'peft {kind}'})


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
    'shared': arrays['prompt_embeddings'][:length],
    'columns': arrays['prefix_task_cols'][:, :length],
    'rows': arrays['prefix_task_rows'],
  }
  embed = found['shared'].shape[-1]
  wanted = ((length, embed), (tasks, length, rank), (tasks, rank, embed))
  for (name, array), shape in zip(found.items(), wanted):
    if array.shape != shape:
      raise ValueError(f'{name} has shape {array.shape}, expected {shape}')
  return MultitaskPrompt(Prompt(length, tasks), rank), found


_KINDS: dict[str, Callable[..., tuple[Method, dict[str, np.ndarray]]]] = {
  'LORA': _lora,
  'IA3': _ia3,
  'MULTITASK_PROMPT_TUNING': _multitask_prompt,
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
