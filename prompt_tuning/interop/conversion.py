"""From one format of models or prompts to another, and reports on them."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import numpy as np

from prompt_tuning import files
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import hugging_face_writing
from prompt_tuning.interop import prompts
from prompt_tuning.interop import t5x
from prompt_tuning.models import parameters
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import UnknownStepError
from prompt_tuning.training.trained import Trained

MODEL_FORMATS = ('safetensors', 't5x', 'hugging_face', 'prompt_tokens')
PROMPT_FORMATS = ('numpy', 'peft', 'serving_table')


def convert(
  sources: Sequence[str],
  output: str | os.PathLike,
  to: str,
  *,
  prompt: str | None = None,
  trained: str | None = None,
  base: str | None = None,
  vocabulary: str | None = None,
  step: int | None = None,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> list[str]:
  """Writes a model or prompts in another format.

  Args:
    sources: one model, one prompt or other method, or for a serving table
      several prompts, in any format that INITIAL_CHECKPOINT_PATH or PROMPT_FILE
      takes.
    output: the folder, or file for 'serving_table', to write.
    to: of a model: 'safetensors' (this package's), 't5x' (with `prompt` folded
      in), 'hugging_face', 'prompt_tokens' (a Hugging Face model with `prompt`
      in its vocabulary). Of a prompt: 'numpy' (.npy and .safetensors), 'peft'
      (needs `base`; of LoRA, IA3 and a decoder's prefix too), 'serving_table'
      (TensorRT-LLM).
    prompt: for 't5x' and 'prompt_tokens'.
    trained: of a model's formats: a run, file or folder of what methods trained
      on it (LoRA, IA3), which is folded into its parameters.
    base: the model that a PEFT adapter belongs to.
    vocabulary: written beside a Hugging Face model.
    step: of a model that does not say it.
    dtype: of a model's parameters, 'float32' or 'bfloat16'.
    overwrite: files that are there may be replaced. A T5X folder gets a
      checkpoint of a step it does not have, whatever it holds.

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
  files.check_output(
    output,
    [*sources, prompt, trained, base, vocabulary],
    overwrite=overwrite or to == 't5x',
    consent='--overwrite',
  )
  if to in PROMPT_FORMATS:
    if trained is not None:
      raise UserError(f'{to} is made of one source; leave --trained away')
    return [str(f) for f in _convert_prompt(sources, output, to, base)]
  try:
    model = base_checkpoints.load_checkpoint(sources[0], step)
  except UnknownStepError as error:
    raise UnknownStepError(error.path, error.hint, 'give --step') from None
  if trained is not None:
    model = _folded(model, trained)
  arrays = parameters.unrolled(model.arrays)
  rows = None
  if prompt is not None:
    if to not in ('t5x', 'prompt_tokens'):
      raise UserError(f'{to} has no place for a prompt; convert it by itself')
    rows = _rows(prompt, arrays['token_embedder/embedding'].shape[1])
  if to == 't5x':
    written = [t5x.write_checkpoint(output, arrays, model.step, rows, dtype)]
  elif to == 'safetensors':
    written = [
      base_checkpoints.save_base(output, arrays, model.step, dtype=dtype)
    ]
  elif to == 'hugging_face':
    file = load_vocabulary(vocabulary).path if vocabulary else None
    written = hugging_face_writing.save_model(
      output,
      arrays,
      model.step,
      dtype=dtype,
      vocabulary_file=file,
      stated=model.stated,
    )
  else:
    if rows is None:
      raise UserError('prompt_tokens needs --prompt')
    if vocabulary is None:
      raise UserError("prompt_tokens needs --vocabulary, the model's")
    written = hugging_face_writing.save_with_prompt_tokens(
      output,
      arrays,
      model.step,
      rows,
      load_vocabulary(vocabulary),
      dtype=dtype,
      stated=model.stated,
    )
  return [str(file) for file in written]


def _convert_prompt(sources, output, to, base) -> list[pathlib.Path]:
  if to == 'serving_table':
    rows = [_rows(source) for source in sources]
    return [adapters.save_serving_table(output, rows)]
  if to == 'numpy':
    return prompts.save_prompt(output, *prompts.load_prompt(sources[0]))
  found = prompts.load_trained(sources[0])
  if len(found) != 1:
    names = ', '.join(one.method.collection for one in found)
    raise UserError(f'peft is made of one method, {sources[0]} holds {names}')
  if base is None:
    raise UserError('peft needs --base, the Hugging Face model it belongs to')
  model = base_checkpoints.open_checkpoint(base)
  _check_base(found[0], model, sources[0])
  return adapters.save_peft(output, found[0], base=base, config=model.config())


def _rows(source: str, embed: int | None = None) -> np.ndarray:
  """The rows [P, E] of a file with one prompt."""
  table, _ = prompts.load_prompt(source)
  return adapters.one_prompt(table, source, embed)


def _folded(base: BaseCheckpoint, source: str) -> BaseCheckpoint:
  """A base that acts as this one does with what was trained on it."""
  found = prompts.load_trained(source)
  for one in found:
    if one.is_base:
      base = one.as_base()
  params = parameters.unrolled(base.arrays)
  # The last method acts first, the one before it on what that gives.
  for one in reversed([one for one in found if not one.is_base]):
    _check_base(one, base, source)
    name = one.method.collection
    try:
      folded = one.method.fold(params, one.arrays)
    except (KeyError, ValueError) as error:
      raise UserError(
        f'the {name} of {source} does not fit {base.path} '
        f'({files.reason(error)}): give the base that it was trained on'
      ) from error
    if folded is None:
      raise UserError(
        f'no plain T5 acts as one with the {name} of {source}; --trained folds'
        ' what can be folded (LoRA, IA3), --prompt takes a prompt'
      )
    params = folded
  return dataclasses.replace(base, arrays=params)


def _check_base(one: Trained, base: BaseCheckpoint, source: str) -> None:
  wanted = one.facts.get('base_fingerprint')
  if wanted not in (None, base.fingerprint()):
    raise UserError(
      f'the {one.method.collection} of {source} was trained on '
      f'{one.facts.get("base", "another base")} (fingerprint {wanted}), got '
      f'{base.path} (fingerprint {base.fingerprint()}): give that base'
    )


# Reports.


def open_any(path: str) -> tuple[str, dict, dict]:
  """(kind, arrays by path, facts) of whatever is at a path."""
  found = ()
  # A T5X checkpoint may have a prompt in it, and is a model for all that.
  if not t5x.is_checkpoint(path):
    try:
      found = prompts.load_trained(path)
    except UserError:
      if path.endswith('.npy') or adapters.is_peft(path):
        raise
  if found and not any(one.is_base for one in found):
    arrays = {name: a for one in found for name, a in one.arrays.items()}
    kind = ' and '.join(one.method.collection for one in found)
    return kind, arrays, dict(found[0].facts)
  base = base_checkpoints.open_checkpoint(path)
  facts = {
    'step': base.step,
    'fingerprint': base.fingerprint(),
    **{k: v for k, v in base.metadata.items() if isinstance(v, str | int)},
  }
  return 'model', dict(base.arrays), facts


def inspect(paths: Sequence[str], all_arrays: bool = False) -> Iterator[str]:
  """Lines on what files hold: a summary, metadata, norms.

  Several prompts are compared as well, row by row and as a whole.

  Args:
    paths: of models and of what methods trained.
    all_arrays: shape, type and norm of each array too; of up to eight they
      are told anyway.
  """
  tables = {}
  for path in paths:
    kind, arrays, facts = open_any(path)
    sizes = [math.prod(array.shape) for array in arrays.values()]
    types = sorted({np.dtype(array.dtype).name for array in arrays.values()})
    yield (
      f'{path}: {kind}, {sum(sizes):,} parameters in {len(sizes)} arrays of'
      f' {" and ".join(types)}'
    )
    for name, value in sorted(facts.items()):
      if value is not None:
        yield f'  {name}: {value}'
    if kind == 'prompt':
      tables[path] = arrays['table']
      yield from _prompt_lines(arrays['table'])
      continue
    if len(arrays) > _FEW and not all_arrays:
      yield '  (--arrays: shape, type and norm of each)'
      continue
    for name in sorted(arrays, key=_natural):
      array = arrays[name]
      norm = float(np.linalg.norm(np.asarray(array, np.float32)))
      yield (
        f'  {name:58} {"x".join(map(str, array.shape)):>14} '
        f'{np.dtype(array.dtype).name:>9}  norm {norm:.4g}'
      )
  names = list(tables)
  for i, one in enumerate(names):
    for other in names[i + 1 :]:
      yield from _compared(one, tables[one], other, tables[other])


# So many arrays are told one by one.
_FEW = 8


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
    first = parameters.unrolled(first)
    second = parameters.unrolled(second)
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
