"""One job over several processes: joining it, agreeing, and losing a member.

Every process runs the same program on its own devices; arrays are global.
Process 0 writes what is small (metrics, manifests, prompts), Orbax writes the
arrays of all processes at once.
"""

from collections.abc import Mapping
import contextlib
import ctypes
import importlib.util
import os
import pathlib
import signal
import sys
import threading
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from prompt_tuning.errors import RestartError
from prompt_tuning.errors import UserError

# Seconds without a sign of life after which a process counts as dead; then the
# others end too.
HEARTBEAT_TIMEOUT = 30


def connect(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  initialization_timeout: int = 300,
  multiprocess_gpu: bool = False,
) -> None:
  """Joins this process to its job; alone, it does nothing.

  Without arguments, TPU pods and slices, Slurm, Open MPI, other MPIs (by
  mpi4py) and Kubernetes jobs (by the kubernetes package) say by themselves who
  takes part. To be called before JAX is used.

  Args:
    coordinator_address: host:port of process 0, free on that host.
    num_processes: of the job; 1 works alone whatever the surroundings say.
    process_id: from 0 on, this process's.
    initialization_timeout: seconds to wait for the others.
    multiprocess_gpu: there must be a job, as T5X's flag says.

  Raises:
    UserError: some but not all are given, or nothing tells of a job.
    RestartError: the others did not come.
  """
  given = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if num_processes == 1:
    return
  settings: dict[str, Any] = {}
  if not missing:
    settings = {name[2:]: value for name, value in given.items()}
    settings['cluster_detection_method'] = 'deactivate'
    if not 0 <= process_id < num_processes:
      raise UserError(
        f'--process_id {process_id} is not one of 0 to {num_processes - 1}'
      )
    if ':' not in coordinator_address:
      raise UserError(
        f'--coordinator_address {coordinator_address} has no port; give'
        ' host:port'
      )
  elif len(missing) < len(given):
    raise UserError(
      f'{", ".join(missing)} is missing: a process of a job is given'
      ' --coordinator_address, --num_processes and --process_id'
    )
  else:
    method = _surroundings(os.environ)
    if method is None:
      if multiprocess_gpu:
        raise UserError(
          '--multiprocess_gpu: nothing here tells of a job; give'
          f' {", ".join(given)}'
        )
      return
    settings['cluster_detection_method'] = method or None
  unreached = (
    'this process could not join its job: {}; are all of them running and can'
    ' they reach process 0? --num_processes=1 works alone'
  )
  never = unreached.format(f'none came in {initialization_timeout} s')
  _explain_aborts(never, joining=True)
  try:
    # Collectives of two CPU programs that run at once would meet each other's.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    jax.distributed.initialize(
      **settings,
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
      initialization_timeout=initialization_timeout,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise RestartError(unreached.format(reason)) from error
  _explain_aborts(
    f'this process lost another one of its job, see above; {_AGAIN}'
  )


_handlers = []  # What C calls must not be collected.


def _explain_aborts(words: str, joining: bool = False) -> None:
  """Has a process that loses its job say these words in a last line.

  Where a member of the job is gone, JAX's client and Gloo abort the process
  from threads of their own, past Python: so this is a handler for C. An abort
  in a thread of Python's is none of theirs, and takes its usual course, unless
  the process is only just joining: that is done in ours.
  """
  libc = ctypes.CDLL(None)

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def explain(number):
    ours = {thread.native_id for thread in threading.enumerate()}
    if threading.get_native_id() in ours and not joining:
      libc.signal(number, None)  # the default, which abort() then meets
      return
    os.write(2, f'\nerror: {words}\n'.encode())
    os._exit(RestartError.EXIT_CODE)

  _handlers.append(explain)
  libc.signal(int(signal.SIGABRT), explain)


_AGAIN = (
  'start all again with the same command: the run continues from its last'
  ' checkpoint'
)


def _surroundings(environment: Mapping[str, str]) -> str | None:
  """Who can tell the members of this job: JAX's name for it, '' or None.

  '' leaves the choice to JAX; None: this process is alone.
  """

  def count(name):
    value = environment.get(name, '')
    return int(value) if value.isdigit() else 1

  if 'SLURM_STEP_NODELIST' in environment and count('SLURM_NTASKS') > 1:
    return 'slurm'
  if count('OMPI_COMM_WORLD_SIZE') > 1:
    return 'ompi'
  if count('PMI_SIZE') > 1 and importlib.util.find_spec('mpi4py'):
    return 'mpi4py'
  if 'MEGASCALE_COORDINATOR_ADDRESS' in environment:
    return ''
  if ',' in environment.get('TPU_WORKER_HOSTNAMES', ''):
    return ''
  if (
    'KUBERNETES_SERVICE_HOST' in environment
    and 'JOB_COMPLETION_INDEX' in environment
    and importlib.util.find_spec('kubernetes')
  ):
    return 'k8s'
  # A TPU VM says nothing in its environment; the metadata server does.
  attached = any(
    pathlib.Path(path).exists() for path in ('/dev/accel0', '/dev/vfio/0')
  )
  on_cpu = environment.get('JAX_PLATFORMS', '') == 'cpu'
  if attached and not on_cpu and importlib.util.find_spec('libtpu'):
    return ''
  return None


def in_job() -> bool:
  """Whether this process has joined others (`connect`); asks no device."""
  return jax.distributed.is_initialized()


def is_primary() -> bool:
  """Whether this process writes for all of them."""
  return jax.process_index() == 0


def agree(value: int) -> int:
  """Process 0's value, in every process."""
  if jax.process_count() == 1:
    return value
  with jax.transfer_guard('allow'):
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def wait_for_all(place: str) -> None:
  """Returns when every process has come to this place."""
  if jax.process_count() > 1:
    with jax.transfer_guard('allow'):
      multihost_utils.sync_global_devices(place)


def leave(code: int) -> None:
  """Ends a failed process of a job at once; alone, it does nothing.

  Python's own exit would wait for the others, who may wait for this one. They
  hear of it from the coordinator or from the next collective.
  """
  if in_job():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving_at_once():
  """Ends a process of a job with its traceback where it has a bug (see
  `leave`)."""
  try:
    yield
  except BaseException:
    if in_job():
      traceback.print_exc()
    leave(1)
    raise


class StopSignal:
  """Turns SIGTERM and Ctrl-C into a step at which to stop.

  Of a job over several processes a SIGTERM to one, as a preemption sends, stops
  all at the same step. A second Ctrl-C interrupts at once, as the first does
  in such a job: there it reaches whom it reaches.
  """

  def __enter__(self) -> 'StopSignal':
    self._requested = False
    self._before: dict[int, Any] = {}
    # In a job JAX listens for SIGTERM itself, and tells the others.
    if (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    ):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    if number == signal.SIGINT and self._requested:
      raise KeyboardInterrupt
    self._requested = True

  def requested(self, step: int) -> bool:
    """Whether to stop before the step after `step`; to be asked at each."""
    if jax.process_count() > 1 and not self._requested:
      self._requested = multihost_utils.reached_preemption_sync_point(step)
    return self._requested

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


# What XLA's collectives and JAX's coordinator say when a process is gone.
_MARKS = (
  'gloo',
  'connection reset',
  'connection closed',
  'connection refused',
  'heartbeat',
  'coordination service',
  'barrier',
  'nccl',
  'another task died',
  'socket closed',
)


@contextlib.contextmanager
def naming_lost_processes():
  """Makes the end of another process a fault in one line."""
  try:
    yield
  except (RuntimeError, ValueError) as error:  # as Gloo has it
    text = str(error).lower()
    if jax.process_count() == 1 or not any(mark in text for mark in _MARKS):
      raise
    reason = str(error).strip().splitlines()[0][:200]
    raise RestartError(
      f'this process lost another one of its job ({reason}); {_AGAIN}'
    ) from error
