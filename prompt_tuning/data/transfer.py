"""Zero-shot transfer between QQP and MRPC (Lester et al. 2021, section 5.2).

`glue_mrpc_from_qqp_v002` is MRPC whose predictions may be in QQP's words:
duplicate is read as equivalent; `glue_qqp_from_mrpc_v002` the other way.
`glue_mrpc_from_qqp_zeroshot_v002` trains on QQP and evaluates on MRPC: the
target task has no training split in it.
"""

import dataclasses

from prompt_tuning.data import glue
from prompt_tuning.data import registration
from prompt_tuning.data.postprocessors import LabelToId

_VERSION = 'v002'
# The same word in the two tasks' labels.
_WORDS = {'qqp': 'duplicate', 'mrpc': 'equivalent'}

for _source, _target in (('qqp', 'mrpc'), ('mrpc', 'qqp')):
  _spec = dataclasses.replace(
    glue.spec(_target, _VERSION),
    name=f'glue_{_target}_from_{_source}_{_VERSION}',
    postprocess=LabelToId(
      glue.TASKS[_target].labels, rewrite=(_WORDS[_source], _WORDS[_target])
    ),
    splits=['validation', 'test'],
  )
  registration.register(_spec)
  registration.register_mixture(
    f'glue_{_target}_from_{_source}_zeroshot_{_VERSION}',
    [f'glue_{_source}_{_VERSION}', _spec.name],
  )
