"""Checkpoints of runs."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.training.checkpoints import Checkpoints
from prompt_tuning.training.optimizers import adafactor
from prompt_tuning.training.train_state import TrainState

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def prompt_state(length=5, embed=32, step=7, fill=None, optimizer=None):
  table = np.random.default_rng(step).normal(size=(1, length, embed))
  if fill is not None:
    table[:] = fill
  trainable = {'prompt': {'table': jnp.asarray(table, jnp.float32)}}
  return TrainState.create(trainable, optimizer or adafactor(0.3), step)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def size_on_disk(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return sum(path.stat().st_size for path in files)


# Saving and restoring.


@pytest.mark.parametrize(
  'optimizer',
  [
    adafactor(0.3, initial_step=1_100_000),
    optax.sgd(0.1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    optax.masked(optax.adam(0.1), {'prompt': {'table': True}}),
  ],
  ids=['adafactor', 'sgd', 'adamw', 'masked'],
)
def test_state_and_extra_come_back_bit_for_bit(tmp_path, optimizer):
  state = prompt_state(optimizer=optimizer)
  extra = {'data_position': np.int64(42), 'seed': 3, 'base': 'mini'}
  with Checkpoints(tmp_path) as saved:
    saved.save(7, state, extra, {'bbc/accuracy': np.float32(0.5)})
  reopened = Checkpoints(tmp_path)
  assert reopened.latest_step() == 7
  assert reopened.metrics(7) == {'bbc/accuracy': 0.5}
  got, got_extra = reopened.restore(
    7, prompt_state(step=5, optimizer=optimizer)
  )
  assert_same(got, state)
  assert got_extra == {'data_position': 42, 'seed': 3, 'base': 'mini'}
  abstract = jax.eval_shape(lambda: state)
  assert_same(reopened.restore(7, abstract)[0], state)


def test_saved_values_survive_donation(tmp_path):
  state = prompt_state()
  want = np.asarray(state.trainable['prompt']['table']).copy()
  shift = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(tmp_path) as saved:
    saved.save(7, state, {})
    shift(state)
    got, _ = saved.restore(7, jax.eval_shape(prompt_state))
  np.testing.assert_array_equal(got.trainable['prompt']['table'], want)


def test_restored_arrays_are_sharded_as_asked(tmp_path):
  mesh = jax.make_mesh((8,), ('x',))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(None, None, 'x')
  )
  state = TrainState(
    step=jnp.asarray(1, jnp.int32),
    trainable={'prompt': {'table': jnp.ones((1, 3, 16))}},
    opt_state=(),
  )
  table = jax.ShapeDtypeStruct((1, 3, 16), jnp.float32, sharding=sharding)
  like = state.replace(trainable={'prompt': {'table': table}})
  with Checkpoints(tmp_path) as saved:
    saved.save(1, state, {})
    got, _ = saved.restore(1, like)
    assert got.trainable['prompt']['table'].sharding == sharding
    saved.save(2, got, {})  # a sharded state is saved as well
    again, _ = saved.restore(2, state)
  np.testing.assert_array_equal(again.trainable['prompt']['table'], 1.0)


@pytest.mark.parametrize('length, embed', [(5, 32), (100, 768)])
def test_checkpoint_of_a_prompt_is_small(tmp_path, length, embed):
  with Checkpoints(tmp_path) as saved:
    saved.save(7, prompt_state(length, embed), {'seed': 0})
  prompt_bytes = 4 * length * embed
  assert size_on_disk(tmp_path) < 100_000 + 3 * prompt_bytes


def test_newest_and_best_checkpoints_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as saved:
    assert saved.best_step() is None
    for step in range(1, 7):
      best = {1: 1, 2: 2}.get(step, 2)
      extra = {'best': {'step': best}}
      saved.save(step, prompt_state(step=step), extra, {'accuracy': 0.5})
    assert saved.steps() == [2, 5, 6]
    assert saved.best_step() == 2
    saved.save(7, prompt_state(step=7), {'best': {'step': 7}})
    assert saved.steps() == [6, 7]


def test_the_newest_is_the_best_where_a_run_does_not_select(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, prompt_state(step=1), {})
    saved.save(2, prompt_state(step=2), {'best': {'step': None}})
    assert saved.best_step() == 2


def test_saving_a_step_again_renews_extra_and_metrics(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(7, prompt_state(), {'position': 1}, {'loss': 2.0})
    saved.save(7, prompt_state(), {'position': 2}, {'accuracy': 0.5})
    assert saved.extra(7) == {'position': 2}
    assert saved.metrics(7) == {'loss': 2.0, 'accuracy': 0.5}


# What was not finished.


def test_folder_without_a_manifest_is_passed_over_and_replaced(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, prompt_state(step=1), {})
    saved.save(2, prompt_state(step=2), {})
    (tmp_path / '2' / 'manifest.json').unlink()
    (tmp_path / '300').mkdir()
    (tmp_path / 'notes').mkdir()
    assert saved.latest_step() == 1
    saved.save(2, prompt_state(step=2), {'again': True})
    assert saved.latest_step() == 2
    assert_same(saved.restore(2, prompt_state())[0], prompt_state(step=2))


def test_truncated_or_missing_file_makes_a_checkpoint_incomplete(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, prompt_state(step=1), {})
    saved.save(2, prompt_state(step=2), {})
  files = sorted(p for p in (tmp_path / '2').rglob('*') if p.is_file())
  assert len(files) > 3
  for file in files:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 1, file
    file.unlink()
    assert Checkpoints(tmp_path, read_only=True).latest_step() == 1, file
    file.write_bytes(content)
  assert Checkpoints(tmp_path, read_only=True).latest_step() == 2


def test_damaged_values_are_one_line(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, prompt_state(), {})
  for file in (tmp_path / '1' / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(b'\0' * file.stat().st_size)
  with pytest.raises(UserError, match='1 is damaged') as fault:
    Checkpoints(tmp_path, read_only=True).restore(1, prompt_state())
  assert '\n' not in str(fault.value)


def test_run_killed_while_saving_leaves_complete_checkpoints(tmp_path):
  program = textwrap.dedent("""
    import itertools, sys
    from tests.training.test_checkpoints import prompt_state
    from prompt_tuning.training.checkpoints import Checkpoints
    saved = Checkpoints(sys.argv[1], keep=2)
    first = (saved.latest_step() or 0) + 1
    for step in itertools.count(first):
      saved.save(step, prompt_state(fill=step, step=step), {'step': step})
      print(step, flush=True)
  """)
  latest = 0
  for round_number in range(3):
    process = subprocess.Popen(
      [sys.executable, '-c', program, str(tmp_path)],
      stdout=subprocess.PIPE,
      cwd=REPOSITORY,
      env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
    )
    for _ in range(3):
      reported = int(process.stdout.readline())
    time.sleep(0.02 * round_number)  # somewhere in the next save
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = Checkpoints(tmp_path, read_only=True)
    latest = saved.latest_step()
    assert latest >= reported
    state, extra = saved.restore(latest, prompt_state())
    assert extra == {'step': latest} and int(state.step) == latest
    np.testing.assert_array_equal(state.trainable['prompt']['table'], latest)


# Faults of the disk and of the user.


def test_full_disk_is_one_line_and_earlier_files_stay(tmp_path, caplog):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, prompt_state(100, 768, step=1), {})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / '1').rglob('*')}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
      # No file may exceed 20 KB, so the write fails as on a full disk.
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
      with pytest.raises(UserError, match='earlier checkpoints') as fault:
        saved.save(2, prompt_state(100, 768, step=2), {})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert '\n' not in str(fault.value)
    assert caplog.text == ''
    assert [p.name for p in tmp_path.iterdir()] == ['1']
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / '1').rglob('*')}
    assert after == before
    saved.save(2, prompt_state(100, 768, step=2), {})  # space is back
    assert saved.latest_step() == 2


def test_unwritable_folder_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='choose another MODEL_DIR'):
    Checkpoints(tmp_path / 'file' / 'checkpoints')


def test_prompt_of_another_shape_is_named(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(7, prompt_state(5, 32), {})
    with pytest.raises(UserError) as fault:
      saved.restore(7, prompt_state(20, 32))
  message = str(fault.value)
  assert 'prompt/table has shape [1, 5, 32], the run needs [1, 20, 32]' in (
    message
  )
  assert '\n' not in message


def test_checkpoint_of_another_optimiser_is_named(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(7, prompt_state(), {})
    with pytest.raises(UserError, match='missing opt_state/0/trace'):
      saved.restore(7, prompt_state(optimizer=optax.sgd(0.1, momentum=0.9)))


def test_absent_step_lists_the_steps_there_are(tmp_path):
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step() is None
    with pytest.raises(UserError, match='of step 9 in .*; there are none'):
      saved.restore(9, prompt_state())
    saved.save(7, prompt_state(), {})
    with pytest.raises(UserError, match=r'there are \[7\]'):
      saved.restore(9, prompt_state())


def test_programming_faults_keep_their_traceback(tmp_path):
  with Checkpoints(tmp_path) as saved:
    with pytest.raises(TypeError, match='not a JSON value'):
      saved.save(7, prompt_state(), {'extra': object()})


def test_manifest_is_plain_json(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(7, prompt_state(), {'seed': 1})
  manifest = json.loads((tmp_path / '7' / 'manifest.json').read_text())
  assert manifest['arrays']['trainable/prompt/table'] == {
    'shape': [1, 5, 32],
    'dtype': 'float32',
  }


def test_a_flipped_bit_is_noticed_and_the_older_checkpoint_taken(
  tmp_path, caplog
):
  with Checkpoints(tmp_path) as saved:
    for step in (3, 5):
      saved.save(step, prompt_state(step=step), {'seed': 0})
  largest = max(
    (path for path in (tmp_path / '5' / 'state').rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  damaged = bytearray(largest.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  largest.write_bytes(damaged)
  again = Checkpoints(tmp_path, read_only=True)
  assert again.newest_unchanged_step() == 3
  assert '5: its contents have changed' in caplog.text
  for read in (again.trained, lambda step: again.restore(step, prompt_state())):
    with pytest.raises(UserError, match=r'contents have changed .*\[3\]'):
      read(5)


@pytest.mark.parametrize('text', ['{}', '[]', '{"files": []}', '{"files": {}}'])
def test_a_manifest_of_another_kind_is_no_checkpoint(tmp_path, text):
  (tmp_path / '3').mkdir()
  (tmp_path / '3' / 'manifest.json').write_text(text)
  assert Checkpoints(tmp_path, read_only=True).steps() == []
