"""Files of a run in a bucket: gs:// here is a folder, by a stand-in for the
gfile that etils takes it through. Orbax reaches buckets by itself, and is not
part of this."""

import pathlib

from etils import epath
from etils.epath import backend
from etils.epath import gpath
import numpy as np
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.interop import t5x
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import save_prompt
from prompt_tuning.serving import jobs
from prompt_tuning.training.reporting import MetricsWriter
from prompt_tuning.training.reporting import Progress


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Serves gs://bucket from a folder, and gives that folder."""
  # Where TensorFlow is installed, etils reaches buckets by its gfile.
  local = type(backend.tf_backend)

  class Bucket(local):
    """Every method of that, on paths of the bucket."""

    def __getattribute__(self, name):
      method = super().__getattribute__(name)
      if name.startswith('_') or not callable(method):
        return method

      def translated(*arguments, **settings):
        arguments = [
          str(tmp_path / argument.removeprefix('gs://'))
          if isinstance(argument, str) and argument.startswith('gs://')
          else argument
          for argument in arguments
        ]
        return method(*arguments, **settings)

      return translated

  stand_in = Bucket()
  monkeypatch.setattr(
    gpath._GPath,
    '_backend',
    property(lambda self: stand_in if self._uri_scheme else backend.os_backend),
  )
  (tmp_path / 'bucket').mkdir()
  return tmp_path / 'bucket'


def test_a_prompt_is_written_to_a_bucket_and_read_from_it(bucket, monkeypatch):
  table = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
  files = save_prompt('gs://bucket/run/prompt', table, {'step': 7})
  assert [str(file) for file in files] == [
    'gs://bucket/run/prompt/prompt.npy',
    'gs://bucket/run/prompt/prompt.safetensors',
  ]
  assert sorted(path.name for path in (bucket / 'run/prompt').iterdir()) == [
    'prompt.npy',
    'prompt.safetensors',
  ]
  for path in ('gs://bucket/run/prompt', 'gs://bucket/run/prompt/prompt.npy'):
    found, _ = load_prompt(path)
    np.testing.assert_array_equal(found, table)
  _, facts = load_prompt('gs://bucket/run/prompt')
  assert facts['step'] == 7
  # T5X's checkpoints are looked for over the network.
  monkeypatch.setattr(t5x, 'is_checkpoint', lambda path: False)
  with pytest.raises(UserError, match='no prompt'):
    load_prompt('gs://bucket/none')


def test_metrics_go_to_a_bucket_and_a_resumed_run_takes_its_lines_up(bucket):
  writer = MetricsWriter('gs://bucket/run', 0)
  for step in (1, 2, 3):
    writer.write(step, 'train', {'loss': float(step)})
  writer.close()
  writer = MetricsWriter('gs://bucket/run', 2)
  writer.write(3, 'train', {'loss': 9.0})
  writer.close()
  lines = (bucket / 'run/metrics.jsonl').read_text().splitlines()
  assert len(lines) == 3 and '9.0' in lines[-1]


def test_texts_and_predictions_may_be_in_a_bucket(bucket):
  import contextlib

  (bucket / 'texts.txt').write_text('a\nb\n')
  with contextlib.ExitStack() as stack:
    show = Progress(silent=True)
    reopen, kind = jobs._input('gs://bucket/texts.txt', None, show, stack)
    lines = list(reopen())
  assert kind == 'text'
  assert [line.strip() for line in lines] == ['a', 'b']
  with jobs._output('gs://bucket/out/predictions.jsonl') as output:
    output.write('{}\n')
  folder = bucket / 'out'
  assert [path.name for path in folder.iterdir()] == ['predictions.jsonl']


def test_a_path_of_a_bucket_keeps_its_slashes():
  """What pathlib makes of it is another path."""
  assert str(pathlib.Path('gs://bucket/run')) == 'gs:/bucket/run'
  assert str(epath.Path('gs://bucket/run') / 'eval') == 'gs://bucket/run/eval'
