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
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models.network import T5Config
from prompt_tuning.training import tensor_files
from prompt_tuning.training.trained import Trained

ADAPTER_CONFIG = 'adapter_config.json'
ADAPTER = 'adapter_model.safetensors'
EMBEDDINGS = 'prompt_embeddings'


def is_peft(folder: str | os.PathLike) -> bool:
  """True for the folder of a PEFT adapter."""
  return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def with_adapter(trained: Trained) -> Trained:
  """It, or the plain prompt where PEFT has an adapter for that alone."""
  if type(trained.method) in _ADAPTERS:
    return trained
  return trained.as_prompt() or trained


def save_peft(
  folder: str | os.PathLike, trained: Trained, *, base: str, config: T5Config
) -> list[pathlib.Path]:
  """Writes a PEFT adapter that `peft.PeftModel.from_pretrained` loads.

  Args:
    folder: created if need be.
    trained: a prompt, LoRA, IA3, a multitask prompt, or a prefix of the
      decoder.
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
  return {EMBEDDINGS: table}, {
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
  return {EMBEDDINGS: pairs.reshape(method.length, -1)}, {
    'encoder_hidden_size': None,
    'num_attention_heads': config.num_heads,
    'num_layers': layers,
    'num_transformer_submodules': 2,
    'num_virtual_tokens': method.length,
    'peft_type': 'PREFIX_TUNING',
    'prefix_projection': False,
    'token_dim': size,
  }


def _of_multitask_prompt(
  method: MultitaskPrompt, arrays: Mapping[str, Any], config: T5Config
) -> tuple[dict, dict]:
  """With one submodule: PEFT's forward would give the decoder rows too."""
  # Its placement is checked as a plain prompt's.
  prompt, plain = method.as_prompt(arrays)
  facts = _of_prompt(prompt, {'table': plain['table'][:1]}, config)[1]
  return {
    EMBEDDINGS: arrays['shared'],
    'prefix_task_cols': arrays['columns'],
    'prefix_task_rows': arrays['rows'],
  }, {
    **facts,
    'num_ranks': method.rank,
    'num_tasks': method.prompt.num_prompts,
    'peft_type': 'MULTITASK_PROMPT_TUNING',
    'prompt_tuning_init_state_dict_path': None,
    'prompt_tuning_init_task': 0,
  }


_ADAPTERS = {
  Prompt: _of_prompt,
  Lora: _of_lora,
  IA3: _of_ia3,
  Prefix: _of_prefix,
  MultitaskPrompt: _of_multitask_prompt,
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
