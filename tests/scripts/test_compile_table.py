"""The table of what fits: from reports that are there, and of a tiny model."""

import importlib.util
import json
import pathlib
import subprocess
import sys

SCRIPT = (
  pathlib.Path(__file__).resolve().parents[2] / 'scripts/compile_table.py'
)


def report(memory, fits, seconds):
  return [
    {
      'memory': memory * 2**30,
      'fits': fits,
      'mesh': {'data': 2, 'fsdp': 1, 'model': 4},
      'seconds': seconds,
    }
  ]


def test_reports_that_are_there_become_a_table(tmp_path):
  seconds = {'compute': 0.1, 'memory': 0.3, 'network': 0.05}
  (tmp_path / 'small-v5e-2x2.json').write_text(
    json.dumps(report(4.94, True, seconds))
  )
  (tmp_path / 'xxl-v5e-2x2.json').write_text(
    json.dumps(report(17.4, False, None))
  )
  done = subprocess.run(
    [
      *(sys.executable, SCRIPT, '--topologies', 'v5e:2x2'),
      *('--sizes', 'small', 'xxl', '--reports', tmp_path),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == [
    '| GiB a device (mesh) | small | xxl |',
    '|---|---|---|',
    '| v5e:2x2 | 4.9 (2x1x4) | **no**, 17.4 |',
    '',
    '| ms a step | small | xxl |',
    '|---|---|---|',
    '| v5e:2x2 | 300-450 |  |',
  ]


def test_batches_have_lines_of_their_own(tmp_path):
  for batch, memory in ((1, 3.0), (8, 5.0)):
    (tmp_path / f'xxl-h100-1-batch-{batch}.json').write_text(
      json.dumps(report(memory, True, None))
    )
  done = subprocess.run(
    [
      *(sys.executable, SCRIPT, '--topologies', 'h100:1', '--sizes', 'xxl'),
      *('--batches', '1', '8', '--reports', tmp_path),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines()[2:4] == [
    '| h100:1, batch 1 | 3.0 (2x1x4) |',
    '| h100:1, batch 8 | 5.0 (2x1x4) |',
  ]


def test_a_report_that_is_missing_is_asked_for(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location('compile_table', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  asked = []

  def run(command, **settings):
    asked.append(command)
    (tmp_path / 'base-h100-8-batch-64.json').write_text(
      json.dumps(report(1, True, None))
    )

  monkeypatch.setattr(module.subprocess, 'run', run)
  bindings = ['--gin.train.seed=1']
  found = module.report('base', 'h100:8', 64, tmp_path, bindings)
  assert found['memory'] == 2**30
  (command,) = asked
  assert "--gin.TOPOLOGY='h100:8'" in command
  assert '--gin_file=models/t5_1_1_base.gin' in command
  assert command[-2:] == ['--gin.train.seed=1', '--gin.BATCH_SIZE=64']
