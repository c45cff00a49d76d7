"""Studies over run folders that are written by hand."""

import dataclasses
import json
import shutil

import gin
import pytest

from prompt_tuning import cli
from prompt_tuning import configuration
from prompt_tuning.errors import UserError
from prompt_tuning.study import execution
from prompt_tuning.study import figures
from prompt_tuning.study import runs as runs_lib
from prompt_tuning.study import views
from prompt_tuning.study.execution import Job
from prompt_tuning.study.grid import Grid
from prompt_tuning.study.study import study

GRID = Grid(
  {
    'model': {'small': 'models/s', 'large': 'models/l'},
    'method': {'prompt': 'runs/prompt_tune', 'model tuning': 'runs/model_tune'},
    'SEED': (0, 1),
  }
)


def write_run(folder, score, answers=(1, 0), task='rte', **facts):
  """A training that ended, as `train` leaves it."""
  (folder / 'eval' / 'inference').mkdir(parents=True)
  (folder / 'result.json').write_text(
    json.dumps(
      {
        'metrics': {f'{task}/accuracy': score, 'score': score},
        'methods': {'prompt': {}},
        'base_step': 1000,
        'best_step': 20,
        'steps': 40,
        'trained_parameters': 3840,
        'seconds': 12.5,
        'peak_memory_bytes': 5 * 10**8,
        'commit': 'abc1234',
        **facts,
      }
    )
  )
  lines = [
    {
      'input': f'text \u2028 {i}',
      'target': 'yes',
      'prediction': 'yes' if one else 'no',
    }
    for i, one in enumerate(answers)
  ]
  # As `evaluate` writes them: what is no ASCII stays as it is.
  text = '\n'.join(json.dumps(x, ensure_ascii=False) for x in lines)
  (folder / 'eval' / 'inference' / f'{task}-1020.jsonl').write_text(text)
  (folder / 'eval' / 'inference' / f'{task}-1040.jsonl').write_text('')
  (folder / 'config.gin').write_text('')
  times = [
    {'step': 1001 + i, 'split': 'train', 'seconds_per_step': s}
    for i, s in enumerate((9, 0.2, 0.4))
  ]
  (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, times)))


@pytest.fixture
def folder(tmp_path):
  """Seven of the eight cells are done."""
  for i, cell in enumerate(GRID.cells(str, lambda cell: None)):
    if i < 7:
      write_run(tmp_path / cell.name, 10.0 * i, (i % 2, 1, i > 3))
  return tmp_path


def collect(folder, *made):
  found = study('Title', [GRID], str(folder), views=made, action='collect')
  return found, (folder / 'report' / 'report.md').read_text()


def test_a_report_has_means_and_deviations_over_seeds(folder):
  table = views.table(rows='method', columns='model', average='all')
  found, text = collect(folder, table)
  assert (found['cells'], found['done']) == (8, 7)
  lines = [line.replace(' ', '') for line in text.splitlines()]
  assert '|prompt|5.0±7.1|45.0±7.1|' in lines
  assert '|modeltuning|25.0±7.1|60.0|' in lines  # one of its seeds is to come
  # By seed the means over methods are 10 and 20; the seed that lacks a run of
  # the large model does not count there.
  assert '|all|15.0±7.1|50.0|' in lines
  assert (
    (folder / 'report' / 'score_by_model.csv')
    .read_text()
    .startswith('method,small,large\n')
  )


def test_what_is_not_done_is_not_averaged_over(folder):
  for home in (folder / f'large.model_tuning.{seed}' for seed in (0, 1)):
    shutil.rmtree(home, ignore_errors=True)
  _, text = collect(folder, views.table('method', 'model', average='all'))
  lines = [line.replace(' ', '') for line in text.splitlines()]
  # No seed has both methods of the large model.
  assert '|prompt|5.0±7.1|45.0±7.1|' in lines and '|all|15.0±7.1||' in lines


def test_every_number_says_which_run_it_is_from(folder):
  _, text = collect(folder)
  (line,) = [x for x in text.splitlines() if 'small.prompt.1' in x]
  cells = [cell.strip() for cell in line.strip('|').split('|')]
  assert cells[:3] == ['small', 'prompt', '1']
  for value in ('10.0', '3,840', '20', '40', '0.400', '12', '500', 'abc1234'):
    assert value in cells
  one = json.loads(
    (folder / 'report' / 'runs' / 'small.prompt.1.json').read_text()
  )
  assert one['labels'] == {'model': 'small', 'method': 'prompt', 'SEED': '1'}
  assert one['command'].startswith('train models/s runs/prompt_tune SEED=1')
  assert one['result']['seconds'] == 12.5


def test_two_methods_are_compared_on_the_examples_they_share(folder):
  compare = views.compare('method', ('prompt', 'model tuning'))
  _, text = collect(folder, compare)
  lines = [line.replace(' ', '') for line in text.splitlines()]
  # Of seeds 0 and 1 both methods have the same answers.
  assert '|small|+0.0|+0.0to+0.0|1|3|2|' in lines
  assert '|large|+0.0|+0.0to+0.0|1|3|1|' in lines


def test_the_page_is_all_by_itself_and_figures_are_files_too(folder):
  figure = figures.figure(
    x='model', lines='method', x_values={'small': 1, 'large': 9}
  )
  _, text = collect(folder, figure, figures.bars('method'))
  report = folder / 'report'
  assert (report / 'score_over_model.png').read_bytes().startswith(b'\x89PNG')
  assert '<svg' in (report / 'score_over_model.svg').read_text()
  page = (report / 'report.html').read_text()
  assert 'src="data:image/svg+xml;base64,' in page
  assert 'src="score' not in page and 'http' not in page.split('base64')[0]
  assert '![score over model](score_over_model.png)' in text
  # Half of the prompts' runs have the first and the last of three answers
  # right, all of them the second: of examples drawn again, 2.5% have it three
  # times and more than 2.5% never.
  assert '|prompt|25.0±7.1|2|50.0to100.0|' in text.replace(' ', '')


def test_what_a_method_costs_stands_beside_what_it_gives(folder):
  _, text = collect(folder, figures.tradeoff('method'))
  lines = [line.replace(' ', '') for line in text.splitlines()]
  # By seed the means over models are 20 and 30.
  assert '|prompt|25.0±7.1|3,840|0.400|500|0|' in lines
  report = folder / 'report'
  assert (report / 'score_against_trained_parameters.png').stat().st_size > 0


def test_what_a_run_does_not_say_is_left_empty(folder):
  for home in folder.iterdir():
    (home / 'metrics.jsonl').unlink()
    facts = json.loads((home / 'result.json').read_text())
    del facts['peak_memory_bytes']
    (home / 'result.json').write_text(json.dumps(facts))
  _, text = collect(folder, figures.tradeoff('method'))
  assert '|prompt|25.0±7.1|3,840|||0|' in text.replace(' ', '')


def test_a_view_of_an_axis_that_is_not_there_is_told(folder):
  with pytest.raises(UserError, match="'modell', the study has model, method"):
    collect(folder, views.table(rows='modell', columns='method'))


def test_published_figures_stand_beside_what_has_their_labels(folder):
  table = views.table('method', 'model', reference='power_of_scale')
  _, text = collect(folder, table)
  lines = [line.replace(' ', '') for line in text.splitlines()]
  assert '|published:prompttuning|59.8±.8|74.5±2.2|' in lines
  with pytest.raises(UserError, match='there are power_of_scale'):
    views.published('figure 1')


def test_the_last_line_of_an_evaluation_counts_and_half_a_line_does_not(
  tmp_path,
):
  write_run(tmp_path / 'run', 1.0)
  test = tmp_path / 'run' / 'eval_test'
  test.mkdir()
  lines = [{'step': 1, 'a/acc': 5.0, 'score': 5.0}, {'step': 1, 'score': 6.0}]
  text = '\n'.join(map(json.dumps, lines)) + '\n{"sco'
  (test / 'eval_metrics.jsonl').write_text(text)
  run = runs_lib.read_run(tmp_path / 'run', ['test'])
  assert run.value('score', 'test') == 6.0
  assert runs_lib.read_run(tmp_path / 'run', ['other']) is None
  assert runs_lib.read_run(tmp_path) is None


def test_a_metric_of_several_tasks_needs_its_whole_name(tmp_path):
  write_run(tmp_path / 'run', 1.0)
  run = runs_lib.read_run(tmp_path / 'run')
  run = dataclasses.replace(
    run, evaluations={'validation': {'a/f1': 1.0, 'b/f1': 2.0}}
  )
  assert run.value('b/f1') == 2.0
  with pytest.raises(UserError, match='a/f1, b/f1 for the metric f1'):
    run.value('f1')


def test_answers_are_those_of_the_best_step(folder):
  run = runs_lib.read_run(folder / 'small.prompt.1')
  assert list(run.answers().values()) == [True, True, False]


def test_what_is_done_is_not_run_again_and_a_failure_stops_no_other(
  folder, monkeypatch, capfd
):
  ran = []

  def run(job, environment=None, started=None):
    ran.append(job.name)
    job.log.parent.mkdir(exist_ok=True)
    job.log.write_text('$ prompt-tuning train\nerror: no such task\n')
    return 1

  monkeypatch.setattr(execution, 'run', run)
  with pytest.raises(UserError, match='1 of 8 cells failed.*error: no such'):
    study('Title', [GRID], str(folder))
  assert ran == ['large.model_tuning.1']
  assert (
    '7 of 8 cells are done' in (folder / 'report' / 'report.md').read_text()
  )
  assert 'failed (1): error: no such task' in capfd.readouterr().err


def test_a_search_goes_on_to_the_other_seeds_in_the_same_call(
  tmp_path, monkeypatch
):
  grid = Grid(
    {'method': {'prompt': 'runs/prompt_tune'}, 'SEED': (0, 1)},
    tries={'prompt': ('LEARNING_RATE=1', 'LEARNING_RATE=2')},
    combined={'ensemble': 'eval {run} PROMPT_FILE={runs}'},
  )
  ran = []

  def run(job, environment=None, started=None):
    ran.append(job.name)
    if job.commands[0][0] == 'train':
      write_run(job.folder, 7.0 if '2' in job.name else 1.0)
    else:
      job.folder.mkdir()
      line = {
        'score': 9.0,
        'members/mean_score': 4.0,
        'members/best_score': 7.0,
      }
      line |= {'members/0/score': 1.0, 'members/1/score': 7.0}
      (job.folder / 'eval_metrics.jsonl').write_text(json.dumps(line))
    return 0

  monkeypatch.setattr(execution, 'run', run)
  study('T', [grid], str(tmp_path), views=[views.tries(), views.ensembles()])
  assert ran == [
    'prompt.0.LEARNING_RATE_1',
    'prompt.0.LEARNING_RATE_2',
    'prompt.1.LEARNING_RATE_2',
    'prompt.ensemble',
  ]
  text = (tmp_path / 'report' / 'report.md').read_text().replace(' ', '')
  assert '|prompt|LEARNING_RATE=1|1.0||' in text
  assert '|prompt|LEARNING_RATE=2|7.0|taken|' in text
  assert '|prompt|2|4.0|7.0|9.0|' in text


def job_of(tmp_path, *commands, name='cell'):
  return Job(name, tmp_path / name, [list(words) for words in commands])


def test_a_cell_runs_its_commands_until_one_fails(tmp_path):
  job = job_of(tmp_path, ['--version'], ['nonsense'], ['--version'])
  assert execution.run(job) == 2
  text = job.log.read_text()
  assert text.count('$ prompt-tuning --version') == 1
  assert job.last_line().startswith('error: nonsense is not a command')


def test_two_studies_do_not_run_one_cell(tmp_path):
  job = job_of(tmp_path, ['--version'])
  states = execution.States([job], 1)
  with execution.claimed(job) as ours:
    assert ours
    assert execution.Local(1).run([job], states) == {}
  assert states.found() == [execution.ELSEWHERE]
  assert not job.log.exists()
  execution.Local(1).run([job], states)
  assert states.found() == [execution.DONE]


def test_what_another_study_did_while_a_cell_waited_is_not_done_again(tmp_path):
  job = job_of(tmp_path, ['nonsense'])
  states = execution.States([job], 1)
  local = execution.Local(1)
  assert local.run([job], states, lambda name: []) == {}
  assert states.found() == [execution.DONE]


def test_cells_share_out_cores_and_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,7')
  local = execution.Local(2)
  assert [e['CUDA_VISIBLE_DEVICES'] for e, _ in local._slots] == ['3,7', '5']
  with pytest.raises(UserError, match='more than the 3 GPU'):
    execution.Local(4)
  monkeypatch.setattr(execution.os, 'sched_getaffinity', lambda _: {0, 1, 2})
  assert execution._share_of_cores(1, 2) == [1]
  assert execution._share_of_cores(0, 1) is None


def test_a_launcher_gets_the_words_of_each_training(tmp_path, monkeypatch):
  launcher = tmp_path / 'launch.sh'
  launcher.write_text(f'#!/bin/sh\necho "$NAME: $@" >> {tmp_path}/seen\n')
  launcher.chmod(0o755)
  grid = Grid({'Model.size': (1, 2)}, words='runs/prompt_tune')
  found = study('T', [grid], str(tmp_path / 'study'), executor=str(launcher))
  assert found['remark'] == 'launched: 2'
  home = tmp_path / 'study'
  assert (tmp_path / 'seen').read_text().splitlines() == [
    f'{n}: runs/prompt_tune Model.size={n} MODEL_DIR={home}/{n}' for n in (1, 2)
  ]
  with pytest.raises(UserError, match='it takes local, slurm or'):
    study('T', [grid], str(home), executor='no-such-launcher')


def test_slurm_gets_an_array_by_submitit(tmp_path, monkeypatch):
  submitit = pytest.importorskip('submitit', reason='submitit is not installed')
  del submitit
  sbatch = tmp_path / 'sbatch'
  sbatch.write_text(
    f'#!/bin/sh\ncat "$1" > {tmp_path}/script\necho Submitted batch job 77\n'
  )
  sbatch.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
  (tmp_path / 'srun').symlink_to(sbatch)
  grid = Grid({'Model.size': (1, 2, 3)}, words='runs/prompt_tune')
  found = study(
    'T',
    [grid],
    str(tmp_path / 'study'),
    executor='slurm',
    at_once=2,
    slurm={'timeout_min': 600, 'slurm_partition': 'tpu'},
  )
  assert found['remark'] == 'submitted to Slurm: 77_0, 77_1, 77_2'
  script = (tmp_path / 'script').read_text()
  assert '#SBATCH --array=0-2%2' in script
  assert '#SBATCH --partition=tpu' in script


@pytest.fixture
def gin_study(tmp_path):
  file = tmp_path / 'mine.gin'
  file.write_text(
    """
include 'wiring/study.gin'
study.title = 'Mine'
STUDY_DIR = '%s'
Grid.words = 'models/t5_1_1_mini tasks/bbc_topics TRAIN_STEPS_RELATIVE=2'
Grid.axes = {
  'method': {'prompt': 'runs/prompt_tune', 'design': 'eval runs/prompt_design'},
  'SEED': (0, 1),
}
Grid.skip = ({'method': 'design', 'SEED': '1'},)
study.views = (@table(),)
table.rows = 'method'
table.columns = 'SEED'
"""
    % (tmp_path / 'study')
  )
  return str(file)


@pytest.mark.parametrize('dialect', ['', '--gin.'])
def test_commands_are_listed_and_words_go_where_they_are_of_use(
  gin_study, tmp_path, capsys, dialect
):
  text = "--gin.Grid.words='models/t5_1_1_mini tasks/bbc_topics'"
  bindings = ['TRAIN_STEPS_RELATIVE=3', 'SHOTS=2']
  words = [gin_study, '--list', text, *(dialect + x for x in bindings)]
  assert cli.main(['study', *words]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ['train', 'train', 'eval']
  assert 'TRAIN_STEPS_RELATIVE=3' in lines[0] and 'SHOTS' not in lines[0]
  assert 'SHOTS=2' in lines[2] and 'TRAIN_STEPS' not in lines[2]
  assert lines[2].endswith(f'EVAL_OUTPUT_DIR={tmp_path}/study/design.0')


def test_words_of_cells_that_are_left_out_are_no_fault(gin_study, capsys):
  text = "--gin.Grid.words='models/t5_1_1_mini tasks/bbc_topics SHOTS=2'"
  words = [gin_study, '--list', text, '--only=method:prompt']
  assert cli.main(['study', *words]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 and not any('SHOTS' in line for line in lines)
  assert cli.main(['study', *words, 'SHOTS=3']) == 1
  assert 'SHOTS=3 is of no use' in capsys.readouterr().err
  words[1:3] = ['--list', text.replace('SHOTS', 'SHOT')]
  assert cli.main(['study', *words]) == 1
  assert 'SHOT=2 is of no use' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['LEARNING_RAT=1'], 'LEARNING_RAT=1 is of no use to any command'),
    (['--lst'], '--lst is not a flag of study (did you mean --list?)'),
    (['--executor'], '--executor needs a value'),
    (['--only=method'], '--only takes AXIS:LABEL'),
    (
      ['--only=methd:prompt'],
      "study.only has 'methd', the axes are SEED, meth",
    ),
    (
      ['--only=method:promt'],
      "'method' has no 'promt'; it has prompt, design",
    ),
    (['Grid.axis={}'], 'Grid has no parameter axis (did you mean axes?)'),
    (['Grid.words=models/t5_1_1_mni'], 'did you mean models/t5_1_1_mini?'),
    (['study.at_once=0'], 'study.at_once must be 1 or more'),
    (['study.views=@bars'], 'study.views is a list'),
    (['table.rows=metod'], "the axis 'metod', the study has method, SEED"),
    (
      ['table.evaluation=tset'],
      "the evaluation 'tset', the study has validation",
    ),
    (['STUDY_DIR=/proc/x'], 'STUDY_DIR /proc/x cannot be made'),
  ],
)
def test_what_is_wrong_is_a_line_before_anything_runs(
  gin_study, capsys, words, message
):
  assert cli.main(['study', gin_study, *words]) in (1, 2)
  error = capsys.readouterr().err.strip()
  assert message in error and error.count('\n') == 0


def resolved(command, words):
  """What such a command writes as config.gin."""
  one = cli.CONFIGURED[command]
  request, _ = cli.parse(words, one.own_file * one.takes_run)
  configuration.configure(one.function, request)
  text = configuration.resolved_config()
  gin.clear_config()
  return text


def test_runs_made_elsewhere_count_if_their_settings_are_the_cells(
  gin_study, tmp_path, capsys
):
  hand = tmp_path / 'by_hand'
  words = ['runs/prompt_tune', 'models/t5_1_1_mini', 'tasks/bbc_topics']
  for name, rate in (('a', '0.3'), ('b', '0.1')):
    write_run(hand / name, 50.0)
    more = ['TRAIN_STEPS_RELATIVE=2', f'LEARNING_RATE={rate}', 'MODEL_DIR=x']
    more += ['train.log_period=7', 'LOCAL_DATA_DIR=elsewhere']
    (hand / name / 'config.gin').write_text(resolved('train', [*words, *more]))
  words = [gin_study, '--collect', f'--adopt={hand}', '--only=SEED:0']
  assert cli.main(['study', *words]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found['cells'], found['done']) == (2, 1)
  text = (tmp_path / 'study' / 'report' / 'report.md').read_text()
  assert str(hand / 'a') in text and str(hand / 'b') not in text


def test_a_folder_with_another_run_is_told(gin_study, tmp_path, capsys):
  home = tmp_path / 'study' / 'prompt.0'
  write_run(home, 50.0)
  (home / 'config.gin').write_text('T5Config.emb_dim = 64\n')
  assert cli.main(['study', gin_study, '--collect']) == 1
  error = capsys.readouterr().err
  assert 'holds a run with another T5Config.emb_dim: 64, not 192' in error


def test_an_evaluation_of_other_settings_is_told(gin_study, tmp_path, capsys):
  words = [gin_study, '--collect', '--only=method:prompt', '--only=SEED:0']
  assert cli.main(['study', gin_study, '--list', *words[2:]]) == 0
  train = capsys.readouterr().out.split()[2:]
  home = tmp_path / 'study' / 'prompt.0'
  write_run(home, 50.0)
  (home / 'config.gin').write_text(resolved('train', train))
  (home / 'eval_test').mkdir()
  (home / 'eval_test' / 'eval_metrics.jsonl').write_text('{"score": 40.0}')
  # It was made where the run stood before.
  elsewhere = tmp_path / 'elsewhere'
  shutil.copytree(home, elsewhere)
  (home / 'eval_test' / 'config.gin').write_text(
    resolved('eval', [str(elsewhere), 'Evaluation.split=test'])
  )
  test = "study.evaluations={'test': 'Evaluation.split=test'}"
  assert cli.main(['study', *words, test]) == 0
  assert json.loads(capsys.readouterr().out)['done'] == 1
  ranked = test.replace('=test', '=test Evaluation.rank_classification=True')
  assert cli.main(['study', *words, ranked]) == 1
  error = capsys.readouterr().err
  assert 'eval_test holds an evaluation with another Evaluation.rank' in error
  (home / 'config.gin').unlink()
  assert cli.main(['study', *words]) == 1
  assert 'config.gin is not there' in capsys.readouterr().err


def test_parameters_are_counted_without_a_run(tmp_path, capsys):
  words = ['studies/parameters', '--only=model:base', f'STUDY_DIR={tmp_path}']
  assert cli.main(['study', *words]) == 0
  text = (tmp_path / 'report' / 'report.md').read_text().replace(' ', '')
  # Lester et al. 2021, table 4.
  assert '|prompttuning|76,800(0.031%)|' in text
  assert '|modeltuning|247,577,856(100%)|' in text
