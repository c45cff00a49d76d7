"""Texts in, predictions out: generated, ranked or scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.data import postprocessors
from prompt_tuning.data import virtual_tokens as virtual_tokens_lib
from prompt_tuning.data import vocabularies
from prompt_tuning.data.templates import Template
from prompt_tuning.errors import UserError
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.models.decoding import temperature_sample
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.serving import loading
from prompt_tuning.serving.loading import Loaded
from prompt_tuning.training import slices
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.trained import Trained

logger = logging.getLogger(__name__)

# A text, or a record whose fields the template names.
Text = str | Mapping[str, Any]

# The shortest encoder rows (see `slices.ladder`), and rows of targets that are
# scored, which double: few shapes are compiled.
_SHORTEST, _SHORTEST_TARGETS = 32, 8
# Batches of texts that are sorted by length at once.
WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A loaded model with its vocabulary; batches and pads by itself.

  Attributes:
    loaded: model, variables and where they are. A job's processes are given
      the same texts.
    vocabulary: the model's own.
    inputs_length: ids of a text, EOS included, virtual tokens not; longer
      texts are cut.
    targets_length: ids of a prediction, EOS included.
    batch_size: texts that run at once.
    prompt_index: which prompt of a table of several; None is refused.
    seed: of decoding, where it samples; what is drawn for a text depends on
      those beside it.
    template: makes the model's input; a plain text takes the place of its only
      field. Plain texts for a template of several fields are inputs as they
      are.
    labels: those that `rank` takes where it is given none.
    target_sentinel: targets begin with <extra_id_0> (see `data.task.Task`);
      texts of labels, targets and predictions have none.
  """

  loaded: Loaded
  vocabulary: vocabularies.Vocabulary
  inputs_length: int = 512
  targets_length: int = 32
  batch_size: int = 32
  prompt_index: int | None = 0
  seed: int = 0
  template: str = '{text}'
  labels: Sequence[str] | None = None
  target_sentinel: bool = False

  def __post_init__(self):
    rows = self.loaded.model.config.vocab_size
    if self.vocabulary.size > rows:
      raise UserError(
        f'the vocabulary {self.vocabulary.path} has {self.vocabulary.size} '
        f'pieces, the model {rows} rows: give the vocabulary of the model'
      )
    for name in ('inputs_length', 'targets_length', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'{name} must be 1 or more, got {getattr(self, name)}')
    if self.prompt_index is None:
      raise UserError(
        'the prompts were trained for several tasks: say which by prompt_index'
      )
    Template(self.template)  # its faults, now

  def input_of(self, text: Text, place: str = 'a text') -> str:
    """What the model is given for a text or a record.

    Args:
      text: see `template`.
      place: of it, for messages.

    Raises:
      UserError: the template cannot be filled.
    """
    return self._template.input_of(text, place)

  @functools.cached_property
  def _template(self) -> Template:
    return Template(self.template)

  def predict(self, texts: Iterable[Text]) -> list[str]:
    """What the model answers to each text."""
    return [record['prediction'] for record in self.records(texts)]

  def rank(
    self, texts: Iterable[Text], labels: Sequence[str] | None = None
  ) -> list[dict[str, float]]:
    """The log-likelihood of each label as the answer to each text, in nats.

    Args:
      texts: see `input_of`.
      labels: None takes the attribute.

    Returns:
      {label: log-likelihood} of each text, the likeliest label first.

    Raises:
      UserError: no labels, or some that cannot be told apart.
    """
    labels = self.labels if labels is None else labels
    if labels is None:
      raise UserError('rank needs labels: the training named none')
    ranked = []
    for record in self.records(texts, labels):
      items = record['scores'].items()
      ranked.append(dict(sorted(items, key=lambda item: -item[1])))
    return ranked

  def score(self, texts: Iterable[Text], targets: Iterable[str]) -> list[float]:
    """The log-likelihood of each target as the answer to its text, in nats.

    Its EOS is counted. Targets are not cut.

    Raises:
      UserError: there are not as many of both.
    """
    texts, targets = list(texts), list(targets)
    if len(texts) != len(targets):
      raise UserError(
        f'score needs a target for each text, got {len(texts)} texts and'
        f' {len(targets)} targets'
      )
    return [record['score'] for record in self.records(texts, targets=targets)]

  def records(
    self,
    texts: Iterable[Text],
    labels: Sequence[str] | None = None,
    targets: Iterable[str] | None = None,
    window: int | None = None,
  ) -> Iterator[dict[str, Any]]:
    """Yields one record a text, in order.

    A record has `input`, `prediction` and `score`, the prediction's
    log-likelihood in nats, its EOS included; with labels also `scores`, the
    log-likelihood of each; `cut`, how many of the input's ids were cut off,
    where some were. Of those a warning tells in the end. With targets there is
    no prediction, and the score is the target's.

    Args:
      texts: read a window at a time.
      labels: rank these by likelihood; None generates text.
      targets: score these, one for each text; they are not cut.
      window: texts that are sorted by length, so that those of a batch are
        about as long, before the first is answered; None: 16 batches of a
        list, one of what is read as it comes.

    Raises:
      UserError: fewer than two labels, or some that cannot be told apart.
    """
    label_rows = None
    if labels is not None:
      vocabularies.label_pieces(self.vocabulary, labels, 'ranking')
      label_rows = self._targets(labels)
    if window is None:
      at_hand = isinstance(texts, Sequence)
      window = self.batch_size * (WINDOW if at_hand else 1)
    answers = None if targets is None else iter(targets)
    waiting, seen, cut_texts = iter(texts), 0, 0
    while chunk := list(itertools.islice(waiting, window)):
      chunk = [
        self.input_of(text, f'text {seen + i}') for i, text in enumerate(chunk)
      ]
      inputs, cut = self._encoder_inputs(chunk)
      shapes = self._shapes(self.batch_size if seen else len(chunk))
      if answers is not None:
        given = list(itertools.islice(answers, len(chunk)))
        records = self._score_of(shapes, inputs, given)
      elif label_rows is None:
        records = self._generate(shapes, inputs, seen)
      else:
        records = self._rank(shapes, inputs, labels, label_rows)
      for text, record, ids in zip(chunk, records, cut, strict=True):
        yield {'input': text, **record} | ({'cut': ids} if ids else {})
      seen, cut_texts = seen + len(chunk), cut_texts + np.count_nonzero(cut)
    if cut_texts:
      logger.warning(
        '%d of %d texts are longer than inputs_length %d and were cut',
        *(cut_texts, seen, self.inputs_length),
      )

  def _encoder_inputs(
    self, texts: Sequence[str]
  ) -> tuple[Int[np.ndarray, 'N T'], list[int]]:
    """Rows, padded, and how many ids of each text were cut off."""
    encoded = [self.vocabulary.encode(text) for text in texts]
    cut = [max(len(ids) + 1 - self.inputs_length, 0) for ids in encoded]
    inputs = [
      virtual_tokens_lib.encoder_row(
        ids, self.inputs_length, self.loaded.virtual_tokens, self.prompt_index
      )
      for ids in encoded
    ]
    return np.stack(inputs), cut

  def _shapes(self, texts: int) -> slices.Shapes:
    """Those that so many texts run in: a batch of few has a row for each."""
    rows = self.batch_size
    while rows // 2 >= texts:
      rows //= 2
    lengths = slices.ladder(
      min(_SHORTEST, self.inputs_length), self.inputs_length
    )
    virtual = virtual_tokens_lib.encoder_length(0, self.loaded.virtual_tokens)
    return slices.Shapes(
      tuple(virtual + length for length in lengths),
      (self.loaded.layout.padded(rows),) * len(lengths),
      (None,),
    )

  def _targets(self, texts: Sequence[str]) -> Int[np.ndarray, 'N L']:
    rows = [self.vocabulary.encode(text) for text in texts]
    if self.target_sentinel:
      rows = [[self.vocabulary.sentinel(0), *row] for row in rows]
    return virtual_tokens_lib.target_rows(rows, self.vocabulary.eos_id)

  def _generate(
    self, shapes: slices.Shapes, inputs: Int[np.ndarray, 'N T'], seen: int
  ) -> Iterator[dict[str, Any]]:
    empty = np.zeros((len(inputs), self.targets_length), np.int32)
    key = jax.random.fold_in(jax.random.key(self.seed), seen)

    def call(batch, number):
      args = (self._placed(batch), jax.random.fold_in(key, number))
      return self._decode_and_score(self.loaded.variables, *args)

    (ids,), (scores,) = slices.run(shapes, _features(inputs, empty), call)
    for row, score in zip(ids, scores, strict=True):
      prediction = self.vocabulary.decode(row.tolist())
      if self.target_sentinel:
        prediction = postprocessors.without_sentinel(prediction)
      yield {'prediction': prediction, 'score': float(score)}

  def _score_of(self, shapes, inputs, targets) -> Iterator[dict]:
    rows = self._targets(targets)  # [N, L]
    lengths = [_SHORTEST_TARGETS]
    while lengths[-1] < rows.shape[1]:
      lengths.append(2 * lengths[-1])
    shapes = dataclasses.replace(shapes, targets=tuple(lengths))
    rows = np.pad(rows, ((0, 0), (0, lengths[-1] - rows.shape[1])))

    def call(batch, number):
      return self._score(self.loaded.variables, self._placed(batch))

    used = slices.row_lengths(rows)
    (scores,) = slices.run(shapes, _features(inputs, rows), call, used)
    for score in scores:
      yield {'score': float(score)}

  def _rank(self, shapes, inputs, labels, label_rows) -> Iterator[dict]:
    def call(batch, number):
      batch = self._placed(batch)
      return self._label_scores(self.loaded.variables, batch, label_rows)

    (scores,) = slices.run(shapes, _features(inputs), call)
    for row in scores:
      best = int(np.argmax(row))
      yield {
        'prediction': labels[best],
        'score': float(row[best]),
        'scores': {label: float(score) for label, score in zip(labels, row)},
      }

  def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    return self.loaded.layout.shard_batch(batch)

  def _jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
    layout = self.loaded.layout
    return layout.jit(function, out_shardings=layout.replicated)

  @functools.cached_property
  def _decode_and_score(self) -> Callable[..., Any]:
    model = self.loaded.model

    def decode_and_score(
      variables, batch, key: jax.Array
    ) -> tuple[Int[Array, 'B L'], Float[Array, 'B']]:
      ids = model.predict_batch(variables, batch, key)
      # Decoders report a score each in their own way (T5X's greedy gives 0,
      # beam search a penalised one); this is the likelihood itself.
      return ids, model.score_batch(variables, {**batch, **_as_targets(ids)})

    return self._jit(decode_and_score)

  @functools.cached_property
  def _score(self) -> Callable[..., Any]:
    return self._jit(self.loaded.model.score_batch)

  @functools.cached_property
  def _label_scores(self) -> Callable[..., Any]:
    return self._jit(self.loaded.model.rank_classify)


def load(
  base: str | os.PathLike | BaseCheckpoint,
  trained: str | os.PathLike | Sequence[Trained] = (),
  *,
  vocabulary: str | None = None,
  model: EncoderDecoderModel | None = None,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  **settings: Any,
) -> Predictor:
  """A model for texts, out of a base and what was trained on it.

  Args:
    base: a bundled name, a folder, a file or a hub id (see `load_checkpoint`).
    trained: a run's MODEL_DIR, an exported prompt or other method, a PEFT
      prompt (see `load_trained`); () for T5 alone.
    vocabulary: a SentencePiece file, a folder with one or a bundled name; None
      looks beside the base.
    model: None: the base's own network, which decodes greedily.
    dtype: of T5's parameters; None: bfloat16 on accelerators, float32 on CPU.
    check_fingerprint: refuse what was trained on another base.
    **settings: further attributes of `Predictor`; lengths, template, labels
      and sentinel that are not given are those of the training, as far as
      `trained` says them.

  Raises:
    UserError: nothing there, or it does not fit together.
  """
  if not isinstance(base, BaseCheckpoint):
    base = base_checkpoints.open_checkpoint(base)
  if isinstance(trained, str | os.PathLike):
    trained = load_trained(trained)
  if model is None:
    model = EncoderDecoderModel(base.config(), decode_fn=temperature_sample)
  try:
    words = vocabularies.load_vocabulary(vocabulary or _beside(base))
  except UserError as error:
    if vocabulary is not None:
      raise
    raise UserError(
      f'{base.path} has no vocabulary beside it: give vocabulary=, the path of'
      ' its spiece.model'
    ) from error
  settings = loading.remembered(trained) | settings
  loaded = loading.load(
    model,
    base,
    trained,
    dtype=dtype,
    check_fingerprint=check_fingerprint,
    vocabulary=words,
  )
  return Predictor(loaded, words, **settings)


def _beside(base: BaseCheckpoint) -> str:
  """Where a base's own vocabulary is looked for."""
  if hugging_face.is_hub_id(base.path) and not os.path.exists(base.path):
    return str(hugging_face.download(base.path))
  return base.path


def _features(
  inputs: Int[np.ndarray, 'N T'], targets: Int[np.ndarray, 'N L'] | None = None
) -> dict[str, np.ndarray]:
  """The model's features of rows."""
  features = {'encoder_input_tokens': inputs}
  return features if targets is None else features | _as_targets(targets, np)


def _as_targets(ids: Any, xp: Any = jnp) -> dict[str, Any]:
  """The decoder's features for ids [B, L] as targets."""
  return {
    'decoder_input_tokens': xp.pad(ids[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': ids,
    'decoder_loss_weights': (ids > 0).astype(xp.float32),
  }
