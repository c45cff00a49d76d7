"""From a decoded string to the value that a metric compares.

A postprocessor has seqio's signature: (decoded, example, is_target). For a
target it gives the truth, for a prediction what the model said, in the form
that the task's metrics take. One of a classification task has `words`: what the
model may answer, in the order of the labels' ids. The class-label initialiser
and rank classification look there.
"""

from collections.abc import Callable, Mapping
import dataclasses

UNKNOWN_LABEL = -1

# Words that do not tell one referent of WSC from another.
_DETERMINERS = frozenset(
  'a an few her his each every many much my our some that the their these this '
  'those which whose your'.split()
)


@dataclasses.dataclass(frozen=True)
class LabelToId:
  """The position of a label, -1 for any other text.

  Attributes:
    labels: in the order of their ids.
    rewrite: (word, replacement): replaced in predictions before they are
      looked up. Zero-shot transfer between tasks of other labels needs it.
  """

  labels: tuple[str, ...]
  rewrite: tuple[str, str] | None = None

  @property
  def words(self) -> tuple[str, ...]:
    """The labels, in the words of predictions."""
    if self.rewrite is None:
      return self.labels
    theirs, ours = self.rewrite
    return tuple(label.replace(ours, theirs) for label in self.labels)

  def __call__(
    self,
    decoded: str,
    example: Mapping | None = None,
    is_target: bool = False,
  ) -> int:
    del example
    if self.rewrite and not is_target:
      decoded = decoded.replace(*self.rewrite)
    if decoded in self.labels:
      return self.labels.index(decoded)
    return UNKNOWN_LABEL


def to_float(decoded, example=None, is_target=False) -> float:
  """The number that is written, -1 where there is none."""
  del example, is_target
  try:
    return float(decoded)
  except ValueError:
    return float(UNKNOWN_LABEL)


@dataclasses.dataclass(frozen=True)
class GroupedLabelToId:
  """MultiRC: as `LabelToId`, with the question that an answer belongs to."""

  labels: tuple[str, ...] = ('False', 'True')

  @property
  def words(self) -> tuple[str, ...]:
    """The labels."""
    return self.labels

  def __call__(self, decoded, example=None, is_target=False) -> dict:
    value = LabelToId(self.labels)(decoded)
    if is_target:
      return {'value': value, 'group': int(example['idx/question'])}
    return {'value': value}


def _text(value) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def record(decoded, example=None, is_target=False) -> dict:
  """ReCoRD: all answers of a query as target, the text as prediction."""
  if is_target:
    return {
      'value': [_text(answer) for answer in example['answers']],
      'group': (int(example['idx/passage']), int(example['idx/query'])),
    }
  return {'value': decoded}


def answers(decoded, example=None, is_target=False) -> str | list[str]:
  """SQuAD and MRQA: all answers as target, the text as prediction."""
  if is_target:
    return [_text(answer) for answer in example['answers']]
  return decoded


def wsc(decoded, example=None, is_target=False) -> int:
  """Whether the prediction names the candidate of the example.

  1 where, without determiners and in lower case, the words of one are all
  among those of the other, and both or none have an apostrophe ("Bob" is not
  "Bob's hat"). An empty prediction is -1.
  """
  if is_target:
    return int(example['label'])

  def clean(text):
    split = text.strip().lower().split(' ')
    return ' '.join(word for word in split if word not in _DETERMINERS)

  predicted = clean(decoded)
  if not predicted:
    return UNKNOWN_LABEL
  referent = clean(_text(example['targets_pretokenized']))
  if ("'" in predicted) != ("'" in referent):
    return 0
  predicted, referent = set(predicted.split(' ')), set(referent.split(' '))
  return int(predicted <= referent or referent <= predicted)


def without_sentinel(decoded: str) -> str:
  """The text without a leading <extra_id_0>, which span corruption puts."""
  return decoded.removeprefix('<extra_id_0>').lstrip()


@dataclasses.dataclass(frozen=True)
class WithoutSentinel:
  """A task's postprocessor for predictions that begin with <extra_id_0>.

  Attributes:
    postprocess: of the task itself.
  """

  postprocess: Callable

  @property
  def words(self) -> tuple[str, ...]:
    """Those of the task, () where it has none."""
    return getattr(self.postprocess, 'words', ())

  def __call__(self, decoded, example=None, is_target=False):
    return self.postprocess(
      without_sentinel(decoded), example=example, is_target=is_target
    )


@dataclasses.dataclass(frozen=True)
class WithExamples:
  """Predictions together with the texts they belong to, for logging.

  A target is what `postprocess` makes of it. A prediction becomes a dict:
  'prediction' (what `postprocess` makes of it), 'prediction_pretokenized' (the
  decoded text), and `example_fields` of the example, None where it lacks one.

  Attributes:
    postprocess: of the task itself.
    example_fields: which of the example's fields.
  """

  postprocess: Callable
  example_fields: tuple[str, ...] = (
    'inputs_pretokenized',
    'targets_pretokenized',
  )

  @property
  def words(self) -> tuple[str, ...]:
    """Those of the task, () where it has none."""
    return getattr(self.postprocess, 'words', ())

  def __call__(self, decoded, example=None, is_target=False):
    value = self.postprocess(decoded, example=example, is_target=is_target)
    if is_target:
      return value
    found = {name: (example or {}).get(name) for name in self.example_fields}
    return {
      'prediction': value,
      'prediction_pretokenized': decoded,
      **found,
    }
