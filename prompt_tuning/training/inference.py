"""What a trained prompt is for: predictions for texts, metrics of a task.

`Predictor` is the Python interface, `infer` runs it over a file and `evaluate`
scores a task. Inference on texts needs neither TensorFlow nor a seqio task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import string
import sys
from typing import Any, TextIO

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.data import virtual_tokens as virtual_tokens_lib
from prompt_tuning.data import vocabularies
from prompt_tuning.errors import UserError
from prompt_tuning.models import model as model_lib
from prompt_tuning.models import network
from prompt_tuning.training import checkpoints
from prompt_tuning.training import hosts
from prompt_tuning.training import partitioning
from prompt_tuning.training import sizing

# The shortest encoder rows; longer ones double, so few shapes are compiled.
_SHORTEST = 32


def load_variables(
  model: model_lib.EncoderDecoderModel,
  base: checkpoints.BaseCheckpoint,
  prompt: tuple[Float[np.ndarray, 'K P E'], Mapping[str, Any]] | None = None,
  *,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  layout: partitioning.Layout | None = None,
) -> tuple[dict[str, dict], virtual_tokens_lib.VirtualTokens | None]:
  """The model's variables from a base checkpoint and a prompt on disk.

  Args:
    model: what the variables are for.
    base: as `load_checkpoint` gives it.
    prompt: (table, metadata) as `load_prompt` gives them; None for none.
    dtype: of the frozen weights, as in training: None is bfloat16 on
      accelerators, float32 on CPU. The prompt stays float32.
    check_fingerprint: refuse a prompt that was trained on another base.
    layout: where they are put; None: this process's first device.

  Returns:
    {'params': ..., 'prompt': {'table': [K, P, E]}} and the virtual tokens that
    belong to the table; None without a prompt.

  Raises:
    UserError: base or prompt do not fit the model, or each other.
  """
  layout = layout or partitioning.single_device()
  like = network.parameter_shapes(model.config)
  params = checkpoints.load_params(
    base,
    like,
    dtype=checkpoints.frozen_dtype(dtype),
    shardings=layout.frozen(like),
  )
  if prompt is None:
    return {'params': params}, None
  table, metadata = prompt
  config = model.config
  if table.shape[-1] != config.emb_dim:
    raise UserError(
      f'the prompt has embed {table.shape[-1]}, the model needs '
      f'{config.emb_dim}: give the model it was trained on'
    )
  trained_on = metadata.get('base_fingerprint')
  if check_fingerprint and trained_on:
    found = base.fingerprint()
    if found != trained_on:
      raise UserError(
        f'the prompt was trained on {metadata.get("base", "another base")} '
        f'(fingerprint {trained_on}), got {base.path} (fingerprint {found}): '
        'give that base, or bind check_fingerprint = False'
      )
  virtual_tokens = virtual_tokens_lib.VirtualTokens(
    first_id=config.vocab_size,
    length=table.shape[1],
    num_prompts=table.shape[0],
    placement=metadata.get('placement', 'prefix'),
  )
  table = layout.replicate(np.asarray(table, np.float32))
  return {'params': params, 'prompt': {'table': table}}, virtual_tokens


@dataclasses.dataclass(frozen=True)
class Predictor:
  """Texts in, predictions out; batches and pads by itself.

  Attributes:
    model: the T5.
    variables: of `load_variables`, or of a training run.
    vocabulary: the model's own.
    virtual_tokens: of the prompt in `variables`; None without one.
    labels: rank these by likelihood; None generates text.
    inputs_length: ids of a text, EOS included, virtual tokens not; longer
      texts are cut.
    targets_length: ids of a prediction, EOS included.
    batch_size: texts that run at once.
    prompt_index: which prompt of the table.
    seed: of decoding, where it samples.
    layout: where `variables` are; None: this process's first device. A job's
      processes are given the same texts.
  """

  model: model_lib.EncoderDecoderModel
  variables: Mapping[str, dict]
  vocabulary: vocabularies.Vocabulary
  virtual_tokens: virtual_tokens_lib.VirtualTokens | None = None
  labels: Sequence[str] | None = None
  inputs_length: int = 512
  targets_length: int = 32
  batch_size: int = 32
  prompt_index: int = 0
  seed: int = 0
  layout: partitioning.Layout = dataclasses.field(
    default_factory=partitioning.single_device
  )

  def __post_init__(self):
    rows = self.model.config.vocab_size
    if self.vocabulary.size > rows:
      raise UserError(
        f'the vocabulary {self.vocabulary.path} has {self.vocabulary.size} '
        f'pieces, the model {rows} rows: give the vocabulary of the model'
      )
    for name in ('inputs_length', 'targets_length', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'{name} must be 1 or more, got {getattr(self, name)}')
    if self.labels is not None and len(self.labels) < 2:
      raise UserError(
        f'labels needs two strings or more, got {list(self.labels)}'
      )

  def __call__(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields one record a text, in order, as soon as its batch is done.

    A record has `input`, `prediction` and `score`, the prediction's
    log-likelihood in nats, its EOS included; with labels also `scores`, the
    log-likelihood of each.
    """
    waiting = iter(texts)
    for number in itertools.count():
      chunk = list(itertools.islice(waiting, self.batch_size))
      if not chunk:
        return
      inputs = self._encoder_inputs(chunk)
      if self.labels is None:
        yield from self._generate(chunk, inputs, number)
      else:
        yield from self._rank(chunk, inputs)

  def _encoder_inputs(self, texts: Sequence[str]) -> Int[np.ndarray, 'B T']:
    """Rows of equal length; the last batch is filled up by empty texts."""
    encoded = [self.vocabulary.encode(text) for text in texts]
    longest = max(len(ids) + 1 for ids in encoded)
    length = _SHORTEST
    while length < longest:
      length *= 2
    length = min(length, self.inputs_length)
    encoded += [[]] * (self.layout.padded(self.batch_size) - len(encoded))
    return np.stack(
      [
        virtual_tokens_lib.encoder_row(
          ids, length, self.virtual_tokens, self.prompt_index
        )
        for ids in encoded
      ]
    )

  def _generate(
    self, texts: Sequence[str], inputs: Int[np.ndarray, 'B T'], number: int
  ) -> Iterator[dict[str, Any]]:
    key = jax.random.fold_in(jax.random.key(self.seed), number)
    ids, scores = jax.device_get(
      self._decode_and_score(self.variables, self._placed(inputs), key)
    )
    for text, row, score in zip(texts, ids, scores):
      prediction = self.vocabulary.decode(row.tolist())
      yield {'input': text, 'prediction': prediction, 'score': float(score)}

  def _rank(
    self, texts: Sequence[str], inputs: Int[np.ndarray, 'B T']
  ) -> Iterator[dict[str, Any]]:
    scores = jax.device_get(
      self._label_scores(
        self.variables, self._placed(inputs), self._label_tokens
      )
    )
    for text, row in zip(texts, scores):
      best = int(np.argmax(row))
      yield {
        'input': text,
        'prediction': self.labels[best],
        'score': float(row[best]),
        'scores': {
          label: float(score) for label, score in zip(self.labels, row)
        },
      }

  def _placed(self, inputs: Int[np.ndarray, 'B T']) -> Int[Array, 'B T']:
    return self.layout.shard_batch({'inputs': inputs})['inputs']

  def _jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
    return self.layout.jit(function, out_shardings=self.layout.replicated)

  @functools.cached_property
  def _label_tokens(self) -> Int[np.ndarray, 'C L']:
    encoded = [
      [*self.vocabulary.encode(label), self.vocabulary.eos_id]
      for label in self.labels
    ]
    tokens = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for row, ids in zip(tokens, encoded):
      row[: len(ids)] = ids
    return tokens

  @functools.cached_property
  def _decode_and_score(self) -> Callable[..., Any]:
    def decode_and_score(
      variables, inputs: Int[Array, 'B T'], key: jax.Array
    ) -> tuple[Int[Array, 'B L'], Float[Array, 'B']]:
      empty = jnp.zeros((inputs.shape[0], self.targets_length), jnp.int32)
      batch = {
        'encoder_input_tokens': inputs,
        'decoder_input_tokens': empty,
        'decoder_target_tokens': empty,
      }
      ids = self.model.predict_batch(variables, batch, key)
      # Decoders report a score each in their own way (T5X's greedy gives 0,
      # beam search a penalised one); this is the likelihood itself.
      scores = self.model.score_batch(
        variables,
        batch
        | {
          'decoder_input_tokens': jnp.pad(ids[:, :-1], ((0, 0), (1, 0))),
          'decoder_target_tokens': ids,
          'decoder_loss_weights': (ids > 0).astype(jnp.float32),
        },
      )
      return ids, scores

    return self._jit(decode_and_score)

  @functools.cached_property
  def _label_scores(self) -> Callable[..., Any]:
    def label_scores(variables, inputs, label_tokens) -> Float[Array, 'B C']:
      batch = {'encoder_input_tokens': inputs}
      return self.model.rank_classify(variables, batch, label_tokens)

    return self._jit(label_scores)


def infer(
  model: model_lib.EncoderDecoderModel,
  base: checkpoints.BaseCheckpoint,
  vocabulary: str,
  input_file: str,
  output_file: str,
  prompt: tuple[Float[np.ndarray, 'K P E'], Mapping[str, Any]] | None = None,
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
  partitioner: sizing.Partitioner | None = None,
) -> dict[str, int]:
  """Predicts for every record of a file and writes JSONL.

  Args:
    model: the T5.
    base: its checkpoint.
    vocabulary: a SentencePiece file or the name of a bundled model.
    input_file: '-' is stdin.
    output_file: '-' is stdout; a file appears when all is done.
    prompt: (table, metadata) of `load_prompt`; None for none.
    template: the model's input, with the record's fields in braces; a plain
      text's only field is `text`.
    input_format: 'jsonl', 'tsv' or 'text'; None goes by the file's ending.
    columns: the names of a TSV's columns; None reads its first line as such.
    labels: see `Predictor`, as all that follow.
    inputs_length: ids of a text; None takes what the prompt's file says it
      was trained with, else 512.
    targets_length: ids of a prediction; None likewise, else 32.
    batch_size: texts that run at once.
    prompt_index: which prompt of the table.
    seed: of decoding, where it samples.
    dtype: of the frozen weights; None: see `load_variables`.
    check_fingerprint: refuse a prompt that was trained on another base.
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
    input_format = _format_of(input_file)
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
    trained = prompt[1] if prompt is not None else {}
    inputs_length = inputs_length or trained.get('inputs_length', 512)
    targets_length = targets_length or trained.get('targets_length', 32)
    variables, virtual_tokens, layout, reason = _load(
      model,
      base,
      prompt,
      partitioner,
      (batch_size, inputs_length, targets_length),
      dtype,
      check_fingerprint,
    )
    predictor = Predictor(
      model,
      variables,
      vocabularies.load_vocabulary(vocabulary),
      virtual_tokens,
      labels,
      inputs_length,
      targets_length,
      batch_size,
      prompt_index,
      seed,
      layout,
    )
    # Of a job one process writes; the others only work along.
    output = stack.enter_context(
      _output(output_file) if hosts.is_primary() else open(os.devnull, 'w')
    )
    count = 0
    for record in predictor(itertools.chain([head], texts)):
      if count == 0:
        _say(reason, layout)
      output.write(json.dumps(record, ensure_ascii=False) + '\n')
      output.flush()
      count += 1
  return {'examples': count}


def evaluate(
  model: model_lib.EncoderDecoderModel,
  base: checkpoints.BaseCheckpoint,
  evaluation: Any,
  output_dir: str,
  prompt: tuple[Float[np.ndarray, 'K P E'], Mapping[str, Any]] | None = None,
  *,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  partitioner: sizing.Partitioner | None = None,
  resolved_config: Callable[[], str] | None = None,
) -> dict[str, float]:
  """Scores the model, with or without a prompt, on a task.

  Args:
    model: the T5.
    base: its checkpoint.
    evaluation: an `Evaluation`: the task, its split and lengths.
    output_dir: gets the predictions, the metrics and config.gin.
    prompt: (table, metadata) of `load_prompt`; None for none.
    dtype: of the frozen weights; None: see `load_variables`.
    check_fingerprint: refuse a prompt that was trained on another base.
    partitioner: how the devices of the job share the work; None chooses.
    resolved_config: gives the text of config.gin; None writes none.

  Returns:
    {'task/metric': value}.

  Raises:
    UserError: base, prompt, task or folder are at fault.
  """
  lengths = getattr(evaluation, 'task_feature_lengths', {})
  variables, virtual_tokens, layout, reason = _load(
    model,
    base,
    prompt,
    partitioner,
    (
      getattr(evaluation, 'batch_size', 32),
      lengths.get('inputs', 512),
      lengths.get('targets', 32),
    ),
    dtype,
    check_fingerprint,
  )
  evaluator = evaluation.build(model, virtual_tokens, output_dir, layout)
  folder = epath.Path(output_dir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  if resolved_config is not None and hosts.is_primary():
    (folder / 'config.gin').write_text(resolved_config())
  _say(reason, layout)
  step = base.step or 0
  if prompt is not None:
    step = prompt[1].get('step', step)
  return evaluator.evaluate(variables, int(step))


def _load(
  model: model_lib.EncoderDecoderModel,
  base: checkpoints.BaseCheckpoint,
  prompt: tuple[Float[np.ndarray, 'K P E'], Mapping[str, Any]] | None,
  partitioner: sizing.Partitioner | None,
  sizes: tuple[int, int, int],
  dtype: str | None,
  check_fingerprint: bool,
) -> tuple[Any, Any, partitioning.Layout, str]:
  """`load_variables` for a job's devices: where they are, and why, follows.

  `sizes` are B, the text's length in ids, and the targets'.
  """
  batch_size, inputs_length, targets_length = sizes
  layout, reason = (partitioner or sizing.Partitioner()).layout(
    sizing.Workload(
      config=model.config,
      batch_size=batch_size,
      inputs_length=inputs_length
      + (0 if prompt is None else len(prompt[0][0])),
      targets_length=targets_length,
      trained=(),
      param_dtype=checkpoints.frozen_dtype(dtype),
      num_decodes=model.num_decodes,
    )
  )
  variables, virtual_tokens = load_variables(
    model,
    base,
    prompt,
    dtype=dtype,
    check_fingerprint=check_fingerprint,
    layout=layout,
  )
  return variables, virtual_tokens, layout, reason


def _say(reason: str, layout: partitioning.Layout) -> None:
  """The reason for a layout, where there was a choice."""
  if layout.mesh.size > 1 and hosts.is_primary():
    print(reason, file=sys.stderr)


def read_records(
  lines: Iterable[str],
  input_format: str,
  name: str,
  columns: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, fields) of every line that is not empty.

  Args:
    lines: of a file.
    input_format: 'jsonl', 'tsv' or 'text'.
    name: the file's, for messages.
    columns: of a TSV; None reads its first line as such.

  Raises:
    UserError: an unknown format, a line that is not JSON or has other columns.
  """
  if input_format not in ('jsonl', 'tsv', 'text'):
    raise UserError(
      f'input_format must be jsonl, tsv or text, got {input_format}'
    )
  for number, line in _numbered(lines, name):
    line = line.rstrip('\r\n')
    place = f'{name}:{number}'
    if not line.strip():
      continue
    if input_format == 'text':
      yield place, {'text': line}
    elif input_format == 'jsonl':
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise UserError(f'{place} is not JSON: {error}') from None
      if not isinstance(record, dict):
        raise UserError(f'{place} is not a JSON object: {line[:60]}')
      yield place, record
    else:
      cells = line.split('\t')
      if columns is None:
        columns = cells
        continue
      if len(cells) != len(columns):
        raise UserError(
          f'{place} has {len(cells)} columns, needs {len(columns)}: '
          f'{", ".join(columns)}'
        )
      yield place, dict(zip(columns, cells))


def _numbered(lines: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
  number = 0
  try:
    for number, line in enumerate(lines, 1):
      yield number, line
  except UnicodeDecodeError as error:
    raise UserError(
      f'{name} is not UTF-8 after line {number}: {error.reason}; convert it'
    ) from None


def _format_of(name: str) -> str:
  ending = pathlib.Path(name).suffix.lower()
  return {'.jsonl': 'jsonl', '.json': 'jsonl', '.tsv': 'tsv'}.get(
    ending, 'text'
  )


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
  path = epath.Path(name)
  partial = path.with_name(f'{path.name}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open('w') as file:
      yield file
    partial.replace(path)
  except OSError as error:
    raise UserError(
      f'output file {name} cannot be written: {error.strerror}'
    ) from None
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
