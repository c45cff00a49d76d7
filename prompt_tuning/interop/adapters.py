"""Prompts in the formats of other systems: PEFT adapters, tables for serving.

PEFT's prompt tuning prepends to a T5's encoder, as ours does with a prompt as
prefix. It stores [num_transformer_submodules * P, E], of which the encoder uses
the first P rows; ours are written with one submodule, [P, E].
"""

from collections.abc import Mapping, Sequence
import io
import json
import os
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np
import safetensors
import safetensors.numpy

from prompt_tuning.errors import UserError

ADAPTER_CONFIG = 'adapter_config.json'
ADAPTER = 'adapter_model.safetensors'
_EMBEDDINGS = 'prompt_embeddings'
_TYPES = ('PROMPT_TUNING', 'P_TUNING')


def is_peft(folder: str | os.PathLike) -> bool:
  """True for the folder of a PEFT adapter."""
  return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def load_peft(
  folder: str | os.PathLike,
) -> tuple[Float[np.ndarray, 'P E'], dict[str, Any]]:
  """The rows that a PEFT prompt-tuning or P-tuning adapter gives the encoder.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`; a
      `.bin` file is not read, since it may run code.

  Returns:
    [P, E] as stored, and the adapter's base model as metadata.

  Raises:
    UserError: another kind of adapter, or a damaged file.
  """
  folder = pathlib.Path(folder)
  file = folder / ADAPTER_CONFIG
  try:
    config = json.loads(file.read_text('utf-8'))
    kind, length = config['peft_type'], config['num_virtual_tokens']
    if not isinstance(length, int) or length < 1:
      raise ValueError(f'num_virtual_tokens {length!r}')
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'cannot read {file} ({" ".join(str(error).split())[:120]}); a PEFT '
      'configuration with peft_type and num_virtual_tokens is required'
    ) from error
  if kind not in _TYPES:
    raise UserError(
      f'{folder} is a PEFT adapter of type {kind}; prompts are '
      f'{" and ".join(_TYPES)}'
    )
  if not (folder / ADAPTER).is_file():
    raise UserError(
      f'{folder} has no {ADAPTER}; save the adapter again with '
      'safe_serialization=True'
    )
  try:
    with safetensors.safe_open(folder / ADAPTER, framework='numpy') as opened:
      if _EMBEDDINGS not in opened.keys():
        raise ValueError(f'no array {_EMBEDDINGS}')
      table = opened.get_tensor(_EMBEDDINGS)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(
      f'cannot read {folder / ADAPTER} ({" ".join(str(error).split())[:120]});'
      ' the file is damaged or of another kind'
    ) from error
  submodules = config.get('num_transformer_submodules') or 2
  allowed = (length, length * submodules)
  if table.ndim != 2 or len(table) not in allowed:
    raise UserError(
      f'{folder / ADAPTER} has shape {list(table.shape)}, the configuration '
      f'says {length} virtual tokens and {submodules} submodules'
    )
  facts = {
    'base': config.get('base_model_name_or_path'),
    'format': f'peft {kind}',
  }
  return table[:length], {k: v for k, v in facts.items() if v is not None}


def save_peft(
  folder: str | os.PathLike,
  table: Float[np.ndarray, 'P E'],
  *,
  base: str,
  num_layers: int,
  num_heads: int,
) -> list[pathlib.Path]:
  """Writes a PEFT adapter that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: created if need be.
    table: one prompt, which stands in front of the text.
    base: the Hugging Face model it belongs to, a path or an id.
    num_layers: of the base's encoder.
    num_heads: of its attention.

  Returns:
    The two files.

  Raises:
    UserError: if they cannot be written.
  """
  folder = pathlib.Path(folder).expanduser()
  length, embed = table.shape
  config = {
    'auto_mapping': None,
    'base_model_name_or_path': base,
    'inference_mode': True,
    'num_attention_heads': num_heads,
    'num_layers': num_layers,
    'num_transformer_submodules': 1,
    'num_virtual_tokens': length,
    'peft_type': 'PROMPT_TUNING',
    'prompt_tuning_init': 'RANDOM',
    'prompt_tuning_init_text': None,
    'revision': None,
    'task_type': 'SEQ_2_SEQ_LM',
    'token_dim': embed,
    'tokenizer_name_or_path': None,
  }
  array = np.ascontiguousarray(table, np.float32)
  data = safetensors.numpy.save({_EMBEDDINGS: array}, metadata={'format': 'pt'})
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  return _write(folder, {ADAPTER: data, ADAPTER_CONFIG: text.encode('utf-8')})


def save_serving_table(
  file: str | os.PathLike, prompts: Sequence[Float[np.ndarray, 'P E']]
) -> pathlib.Path:
  """TensorRT-LLM's prompt table, [tasks, longest P, E] float32, zero-padded.

  Task i's virtual tokens have the ids V, V + 1, ... there.

  Args:
    file: a .npy file to write.
    prompts: one for each task, of one E.
  """
  file = pathlib.Path(file).expanduser()
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
  data = io.BytesIO()
  np.save(data, table, allow_pickle=False)
  return _write(file.parent, {file.name: data.getvalue()})[0]


def _write(
  folder: pathlib.Path, files: Mapping[str, bytes]
) -> list[pathlib.Path]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      unfinished = folder / f'{name}.unfinished'
      unfinished.write_bytes(data)
      unfinished.replace(folder / name)
  except OSError as error:
    raise UserError(
      f'cannot write {folder}: {error.strerror}; free the disk or choose '
      'another folder'
    ) from error
  return [folder / name for name in files]
