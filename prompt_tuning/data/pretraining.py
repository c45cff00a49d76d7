"""Pre-training objectives on C4 (TFDS c4/en 2.2.0), as the paper compares them.

Span corruption, prefix LM (T5's LM adaptation) and BART's two, text infilling
(with T5's sentinels) and token deletion. The paper's "span corruption +
sentinel" is span corruption whose downstream targets begin with <extra_id_0>:
`TaskData.target_sentinel` on the task that is tuned.
"""

import seqio

from prompt_tuning.data import preprocessors
from prompt_tuning.data import registration

OBJECTIVES = {
  'span_corruption': preprocessors.span_corruption,
  'prefix_lm': preprocessors.prefix_lm,
  'bart_text_infilling': preprocessors.text_infilling,
  'bart_token_deletion': preprocessors.token_deletion,
}


@seqio.map_over_dataset
def _text_as_targets(row):
  return {'targets': row['text']}


for _model, _vocabulary in registration.VOCABULARIES.items():
  _feature = seqio.Feature(vocabulary=_vocabulary)
  for _name, _objective in OBJECTIVES.items():
    seqio.TaskRegistry.add(
      f'{_model}c4_v220_{_name}',
      source=seqio.TfdsDataSource('c4/en:2.2.0'),
      preprocessors=[
        _text_as_targets,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        _objective,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={'inputs': _feature, 'targets': _feature},
      metric_fns=[],
    )
