"""From one format of models or prompts to another, and reports on them."""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
from typing import Any

import numpy as np

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop import prompts
from prompt_tuning.interop import t5x
from prompt_tuning.training import checkpoints

MODEL_FORMATS = ('safetensors', 't5x', 'hugging_face', 'prompt_tokens')
PROMPT_FORMATS = ('numpy', 'peft', 'serving_table')


def convert(
  sources: Sequence[str],
  output: str | os.PathLike,
  to: str,
  *,
  prompt: str | None = None,
  base: str | None = None,
  vocabulary: str | None = None,
  step: int | None = None,
  dtype: str = 'float32',
) -> list[str]:
  """Writes a model or prompts in another format.

  Args:
    sources: one model, one prompt, or for a serving table several prompts, in
      any format that INITIAL_CHECKPOINT_PATH or PROMPT_FILE takes.
    output: the folder, or file for 'serving_table', to write.
    to: of a model: 'safetensors' (this package's), 't5x' (with `prompt` folded
      in), 'hugging_face', 'prompt_tokens' (a Hugging Face model with `prompt`
      in its vocabulary). Of a prompt: 'numpy' (.npy and .safetensors), 'peft'
      (needs `base`), 'serving_table' (TensorRT-LLM).
    prompt: for 't5x' and 'prompt_tokens'.
    base: the model that a PEFT adapter belongs to.
    vocabulary: written beside a Hugging Face model.
    step: of a model that does not say it.
    dtype: of a model's parameters, 'float32' or 'bfloat16'.

  Returns:
    The files or folders written.

  Raises:
    UserError: for what does not fit together, cannot be read or written.
  """
  if to not in (*MODEL_FORMATS, *PROMPT_FORMATS):
    raise UserError(
      f'--to must be one of {", ".join((*MODEL_FORMATS, *PROMPT_FORMATS))}, '
      f'got {to!r}'
    )
  if len(sources) > 1 and to != 'serving_table':
    raise UserError(f'{to} is made of one source, got {len(sources)}')
  if to in PROMPT_FORMATS:
    return [str(f) for f in _convert_prompt(sources, output, to, base, step)]
  model = base_checkpoints.load_checkpoint(sources[0], step)
  arrays = checkpoints.unrolled(model.arrays)
  rows = None
  if prompt is not None:
    rows = _single(prompt, arrays['token_embedder/embedding'].shape[1])
  elif to == 'prompt_tokens':
    raise UserError('prompt_tokens needs --prompt')
  if prompt is not None and to not in ('t5x', 'prompt_tokens'):
    raise UserError(f'{to} has no place for a prompt; convert it by itself')
  if to == 't5x':
    written = [t5x.write_checkpoint(output, arrays, model.step, rows, dtype)]
  elif to == 'safetensors':
    written = [
      base_checkpoints.save_base(output, arrays, model.step, dtype=dtype)
    ]
  elif to == 'hugging_face':
    file = load_vocabulary(vocabulary).path if vocabulary else None
    written = hugging_face.save_model(
      output, arrays, model.step, dtype=dtype, vocabulary_file=file
    )
  else:
    if vocabulary is None:
      raise UserError("prompt_tokens needs --vocabulary, the model's")
    written = hugging_face.save_with_prompt_tokens(
      output, arrays, model.step, rows, load_vocabulary(vocabulary), dtype=dtype
    )
  return [str(file) for file in written]


def _convert_prompt(sources, output, to, base, step) -> list[pathlib.Path]:
  if to == 'serving_table':
    return [
      adapters.save_serving_table(output, [_single(name) for name in sources])
    ]
  table, metadata = prompts.load_prompt(sources[0])
  if to == 'numpy':
    return prompts.save_prompt(output, table, metadata)
  if metadata.get('placement', 'prefix') != 'prefix':
    raise UserError(
      f'PEFT puts a prompt in front of the text, {sources[0]} stands as '
      f'{metadata["placement"]}'
    )
  if base is None:
    raise UserError('peft needs --base, the Hugging Face model it belongs to')
  arrays = checkpoints.unrolled(
    base_checkpoints.load_checkpoint(base, 0 if step is None else step).arrays
  )
  config = hugging_face.config_of(arrays)
  return adapters.save_peft(
    output,
    _single(sources[0], config['d_model']),
    base=base,
    num_layers=config['num_layers'],
    num_heads=config['num_heads'],
  )


def _single(path: str, embed: int | None = None) -> np.ndarray:
  """The rows [P, E] of a file with one prompt."""
  table, _ = prompts.load_prompt(path)
  if len(table) != 1:
    raise UserError(
      f'{path} is a table of {len(table)} prompts; give a file of one'
    )
  if embed is not None and table.shape[2] != embed:
    raise UserError(
      f'{path} has embed {table.shape[2]}, the model needs {embed}'
    )
  return table[0]


# Reports.


def open_any(path: str) -> tuple[str, dict, dict]:
  """(kind, arrays by path, facts) of whatever is at a path."""
  try:
    # Which may have a prompt in it, and is a model for all that.
    if t5x.is_checkpoint(path):
      raise UserError(f'{path} is a T5X checkpoint')
    table, facts = prompts.load_prompt(path)
  except UserError as not_a_prompt:
    try:
      # Their files do not say a step, and a report does not need one.
      base = base_checkpoints.load_checkpoint(path)
    except UserError:
      try:
        base = base_checkpoints.load_checkpoint(path, 0)
      except UserError as not_a_model:
        if _looks_like_a_prompt(path):
          raise not_a_prompt from None
        raise not_a_model from None
    facts = {
      'step': base.step,
      'fingerprint': base.fingerprint(),
      **{k: v for k, v in base.metadata.items() if isinstance(v, str | int)},
    }
    return 'model', dict(base.arrays), facts
  return 'prompt', {'table': table}, facts


def _looks_like_a_prompt(path: str) -> bool:
  return path.endswith('.npy') or adapters.is_peft(path)


def inspect(paths: Sequence[str]) -> Iterator[str]:
  """Lines on what files hold: shapes, types, norms, metadata.

  Several prompts are compared as well, row by row and as a whole.
  """
  tables = {}
  for path in paths:
    kind, arrays, facts = open_any(path)
    yield f'{path}: {kind}'
    for name, value in sorted(facts.items()):
      if value is not None:
        yield f'  {name}: {value}'
    if kind == 'prompt':
      tables[path] = arrays['table']
      yield from _prompt_lines(arrays['table'])
      continue
    total = 0
    for name in sorted(arrays, key=_natural):
      array = arrays[name]
      size = int(np.prod(array.shape))
      total += size
      norm = float(np.linalg.norm(np.asarray(array, np.float32)))
      yield (
        f'  {name:58} {"x".join(map(str, array.shape)):>14} '
        f'{np.dtype(array.dtype).name:>9}  norm {norm:.4g}'
      )
    yield f'  {total:,} parameters in {len(arrays)} arrays'
  names = list(tables)
  for i, one in enumerate(names):
    for other in names[i + 1 :]:
      yield from _compared(one, tables[one], other, tables[other])


def _natural(name: str) -> list:
  return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name)]


def _prompt_lines(table: np.ndarray) -> Iterator[str]:
  for number, rows in enumerate(table):
    norms = np.linalg.norm(rows, axis=-1)
    unit = rows / np.maximum(norms, 1e-30)[:, None]
    cosines = unit @ unit.T
    others = cosines[~np.eye(len(rows), dtype=bool)]
    mean = (
      f', mean cosine between rows {others.mean():.3f}' if others.size else ''
    )
    yield (
      f'  prompt {number}: {len(rows)} x {rows.shape[1]} float32, row norms '
      f'{norms.min():.4g} to {norms.max():.4g}, mean {norms.mean():.4g}{mean}'
    )


def _compared(one, first, other, second) -> Iterator[str]:
  if first.shape != second.shape:
    yield (
      f'{one} and {other}: shapes {list(first.shape)} and '
      f'{list(second.shape)} are not comparable'
    )
    return
  dot = np.sum(first * second, axis=-1)
  norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
  cosines = dot / np.maximum(norms, 1e-30)
  distance = float(np.linalg.norm(first - second))
  yield (
    f'{one} and {other}: cosine of rows {cosines.min():.3f} to '
    f'{cosines.max():.3f}, mean {cosines.mean():.3f}; distance {distance:.4g}'
  )


def differences(one: str, other: str) -> Iterator[str]:
  """Lines on how two files of one kind differ; none where they are equal."""
  (kind, first, _), (other_kind, second, _) = open_any(one), open_any(other)
  if kind != other_kind:
    raise UserError(f'{one} is a {kind}, {other} a {other_kind}')
  if kind == 'model':
    first = checkpoints.unrolled(first)
    second = checkpoints.unrolled(second)
  for name in sorted({*first, *second}, key=_natural):
    if name not in second or name not in first:
      yield f'{name}: only in {one if name in first else other}'
      continue
    yield from _difference(name, first[name], second[name])


def _difference(name: str, one: Any, other: Any) -> Iterator[str]:
  if tuple(one.shape) != tuple(other.shape):
    yield f'{name}: shape {list(one.shape)} and {list(other.shape)}'
    return
  left, right = (np.asarray(a).astype(np.float64) for a in (one, other))
  unequal = left != right
  if unequal.any():
    largest = np.max(np.abs(left - right))
    scale = max(np.max(np.abs(left)), 1e-300)
    yield (
      f'{name}: {int(unequal.sum()):,} of {left.size:,} values differ, by '
      f'{largest:.3g} at most ({largest / scale:.3g} of the largest)'
    )
