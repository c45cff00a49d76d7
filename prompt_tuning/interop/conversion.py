"""From one format of models or prompts to another, and reports on them."""

from collections.abc import Iterator, Sequence
import dataclasses
import logging
import math
import os
import pathlib
import re
from typing import Any

from etils import epath
import numpy as np

from prompt_tuning import files
from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import hugging_face_writing
from prompt_tuning.interop import prompts
from prompt_tuning.interop import t5x
from prompt_tuning.interop import transfer
from prompt_tuning.interop.formats import MODEL_FORMATS
from prompt_tuning.interop.formats import PROMPT_FORMATS
from prompt_tuning.methods import nearest_pieces
from prompt_tuning.models import parameters
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import UnknownStepError
from prompt_tuning.training.base import untold
from prompt_tuning.training.trained import Trained

logger = logging.getLogger(__name__)


def convert(
  sources: Sequence[str],
  output: str | os.PathLike,
  to: str,
  *,
  prompt: str | None = None,
  trained: str | None = None,
  base: str | None = None,
  old_base: str | None = None,
  recycler: str = 'linear',
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
      (needs `base`; of LoRA, IA3, a decoder's prefix and a multitask prompt
      too), 'serving_table' (TensorRT-LLM), 'recycled' (mapped to another model,
      `base`; see `transfer.recycled`).
    prompt: for 't5x' and 'prompt_tokens'.
    trained: of a model's formats: a run, file or folder of what methods trained
      on it (LoRA, IA3, norm scales), which is folded into its parameters.
    base: the model that a PEFT adapter or a recycled prompt belongs to.
    old_base: of a prompt to recycle; None: the one that it names.
    recycler: 'linear', 'lin_comb' or 'mlp'.
    vocabulary: written beside a Hugging Face model; of a prompt to recycle both
      models', whose words it is fitted on (None: all pieces).
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
    if to == 'recycled':
      named = (base, old_base, recycler, vocabulary)
      return [str(f) for f in _recycle(sources[0], output, *named)]
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
    rows = _rows(prompt, to, arrays['token_embedder/embedding'].shape[1])
  if to == 't5x':
    if unsaid := untold(model.config()):
      logger.warning(
        'a T5X checkpoint does not say %s: bind it where this one is read',
        ', '.join(f'T5Config.{k}={v!r}' for k, v in unsaid.items()),
      )
    written = [t5x.write_checkpoint(output, arrays, model.step, rows, dtype)]
  elif to == 'safetensors':
    written = [
      base_checkpoints.save_base(
        output, arrays, model.step, dtype=dtype, stated=untold(model.config())
      )
    ]
  elif to == 'hugging_face':
    words = load_vocabulary(vocabulary) if vocabulary else None
    is_bytes = isinstance(words, ByteVocabulary)
    written = hugging_face_writing.save_model(
      output,
      arrays,
      model.step,
      dtype=dtype,
      vocabulary_file=None if words is None or is_bytes else words.path,
      stated=model.stated,
    )
    if is_bytes:
      written.append(hugging_face_writing.save_byte_tokenizer(output))
  else:
    if rows is None:
      raise UserError('prompt_tokens needs --prompt')
    if vocabulary is None:
      raise UserError("prompt_tokens needs --vocabulary, the model's")
    words = load_vocabulary(vocabulary)
    if isinstance(words, ByteVocabulary):
      raise UserError(
        'prompt_tokens adds pieces to a vocabulary; bytes have none'
      )
    written = hugging_face_writing.save_with_prompt_tokens(
      output,
      arrays,
      model.step,
      rows,
      words,
      dtype=dtype,
      stated=model.stated,
    )
  return [str(file) for file in written]


def _convert_prompt(sources, output, to, base) -> list[pathlib.Path]:
  if to == 'serving_table':
    rows = [_rows(source, to) for source in sources]
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
  one = adapters.with_adapter(found[0])
  return adapters.save_peft(output, one, base=base, config=model.config())


def _recycle(
  source: str,
  output: str | os.PathLike,
  base: str | None,
  old_base: str | None,
  recycler: str,
  vocabulary: str | None,
) -> list[epath.Path]:
  """Writes a prompt for another model than the one that it was trained on."""
  table, facts = prompts.load_prompt(source)
  old_base = old_base or facts.get('base')
  if base is None or not old_base:
    raise UserError(
      'recycled needs --base, the new model, and --old_base, that of the prompt'
    )
  models = [base_checkpoints.open_checkpoint(name) for name in (old_base, base)]
  wanted = facts.get('base_fingerprint')
  if not models[0].has_fingerprint(wanted):
    raise UserError(
      f'{source} was trained on another model than {old_base} (fingerprint'
      f' {wanted}): give --old_base'
    )
  old, new = (
    np.asarray(model.arrays['token_embedder/embedding'], np.float32)
    for model in models
  )
  words = None
  if vocabulary is not None:
    words = nearest_pieces.word_pieces(vocabulary)(min(len(old), len(new)))
  mapped = transfer.recycled(table, old, new, recycler, words)
  facts |= {
    'base': base,
    'base_fingerprint': models[1].fingerprint(),
    'recycled_from': old_base,
    'recycler': recycler,
  }
  # They are of the old model's answers.
  for name in ('metric', 'metric_value'):
    facts.pop(name, None)
  return prompts.save_prompt(output, mapped, facts)


def _rows(source: str, to: str, embed: int | None = None) -> np.ndarray:
  """The rows [P, E] of a file with one prompt, which is put before texts."""
  table, facts = prompts.load_prompt(source)
  if facts.get('placement', 'prefix') != 'prefix':
    raise UserError(
      f'{to} puts a prompt in front of the text, that of {source} stands as'
      f' {facts["placement"]}'
    )
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
        ' what can be folded (LoRA, IA3, norm scales), --prompt takes a prompt'
      )
    params = folded
  return dataclasses.replace(base, arrays=params)


def _check_base(one: Trained, base: BaseCheckpoint, source: str) -> None:
  wanted = one.facts.get('base_fingerprint')
  if not base.has_fingerprint(wanted):
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


def inspect(
  paths: Sequence[str],
  all_arrays: bool = False,
  text: str | None = None,
  base: str | None = None,
  vocabulary: str | None = None,
) -> Iterator[str]:
  """Lines on what files hold: a summary, metadata, norms.

  Several prompts are compared as well, row by row and as a whole.

  Args:
    paths: of models and of what methods trained.
    all_arrays: shape, type and norm of each array too; of up to eight they
      are told anyway.
    text: reads prompts as text, of the nearest 'pieces' or 'words' of the
      vocabulary; None does not.
    base: of prompts that are read; None: the one that they name.
    vocabulary: likewise.
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
    table = _table(path, kind, arrays)
    if table is not None:
      tables[path] = table
      yield from _prompt_lines(table)
      if text is not None:
        facts |= {'base': base} if base else {}
        facts |= {'vocabulary': vocabulary} if vocabulary else {}
        yield from _text_lines(table, path, facts, text)
    if kind == 'prompt':
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
  yield from _sources(tables)


# So many arrays are told one by one.
_FEW = 8


def _natural(name: str) -> list:
  return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name)]


def _table(path: str, kind: str, arrays: dict) -> np.ndarray | None:
  """The table of a prompt, or of what acts as one."""
  if kind == 'prompt':
    return np.asarray(arrays['table'])
  if kind == 'model' or ' and ' in kind:
    return None
  (found,) = prompts.load_trained(path)
  prompt = found.as_prompt()
  return None if prompt is None else prompt.arrays['table']


def _text_lines(
  table: np.ndarray, path: str, facts: dict, text: str
) -> Iterator[str]:
  """A prompt as text, with the cosines and distances of its pieces."""
  for name, flag in (('base', '--base'), ('vocabulary', '--vocabulary')):
    if not facts.get(name):
      raise UserError(
        f'{path} does not name its {name}; --text needs {flag} to read it'
      )
  model = base_checkpoints.open_checkpoint(facts['base'])
  embedding = np.asarray(model.arrays['token_embedder/embedding'], np.float32)
  if table.shape[2] != embedding.shape[1]:
    raise UserError(
      f'{path} has embed {table.shape[2]}, {facts["base"]} has'
      f' {embedding.shape[1]}: give the base that it was trained on'
    )
  rule = {
    'pieces': nearest_pieces.written_pieces,
    'words': nearest_pieces.word_pieces,
  }[text]
  readings = nearest_pieces.read_as_text(
    table,
    embedding,
    load_vocabulary(facts['vocabulary']),
    rule(facts['vocabulary']),
  )
  for number, (rows, reading) in enumerate(zip(table, readings)):
    near = embedding[np.asarray(reading.ids)]
    distances = np.linalg.norm(rows - near, axis=-1)
    yield f'  prompt {number} as text: {reading}'
    yield (
      f'    cosine with its {text} {_cosines(rows, near).mean():.3f} in the'
      f' mean, squared distance {np.mean(distances**2):.4g}'
    )


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Of rows with rows."""
  norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
  return np.sum(one * other, axis=-1) / np.maximum(norms, 1e-30)


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


def _sources(tables: dict[str, np.ndarray]) -> Iterator[str]:
  """Which of the other prompts each task's is most similar to (SPoT)."""
  rows = {
    f'{path}{f" prompt {k}" if len(table) > 1 else ""}': table[k]
    for path, table in tables.items()
    for k in range(len(table))
  }
  if len({one.shape[1] for one in rows.values()}) != 1 or len(rows) < 2:
    return
  for name, one in rows.items():
    others = {other: rows[other] for other in rows if other != name}
    (nearest, by_rows), *_ = transfer.by_similarity(one, others)
    by_pairs = transfer.similarity(one, others[nearest], 'pairs')
    yield (
      f'{name}: the nearest source is {nearest}, cosine of mean rows'
      f' {by_rows:.3f}, mean cosine of all pairs {by_pairs:.3f}'
    )


def _compared(one, first, other, second) -> Iterator[str]:
  if first.shape != second.shape:
    yield (
      f'{one} and {other}: shapes {list(first.shape)} and '
      f'{list(second.shape)} are not comparable'
    )
    return
  cosines = _cosines(first, second)
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
