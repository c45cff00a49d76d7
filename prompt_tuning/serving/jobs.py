"""Inference as commands: predictions for a file's texts, metrics of a task.

Inference on texts needs neither TensorFlow nor a seqio task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import itertools
import json
import os
import string
import sys
from typing import Any, TextIO

from etils import epath
import jax

from prompt_tuning import files
from prompt_tuning.data import vocabularies
from prompt_tuning.data.records import format_of
from prompt_tuning.data.records import read_records
from prompt_tuning.errors import UserError
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.serving import loading
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.training import hosts
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.evaluator import Evaluation
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.trained import Trained


def infer(
  model: EncoderDecoderModel,
  base: BaseCheckpoint,
  vocabulary: str,
  input_file: str,
  output_file: str,
  trained: Sequence[Trained] = (),
  *,
  template: str = '{text}',
  input_format: str | None = None,
  columns: Sequence[str] | None = None,
  labels: Sequence[str] | None = None,
  inputs_length: int | None = None,
  targets_length: int | None = None,
  batch_size: int = 32,
  prompt_index: int = 0,
  seed: int = 0,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  partitioner: Partitioner | None = None,
) -> dict[str, int]:
  """Predicts for every record of a file and writes JSONL.

  Args:
    model: the T5.
    base: its checkpoint.
    vocabulary: a SentencePiece file or the name of a bundled model.
    input_file: '-' is stdin.
    output_file: '-' is stdout; a file appears when all is done.
    trained: of methods, as `load_trained` gives them; none for T5 alone.
    template: the model's input, with the record's fields in braces; a plain
      text's only field is `text`.
    input_format: 'jsonl', 'tsv' or 'text'; None goes by the file's ending.
    columns: the names of a TSV's columns; None reads its first line as such.
    labels: see `Predictor`, as all that follow.
    inputs_length: ids of a text; None takes what was trained with, as far as
      `trained` says it, else 512.
    targets_length: ids of a prediction; None likewise, else 32.
    batch_size: texts that run at once.
    prompt_index: which prompt of the table.
    seed: of decoding, where it samples.
    dtype: of the frozen weights; None: see `loading.load`.
    check_fingerprint: refuse what was trained on another base.
    partitioner: how the devices of the job share the work; None chooses.

  Returns:
    {'examples': how many}.

  Raises:
    UserError: files, fields, prompt or vocabulary are at fault.
  """
  if input_file == '-' and jax.process_count() > 1:
    raise UserError('a job over several processes needs an input file, got -')
  # The cheap faults first: the checkpoint takes a while.
  if input_format is None:
    input_format = format_of(input_file)
  fields = _template_fields(template)
  with contextlib.ExitStack() as stack:
    lines = _open_input(input_file, stack)
    records = read_records(lines, input_format, input_file, columns)
    first = list(itertools.islice(records, 1))
    if not first:
      raise UserError(f'{input_file} has no records')
    texts = (
      _fill(template, fields, record, place)
      for place, record in itertools.chain(first, records)
    )
    head = next(texts)
    known = dict(trained[0].facts) if trained else {}
    lengths = {
      'inputs': inputs_length or known.get('inputs_length') or 512,
      'targets': targets_length or known.get('targets_length') or 32,
    }
    loaded = loading.load_for_job(
      model,
      base,
      trained,
      partitioner,
      lengths,
      batch_size,
      dtype=dtype,
      check_fingerprint=check_fingerprint,
    )
    predictor = Predictor(
      loaded,
      vocabularies.load_vocabulary(vocabulary),
      inputs_length=lengths['inputs'],
      targets_length=lengths['targets'],
      batch_size=batch_size,
      prompt_index=prompt_index,
      seed=seed,
    )
    # Of a job one process writes; the others only work along.
    output = stack.enter_context(
      _output(output_file) if hosts.is_primary() else open(os.devnull, 'w')
    )
    count = 0
    for record in predictor.records(itertools.chain([head], texts), labels):
      if count == 0:
        _say(loaded)
      output.write(json.dumps(record, ensure_ascii=False) + '\n')
      output.flush()
      count += 1
  return {'examples': count}


def evaluate(
  model: EncoderDecoderModel,
  base: BaseCheckpoint,
  evaluation: Evaluation,
  output_dir: str,
  trained: Sequence[Trained] = (),
  *,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  partitioner: Partitioner | None = None,
  resolved_config: Callable[[], str] | None = None,
) -> dict[str, float]:
  """Scores the model, with or without a prompt, on a task.

  Args:
    model: the T5.
    base: its checkpoint.
    evaluation: an `Evaluation`: the task, its split and lengths.
    output_dir: gets the predictions, the metrics and config.gin.
    trained: of methods, as `load_trained` gives them; none for T5 alone.
    dtype: of the frozen weights; None: see `loading.load`.
    check_fingerprint: refuse what was trained on another base.
    partitioner: how the devices of the job share the work; None chooses.
    resolved_config: gives the text of config.gin; None writes none.

  Returns:
    {'task/metric': value}.

  Raises:
    UserError: base, prompt, task or folder are at fault.
  """
  loaded = loading.load_for_job(
    model,
    base,
    trained,
    partitioner,
    evaluation.task.feature_lengths,
    evaluation.batch_size,
    dtype=dtype,
    check_fingerprint=check_fingerprint,
  )
  evaluator = evaluation.build(
    loaded.model, loaded.virtual_tokens, output_dir, loaded.layout
  )
  folder = epath.Path(output_dir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  if resolved_config is not None and hosts.is_primary():
    (folder / 'config.gin').write_text(resolved_config())
  _say(loaded)
  step = trained[0].facts.get('step') if trained else None
  step = base.step if step is None else step
  return evaluator.evaluate(loaded.variables, int(step or 0))


def _say(loaded: loading.Loaded) -> None:
  """The reason for a layout, where there was a choice."""
  if loaded.layout.mesh.size > 1 and hosts.is_primary():
    print(loaded.reason, file=sys.stderr)


def _template_fields(template: str) -> list[str]:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise UserError(f'template {template!r} is not valid: {error}') from None
  fields = [field for _, field, _, _ in parts if field is not None]
  if not fields or not all(field.isidentifier() for field in fields):
    raise UserError(
      f'template {template!r} needs names of fields in braces, as in '
      "'question: {question}'"
    )
  return fields


def _fill(
  template: str, fields: Sequence[str], record: Mapping[str, Any], place: str
) -> str:
  missing = [field for field in fields if field not in record]
  if missing:
    raise UserError(
      f'{place} has no field {missing[0]}, needed by the template '
      f'{template!r}; it has {", ".join(record)}'
    )
  return template.format_map(record)


def _open_input(name: str, stack: contextlib.ExitStack) -> Iterable[str]:
  if name == '-':
    return sys.stdin
  try:
    if '://' in name:
      return stack.enter_context(epath.Path(name).open())
    return stack.enter_context(open(name, encoding='utf-8-sig'))
  except OSError as error:
    raise UserError(
      f'input file {name} cannot be read: {error.strerror}'
    ) from None


@contextlib.contextmanager
def _output(name: str) -> Iterator[TextIO]:
  """A file that takes its name when it is whole; '-' is stdout."""
  if name == '-':
    yield sys.stdout
    return
  try:
    epath.Path(name).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(name) as file:
      yield file
  except OSError as error:
    raise UserError(
      f'output file {name} cannot be written: {error.strerror}'
    ) from None
