"""SuperGLUE (Wang et al. 2019) and definite pronoun resolution.

`super_glue_<task>_v102` reads TFDS super_glue 1.0.2; for the variants of each
name see `registration`. WSC is T5's task of generation: the referent is
written, trained on examples whose candidate is the referent
(`super_glue_wsc_v102_simple_train`) and evaluated on all
(`super_glue_wsc_v102_simple_eval`); `super_glue_wsc_and_dev_v102_simple` is
both. Labels are in the order of TFDS.
"""

import functools

from prompt_tuning.data import metrics
from prompt_tuning.data import postprocessors
from prompt_tuning.data import preprocessors
from prompt_tuning.data import registration
from prompt_tuning.data.postprocessors import LabelToId

_BOOLEAN = ('False', 'True')
_ENTAILMENT = ('entailment', 'not_entailment')
_ACCURACY = (metrics.accuracy,)

# Name: prefix, fields of the text, labels, metrics, index. Axb and axg are
# diagnostics of RTE, without public labels.
CLASSIFICATION = {
  'boolq': ('boolq', ('passage', 'question'), _BOOLEAN, _ACCURACY, 0),
  'cb': (
    'cb',
    ('hypothesis', 'premise'),
    ('entailment', 'contradiction', 'neutral'),
    (metrics.macro_f1(3, 'mean_3class_f1'), metrics.accuracy),
    1,
  ),
  'copa': (
    'copa',
    ('choice1', 'choice2', 'premise', 'question'),
    ('choice1', 'choice2'),
    _ACCURACY,
    2,
  ),
  'rte': ('rte', ('hypothesis', 'premise'), _ENTAILMENT, _ACCURACY, 5),
  'wic': ('wic', ('sentence1', 'sentence2', 'word'), _BOOLEAN, _ACCURACY, 6),
  'axb': (
    'rte',
    ('hypothesis=sentence2', 'premise=sentence1'),
    _ENTAILMENT,
    (),
    5,
  ),
  'axg': ('rte', ('hypothesis', 'premise'), _ENTAILMENT, (), 5),
}

# Numbers of training examples (of answers for ReCoRD, of true ones for WSC).
RATES = {
  'super_glue_wsc_v102_simple_train': 259,
  'super_glue_wsc_v102_simple_eval': 0,
  'super_glue_boolq_v102': 9427,
  'super_glue_cb_v102': 250,
  'super_glue_copa_v102': 400,
  'super_glue_multirc_v102': 27243,
  'super_glue_record_v102': 138854,
  'super_glue_rte_v102': 2490,
  'super_glue_wic_v102': 5428,
}
DPR_RATE = 1322


def specs() -> list[registration.TaskSpec]:
  """All tasks."""
  found = [
    registration.TaskSpec(
      name=f'super_glue_{name}_v102',
      tfds_name=f'super_glue/{name}:1.0.2',
      preprocessor=functools.partial(
        preprocessors.fields, names=fields, labels=labels
      ),
      prefix=prefix,
      postprocess=LabelToId(labels),
      metrics=metric_fns,
      index=index,
    )
    for name, (prefix, fields, labels, metric_fns, index) in (
      CLASSIFICATION.items()
    )
  ]
  found.append(
    registration.TaskSpec(
      name='super_glue_multirc_v102',
      tfds_name='super_glue/multirc:1.0.2',
      preprocessor=preprocessors.multirc,
      prefix='multirc',
      postprocess=postprocessors.GroupedLabelToId(_BOOLEAN),
      metrics=(metrics.multirc,),
      index=3,
    )
  )
  found.append(
    registration.TaskSpec(
      name='super_glue_record_v102',
      tfds_name='super_glue/record:1.0.2',
      preprocessor=preprocessors.record,
      prefix='record',
      postprocess=postprocessors.record,
      metrics=(metrics.record,),
      index=4,
    )
  )
  for kind, splits in (('train', ['train']), ('eval', ['validation', 'test'])):
    found.append(
      registration.TaskSpec(
        name=f'super_glue_wsc_v102_simple_{kind}',
        tfds_name='super_glue/wsc.fixed:1.0.2',
        preprocessor=functools.partial(
          preprocessors.wsc, correct_only=kind == 'train'
        ),
        prefix='wsc:',
        postprocess=postprocessors.wsc,
        metrics=_ACCURACY if kind == 'eval' else (),
        index=7,
        splits=splits,
      )
    )
  found.append(
    registration.TaskSpec(
      name='dpr_v001_simple',
      tfds_name='definite_pronoun_resolution:1.1.0',
      preprocessor=preprocessors.definite_pronoun,
      prefix='wsc:',
      index=7,
    )
  )
  return found


for _spec in specs():
  registration.register(_spec)
registration.register_mixture(
  'super_glue_wsc_and_dev_v102_simple',
  ['super_glue_wsc_v102_simple_train', 'super_glue_wsc_v102_simple_eval'],
)
registration.register_mixture('super_glue_v102{examples}_proportional', RATES)
registration.register_mixture(
  'super_glue_with_dpr_v102{examples}_proportional',
  {'dpr_v001_simple': DPR_RATE, **RATES},
)
