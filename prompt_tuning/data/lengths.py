"""How many tokens a task's inputs and targets have, EOS too, and what is cut.

TASK_FEATURE_LENGTHS is chosen knowingly by `measure`, and checked against a
sample of the data by `check_truncation` when a training begins.
"""

from collections.abc import Iterable, Iterator, Mapping
import inspect
import logging
import typing

from jaxtyping import Int
import numpy as np

from prompt_tuning.data import checking
from prompt_tuning.data import task as task_lib
from prompt_tuning.data.vocabularies import label_pieces
from prompt_tuning.errors import UserError

if typing.TYPE_CHECKING:
  import seqio

# Examples that a training looks at before it begins, and the share of them that
# may be cut without a word.
SAMPLE = 1000
TOLERATED = 0.01

logger = logging.getLogger(__name__)


def cut_by_task(task: 'seqio.Task') -> bool:
  """True where the task's own preprocessors cut texts to their lengths."""
  import seqio

  return any(
    'sequence_length' in inspect.signature(step).parameters
    for step in task.preprocessors
    if callable(step) and step is not seqio.preprocessors.append_eos_after_trim
  )


def measure(
  task: 'seqio.Task', split: str, most: int | None = None
) -> dict[str, Int[np.ndarray, 'N']]:
  """Lengths of the examples as nothing cuts them.

  Args:
    task: whose preprocessors do not need lengths themselves.
    split: of the task.
    most: how many examples, from the first on; None for all.

  Returns:
    {'inputs': [N], 'targets': [N]}, in tokens, EOS included, virtual tokens
    not.
  """
  with checking.reading(task, split):
    dataset = task.get_dataset(
      sequence_length=None, split=split, shuffle=False, num_epochs=1
    )
    if most is not None:
      dataset = dataset.take(most)
    names = ('inputs', 'targets')
    # Counted inside the pipeline: ids need not become numpy arrays one by one.
    counts = dataset.map(lambda row: [len(row[name]) for name in names])
    rows = list(counts.batch(1024).as_numpy_iterator())
  joined = [np.concatenate([row[i] for row in rows]) for i in range(len(names))]
  return dict(zip(names, joined, strict=True))


def truncated(
  lengths: Mapping[str, Int[np.ndarray, 'N']], limits: Mapping[str, int]
) -> dict[str, float]:
  """Share of the examples whose inputs, whose targets a limit cuts."""
  return {
    name: float(np.mean(values > limits[name]))
    for name, values in lengths.items()
  }


def sample(
  task: 'seqio.Task | seqio.Mixture', split: str
) -> dict[str, Int[np.ndarray, 'N']]:
  """Lengths, uncut, of the first `SAMPLE` examples of each task.

  None of a task without the split, nor of one that cuts by itself.
  """
  return _joined(measure(one, split, SAMPLE) for one in _parts(task, split))


def _parts(
  task: 'seqio.Task | seqio.Mixture', split: str
) -> Iterator['seqio.Task']:
  import seqio

  for part in seqio.get_subtasks(task):
    if split in part.splits and not cut_by_task(part):
      yield part


def _joined(
  samples: Iterable[Mapping[str, Int[np.ndarray, 'N']]],
) -> dict[str, Int[np.ndarray, 'M']]:
  samples, none = list(samples), np.zeros(0, np.int32)
  return {
    name: np.concatenate([none, *(one[name] for one in samples)])
    for name in ('inputs', 'targets')
  }


def check_truncation(
  task: 'seqio.Task | seqio.Mixture',
  split: str,
  limits: Mapping[str, int],
  target_sentinel: bool = False,
) -> dict[str, Int[np.ndarray, 'N']]:
  """Warns of texts that are cut, refuses to cut labels.

  Looks at the first `SAMPLE` examples of each task, and at all labels.

  Args:
    task: of text to text.
    split: tasks without it are left out.
    limits: TASK_FEATURE_LENGTHS.
    target_sentinel: one stands in front of the targets.

  Returns:
    The lengths that it saw, uncut; none of a task that cuts by itself.

  Raises:
    UserError: if a label of a classification task, with EOS, does not fit.
  """
  seen = []
  for part in _parts(task, split):
    vocabulary = part.output_features['targets'].vocabulary
    words = task_lib.class_labels(part) or ()
    rows = label_pieces(vocabulary, words, f'task {part.name}') if words else ()
    for word, row in zip(words, rows):
      needed = len(row) + 1 + target_sentinel
      if needed > limits['targets']:
        raise UserError(
          f'the label {word!r} of task {part.name} has {needed} tokens with'
          f' EOS{" and sentinel" if target_sentinel else ""},'
          f' TASK_FEATURE_LENGTHS allows {limits["targets"]} for targets; give'
          ' more'
        )
    found = measure(part, split, SAMPLE)
    seen.append(found)
    for name, share in truncated(found, limits).items():
      if share > TOLERATED:
        logger.warning(
          'task %s, split %r: %.1f%% of %d examples have %s longer than %d'
          ' tokens and are cut; 99%% fit into %d (TASK_FEATURE_LENGTHS)',
          part.name,
          split,
          100 * share,
          len(found[name]),
          name,
          limits[name],
          int(np.ceil(np.percentile(found[name], 99))),
        )
  return _joined(seen)
