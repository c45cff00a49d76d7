"""What the shell is told: an exit code, and a line for each fault."""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading

from prompt_tuning import errors
from prompt_tuning.gin_files import ConfigurationError


def guarded(work: Callable[[], int], fault: int = 1) -> int:
  """The exit code of some work, whose faults are one line each.

  Args:
    work: prints, and returns its exit code.
    fault: the code for one of data, paths or shapes.
  """
  try:
    with _stopped_by_a_signal():
      code = work()
      sys.stdout.flush()
      return code
  except BrokenPipeError:  # `| head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (errors.UserError, OSError) as error:
    # gin appends lines that name the configurable; ours is the first.
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = line.encode('utf-8', 'backslashreplace').decode()
    print(f'error: {line}', file=sys.stderr)
    code = 2 if isinstance(error, ConfigurationError) else fault
    return getattr(error, 'EXIT_CODE', code)
  except KeyboardInterrupt:
    print('error: interrupted', file=sys.stderr)
    return 130


def leave(code: int) -> int:
  """Ends the process with this code, its files closed and its exits called.

  Python's own end would take JAX and TensorFlow apart, most of a second.
  Where threads still work, whom it would wait for, or where a profiler waits
  for the end, the code is returned.
  """
  others = [
    thread
    for thread in threading.enumerate()
    if not thread.daemon and thread is not threading.current_thread()
  ]
  if others or sys.getprofile() or sys.gettrace():
    return code
  atexit._run_exitfuncs()  # the one name it has
  with contextlib.suppress(OSError):  # nobody reads any more
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


@contextlib.contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
  """Lets SIGTERM end the work as other faults do, and not in its middle.

  What is written beside goes away, and a line says so. Training, which saves
  first, has a handler of its own (`training.hosts.StopSignal`).
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number, frame):
    raise errors.RestartError(
      'stopped by SIGTERM; the same command starts again'
    )

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
