"""The launchers: what they would do, and what they do with stand-ins for ssh,
gcloud, sbatch and kubectl."""

import os
import pathlib
import re
import shlex
import socket
import stat
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'scripts/launch'
# What a shell, or a second one, might take apart.
ARGUMENTS = [
  '--gin_file=models/t5_1_1_xxl.gin',
  "--gin.MODEL_DIR='gs://bucket/a run'",
  "--gin.TASK_FILES={'train': 'a.jsonl', \"dev\": '$HOME/*'}",
]
SETTINGS = {
  'ssh.sh': {'HOSTS': 'me@one two'},
  'slurm.sh': {'NODES': '2', 'GPUS': '8'},
  'tpu_pod.sh': {'TPU': 'slice', 'ZONE': 'us-central2-b', 'TYPE': 'v4-32'},
  'jobset.sh': {
    'NAME': 'boolq',
    'IMAGE': 'image',
    'TOPOLOGY': '4x4',
    'ACCELERATOR': 'tpu-v5-lite-podslice',
    'HOSTS': '4',
    'CHIPS': '4',
  },
}


def launch(script, *arguments, settings=None, path=None):
  environment = os.environ | (
    SETTINGS[script] if settings is None else settings
  )
  environment |= {'PAUSE': '0'}
  if path is not None:
    environment['PATH'] = f'{path}{os.pathsep}{environment["PATH"]}'
  return subprocess.run(
    [FOLDER / script, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    timeout=240,
  )


def stand_in(folder, name, text):
  """A program of that name that comes before the real one."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return folder


def dry_run(script):
  done = launch(script, '--dry_run', *ARGUMENTS)
  assert done.returncode == 0, done.stderr
  return done.stdout


def seen_by_train(command):
  """The arguments after `train` in a command as a shell takes it apart."""
  words = shlex.split(command)
  return words[words.index('train') + 1 :]


@pytest.mark.parametrize('script', SETTINGS)
def test_every_launcher_is_covered_and_asks_for_what_it_needs(script):
  assert {path.name for path in FOLDER.glob('*.sh')} == set(SETTINGS)
  done = launch(script, '--dry_run', settings={})
  if script != 'slurm.sh':
    assert done.returncode != 0
    assert next(iter(SETTINGS[script])) in done.stderr


def test_ssh_gives_every_host_the_command_and_its_number():
  lines = dry_run('ssh.sh').splitlines()
  assert len(lines) == 2
  for number, (line, host) in enumerate(zip(lines, ('me@one', 'two'))):
    program, target, remote = shlex.split(line)
    assert (program, target) == ('ssh', host)
    assert seen_by_train(remote) == [
      *ARGUMENTS,
      '--coordinator_address=one:8476',
      '--num_processes=2',
      f'--process_id={number}',
    ]


def test_slurm_starts_a_process_for_each_gpu_and_queues_again():
  script = dry_run('slurm.sh')
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)
  for option in (
    '--nodes=2',
    '--ntasks-per-node=8',
    '--gpus-per-node=8',
    '--requeue',
  ):
    assert f'#SBATCH {option}\n' in script
  command = script.partition('bash "$fault" ')[2].partition(' &\n')[0]
  assert seen_by_train(command) == ARGUMENTS


# As srun does: a process's own code, but that of a kill where there was one.
SRUN = """
while [ "$1" != bash ]; do shift; done
"$@"
code=$?
exit ${{KILLED:-$code}}
"""


@pytest.mark.parametrize(
  ('code', 'killed', 'restarts', 'again'),
  [
    (0, '', 0, 0),
    (1, '', 0, 0),
    (1, '137', 0, 0),  # the others were killed because of a user's fault
    (75, '', 0, 1),
    (75, '137', 0, 1),
    (137, '137', 0, 1),
    (75, '', 50, 0),
  ],
)
def test_a_slurm_job_is_queued_again_for_what_was_lost_alone(
  tmp_path, code, killed, restarts, again
):
  programs = stand_in(tmp_path / 'bin', 'srun', SRUN.format())
  stand_in(programs, 'prompt-tuning', f'exit {code}')
  stand_in(programs, 'scontrol', f'echo "$@" >> {tmp_path}/queued')
  environment = os.environ | {
    'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}',
    'SLURM_JOB_ID': '7',
    'SLURM_SUBMIT_DIR': str(tmp_path),
    'SLURM_RESTART_COUNT': str(restarts),
    'KILLED': killed,
  }
  done = subprocess.run(
    ['bash'], input=dry_run('slurm.sh'), text=True, env=environment
  )
  assert done.returncode == int(killed or code)
  assert not list(tmp_path.glob('.fault*'))
  queued = tmp_path / 'queued'
  assert queued.exists() == bool(again)
  if again:
    assert queued.read_text() == 'requeue 7\n'


def test_a_slurm_job_near_its_end_saves_and_is_queued_again(tmp_path):
  """USR1 comes before the time is over: the run is told to save."""
  # SIGTERM to srun itself would kill the processes.
  programs = stand_in(
    tmp_path / 'bin',
    'srun',
    f'echo $$ > {tmp_path}/srun; trap "exit 143" TERM\n'
    f'trap "echo saved >> {tmp_path}/log; exit 75" USR2\n'
    'kill -USR1 $PPID\nwhile true; do sleep 0.1; done',
  )
  stand_in(
    programs,
    'scancel',
    f'[ "$*" = "--signal=TERM 7" ] && kill -USR2 $(cat {tmp_path}/srun)',
  )
  stand_in(programs, 'scontrol', f'echo "$@" >> {tmp_path}/log')
  script = tmp_path / 'job.sh'
  script.write_text(dry_run('slurm.sh'))
  done = subprocess.run(
    ['bash', script],
    env=os.environ
    | {
      'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}',
      'SLURM_JOB_ID': '7',
    },
    timeout=240,
  )
  assert done.returncode == 75
  assert (tmp_path / 'log').read_text() == 'saved\nrequeue 7\n'


def test_a_job_set_is_a_manifest_with_the_arguments_as_they_were():
  yaml = pytest.importorskip('yaml', reason='PyYAML reads the manifest')
  manifest = yaml.safe_load(dry_run('jobset.sh'))
  assert manifest['kind'] == 'JobSet'
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  assert job['parallelism'] == job['completions'] == 4
  pod = job['template']['spec']
  container = pod['containers'][0]
  assert container['command'] == ['prompt-tuning', 'train', *ARGUMENTS]
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [1, 2]
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'


def test_a_job_set_waits_in_a_queue_of_kueue(monkeypatch):
  yaml = pytest.importorskip('yaml', reason='PyYAML reads the manifest')
  assert not yaml.safe_load(dry_run('jobset.sh'))['metadata']['labels']
  monkeypatch.setenv('QUEUE', 'slices')
  labels = yaml.safe_load(dry_run('jobset.sh'))['metadata']['labels']
  assert labels == {'kueue.x-k8s.io/queue-name': 'slices'}


def test_a_tpu_slice_is_made_installed_and_told():
  lines = dry_run('tpu_pod.sh').splitlines()
  commands = [shlex.split(line) for line in ' '.join(lines).split(' gcloud ')]
  said = '\n'.join(lines)
  assert (
    'tpu-vm create slice --zone=us-central2-b --accelerator-type=v4-32'
    in (said)
  )
  assert 'pip wheel' in said and 'tpu-vm scp' in said
  (option,) = [word for word in commands[-1] if word.startswith('--command=')]
  remote = option.removeprefix('--command=')
  assert remote.startswith('~/venv/bin/prompt-tuning train')
  assert seen_by_train(remote.partition('; code=')[0]) == ARGUMENTS
  assert '--worker=all' in commands[-1]


GCLOUD = """
log={log}
case "$*" in
  *describe*) cat $log.state 2> /dev/null ;;
  *create*) echo create >> $log; echo READY > $log.state ;;
  *cat*exit_code*) cat $log.code ;;
  *delete*) echo delete >> $log; rm $log.state ;;
  *train*)
    echo train >> $log
    if [ "$(grep -c train $log)" -lt 2 ]; then
      echo PREEMPTED > $log.state; exit 255
    fi ;;
esac
"""


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(tmp_path):
  log = tmp_path / 'log'
  programs = stand_in(tmp_path / 'bin', 'gcloud', GCLOUD.format(log=log))
  stand_in(programs, 'python3', 'touch "${6#--wheel-dir=}/prompt_tuning-1.whl"')
  done = launch('tpu_pod.sh', *ARGUMENTS, path=programs)
  assert done.returncode == 0, done.stderr
  assert log.read_text().split() == [
    'create',
    'train',
    'delete',
    'create',
    'train',
  ]
  assert 'restart 1 of 20' in done.stderr


@pytest.mark.parametrize(
  ('worker', 'code', 'done_there'),
  [
    (2, 1, ['create', 'train']),  # a fault of the user's: not tried again
    (75, 0, ['create', 'train', 'train']),  # a worker that was lost
  ],
)
def test_what_a_worker_ends_with_says_whether_to_try_again(
  tmp_path, worker, code, done_there
):
  log = tmp_path / 'log'
  text = GCLOUD.format(log=log).replace(
    'echo PREEMPTED > $log.state; exit 255',
    f'echo {worker} > $log.code; exit 1',
  )
  programs = stand_in(tmp_path / 'bin', 'gcloud', text)
  stand_in(programs, 'python3', 'touch "${6#--wheel-dir=}/prompt_tuning-1.whl"')
  done = launch('tpu_pod.sh', *ARGUMENTS, path=programs)
  assert done.returncode == code, done.stderr
  assert log.read_text().split() == done_there


# Each ends once, b as a lost host, a as a run whose peer is gone.
LOSING_B = """
if mkdir {folder}/$6 2> /dev/null; then
  [ "$6" = b ] && exit 255
  exit 75
fi
echo "$6" >> {folder}/done
cd / && eval "${{7/prompt-tuning/echo}}"
"""


def test_ssh_restarts_all_where_one_host_is_lost(tmp_path):
  """A stand-in for ssh that runs the command here."""
  programs = stand_in(tmp_path / 'bin', 'ssh', LOSING_B.format(folder=tmp_path))
  done = launch('ssh.sh', *ARGUMENTS, settings={'HOSTS': 'a b'}, path=programs)
  assert done.returncode == 0, done.stderr
  assert done.stderr.count('; restart 1 of 10') == 1
  assert sorted((tmp_path / 'done').read_text().split()) == ['a', 'b']
  lines = done.stdout.strip().splitlines()
  assert len(lines) == 2
  assert all(ARGUMENTS[1] in line for line in lines)


def test_ssh_ends_with_a_fault_of_the_users(tmp_path):
  programs = stand_in(
    tmp_path / 'bin', 'ssh', '[ "$6" = a ] && exit 75\nexit 2'
  )
  done = launch('ssh.sh', settings={'HOSTS': 'a b'}, path=programs)
  assert done.returncode == 2
  assert 'restart' not in done.stderr


def test_ssh_really_runs_two_processes(tmp_path):
  """Two hosts that are both this machine find each other and count devices."""
  code = (
    'import sys, jax; from prompt_tuning import cli; '
    'from prompt_tuning.training import hosts; '
    'hosts.connect(**cli.parse(sys.argv[2:])[1]); '
    'print([jax.process_index(), jax.device_count()])'
  )
  program = tmp_path / 'program'
  program.write_text(
    f'#!/usr/bin/env bash\n{sys.executable} -c "{code}" "$@"\n'
  )
  program.chmod(0o755)
  programs = stand_in(tmp_path / 'bin', 'ssh', 'eval "$7"')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  settings = {
    'HOSTS': 'localhost localhost',
    'COMMAND': str(program),
    'PORT': str(port),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'PYTHONPATH': os.pathsep.join(sys.path),
  }
  done = launch('ssh.sh', settings=settings, path=programs)
  assert done.returncode == 0, done.stderr
  # Both write to one stream, at once.
  found = re.findall(r'\[(\d), (\d)\]', done.stdout)
  assert sorted(found) == [('0', '4'), ('1', '4')]
