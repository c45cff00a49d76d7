"""Evaluation of a task's metrics on decoded text, by seqio's Evaluator."""

import collections
from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import os
import typing
from typing import Any

import absl.logging
from etils import epath
import jax
from jaxtyping import Float, Int
import numpy as np

from prompt_tuning import files
from prompt_tuning.data import checking
from prompt_tuning.data import task as task_lib
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.training import calibration
from prompt_tuning.training import ensemble
from prompt_tuning.training import hosts
from prompt_tuning.training import partitioning
from prompt_tuning.training import slices
from prompt_tuning.training.best import SCORE
from prompt_tuning.training.eval_examples import TaskExamples

if typing.TYPE_CHECKING:
  import seqio

METRICS_FILE = 'eval_metrics.jsonl'
# Of each task, before shapes are chosen: so many rows, or up to twice as many.
_SAMPLE_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is evaluated, and how.

  Attributes:
    task: which; the object that training was given.
    batch_size: rows that are computed at once, at most.
    split: the split of each task; a mixture's tasks without it are left out.
    num_examples: size of a sample of each task, the same at every evaluation;
      None for all examples, in the order of the data.
    rank_classification: the answer is the task's label of the highest
      likelihood, and not what decoding gives.
    ensemble: the answer is that of most prompts of the table (see
      `training.ensemble`), whose own metrics are told as `members/<k>/...`.
    calibrate: labels are ranked by their likelihood beside what it is for an
      input that says nothing (see `training.calibration`).
    seed: of that sample, and of decoding that samples: what is drawn for an
      example depends on its place among the examples by length.
  """

  task: task_lib.Task
  batch_size: int = 32
  split: str = 'validation'
  num_examples: int | None = None
  rank_classification: bool = False
  ensemble: bool = False
  calibrate: bool = False
  seed: int = 0

  def __post_init__(self):
    if self.calibrate and (self.ensemble or not self.rank_classification):
      raise UserError(
        'Evaluation.calibrate weighs labels that are ranked: it needs'
        ' rank_classification=True and no ensemble'
      )

  def build(
    self,
    model: Any,
    virtual_tokens: VirtualTokens | None,
    output_dir: str | os.PathLike,
    layout: partitioning.Layout | None = None,
  ) -> 'Evaluator':
    """Reads and converts the examples, once.

    Args:
      model: an `EncoderDecoderModel`.
      virtual_tokens: None for a model without a prompt (zero-shot, model
        tuning).
      output_dir: gets predictions and metrics (see `Evaluator.evaluate`).
      layout: where the variables will be; None: this process's first device.

    Raises:
      UserError: as `Task.checked`, and if no task has metrics or, for rank
        classification, labels that its vocabulary can write.
    """
    return Evaluator(self, model, virtual_tokens, output_dir, layout)


class Evaluator:
  """Metrics of given variables on examples kept in host memory.

  It draws from no state that training uses, and its functions are compiled at
  the first evaluation only.
  """

  def __init__(
    self,
    evaluation: Evaluation,
    model: Any,
    virtual_tokens: VirtualTokens | None,
    output_dir: str | os.PathLike,
    layout: partitioning.Layout | None = None,
  ):
    self._evaluation = evaluation
    self._layout = layout or partitioning.single_device()
    self._output_dir = files.place(output_dir)
    self._virtual_tokens = virtual_tokens
    if evaluation.ensemble:
      ensemble.members(virtual_tokens)
    task_lib.import_seqio()
    import seqio

    from prompt_tuning.data import feature_converter

    self.lengths = evaluation.task.lengths()
    sampled = evaluation.num_examples is not None
    provider = evaluation.task.checked(
      evaluation.split,
      rows=model.config.vocab_size,
      virtual_tokens=virtual_tokens,
      shuffled=sampled,
    )
    with (
      _quiet(),
      _registered(provider),
      checking.reading(provider, evaluation.split),
    ):
      self._seqio = seqio.Evaluator(
        provider.name,
        feature_converter.VirtualTokensFeatureConverter(virtual_tokens),
        eval_split=evaluation.split,
        sequence_length=self.lengths,
        num_examples=evaluation.num_examples,
        # The first examples of a file may all be of one label.
        shuffle=sampled,
        seed=evaluation.seed,
        # Metrics are wanted at once, and threads and accelerators do not mix.
        async_compute_metrics=False,
      )
    if not self._seqio.eval_tasks:
      raise UserError(
        f'evaluation needs a task with metrics, {provider.name} has none for'
        f' split {evaluation.split!r}'
      )
    self._name = provider.name
    self._shapes: slices.Shapes | None = None
    self._tasks = {
      task.name: TaskExamples(
        task,
        self._seqio,
        evaluation.rank_classification,
        evaluation.task.target_sentinel,
        'train' in task.splits
        or task_lib.trained_beside(task, seqio.get_subtasks(provider))
        is not None,
      )
      for task in self._seqio.eval_tasks
    }

    # All take (variables, slice, number of the slice, ...).
    def key(number):
      """A slice's own random key, for decoding that samples."""
      return jax.random.fold_in(jax.random.key(evaluation.seed), number)

    jit = functools.partial(
      self._layout.jit, out_shardings=self._layout.replicated
    )

    @jit
    def predict(variables, batch, number):
      return model.predict_batch(variables, batch, key(number))

    @jit
    def predict_with_aux(variables, batch, number):
      return model.predict_batch_with_aux(variables, batch, key(number))

    @jit
    def score(variables, batch, number):
      del number
      return model.score_batch(variables, batch)

    @jit
    def rank(variables, batch, number, label_tokens):
      del number
      return model.rank_classify(variables, batch, label_tokens)

    self._predict, self._predict_with_aux = predict, predict_with_aux
    self._score, self._rank = score, rank

  def evaluate(
    self, variables: Mapping[str, Any], step: int
  ) -> dict[str, float]:
    """The metrics of all tasks, {'task/metric': value}.

    'task/score' is the mean of a task's metrics, 'mixture/score' the mean of
    that over the tasks of a mixture. 'score' is the task's own, by which runs
    select: of a mixture the mean over those tasks that training reads too (not
    those evaluated zero-shot), where there are some.

    Writes `inference/<task>-<step>.jsonl` (input, target, prediction: one line
    an example) and adds a line to `eval_metrics.jsonl`; where a resumed run
    evaluates a step again, the later line counts.

    Args:
      variables: the model's collections.
      step: goes into file names and lines.

    Raises:
      UserError: if the files cannot be written.
    """
    answers: dict[str, Any] = {}

    def predict(dataset):
      task = self._task_of(dataset)
      answers[task.name] = self._answers(variables, task)
      return list(enumerate(answers[task.name][0]))

    values, outputs = self._measure(
      step,
      predict,
      lambda ds: self._predictions_and_aux(variables, ds),
      lambda ds: self._scores(variables, ds),
    )
    if self._evaluation.ensemble:
      values |= self._of_members(step, answers)
    if not hosts.is_primary():
      return values
    with _writing(self._output_dir):
      for task, output in outputs.items():
        self._write_inference(self._tasks[task], output, step)
      line = {'step': step, 'split': self._evaluation.split, **values}
      with (self._output_dir / METRICS_FILE).open('a') as file:
        file.write(json.dumps(line) + '\n')
    return values

  def _of_members(
    self, step: int, answers: Mapping[str, Any]
  ) -> dict[str, float]:
    """Each member's metrics, and the mean and the best of their scores."""
    found: dict[str, float] = {}
    own = []
    for k in range(self._virtual_tokens.num_prompts):

      def predict(dataset, k=k):
        return list(enumerate(answers[self._task_of(dataset).name][1][k]))

      values, _ = self._measure(step, predict, _refused, _refused)
      found |= {f'members/{k}/{name}': value for name, value in values.items()}
      own.append(values.get(SCORE))
    if None not in own:
      found['members/mean_score'] = _mean(own)
      found['members/best_score'] = max(own)
    return found

  def metric_names(self) -> set[str]:
    """The names of `evaluate`'s metrics, found with the truth as prediction."""

    def truth(dataset):
      rows = self._task_of(dataset).target_rows
      return list(enumerate(rows))

    def zeros(dataset):
      return [(i, 0.0) for i in range(self._task_of(dataset).size)]

    def truth_and_zeros(dataset):
      return truth(dataset), {'scores': [zero for _, zero in zeros(dataset)]}

    return set(self._measure(0, truth, truth_and_zeros, zeros)[0])

  def _measure(
    self,
    step: int,
    predict: Callable[..., Any],
    predict_with_aux: Callable[..., Any],
    score: Callable[..., Any],
  ) -> tuple[dict[str, float], Mapping[str, Any]]:
    """All metrics of a model's functions, and its outputs by task."""
    # A training loop forbids implicit transfers; seqio's metrics make some.
    with jax.transfer_guard('allow'):
      metrics, outputs = self._seqio.evaluate(
        compute_metrics=True,
        step=step,
        predict_fn=predict,
        predict_with_aux_fn=predict_with_aux,
        score_fn=score,
      )
    values = {}
    for task, results in metrics.result().items():
      for name, value in results.items():
        value = getattr(value, 'value', value)
        if isinstance(value, (int, float, np.number)):
          values[f'{task}/{name}'] = float(value)
    values.update(scores(values))
    found = {n: value for n, value in values.items() if n.endswith('/score')}
    if len(self._tasks) > 1 and found:
      values[f'{self._name}/score'] = _mean(found.values())
    own = [found[n] for t in self._tasks.values() if (n := t.selects) in found]
    if found:
      values[SCORE] = _mean(own or found.values())
    return values, outputs

  def _task_of(self, dataset) -> TaskExamples:
    for name, cached in self._seqio.cached_model_datasets.items():
      if cached is dataset:
        return self._tasks[name]
    raise AssertionError('seqio evaluates a data set that it did not cache')

  def _run(self, function, variables, features, *arguments) -> Any:
    """`function` on all rows: results [N, ...], of an ensemble [K, N, ...].

    Every slice is split as a training batch is. Each process has all examples
    and puts its rows on its devices; the results come back to all.
    """
    if self._shapes is None:
      self._shapes = self._chosen_shapes()

    def call(batch, number):
      if self._evaluation.ensemble:
        batch = ensemble.for_each_member(batch, self._virtual_tokens)
      placed = self._layout.shard_batch(batch)
      return function(variables, placed, np.int32(number), *arguments)

    found = slices.run(self._shapes, features, call, members=self._members)
    if self._evaluation.ensemble:
      return found
    return jax.tree.map(lambda whole: whole[0], found)

  @property
  def _members(self) -> int:
    """Rows that an example takes."""
    return self._virtual_tokens.num_prompts if self._evaluation.ensemble else 1

  def _chosen_shapes(self) -> slices.Shapes:
    """Those of all tasks' slices, with the rows of a batch at most."""
    inputs = [t.features['encoder_input_tokens'] for t in self._tasks.values()]
    rows = -(-self._evaluation.batch_size // self._members)
    rows = slices.evened(rows, max(map(len, inputs)))
    rows = self._layout.padded(rows)
    longest = max(ids.shape[1] for ids in inputs)
    return slices.choose(
      [
        slices.row_lengths(ids[:: max(len(ids) // _SAMPLE_ROWS, 1)])
        for ids in inputs
      ],
      longest,
      rows=rows,
      # A CPU is no faster with more rows, so that fewer may save padding.
      tokens=rows * longest if self._layout.on_cpu else None,
      multiple=self._layout.batch_shards,
    )

  def _answers(
    self, variables, task
  ) -> tuple[Int[np.ndarray, 'N L'], Int[np.ndarray, 'K N L'] | None]:
    """Answers as ids of the vocabulary, and those of an ensemble's members."""
    if self._evaluation.rank_classification:
      name = 'encoder_input_tokens'
      asked = {name: task.features[name]}, task.label_tokens
      likelihoods = self._run(self._rank, variables, *asked)
      if self._evaluation.calibrate:
        likelihoods = calibration.calibrated(
          likelihoods, self._of_nothing(variables, task)
        )
      ids = task.label_tokens[np.argmax(likelihoods, axis=-1)]
    else:
      ids = self._run(self._predict, variables, task.features)
    ids = task.within_vocabulary(ids)
    return (
      (ensemble.vote(ids), ids) if self._evaluation.ensemble else (ids, None)
    )

  def _of_nothing(self, variables, task) -> Float[np.ndarray, 'F C']:
    """Likelihoods of the labels for inputs that say nothing."""
    asked = self._evaluation.task
    rows = calibration.content_free_rows(
      asked.prefix(task.name),
      task_lib.TEMPLATES.get(task.name),
      task.vocabulary,
      self.lengths['inputs'],
      self._virtual_tokens,
      (asked.prompt_indices or {}).get(task.name, 0),
    )
    features = {'encoder_input_tokens': rows}
    return self._run(self._rank, variables, features, task.label_tokens)

  def _predictions_and_aux(self, variables, dataset):
    task = self._task_of(dataset)
    if self._evaluation.rank_classification:
      raise UserError(
        f'task {task.name} has a metric of auxiliary values, which rank'
        ' classification has none of; evaluate it with'
        ' rank_classification=False'
      )
    if self._evaluation.ensemble:
      _refused(dataset)
    ids, aux = self._run(self._predict_with_aux, variables, task.features)
    rows = list(enumerate(task.within_vocabulary(ids)))
    return rows, {name: list(values) for name, values in aux.items()}

  def _scores(self, variables, dataset) -> list[tuple[int, float]]:
    if self._evaluation.ensemble:
      _refused(dataset)
    task = self._task_of(dataset)
    scores = self._run(self._score, variables, task.features)
    return list(enumerate(scores.tolist()))

  def _write_inference(self, task, output, step) -> None:
    from seqio.metrics import ModelOutputType as kind

    rows = [
      {'input': source, 'target': target}
      for source, target in zip(task.inputs, task.targets, strict=True)
    ]
    predicted = output.get(kind.PREDICTION)
    if predicted is None and kind.PREDICTION_WITH_AUX in output:
      predicted = output[kind.PREDICTION_WITH_AUX][0]
    if predicted is not None:
      for row, ids in zip(rows, predicted, strict=True):
        row['prediction'] = task.vocabulary.decode(ids.tolist())
    for row, score in zip(rows, output.get(kind.SCORE, ())):
      row['score'] = score
    folder = self._output_dir / 'inference'
    folder.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / f'{task.name}-{step}.jsonl') as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + '\n')


def _refused(dataset):
  raise UserError(
    'members of an ensemble vote with answers; the task has a metric of'
    ' likelihoods or auxiliary values, which needs Evaluation.ensemble=False'
  )


def _mean(values: Collection[float]) -> float:
  return sum(values) / len(values)


def scores(values: Mapping[str, float]) -> dict[str, float]:
  """{'task/score': mean of the task's metrics}, by which prompts are compared.

  The paper stops early on it (Lester et al. 2021, section 3); its mean over
  SuperGLUE's tasks is SuperGLUE's score. Shares say how to read a metric and
  are none.
  """
  metrics = collections.defaultdict(list)
  for name, value in values.items():
    task, _, metric = name.rpartition('/')
    if not metric.endswith('_share'):
      metrics[task].append(value)
  return {f'{task}/score': _mean(found) for task, found in metrics.items()}


@contextlib.contextmanager
def _registered(provider: 'seqio.Task | seqio.Mixture'):
  """Lets seqio, which wants a name, find this object under its name."""
  import seqio

  registry = (
    seqio.MixtureRegistry
    if isinstance(provider, seqio.Mixture)
    else seqio.TaskRegistry
  )
  original = registry.get(provider.name)
  registry.remove(provider.name)
  registry.add_provider(provider.name, provider)
  try:
    yield
  finally:
    registry.remove(provider.name)
    registry.add_provider(provider.name, original)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without seqio's warnings on padding and on loggers, which we do not use."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    yield
  finally:
    absl.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    raise UserError(
      f'cannot write the evaluation to {error.filename or folder}'
      f' ({error.strerror}); earlier files are as they were'
    ) from error
