"""GLUE (Wang et al. 2018): all tasks, in both versions of the data.

`glue_<task>_v002` reads TFDS glue 1.0.0, `glue_<task>_v200` glue 2.0.0; for the
variants of each name see `registration`. Labels are in the order of TFDS.
"""

import dataclasses
import functools

from prompt_tuning.data import metrics
from prompt_tuning.data import preprocessors
from prompt_tuning.data import registration
from prompt_tuning.data.postprocessors import LabelToId
from prompt_tuning.data.postprocessors import to_float

VERSIONS = {'v002': '1.0.0', 'v200': '2.0.0'}

_NLI = ('entailment', 'neutral', 'contradiction')
_ENTAILMENT = ('entailment', 'not_entailment')


@dataclasses.dataclass(frozen=True)
class GlueTask:
  """What is particular to a task of GLUE.

  Attributes:
    fields: of a row, in the order of the text; ('text=field',) renames one.
    labels: in the order of their ids; () for STS-B, whose label is a number.
    metrics: T5's.
    index: of the sentinel in the task_index_ variants.
    prefix: T5's name of the task in the text; None for its own.
  """

  fields: tuple[str, ...]
  labels: tuple[str, ...]
  metrics: tuple[metrics.Metric, ...]
  index: int
  prefix: str | None = None


_SENTENCES = ('sentence1', 'sentence2')
_PREMISE = ('hypothesis', 'premise')
_ACCURACY = (metrics.accuracy,)
_F1_ACCURACY = (metrics.f1, metrics.accuracy)

TASKS = {
  'cola': GlueTask(
    ('sentence',),
    ('unacceptable', 'acceptable'),
    (metrics.matthews_corrcoef,),
    0,
  ),
  'sst2': GlueTask(('sentence',), ('negative', 'positive'), _ACCURACY, 6),
  'mrpc': GlueTask(
    _SENTENCES, ('not_equivalent', 'equivalent'), _F1_ACCURACY, 2
  ),
  'qqp': GlueTask(
    ('question1', 'question2'),
    ('not_duplicate', 'duplicate'),
    _F1_ACCURACY,
    4,
  ),
  'stsb': GlueTask(
    _SENTENCES, (), (metrics.pearson_corrcoef, metrics.spearman_corrcoef), 7
  ),
  'mnli': GlueTask(_PREMISE, _NLI, _ACCURACY, 1),
  'mnli_matched': GlueTask(_PREMISE, _NLI, _ACCURACY, 1, 'mnli'),
  'mnli_mismatched': GlueTask(_PREMISE, _NLI, _ACCURACY, 1, 'mnli'),
  'qnli': GlueTask(('question', 'sentence'), _ENTAILMENT, _ACCURACY, 3),
  'rte': GlueTask(_SENTENCES, _ENTAILMENT, _ACCURACY, 5),
  'wnli': GlueTask(_SENTENCES, ('not_entailment', 'entailment'), _ACCURACY, 8),
  # Labels are not public.
  'ax': GlueTask(_PREMISE, _NLI, (), 1, 'mnli'),
}

# Numbers of training examples; T5 trains on WSC instead of WNLI and on no
# evaluation set.
RATES = {
  'cola': 8551,
  'sst2': 67349,
  'mrpc': 3668,
  'qqp': 363849,
  'stsb': 5749,
  'mnli': 392702,
  'qnli': 104743,
  'rte': 2490,
  'mnli_matched': 0,
  'mnli_mismatched': 0,
}


def spec(name: str, version: str) -> registration.TaskSpec:
  """The task of one data version."""
  task = TASKS[name]
  if name == 'stsb':
    preprocessor, postprocess = preprocessors.stsb, to_float
  else:
    preprocessor = functools.partial(
      preprocessors.fields, names=task.fields, labels=task.labels
    )
    postprocess = LabelToId(task.labels)
  return registration.TaskSpec(
    name=f'glue_{name}_{version}',
    tfds_name=f'glue/{name}:{VERSIONS[version]}',
    preprocessor=preprocessor,
    prefix=task.prefix or name,
    postprocess=postprocess,
    metrics=task.metrics,
    index=task.index,
  )


for _version in VERSIONS:
  for _name in TASKS:
    registration.register(spec(_name, _version))
  registration.register_mixture(
    f'glue_mnli_and_dev_{_version}',
    [
      f'glue_{name}_{_version}'
      for name in ('mnli', 'mnli_mismatched', 'mnli_matched')
    ],
  )
  registration.register_mixture(
    f'glue_{_version}{{examples}}_proportional',
    {f'glue_{name}_{_version}': rate for name, rate in RATES.items()},
  )
