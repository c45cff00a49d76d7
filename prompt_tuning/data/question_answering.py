"""SQuAD 1.1 and MRQA 2019 (Fisch et al. 2019), and transfer between them.

T5's texts of SQuAD have no task's name, so there are no taskless_ variants.
`squad_to_<set>` trains on SQuAD and evaluates on a set of MRQA from outside
its domain, `squad_to_mrqa` on all six; those sets have nothing but a test
split, which stands as validation here.
"""

from prompt_tuning.data import metrics
from prompt_tuning.data import postprocessors
from prompt_tuning.data import preprocessors
from prompt_tuning.data import registration

IN_DOMAIN = (
  'squad',
  'news_qa',
  'trivia_qa',
  'search_qa',
  'hotpot_qa',
  'natural_questions',
)
OUT_OF_DOMAIN = (
  'bio_asq',
  'drop',
  'duo_rc',
  'race',
  'relation_extraction',
  'textbook_qa',
)
SQUAD = 'squad_v010_allanswers'

_SHARED = {
  'postprocess': postprocessors.answers,
  'metrics': (metrics.squad,),
  'example_fields': ('targets_pretokenized', 'context', 'question', 'answers'),
}

registration.register(
  registration.TaskSpec(
    name=SQUAD,
    tfds_name='squad/v1.1:3.0.0',
    preprocessor=lambda prefix: preprocessors.squad,
    **_SHARED,
  )
)
for _name in (*IN_DOMAIN, *OUT_OF_DOMAIN):
  registration.register(
    registration.TaskSpec(
      name=f'mrqa_{_name}_v100',
      tfds_name=f'mrqa/{_name}:1.0.0',
      preprocessor=lambda prefix: preprocessors.mrqa,
      splits={'validation': 'test'} if _name in OUT_OF_DOMAIN else None,
      **_SHARED,
    )
  )
for _name in OUT_OF_DOMAIN:
  registration.register_mixture(
    f'squad_to_{_name}', [SQUAD, f'mrqa_{_name}_v100'], forms=('',)
  )
registration.register_mixture(
  'squad_to_mrqa',
  [SQUAD, *(f'mrqa_{name}_v100' for name in OUT_OF_DOMAIN)],
  forms=('',),
)
