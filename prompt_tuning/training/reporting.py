"""What a run says: a line of progress, a JSONL of metrics, TensorBoard."""

from collections.abc import Mapping
import functools
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any, TextIO

from etils import epath
import jax

import prompt_tuning
from prompt_tuning import files
from prompt_tuning.errors import UserError
from prompt_tuning.models import quantization
from prompt_tuning.training.batches import Placed

logger = logging.getLogger(__name__)

# Share of the time; the first batch of a run is always waited for.
_MUCH_WAITING = 0.1


class MetricsWriter:
  """Appends to MODEL_DIR/metrics.jsonl and writes TensorBoard events.

  A line holds `step`, `split` ('train', 'validation' or 'eval') and
  the metrics. A resumed run drops the lines of steps after its checkpoint:
  it makes them again.
  """

  def __init__(
    self, model_dir: str | os.PathLike, first_step: int, silent: bool = False
  ):
    """Opens the files, unless `silent`: then nothing is ever written."""
    self._silent = silent
    if silent:
      return
    folder = files.place(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / 'metrics.jsonl'
    if self.path.exists():
      self._drop_after(first_step)
    self._tensorboard = None
    if _can_write_events(folder):
      import tensorboardX  # which none but a training needs

      self._tensorboard = tensorboardX.SummaryWriter(
        str(folder / 'tensorboard'), purge_step=first_step + 1
      )

  def _drop_after(self, step: int):
    kept = []
    for line in self.path.read_text().splitlines(keepends=True):
      try:
        if json.loads(line)['step'] <= step:
          kept.append(line)
      except ValueError:
        pass  # A killed run may leave half a line.
    with files.replacing(self.path) as file:
      file.write(''.join(kept))

  def write(self, step: int, split: str, metrics: Mapping[str, float]):
    if self._silent:
      return
    line = json.dumps({'step': step, 'split': split, **metrics})
    try:
      with self.path.open('a') as file:
        file.write(line + '\n')
    except OSError as error:
      raise UserError(
        f'cannot write {self.path}: {error.strerror}; checkpoints are intact;'
        ' free the disk and start again'
      ) from error
    if self._tensorboard is None:
      return
    for name, value in metrics.items():
      tag = name if '/' in name else f'{split}/{name}'
      self._tensorboard.add_scalar(tag, value, step)

  def close(self):
    if not self._silent and self._tensorboard is not None:
      self._tensorboard.close()


def _can_write_events(folder: epath.Path) -> bool:
  """TensorBoard's events need a package to go to a bucket; metrics do not."""
  if '://' not in os.fspath(folder):
    return True
  try:
    import google.cloud.storage  # noqa: F401
  except ImportError:
    logger.warning(
      'no TensorBoard events in %s: pip install google-cloud-storage', folder
    )
    return False
  return True


class Progress:
  """One live line on a terminal, plain lines elsewhere."""

  def __init__(self, stream: TextIO | None = None, silent: bool = False):
    self._silent = silent
    self._stream = stream or sys.stderr
    self._live = False
    self.begin(0)

  def begin(self, total: int, done: int = 0) -> None:
    """Expects `total` steps, of which `done` were done before this start."""
    self._total = total
    self._start_done = done
    self._start = time.monotonic()

  def update(self, done: int, metrics: Mapping[str, float]):
    """Shows steps done, the main metrics of training and the time left."""
    if self._silent:
      return
    passed = time.monotonic() - self._start
    steps = max(done - self._start_done, 1)
    left = duration(passed / steps * (self._total - done))
    shown = (
      f'loss {metrics["loss_per_token"]:.4g}'
      f'  accuracy {metrics["accuracy"]:.4g}'
      f'  examples/s {metrics["examples_per_second"]:.4g}'
    )
    if metrics['input_wait_share'] > _MUCH_WAITING:
      shown += f'  waiting for data {metrics["input_wait_share"]:.0%}'
    line = f'step {done}/{self._total}  {shown}  ETA {left}'
    if self._stream.isatty():
      self._stream.write(f'\r{line}\x1b[K')
      self._live = True
    else:
      self._stream.write(line + '\n')
    self._stream.flush()

  def count(self, done: int, total: int | None, what: str):
    """Shows how far something without metrics is."""
    if self._silent:
      return
    of = '' if total is None else f'/{total}'
    if self._stream.isatty():
      self._stream.write(f'\r{done}{of} {what}\x1b[K')
      self._live = True
      self._stream.flush()

  def say(self, text: str):
    """A line that stays."""
    if self._silent:
      return
    if self._live:
      self._stream.write('\n')
      self._live = False
    self._stream.write(text + '\n')
    self._stream.flush()


class Clock:
  """Counts what went through between two lines of metrics."""

  def __init__(self):
    self.take()

  def add(self, batch: Placed, waited: float):
    self._steps += 1
    self._examples += batch.examples
    self._tokens += batch.tokens
    self._filled += batch.filled
    self._waited += waited

  def take(self) -> dict[str, float]:
    """Rates since the last call; tokens are counted with their padding."""
    now = time.monotonic()
    rates = {}
    if hasattr(self, '_start'):
      passed = max(now - self._start, 1e-9)
      rates = {
        'examples_per_second': self._examples / passed,
        'tokens_per_second': self._tokens / passed,
        'seconds_per_step': passed / max(self._steps, 1),
        'padding_share': 1 - self._filled / max(self._tokens, 1),
        'input_wait_share': self._waited / passed,
      }
    self._start, self._waited = now, 0.0
    self._steps = self._examples = self._tokens = self._filled = 0
    return rates


RESULT_FILE = 'result.json'


def write_result(
  model_dir: str | os.PathLike, facts: Mapping[str, Any]
) -> None:
  """MODEL_DIR/result.json: what came of a run, for who compares runs.

  Args:
    model_dir: of the run.
    facts: of it; what computed it is added.
  """
  devices = jax.devices()
  added = {
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'processes': jax.process_count(),
    'peak_memory_bytes': peak_memory(),
    'prompt_tuning_version': prompt_tuning.__version__,
    'commit': source_commit(),
    'jax_version': jax.__version__,
  }
  with files.replacing(files.place(model_dir) / RESULT_FILE) as file:
    file.write(json.dumps({**facts, **added}, indent=1) + '\n')


def peak_memory() -> int:
  """Bytes that this process took at most: of the first device, else of RAM."""
  stats = jax.local_devices()[0].memory_stats() or {}
  unit = 1 if sys.platform == 'darwin' else 1024
  of_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return stats.get('peak_bytes_in_use', of_host)


@functools.cache
def source_commit() -> str | None:
  """The git commit of this package, '+' where files differ from it.

  That of the first call: a run asks when it begins. None where the package is
  installed without its repository.
  """
  folder = pathlib.Path(prompt_tuning.__file__).parent
  if not (folder.parent / '.git').exists():
    return None
  try:
    found = subprocess.run(
      ['git', 'describe', '--always', '--dirty=+', '--exclude=*'],
      cwd=folder,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()


def count_parameters(tree: Any) -> int:
  """Scalars in all leaves; those of a quantized kernel without its scales."""
  leaves = jax.tree.leaves(tree, is_leaf=quantization.is_quantized)
  return sum(leaf.size for leaf in leaves)


def per_token(sums: Mapping[str, Any]) -> dict[str, float]:
  """Loss and accuracy of a token, of the sums of `model.loss_fn`."""
  tokens = max(float(sums['tokens']), 1.0)
  return {
    'loss_per_token': float(sums['cross_entropy']) / tokens,
    'accuracy': float(sums['correct']) / tokens,
  }


def summary(
  metrics: Mapping[str, Any], rates: Mapping[str, float]
) -> dict[str, float]:
  """A line of metrics of a step, fetched from the devices."""
  metrics = jax.device_get(metrics)
  kept = (
    'loss',
    'z_loss',
    'tokens',
    'learning_rate',
    'gradient_norm',
    'update_norm',
    'trained_norm',
  )
  values = {name: float(metrics[name]) for name in kept}
  if metrics['penalty']:
    values['penalty'] = float(metrics['penalty'])
  return per_token(metrics) | values | rates


def duration(seconds: float) -> str:
  """h:mm:ss"""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
