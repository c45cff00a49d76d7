"""One statement of a task, all the names it is registered under.

A `TaskSpec` says what a task is. `register` derives its public variants, which
differ in the beginning of the name:

  mt5_, byt5_    mT5's or ByT5's vocabulary instead of T5's
  taskless_      inputs without the task's name: the texts of prompt tuning
  task_index_    the same with a sentinel of the task's own in front

and in its end: with `_examples`, predictions come together with their texts
(see `postprocessors.WithExamples`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools

import seqio

from prompt_tuning.data import metrics as metrics_lib
from prompt_tuning.data import preprocessors
from prompt_tuning.data.postprocessors import WithExamples

# Read when a task is used for the first time, and not at all by a run with
# VOCABULARY. mT5's model has its sentinels among its pieces; ByT5's ids are
# bytes.
VOCABULARIES = {
  '': seqio.SentencePieceVocabulary(
    'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model', 100
  ),
  'mt5_': seqio.SentencePieceVocabulary(
    'gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model', 0
  ),
  'byt5_': seqio.ByteVocabulary(),
}
FORMS = ('', 'taskless_', 'task_index_')
SUFFIXES = ('', '_examples')


@dataclasses.dataclass(frozen=True)
class TaskSpec:
  """A task of text to text on a TFDS data set.

  Attributes:
    name: its plain public name.
    tfds_name: name, config and version of the data set.
    preprocessor: from the words in front of the inputs to a preprocessor that
      makes `inputs` and `targets` of a row.
    prefix: those words in T5's texts; None if T5's texts have none, and then
      there are no taskless_ and task_index_ variants.
    postprocess: from decoded text to what metrics compare; None without any.
    metrics: functions of seqio's signature.
    index: number of the sentinel in front of a task_index_ variant's inputs.
    splits: of the data set, if not all under their own names.
    example_fields: what `_examples` variants keep of an example.
  """

  name: str
  tfds_name: str
  preprocessor: Callable[[str], preprocessors.Preprocessor]
  prefix: str | None = None
  postprocess: Callable | None = None
  metrics: Sequence[metrics_lib.Metric] = ()
  index: int = 0
  splits: Iterable[str] | Mapping[str, str] | None = None
  example_fields: tuple[str, ...] = WithExamples.example_fields

  @property
  def forms(self) -> tuple[str, ...]:
    """The beginnings of names that this task has variants for."""
    return FORMS if self.prefix is not None else FORMS[:1]


def register(spec: TaskSpec) -> None:
  """Registers all variants of a task."""
  source = seqio.TfdsDataSource(spec.tfds_name, splits=spec.splits)
  for model, vocabulary in VOCABULARIES.items():
    feature = seqio.Feature(vocabulary=vocabulary)
    for form in spec.forms:
      prefix = (spec.prefix or '') if form == '' else ''
      steps = [spec.preprocessor(prefix), seqio.preprocessors.tokenize]
      if form == 'task_index_':
        steps.append(
          functools.partial(
            preprocessors.add_sentinel, feature='inputs', number=spec.index
          )
        )
      steps.append(seqio.CacheDatasetPlaceholder())
      steps.append(seqio.preprocessors.append_eos_after_trim)
      for suffix in SUFFIXES:
        postprocess, metric_fns = spec.postprocess, list(spec.metrics)
        if suffix and postprocess is not None:
          postprocess = WithExamples(postprocess, spec.example_fields)
          metric_fns = [*map(metrics_lib.of_examples, metric_fns)]
        seqio.TaskRegistry.add(
          f'{model}{form}{spec.name}{suffix}',
          source=source,
          preprocessors=steps,
          output_features={'inputs': feature, 'targets': feature},
          postprocess_fn=postprocess,
          metric_fns=metric_fns,
        )


def register_mixture(
  name: str,
  rates: Mapping[str, float] | Sequence[str],
  forms: Sequence[str] = FORMS,
) -> None:
  """Registers a mixture of each variant of some tasks.

  Args:
    name: plain; '{examples}' in it is where _examples goes, the end if it is
      not there.
    rates: of the tasks' plain names; all alike for a sequence.
    forms: the variants of the tasks.
  """
  if not isinstance(rates, Mapping):
    rates = dict.fromkeys(rates, 1.0)
  if '{examples}' not in name:
    name += '{examples}'
  for model in VOCABULARIES:
    for form in forms:
      for suffix in SUFFIXES:
        seqio.MixtureRegistry.add(
          f'{model}{form}{name.format(examples=suffix)}',
          [
            (f'{model}{form}{task}{suffix}', float(rate))
            for task, rate in rates.items()
          ],
        )
