import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.study.grid import Grid

AXES = {
  'method': {'prompt': 'runs/prompt_tune', 'model': 'runs/model_tune'},
  'PROMPT_LENGTH': (1, 20),
  'SEED': (0, 1),
}


def cells(grid, score=lambda cell: None):
  return grid.cells(lambda name: f'study/{name}', score)


def test_a_cell_is_a_command_with_the_words_of_its_labels():
  first, *_ = found = cells(Grid(AXES, words='tasks/x "A=b c"'))
  assert len(found) == 8
  assert first.arguments('here') == [
    'train',
    *('tasks/x', 'A=b c', 'runs/prompt_tune', 'PROMPT_LENGTH=1', 'SEED=0'),
    'MODEL_DIR=here',
  ]
  assert first.labels == {'method': 'prompt', 'PROMPT_LENGTH': '1', 'SEED': '0'}
  assert len({cell.name for cell in found}) == 8


def test_a_cell_may_evaluate_only():
  (cell,) = cells(Grid({'method': {'design': 'eval runs/prompt_design'}}))
  assert cell.arguments('here') == [
    'eval',
    'runs/prompt_design',
    'EVAL_OUTPUT_DIR=here',
  ]


def test_products_that_are_skipped_are_no_cells():
  skip = ({'method': 'model', 'PROMPT_LENGTH': ('1', '20')},)
  assert {c.labels['method'] for c in cells(Grid(AXES, skip=skip))} == {
    'prompt'
  }


def test_a_search_takes_the_best_try_of_the_first_seed_for_the_others():
  tries = {'prompt': ('LEARNING_RATE=1', 'LEARNING_RATE=2')}
  grid = Grid({**AXES, 'PROMPT_LENGTH': (5,)}, tries=tries)
  tried = [c for c in cells(grid) if c.labels['method'] == 'prompt']
  assert [(c.labels['try'], c.chosen) for c in tried] == [
    ('LEARNING_RATE=1', False),
    ('LEARNING_RATE=2', False),
  ]

  scores = {'LEARNING_RATE=1': 3.0, 'LEARNING_RATE=2': 4.0}
  found = cells(grid, lambda cell: scores.get(cell.labels.get('try')))
  of_prompt = [c for c in found if c.labels['method'] == 'prompt']
  assert [(c.labels['SEED'], c.words[-1], c.chosen) for c in of_prompt] == [
    ('0', 'LEARNING_RATE=1', False),
    ('0', 'LEARNING_RATE=2', True),
    ('1', 'LEARNING_RATE=2', True),
  ]


def test_a_score_that_is_no_number_is_never_the_best_of_a_search():
  tries = {'prompt': ('A=1', 'A=2', 'A=3')}
  scores = {'A=1': float('nan'), 'A=2': -3.0, 'A=3': -4.0}
  grid = Grid({'method': {'prompt': ''}, 'SEED': (0, 1)}, tries=tries)
  found = cells(grid, lambda cell: scores.get(cell.labels.get('try')))
  assert [c.labels.get('try') for c in found if c.chosen] == ['A=2'] * 2


def test_the_search_of_some_seeds_is_that_of_all():
  tries = {'prompt': ('A=1', 'A=2')}
  grid = Grid(
    {'method': {'prompt': ''}, 'SEED': (0, 1, 2)},
    tries=tries,
    combined={'ensemble': 'eval {run} PROMPT_FILE={runs}'},
  )
  part = grid.only({'SEED': ['2']})
  assert [c.name for c in cells(part)] == ['prompt.0.A_1', 'prompt.0.A_2']
  scores = {'A=1': 3.0, 'A=2': 4.0}
  rest = cells(part, lambda cell: scores.get(cell.labels.get('try')))
  # No ensemble of fewer seeds stands where that of all would.
  assert [(c.name, c.words[-1]) for c in rest] == [('prompt.2.A_2', 'A=2')]
  assert grid.only({'SEED': '7'}) is None


def test_a_combination_comes_after_the_runs_that_differ_in_their_seed():
  grid = Grid(
    {'task': {'rte': 'tasks/rte'}, 'SEED': (0, 1)},
    combined={'ensemble': 'eval {run} PROMPT_FILE={runs}'},
  )
  *_, last = cells(grid)
  assert last.needs == ('rte.0', 'rte.1')
  assert last.arguments('here') == [
    *('eval', 'study/rte.0', "PROMPT_FILE=['study/rte.0','study/rte.1']"),
    'EVAL_OUTPUT_DIR=here',
  ]
  assert last.labels == {'task': 'rte', 'SEED': 'ensemble'}


def test_a_part_of_a_grid_has_the_labels_asked_for_alone():
  grid = Grid(AXES, skip=({'method': 'model', 'PROMPT_LENGTH': '1'},))
  part = grid.only({'method': 'model', 'unknown axis': 'x'})
  assert [c.name for c in cells(part)] == ['model.20.0', 'model.20.1']
  assert len(cells(grid.only({'method': ['prompt']}))) == 4


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tries': {'promt': ('A=1',)}}, "'promt' is no label"),
    ({'skip': ({'method': 'lora'},)}, "'lora' is no label"),
    ({'axes': {'SEED': ()}}, "'SEED' of the study has no labels"),
  ],
)
def test_labels_that_no_axis_has_are_told(change, message):
  with pytest.raises(UserError, match=message):
    Grid(**{'axes': AXES, **change})


def test_a_grid_with_none_of_the_labels_has_no_part():
  assert Grid(AXES).only({'PROMPT_LENGTH': '3'}) is None
