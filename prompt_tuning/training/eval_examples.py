"""The examples of an evaluation, kept in host memory as text and as batches."""

import typing

from jaxtyping import Int
import numpy as np

from prompt_tuning.data import task as task_lib
from prompt_tuning.data.virtual_tokens import target_rows
from prompt_tuning.data.vocabularies import label_pieces
from prompt_tuning.errors import UserError

if typing.TYPE_CHECKING:
  import seqio


class TaskExamples:
  """One task's examples, as text and as the model's features.

  Attributes:
    selects: its score's name, if the mixture trains for it (others are
      evaluated zero-shot); else None.
    features: {name: [N, length]}, padded.
    label_tokens: ids of its labels [C, L], if it is `ranked`.
  """

  def __init__(
    self,
    task: 'seqio.Task',
    evaluator: 'seqio.Evaluator',
    ranked: bool = False,
    target_sentinel: bool = False,
    is_trained: bool = True,
  ):
    self.name = task.name
    self.selects = f'{task.name}/score' if is_trained else None
    self.vocabulary = task.output_features['targets'].vocabulary
    examples = list(
      evaluator.cached_task_datasets[task.name].as_numpy_iterator()
    )
    self.inputs = [_text(task, example, 'inputs') for example in examples]
    self.targets = [_text(task, example, 'targets') for example in examples]
    rows = [
      row
      for _, row in evaluator.cached_model_datasets[
        task.name
      ].as_numpy_iterator()
    ]
    self.size = len(rows)
    self.features = {
      name: np.stack([row[name] for row in rows]) for name in rows[0]
    }
    self.label_tokens = None
    if ranked:
      self.label_tokens = _label_tokens(task, self.vocabulary, target_sentinel)

  @property
  def target_rows(self) -> Int[np.ndarray, 'N L']:
    """The truth as ids."""
    return self.features['decoder_target_tokens']

  def within_vocabulary(
    self, ids: Int[np.ndarray, 'N L']
  ) -> Int[np.ndarray, 'N L']:
    """Ids that the vocabulary does not know become padding.

    The embedding table has more rows than the vocabulary has pieces, and a
    detokeniser given such an id may fail or make up text.
    """
    known = (ids >= 0) & (ids < self.vocabulary.vocab_size)
    return np.where(known, ids, self.vocabulary.pad_id)


def _text(task, example, feature: str) -> str:
  """What a feature's ids stand for, as the task had it or else decoded."""
  text = example.get(f'{feature}_pretokenized')
  if isinstance(text, bytes):
    return text.decode('utf-8')
  vocabulary = task.output_features[feature].vocabulary
  return str(vocabulary.decode(example[feature].tolist()))


def _label_tokens(
  task, vocabulary, target_sentinel: bool
) -> Int[np.ndarray, 'C L']:
  """The ids of the task's labels with EOS, padded with 0."""
  labels = task_lib.class_labels(task)
  if labels is None:
    raise UserError(
      f'rank classification needs a task with labels, {task.name} has none;'
      ' evaluate it with rank_classification=False'
    )
  rows = label_pieces(vocabulary, labels, f'task {task.name}')
  if target_sentinel:
    rows = [[vocabulary.vocab_size - 1, *row] for row in rows]
  return target_rows(rows, vocabulary.eos_id)
