"""Inference as commands: predictions for a file's texts, metrics of a task.

Inference on texts needs neither TensorFlow nor a seqio task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import json
import os
import sys
import time
from typing import Any, TextIO

from etils import epath
import jax

from prompt_tuning import files
from prompt_tuning.data import lengths as lengths_lib
from prompt_tuning.data import vocabularies
from prompt_tuning.data.records import format_of
from prompt_tuning.data.records import looks_like_json
from prompt_tuning.data.records import read_records
from prompt_tuning.data.templates import Template
from prompt_tuning.errors import UserError
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.serving import loading
from prompt_tuning.serving.predictor import WINDOW
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.training import hosts
from prompt_tuning.training import reporting
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
  template: str | None = None,
  input_format: str | None = None,
  columns: Sequence[str] | None = None,
  rank: bool = False,
  labels: Sequence[str] | None = None,
  target: str | None = None,
  inputs_length: int | None = None,
  targets_length: int | None = None,
  batch_size: int = 32,
  prompt_index: int | None = None,
  seed: int = 0,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  partitioner: Partitioner | None = None,
  overwrite: bool = False,
  progress: bool = True,
) -> dict[str, Any]:
  """Predicts for every record of a file and writes JSONL.

  A line of the output has the fields of its record and what
  `Predictor.records` gives; of a field that both have, the record's is called
  `<name>_given`.

  Args:
    model: the T5.
    base: its checkpoint.
    vocabulary: a SentencePiece file or the name of a bundled model.
    input_file: '-' is stdin.
    output_file: '-' is stdout; a file appears when all is done.
    trained: of methods, as `load_trained` gives them; none for T5 alone.
    template: the model's input, with the record's fields in braces; None takes
      that of the training, as far as `trained` says it, else '{text}' (see
      `Predictor`).
    input_format: 'jsonl', 'tsv', 'csv' or 'text'; None goes by the file's
      ending, on stdin by the first line.
    columns: the names of a table's columns; None reads its first line as such.
    rank: ranks labels by their likelihood instead of generating.
    labels: which; given, it implies `rank`; None takes those of the training.
    target: a field of the records whose text is scored as the answer, in place
      of a prediction (T5X's mode 'score').
    inputs_length: ids of a text; None takes what was trained with, as far as
      `trained` says it, else 512.
    targets_length: ids of a prediction; None likewise, else 32.
    batch_size: texts that run at once.
    prompt_index: which prompt of the table; None takes that of the training, as
      far as `trained` says it, else 0.
    seed: of decoding, where it samples.
    dtype: of the frozen weights; None: see `loading.load`.
    check_fingerprint: refuse what was trained on another base or vocabulary.
    partitioner: how the devices of the job share the work; None chooses.
    overwrite: an output file that is there may be replaced.
    progress: shows progress on stderr.

  Returns:
    {'examples': how many, 'cut': how many of them were too long, 'output'}.

  Raises:
    UserError: files, fields, prompt or vocabulary are at fault.
  """
  if input_file == '-' and jax.process_count() > 1:
    raise UserError('a job over several processes needs an input file, got -')
  # The cheap faults first: the checkpoint takes a while.
  show = reporting.Progress(silent=not progress or not hosts.is_primary())
  if output_file != '-':
    if os.path.isdir(output_file):
      raise UserError(f'OUTPUT_FILE {output_file} is a folder; name a file')
    files.check_output(
      output_file,
      [input_file],
      overwrite=overwrite,
      what='OUTPUT_FILE',
      consent='infer.overwrite=True',
    )
  known = loading.remembered(trained)
  asked = {
    'inputs_length': inputs_length,
    'targets_length': targets_length,
    'template': template,
    'prompt_index': prompt_index,
  }
  settings = known | {k: v for k, v in asked.items() if v is not None}
  _tell_differences(known, settings, show)
  for part, length in (('inputs', 512), ('targets', 32)):
    settings.setdefault(f'{part}_length', length)
  words = vocabularies.load_vocabulary(vocabulary)
  if rank and labels is None:
    labels = settings.get('labels')
    if labels is None:
      raise UserError('infer.rank needs infer.labels: the training named none')
  if labels is not None:
    vocabularies.label_pieces(words, labels, 'infer.labels')
    if target is not None:
      raise UserError(
        'infer.target scores, infer.labels rank: give one of them'
      )
  with contextlib.ExitStack() as stack:
    texts = functools.partial(
      _texts,
      *_input(input_file, input_format, show, stack),
      input_file,
      columns,
      Template(settings.pop('template', None) or '{text}'),
      template is None,
      target,
    )
    # A file is looked at whole before a model is read.
    total = sum(1 for _ in texts()) if os.path.isfile(input_file) else None
    waiting = texts()
    first = list(itertools.islice(waiting, 1))
    if not first:
      raise UserError(f'{input_file} has no records')
    show.say(f'reading the base {base.path}' if base else 'reading the base')
    loaded = loading.load_for_job(
      model,
      base,
      trained,
      partitioner,
      {part: settings[f'{part}_length'] for part in ('inputs', 'targets')},
      batch_size,
      dtype=dtype,
      check_fingerprint=check_fingerprint,
      vocabulary=words,
    )
    predictor = Predictor(
      loaded,
      words,
      batch_size=batch_size,
      seed=seed,
      **settings,
    )
    # Of a job one process writes; the others only work along.
    output = stack.enter_context(
      _output(output_file) if hosts.is_primary() else open(os.devnull, 'w')
    )
    counts = {'examples': 0, 'cut': 0}
    waiting, kept = itertools.tee(itertools.chain(first, waiting))
    targets = None
    if target is not None:
      waiting, others = itertools.tee(waiting)
      targets = (answer for _, _, answer in others)
    # What comes through a pipe is answered as it comes.
    window = None if total is None else WINDOW * batch_size
    inputs = (text for _, text, _ in waiting)
    made = predictor.records(inputs, labels, targets, window)
    for record, (fields, *_) in zip(made, kept):
      if not counts['examples']:
        _say(loaded)
      output.write(_line(fields, record))
      output.flush()
      counts['examples'] += 1
      counts['cut'] += 'cut' in record
      if counts['examples'] % batch_size == 0:
        show.count(counts['examples'], total, 'texts')
  return {**counts, 'output': output_file}


def _texts(
  reopen: Callable[[], Iterable[str]],
  input_format: str,
  name: str,
  columns: Sequence[str] | None,
  template: Template,
  is_remembered: bool,
  target: str | None = None,
) -> Iterator[tuple[dict[str, Any], str, str | None]]:
  """(fields to keep, the model's input, its target) of each record, from the
  start.

  The training's template takes a plain text, whatever its field.
  """
  is_text = input_format == 'text'
  if is_text and target is not None:
    raise UserError(
      f'infer.target={target} is a field of records, {name} has lines of text;'
      ' give JSONL, CSV or TSV'
    )
  for place, record in read_records(reopen(), input_format, name, columns):
    given = record['text'] if is_text and is_remembered else record
    answer = None
    if target is not None:
      answer = Template(f'{{{target}}}').input_of(record, place)
    yield {} if is_text else record, template.input_of(given, place), answer


def _tell_differences(
  known: Mapping[str, Any],
  settings: Mapping[str, Any],
  show: reporting.Progress,
) -> None:
  """Says where texts do not look as they did in training."""
  for name, trained_with in known.items():
    if settings.get(name, trained_with) != trained_with:
      show.say(
        f'note: trained with {name} {trained_with!r}, asked for'
        f' {settings[name]!r}'
      )


def _line(fields: Mapping[str, Any], made: Mapping[str, Any]) -> str:
  """A line of the output: the record's fields, then ours."""
  theirs = {}
  for name, value in fields.items():
    free = name
    while free in made or free == 'cut' or (free != name and free in fields):
      free += '_given'
    theirs[free] = value
  return json.dumps({**theirs, **made}, ensure_ascii=False) + '\n'


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
  overwrite: bool = False,
  resolved_config: Callable[[], str] | None = None,
) -> dict[str, float]:
  """Scores the model, with or without a prompt, on a task.

  Args:
    model: the T5.
    base: its checkpoint.
    evaluation: an `Evaluation`: the task, its split and lengths.
    output_dir: gets the predictions, the metrics, config.gin and result.json
      (seconds, with what is compiled for it, and memory).
    trained: of methods, as `load_trained` gives them; none for T5 alone.
    dtype: of the frozen weights; None: see `loading.load`.
    check_fingerprint: refuse what was trained on another base.
    partitioner: how the devices of the job share the work; None chooses.
    overwrite: the results of another evaluation may be replaced.
    resolved_config: gives the text of config.gin; None writes none.

  Returns:
    {'task/metric': value}.

  Raises:
    UserError: base, prompt, task or folder are at fault.
  """
  show = reporting.Progress(silent=not hosts.is_primary())
  task = evaluation.task
  lengths = {f'{part}_length': n for part, n in task.feature_lengths.items()}
  asked = {**lengths, 'target_sentinel': task.target_sentinel}
  _tell_differences(loading.remembered(trained), asked, show)
  folder = files.place(output_dir)
  if (folder / 'checkpoints').exists():
    raise UserError(
      f'EVAL_OUTPUT_DIR {folder} is the folder of a run; choose one in it, such'
      f' as {folder / "eval_test"}'
    )
  vocabulary = None
  if task.vocabulary is not None:
    vocabulary = vocabularies.load_vocabulary(task.vocabulary)
  show.say(f'reading the base {base.path}')
  loaded = loading.load_for_job(
    model,
    base,
    trained,
    partitioner,
    task.lengths(),
    evaluation.batch_size,
    dtype=dtype,
    check_fingerprint=check_fingerprint,
    vocabulary=vocabulary,
  )
  show.say('reading the data')
  evaluator = evaluation.build(
    loaded.model, loaded.virtual_tokens, output_dir, loaded.layout
  )
  lengths_lib.check_truncation(
    task.seqio(), evaluation.split, evaluator.lengths, task.target_sentinel
  )
  if resolved_config is not None and hosts.is_primary():
    _write_config(folder / 'config.gin', resolved_config(), overwrite)
  _say(loaded)
  step = trained[0].facts.get('step') if trained else None
  step = base.step if step is None else step
  began = time.monotonic()
  found = evaluator.evaluate(loaded.variables, int(step or 0))
  if hosts.is_primary():
    seconds = {'seconds': time.monotonic() - began}
    reporting.write_result(folder, seconds | {'evaluated': dict(found)})
  return found


def _write_config(file: epath.Path, text: str, overwrite: bool) -> None:
  """Writes how results came to be, over nothing but the same."""
  if file.exists() and not overwrite and file.read_text() != text:
    raise UserError(
      f'EVAL_OUTPUT_DIR {file.parent} has the results of another evaluation'
      f' ({file.name} differs): choose another folder, or say'
      ' evaluate.overwrite=True'
    )
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as opened:
      opened.write(text)
  except OSError as error:
    raise UserError(
      f'EVAL_OUTPUT_DIR {file.parent} cannot be written: {error.strerror}'
    ) from None


def _say(loaded: loading.Loaded) -> None:
  """The reason for a layout, where there was a choice."""
  if loaded.layout.mesh.size > 1 and hosts.is_primary():
    print(loaded.reason, file=sys.stderr)


def _input(
  name: str,
  input_format: str | None,
  show: reporting.Progress,
  stack: contextlib.ExitStack,
) -> tuple[Callable[[], Iterable[str]], str]:
  """What opens the lines of a file, and their format."""
  if input_format is None:
    input_format = format_of(name)
    if name == '-':
      first = list(itertools.islice(sys.stdin, 1))
      if first and looks_like_json(first[0]):
        show.say('stdin is read as JSONL (infer.input_format=text: as lines)')
        input_format = 'jsonl'
      return lambda: itertools.chain(first, sys.stdin), input_format

  def reopen() -> Iterable[str]:
    if name == '-':
      return sys.stdin
    path = files.place(name)
    try:
      if '://' in name:
        return stack.enter_context(path.open())
      if files.is_pipe(path):
        return stack.enter_context(files.open_pipe(path, 'r'))
      # Lines end at \n alone: text may hold U+2028 and the like.
      file = open(path, encoding='utf-8-sig', newline='\n')
      return stack.enter_context(file)
    except OSError as error:
      raise UserError(
        f'input file {name} cannot be read: {error.strerror}'
      ) from None

  return reopen, input_format


@contextlib.contextmanager
def _output(name: str) -> Iterator[TextIO]:
  """A file that takes its name when it is whole; '-' is stdout."""
  if name == '-':
    yield sys.stdout
    return
  try:
    files.place(name).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(name) as file:
      yield file
  except OSError as error:
    raise UserError(
      f'output file {name} cannot be written: {error.strerror}'
    ) from None
