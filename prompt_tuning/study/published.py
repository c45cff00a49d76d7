"""Figures that others published, to stand beside a study's own.

Each is what its source says, on the source's models, budgets and seeds, which
are not a study's of small models: they are there to compare shapes of curves.
"""

from collections.abc import Mapping

from prompt_tuning.errors import UserError

Figures = Mapping[str, Mapping[str, str]]

_SIZES = ('small', 'base', 'large', 'xl', 'xxl')
_SUPER_GLUE = (
  *('BoolQ', 'MultiRC', 'WiC', 'CB', 'RTE', 'WSC', 'COPA', 'ReCoRD'),
)


def _by(columns, values: str) -> dict[str, str]:
  return dict(zip(columns, values.split(), strict=True))


# {name: (source, {row: {column: value}})}
FIGURES: Mapping[str, tuple[str, Figures]] = {
  'power_of_scale': (
    'SuperGLUE, dev average by size: Vu et al. 2022 (arXiv 2110.07904), table 4'
    ' (figure 1 of Lester et al. 2021 has no table)',
    {
      'prompt design (GPT-3)': _by(_SIZES, '40.6 43.4 45.1 47.8 52.8'),
      'model tuning': _by(_SIZES, '62.8±.8 73.7±.6 81.3±.6 83.1±.2 89.9±.2'),
      'prompt tuning': _by(_SIZES, '59.8±.8 63.1±1.1 74.5±2.2 79.2±.5 88.8±.2'),
      'SPoT': _by(_SIZES, '64.5±.3 73.2±.3 82.7±.2 88.7±.3 91.2±.1'),
    },
  ),
  'squad_to_mrqa': (
    'F1 after training on SQuAD: Lester et al. 2021, table 1 (T5 XXL)',
    {
      name: {'model tuning': model, 'prompt tuning': prompt}
      for name, model, prompt in (
        ('SQuAD', '94.9±.2', '94.8±.1'),
        ('TextbookQA', '54.3±3.7', '66.8±2.9'),
        ('BioASQ', '77.9±.4', '79.1±.3'),
        ('RACE', '59.8±.6', '60.7±.5'),
        ('RE', '88.4±.1', '88.8±.2'),
        ('DuoRC', '68.9', '67.7±1.1'),
        ('DROP', '68.9', '67.1±1.9'),
      )
    },
  ),
  'qqp_and_mrpc': (
    'accuracy / F1, zero-shot: Lester et al. 2021, table 2 (T5 XXL)',
    {
      'QQP to MRPC': {
        'model tuning': '73.1±.9 / 81.2±2.1',
        'prompt tuning': '76.3±.1 / 84.3±.3',
      },
      'MRPC to QQP': {
        'model tuning': '74.9±1.3 / 70.9±1.2',
        'prompt tuning': '75.4±.8 / 69.7±.3',
      },
    },
  ),
  'ensemble': (
    'five prompts, T5 XXL, majority vote: Lester et al. 2021, table 3',
    {
      name: {'average': average, 'best': best, 'ensemble': ensemble}
      for name, average, best, ensemble in (
        ('BoolQ', '91.1', '91.3', '91.7'),
        ('CB, accuracy / F1', '99.3 / 99.0', '100 / 100', '100 / 100'),
        ('COPA', '98.8', '100', '100'),
        ('MultiRC, EM / F1a', '65.7 / 88.7', '66.3 / 89.0', '67.1 / 89.4'),
        ('ReCoRD, EM / F1', '92.7 / 93.4', '92.9 / 93.5', '93.2 / 93.9'),
        ('RTE', '92.6', '93.5', '93.5'),
        ('WiC', '76.2', '76.6', '77.4'),
        ('WSC', '95.8', '96.2', '96.2'),
        ('all', '90.5', '91.0', '91.3'),
      )
    },
  ),
  'parameters': (
    'parameters with a prompt of 100: Lester et al. 2021, table 4',
    {
      'T5 and prompt': _by(
        _SIZES,
        '77,012,352 247,654,656 783,252,480 2,849,961,984 11,135,741,952',
      ),
      'prompt': _by(_SIZES, '51,200 76,800 102,400 204,800 409,600'),
    },
  ),
  'super_glue_by_task': (
    'T5 Large, LM-adapted, soft prompt, 20,000 steps of Adafactor at 0.3:'
    ' results of OpenPrompt',
    {
      'OpenPrompt, large': _by(
        _SUPER_GLUE, '82.5 79.7 65.0 75 79.4 62.5 72 77.0'
      )
    },
  ),
  'squad': (
    'T5 Base, LM-adapted, F1 / EM on SQuAD:'
    ' github.com/katieluo88/prompt-tuning-replication',
    {
      'prompt tuning, rate 0.3': {'SQuAD': '86.0 / 78.6'},
      'prompt tuning, rate 1e-3': {'SQuAD': '67.6 / 58.0'},
      'model tuning': {'SQuAD': '90.6'},
    },
  ),
  'methods': (
    'T5 Base, averages of GLUE (8 tasks) and SuperGLUE (5), as the papers of'
    ' DePT, MPT and ATTEMPT give them',
    {
      'DePT': {'GLUE': '85.9', 'SuperGLUE': '76.5'},
      'MPT': {'GLUE': '85.6', 'SuperGLUE': '74.1'},
      'ATTEMPT': {'GLUE': '83.4', 'SuperGLUE': '70.5'},
      'prompt tuning': {'GLUE': '72.2', 'SuperGLUE': '58'},
      'model tuning': {'GLUE': '84.9', 'SuperGLUE': '73.9'},
    },
  ),
}


def figures(name: str) -> tuple[str, Figures]:
  """Source and figures.

  Raises:
    UserError: none have that name.
  """
  if name not in FIGURES:
    raise UserError(
      f'no published figures are called {name!r}; there are'
      f' {", ".join(FIGURES)}'
    )
  return FIGURES[name]


def number(text: str) -> float:
  """The figure without its deviation."""
  return float(text.partition('±')[0].partition('/')[0])
