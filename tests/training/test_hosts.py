"""Jobs over several processes, on this machine: the same command, with who is
who. Every process has some of the virtual CPU devices."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from prompt_tuning.errors import RestartError
from prompt_tuning.errors import UserError
from prompt_tuning.interop.base_checkpoints import save_base
from prompt_tuning.models import model as model_lib
from prompt_tuning.models import network
from prompt_tuning.training import hosts

STEPS = 12
CONFIG = network.T5Config(256, 16, 2, 8, 32, 1, 1)
GIN = """
train.model = @EncoderDecoderModel()
EncoderDecoderModel.config = @T5Config()
T5Config.vocab_size = 256
T5Config.emb_dim = 16
T5Config.num_heads = 2
T5Config.head_dim = 8
T5Config.mlp_dim = 32
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
train.model_dir = %MODEL_DIR
train.base = @load_checkpoint()
load_checkpoint.path = 'base'
train.methods = (@Prompt(),)
Prompt.length = 3
train.optimizer = @adafactor
adafactor.multiply_by_parameter_scale = False
train.train_steps_relative = 12
train.data = @TaskData()
TaskData.task = @Task()
Task.name = @classification_task()
Task.vocabulary = 'tiny.model'
Task.feature_lengths = {'inputs': 40, 'targets': 8}
TaskData.batch_size = 16
train.evaluation = @Evaluation()
Evaluation.task = @Task()
Evaluation.batch_size = 4
Evaluation.rank_classification = True
classification_task.name = 'reviews'
classification_task.splits = {'train': 'train.jsonl', 'validation': 'dev.jsonl'}
classification_task.labels = ('bad', 'good')
classification_task.template = '{text}'
train.eval_period = 6
train.checkpoint_period = 3
train.keep_checkpoints = 9
train.log_period = 1
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_vocabulary):
  """A base, a task of 21 training and 5 validation examples, a gin file."""
  folder = tmp_path_factory.mktemp('job')
  model = model_lib.EncoderDecoderModel(CONFIG)
  params = jax.jit(model.init_params)(jax.random.key(0))
  save_base(folder / 'base', params, 40)
  os.link(tiny_vocabulary, folder / 'tiny.model')
  words = 'film was good bad fine dull bright music sport review'.split()
  for name, count in (('train', 21), ('dev', 5)):
    rows = [
      {
        'text': ' '.join(words[(i * k + k) % 10] for k in range(1, 5 + i % 15)),
        'label': ('bad', 'good')[i % 2],
      }
      for i in range(count)
    ]
    text = '\n'.join(json.dumps(row) for row in rows)
    (folder / f'{name}.jsonl').write_text(text)
  (folder / 'run.gin').write_text(GIN)
  model = [line for line in GIN.splitlines() if line.startswith('T5Config')]
  (folder / 'model.gin').write_text('\n'.join(model))
  return folder


def start(folder, model_dir, processes, devices, *bindings):
  """The processes of a job that trains."""
  return run_main(
    folder,
    'train',
    processes,
    devices,
    '--gin_file=run.gin',
    f"--gin.MODEL_DIR='{model_dir}'",
    *bindings,
  )


def run_main(folder, main, processes, devices, *arguments):
  """The processes of a job, each with some virtual devices."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': os.pathsep.join(sys.path),
  }
  command = [sys.executable, '-m', 'prompt_tuning', main, *arguments]
  who = [
    [
      f'--coordinator_address={address}',
      f'--num_processes={processes}',
      f'--process_id={number}',
    ]
    for number in range(processes)
  ]
  return [
    subprocess.Popen(
      command + (flags if processes > 1 else []),
      cwd=folder,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for flags in who
  ]


def finish(job, code=0):
  """The (stdout, stderr) of each process; all must end with `code`."""
  outputs = []
  with contextlib.ExitStack() as stack:
    for process in job:
      stack.callback(process.kill)
    for process in job:
      outputs.append(process.communicate(timeout=240))
    for process, (_, errors) in zip(job, outputs, strict=True):
      assert process.returncode == code, errors[-2000:]
  return outputs


def losses(folder):
  lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return {
    line['step']: line['loss'] for line in lines if line['split'] == 'train'
  }


def prompt(folder):
  return np.load(folder / 'prompt/prompt.npy')


@pytest.fixture(scope='module')
def whole(folder):
  """The run by two processes with four devices each, uninterrupted."""
  outputs = finish(start(folder, 'whole', 2, 4))
  return folder / 'whole', outputs


def test_one_process_writes_prompts_metrics_and_results(whole):
  folder, ((printed, said), (nothing, unsaid)) = whole
  result = printed.strip().splitlines()[-1]  # after what Gloo prints
  assert json.loads(result)['step'] == 40 + STEPS
  assert '8 device(s), 2 process(es)' in said
  assert 'mesh data 8 x fsdp 1 x model 1' in said
  # Each reads every row and cuts the same slices out of the batch.
  assert re.search(
    r'rows are padded to \d+.* or 43 tokens, .* slices of 8', said
  )
  assert '{' not in nothing and 'step' not in unsaid
  assert list(losses(folder)) == list(range(41, 41 + STEPS))
  # Five examples by two batches of four: nothing of what fills the last one.
  lines = (folder / 'eval/inference/reviews-52.jsonl').read_text().splitlines()
  assert len(lines) == 5
  assert prompt(folder).shape == (3, 16)


@pytest.mark.parametrize(
  ('processes', 'devices', 'mesh'),
  [
    pytest.param(*(1, 8, 'data 8 x fsdp 1 x model 1'), marks=pytest.mark.slow),
    (1, 1, 'data 1 x fsdp 1 x model 1'),
    # The halves of a model are in two processes: both read the same rows.
    (2, 1, 'data 1 x fsdp 1 x model 2'),
  ],
)
def test_the_number_of_processes_and_devices_changes_rounding_alone(
  folder, whole, processes, devices, mesh
):
  expected, _ = whole
  name = f'by_{processes}_{devices}'
  # Two parts of the data, as two processes read by themselves.
  bindings = ['--gin.TaskData.num_shards=2']
  if 'model 2' in mesh:
    bindings.append('--gin.Partitioner.num_partitions=2')
    bindings.append('--gin.train.partitioner=@Partitioner()')
  elif devices == 1:  # without slices
    bindings.append('--gin.train.row_lengths=()')
  outputs = finish(start(folder, name, processes, devices, *bindings))
  assert f'mesh {mesh}' in outputs[0][1]
  # Sums over examples, or over heads, in another order: some 1e-7 of a float32
  # each, and Adafactor, which divides by the gradient's size, hands that on.
  found, wanted = losses(folder / name), losses(expected)
  assert found.keys() == wanted.keys()
  for step, loss in wanted.items():
    assert found[step] == pytest.approx(loss, rel=1e-5), step
  np.testing.assert_allclose(prompt(folder / name), prompt(expected), atol=2e-5)
  for one in (folder / name, expected):
    assert (one / 'eval/eval_metrics.jsonl').read_text().count('\n') == 2


def test_a_job_predicts_as_one_process_does_and_writes_once(folder, whole):
  (folder / 'texts.txt').write_text('film was good\nbad\nsport\n')
  scores = []
  for processes, devices in ((2, 1), (1, 1)):
    output = folder / f'predicted_{processes}.jsonl'
    finish(
      run_main(
        folder,
        'infer',
        processes,
        devices,
        '--gin_file=model.gin',
        '--gin_file=runs/infer.gin',
        "--gin.INITIAL_CHECKPOINT_PATH='base'",
        "--gin.VOCABULARY='tiny.model'",
        "--gin.PROMPT_FILE='whole/prompt'",
        "--gin.INPUT_FILE='texts.txt'",
        f"--gin.OUTPUT_FILE='{output}'",
        "--gin.infer.labels=('bad', 'good')",
        f'--gin.Partitioner.num_partitions={processes}',
      )
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert [line['input'] for line in lines] == [
      'film was good',
      'bad',
      'sport',
    ]
    scores.append([list(line['scores'].values()) for line in lines])
  np.testing.assert_allclose(*scores, rtol=1e-5)


def wait_for(path, job):
  deadline = time.monotonic() + 120
  while not path.exists():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in job)
    time.sleep(0.05)


def test_a_killed_process_ends_the_others_and_the_job_resumes_bit_for_bit(
  folder, whole
):
  job = start(folder, 'killed', 2, 4)
  wait_for(folder / 'killed/checkpoints/43/manifest.json', job)
  job[1].kill()
  # Not for ever; how long is a matter of the machine.
  _, errors = job[0].communicate(timeout=10 * hosts.HEARTBEAT_TIMEOUT)
  assert job[0].returncode == RestartError.EXIT_CODE
  assert 'the run continues from its last checkpoint' in errors
  assert 'Traceback' not in errors
  job[1].communicate()
  said = finish(start(folder, 'killed', 2, 4))[0][1]
  assert 'resumed after' in said
  np.testing.assert_array_equal(prompt(folder / 'killed'), prompt(whole[0]))


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_without_a_peer_a_process_of_one_device_says_so_too(folder, who):
  name = f'alone_{who}'
  job = start(folder, name, 2, 1)
  wait_for(folder / name / 'checkpoints/43/manifest.json', job)
  job[who].kill()
  _, errors = job[1 - who].communicate(timeout=10 * hosts.HEARTBEAT_TIMEOUT)
  assert job[1 - who].returncode == RestartError.EXIT_CODE
  last = errors.strip().splitlines()[-1]
  assert last.startswith('error: this process ')
  assert 'the run continues from its last checkpoint' in last
  job[who].communicate()


def joined(fault):
  """A job of two processes, of which number 1 meets a fault."""
  code = (
    'import os, sys; from prompt_tuning.training import hosts\n'
    'who = int(sys.argv[2])\n'
    'with hosts.leaving_at_once():\n'
    '  hosts.connect(sys.argv[1], 2, who)\n'
    f'  if who: {fault}\n'
    '  hosts.wait_for_all("here")\n'
  )
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  return [
    subprocess.Popen(
      [sys.executable, '-c', code, address, str(number)],
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
        'PYTHONPATH': os.pathsep.join(sys.path),
      },
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]


@pytest.mark.slow
def test_a_bug_in_one_process_ends_it_at_once_with_its_traceback():
  """Python's own exit would wait for the others."""
  job = joined('raise KeyError("a bug")')
  _, errors = job[1].communicate(timeout=600)
  assert job[1].returncode == 1
  assert "KeyError: 'a bug'" in errors
  job[0].communicate(timeout=600)
  assert job[0].returncode != 0


@pytest.mark.slow
def test_an_abort_of_ones_own_is_no_reason_to_start_again():
  """Only who lost another process says so, and exits with 75."""
  job = joined('os.abort()')
  _, errors = job[1].communicate(timeout=600)
  assert job[1].returncode == -signal.SIGABRT
  assert 'start all again' not in errors
  _, errors = job[0].communicate(timeout=600)
  assert job[0].returncode == RestartError.EXIT_CODE
  last = errors.strip().splitlines()[-1]
  assert last.startswith('error: this process ')


@pytest.mark.slow
def test_a_preempted_job_stops_at_one_step_and_goes_on_with_other_devices(
  folder, whole
):
  job = start(folder, 'preempted', 2, 4)
  wait_for(folder / 'preempted/checkpoints/43/manifest.json', job)
  job[1].send_signal(signal.SIGTERM)  # One is told; both stop.
  said = finish(job, RestartError.EXIT_CODE)[0][1]
  stopped = int(re.search(r'stopped after (\d+) of 12 steps', said)[1])
  assert 3 <= stopped < STEPS
  said = finish(start(folder, 'preempted', 1, 4))[0][1]
  assert f'resumed after {stopped} steps' in said
  assert 'mesh data 4' in said
  np.testing.assert_allclose(
    prompt(folder / 'preempted'), prompt(whole[0]), atol=2e-5
  )


def test_a_process_whose_job_never_comes_ends_with_one_last_line():
  code = (
    'import sys; from prompt_tuning.training import hosts; '
    "hosts.connect('localhost:1', 2, 1, initialization_timeout=3)"
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == RestartError.EXIT_CODE
  last = done.stderr.strip().splitlines()[-1]
  assert 'could not join its job' in last and '--num_processes=1' in last


def test_who_takes_part_is_told_whole_or_not_at_all(monkeypatch):
  for given, message in (
    ({'num_processes': 2}, '--coordinator_address, --process_id is missing'),
    (
      {
        'coordinator_address': 'a:1',
        'num_processes': 2,
        'process_id': 2,
      },
      'not one of 0 to 1',
    ),
    (
      {'coordinator_address': 'a', 'num_processes': 2, 'process_id': 0},
      'has no port',
    ),
    ({'multiprocess_gpu': True}, 'nothing here tells of a job'),
  ):
    with pytest.raises(UserError, match=message):
      hosts.connect(**given)


@pytest.mark.parametrize(
  ('environment', 'method'),
  [
    ({}, None),
    ({'SLURM_STEP_NODELIST': 'a[1-2]', 'SLURM_NTASKS': '2'}, 'slurm'),
    ({'SLURM_STEP_NODELIST': 'a1', 'SLURM_NTASKS': '1'}, None),
    ({'SLURM_NTASKS': '4'}, None),  # of the allocation, not of a step
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'ompi'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, ''),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, ''),
  ],
)
def test_the_surroundings_of_a_job_are_recognised(environment, method):
  assert hosts._surroundings(environment) == method
