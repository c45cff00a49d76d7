"""Whole runs of a tiny model: what they learn, keep, resume and refuse."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.errors import UserError
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.methods.dept import ADePT
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import uniform
from prompt_tuning.methods.reparametrization import LowRank
from prompt_tuning.methods.reparametrization import Residual
from prompt_tuning.methods.reparametrization import Superposition
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import checkpoints
from prompt_tuning.training import loop
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.trained import export
from prompt_tuning.training.trained import of_run

CONFIG = network.T5Config(
  vocab_size=32,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
MODEL = EncoderDecoderModel(CONFIG)
PROMPT = Prompt(3, 1, uniform())


@dataclasses.dataclass(frozen=True)
class ConstantAnswer:
  """Random texts whose target is always 7: a prompt can learn that."""

  batch_size: int = 4
  feature_lengths = {'inputs': 5, 'targets': 2}
  vocabulary: str | None = None
  name: str | None = None
  num_shards: int | None = None
  sleep: float = 0.0
  stop_after: int | None = None
  stop_signal: int = signal.SIGTERM

  def class_labels(self):
    return None

  def batches(self, *, virtual_tokens, seed, start, rows, num_shards):
    index = start
    while True:
      rng = np.random.default_rng((seed, index))
      text = rng.integers(2, 30, (self.batch_size, 5), dtype=np.int32)
      if virtual_tokens is not None:
        virtual = np.tile(virtual_tokens.ids(), (self.batch_size, 1))
        text = np.concatenate([virtual.astype(np.int32), text], axis=1)
      target = np.tile(np.array([7, 1], np.int32), (self.batch_size, 1))
      time.sleep(self.sleep)
      yield {
        'encoder_input_tokens': text,
        'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))),
        'decoder_target_tokens': target,
        'decoder_loss_weights': np.ones_like(target),
      }
      index += 1
      if index == self.stop_after:
        os.kill(os.getpid(), self.stop_signal)
        time.sleep(0.5)


def base():
  params = jax.jit(MODEL.init_params)(jax.random.key(5))
  flat = {
    '/'.join(key.key for key in path): np.asarray(value)
    for path, value in jax.tree_util.tree_leaves_with_path(params)
  }
  return BaseCheckpoint('tiny base', 1000, flat, {})


def run(folder, steps, **settings):
  settings = {
    'model': MODEL,
    'data': ConstantAnswer(),
    'base': base(),
    'methods': (PROMPT,),
    'train_steps_relative': steps,
    'log_period': 5,
    'checkpoint_period': 4,
    'partitioner': OneDevice(),
    'progress': False,
    **settings,
  }
  return loop.train(model_dir=folder, **settings)


class OneDevice(Partitioner):
  """All on the first of the eight devices that tests have."""

  def layout(self, workload, devices=None):
    return super().layout(workload, jax.devices()[:1])


def table_of(result):
  return result.variables['prompt']['table']


def test_a_run_learns_a_prompt_and_writes_its_files(tmp_path):
  result = run(tmp_path, 30, validation_data=ConstantAnswer(), eval_period=10)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').open()]
  trained = [line for line in lines if line['split'] == 'train']
  # Steps count on from the base's.
  assert [line['step'] for line in trained] == [
    1005,
    1010,
    1015,
    1020,
    1025,
    1030,
  ]
  assert trained[-1]['loss_per_token'] < trained[0]['loss_per_token'] - 0.3
  assert trained[0]['learning_rate'] == pytest.approx(0.3)
  for name in (
    'accuracy',
    'z_loss',
    'gradient_norm',
    'update_norm',
    'trained_norm',
    'tokens_per_second',
    'examples_per_second',
    'input_wait_share',
  ):
    assert np.isfinite(trained[-1][name])
  assert (result.step, result.best_step) == (1030, 1030)
  assert result.metrics['validation/loss'] < 2.3
  assert table_of(result).shape == (1, 3, 16)
  # What came of it, for who compares runs.
  told = json.loads((tmp_path / 'result.json').read_text())
  assert (told['base'], told['base_step']) == ('tiny base', 1000)
  assert (told['steps'], told['best_step'], told['seed']) == (30, 30, 0)
  assert told['trained_parameters'] == 3 * 16
  assert told['metrics'] == result.metrics
  assert told['methods']['prompt']['length'] == 3
  # More than the program's own, and less than this machine can have.
  assert 10**8 < told['peak_memory_bytes'] < 10**12
  assert 0 < trained[-1]['seconds_per_step'] <= told['seconds']
  assert list((tmp_path / 'tensorboard').iterdir())


def test_a_run_in_two_parts_equals_one_in_a_piece_bit_for_bit(tmp_path):
  whole = run(tmp_path / 'whole', 11)
  run(tmp_path / 'parts', 6)
  parts = run(tmp_path / 'parts', 11)
  np.testing.assert_array_equal(table_of(parts), table_of(whole))
  steps = [
    json.loads(line)['step']
    for line in (tmp_path / 'parts/metrics.jsonl').open()
  ]
  assert steps == sorted(set(steps))


def test_a_finished_run_started_again_does_nothing(tmp_path):
  first = run(tmp_path, 4)
  again = run(tmp_path, 4)
  assert again.step == first.step
  np.testing.assert_array_equal(table_of(again), table_of(first))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns_and_the_run_goes_on(tmp_path, number):
  before = signal.getsignal(number)
  whole = run(tmp_path / 'whole', 12)
  data = ConstantAnswer(stop_after=7, stop_signal=number)
  stopped = run(tmp_path / 'cut', 12, data=data)
  assert stopped.interrupted and stopped.step < 1012
  kept = checkpoints.Checkpoints(tmp_path / 'cut/checkpoints', read_only=True)
  assert kept.latest_step() == stopped.step
  assert signal.getsignal(number) is before
  resumed = run(tmp_path / 'cut', 12)
  np.testing.assert_array_equal(table_of(resumed), table_of(whole))


_KILLED_RUN = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import test_loop
result = test_loop.run(
  sys.argv[1], 60, data=test_loop.ConstantAnswer(sleep=0.02),
  checkpoint_period=3,
)
print('done', result.step)
"""


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(tmp_path):
  here = pathlib.Path(__file__).resolve().parent
  code = _KILLED_RUN.format(root=str(here.parent.parent), here=str(here))
  whole = run(tmp_path / 'whole', 60)
  rng = np.random.default_rng(0)
  folder = tmp_path / 'killed'
  kills = during = 0
  for attempt in range(60):
    process = subprocess.Popen(
      [sys.executable, '-c', code, str(folder)],
      stdout=subprocess.PIPE,
      env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
    )
    # Wait for the first checkpoint of this start, then some random moment more;
    # every fourth is killed wherever it is, compiling as it may be.
    seen = checkpoints_in(folder)
    deadline = time.monotonic() + (120 if attempt % 4 else rng.uniform(1, 4))
    while time.monotonic() < deadline and process.poll() is None:
      if checkpoints_in(folder) != seen:
        break
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.15))
    if process.poll() is None:
      process.kill()
      kills += 1
      during += checkpoints_in(folder) != seen
    out, _ = process.communicate()
    if b'done 1060' in out:
      break
  assert kills >= 10 and during >= 5, (kills, during)
  final = run(folder, 60, checkpoint_period=3)
  assert final.step == 1060
  np.testing.assert_array_equal(table_of(final), table_of(whole))


def checkpoints_in(folder):
  return sorted(path.name for path in folder.glob('checkpoints/[0-9]*'))


class FakeEvaluation:
  """Scores as listed, one an evaluation."""

  def __init__(self, scores):
    self.scores = scores

  def build(self, model, virtual_tokens, output_dir, layout):
    remaining = iter(self.scores)

    class Evaluator:
      def evaluate(self, variables, step):
        return {'task/score': next(remaining)}

    return Evaluator()


def test_the_best_prompt_is_returned_and_patience_ends_the_run(tmp_path):
  settings = {
    'evaluation': FakeEvaluation([1.0, 3.0, 2.0, 2.0, 9.0]),
    'eval_period': 2,
    'best_metric': 'task/score',
    'checkpoint_period': 100,
    'keep_checkpoints': 1,
  }
  result = run(tmp_path / 'a', 20, early_stopping_patience=2, **settings)
  assert (result.best_step, result.step) == (1004, 1008)
  assert result.metrics == {'task/score': 3.0}
  np.testing.assert_array_equal(
    table_of(result), table_of(run(tmp_path / 'b', 4))
  )
  # The same command again finds the run ended.
  settings['evaluation'] = FakeEvaluation([])
  again = run(tmp_path / 'a', 20, early_stopping_patience=2, **settings)
  assert (again.best_step, again.step) == (1004, 1008)


@pytest.mark.parametrize('scores', [[3, 3, 1, 1, 3], [np.nan, 3, 1, 1, 1]])
def test_ties_and_undefined_scores_do_not_lose_the_best(tmp_path, scores):
  result = run(
    tmp_path,
    10,
    evaluation=FakeEvaluation([float(score) for score in scores]),
    eval_period=2,
    best_metric='task/score',
    checkpoint_period=2,
    keep_checkpoints=1,
  )
  first = 1002 + 2 * scores.index(3)
  assert (result.best_step, result.step) == (first, 1010)
  kept = checkpoints.Checkpoints(tmp_path / 'checkpoints', read_only=True)
  assert kept.steps() == [first, 1010]


def test_a_loss_is_best_where_it_is_lowest(tmp_path):
  result = run(
    tmp_path,
    6,
    validation_data=ConstantAnswer(),
    eval_period=2,
    best_metric='validation/loss',
  )
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').open()]
  losses = {
    line['step']: line['validation/loss']
    for line in lines
    if line['split'] == 'validation'
  }
  assert result.best_step == min(losses, key=losses.get)


def test_a_prompt_trained_with_its_model_names_that_model(tmp_path):
  run(tmp_path, 2, methods=(PROMPT, ModelTuning()), learning_rate=1e-3)
  export(tmp_path, tmp_path / 'out')
  _, metadata = load_prompt(tmp_path / 'out/prompt.safetensors')
  tuned = load_checkpoint(tmp_path / 'out')
  assert metadata['base_fingerprint'] == tuned.fingerprint()
  assert metadata['base_fingerprint'] != base().fingerprint()
  assert tuned.step == 1002


def test_model_tuning_trains_the_whole_model(tmp_path):
  result = run(tmp_path, 3, methods=(ModelTuning(),), learning_rate=1e-3)
  start = base().arrays
  for path, value in jax.tree_util.tree_leaves_with_path(
    result.variables['params']
  ):
    name = '/'.join(key.key for key in path)
    assert (value != start[name]).any(), name


def test_any_optax_optimiser_trains_with_a_schedule(tmp_path):
  # Schedules count from the run's start, whatever the base's step.
  seen = optax.linear_schedule(0.1, 0.0, 10)
  with jax.numpy_dtype_promotion('standard'):  # optax needs it
    result = run(tmp_path, 5, optimizer=optax.adamw, learning_rate=seen)
  line = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert line['learning_rate'] == pytest.approx(0.06)
  assert np.isfinite(table_of(result)).all()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good(
  tmp_path,
):
  explode = lambda step: jnp.where(step < 4, 0.3, 1e38)
  run(tmp_path, 4, learning_rate=explode)
  with pytest.raises(UserError, match=r'not finite at step .*1004 is kept'):
    run(tmp_path, 30, learning_rate=explode)
  kept = checkpoints.Checkpoints(tmp_path / 'checkpoints', read_only=True)
  assert 1004 in kept.steps()


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'base': None}, 'INITIAL_CHECKPOINT_PATH'),
    ({'methods': ()}, 'methods is empty'),
    ({'methods': (PROMPT, PROMPT)}, "share the collection 'prompt'"),
    (
      {'methods': (PROMPT, PerLayerPrompt())},
      'prompt and per_layer both put virtual tokens',
    ),
    (
      {'methods': (PerLayerPrompt(2), Lora(2))},
      'per_layer computes with .* past what lora make of them; give it alone',
    ),
    ({'methods': (Lora(targets=('q',)),)}, "Lora.targets has 'q'"),
    (
      {
        'methods': (PROMPT, ModelTuning()),
        'model': EncoderDecoderModel(
          dataclasses.replace(CONFIG, attention='tpu_kernel')
        ),
      },
      "attention='tpu_kernel' takes position biases as frozen",
    ),
    (
      {
        'model': EncoderDecoderModel(
          dataclasses.replace(CONFIG, attention='gpu_kernel')
        ),
      },
      'attention=gpu_kernel does not run on cpu; formula does',
    ),
    (
      {'train_steps': 1000, 'train_steps_relative': None},
      'not beyond the base',
    ),
    ({'train_steps': 1100}, 'either TRAIN_STEPS_RELATIVE'),
    ({'train_steps_relative': None}, 'either TRAIN_STEPS_RELATIVE'),
    ({'microbatches': 3}, 'BATCH_SIZE 4 does not divide'),
    ({'best_metric': 'a/b'}, 'needs an evaluation'),
    ({'best_mode': 'most'}, "'max' or 'min'"),
    ({'early_stopping_patience': 3}, 'needs a best_metric'),
    ({'log_period': 0}, 'log_period must be 1 or more, got 0'),
    ({'frozen_dtype': 'bf16'}, "float32, bfloat16 or int8, got 'bf16'"),
    (
      {
        'best_metric': 'x/y',
        'evaluation': FakeEvaluation([1.0]),
        'eval_period': 1,
      },
      "'x/y' is not among the metrics of the evaluation: task/score",
    ),
  ],
)
def test_contradictions_are_named_before_the_first_step(
  tmp_path, settings, message
):
  with pytest.raises(UserError, match=message) as caught:
    run(tmp_path, 5, **settings)
  assert '\n' not in str(caught.value)


def test_a_folder_of_another_run_is_refused(tmp_path):
  run(tmp_path, 2)
  with pytest.raises(UserError, match='another seed: 0, this one has 1'):
    run(tmp_path, 4, seed=1)
  with pytest.raises(UserError, match='another prompt length: 3, this one'):
    run(tmp_path, 4, methods=(Prompt(5, 1, uniform()),))
  adamw = functools.partial(optax.adamw, weight_decay=0.5)
  with pytest.raises(UserError) as caught:
    run(
      tmp_path,
      2,  # finished: nothing old comes back as new
      learning_rate=0.1,
      optimizer=adamw,
      methods=(Prompt(3, 1, uniform(high=0.7)),),
    )
  assert str(caught.value) == (
    f'MODEL_DIR {tmp_path} holds a run with another learning_rate: 0.3, this'
    ' one has 0.1; another prompt initializer high: 0.5, this one has 0.7;'
    ' another optimizer: adafactor, this one has chain; choose another'
    ' MODEL_DIR, or give what it has'
  )
  longer = run(tmp_path, 4, log_period=1, checkpoint_period=1)
  assert longer.step == 1004


def test_a_prompts_checkpoint_is_small(tmp_path):
  run(tmp_path, 4)
  folder = tmp_path / 'checkpoints' / '1004'
  size = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
  assert size < 100_000 + 3 * (3 * 16 * 4)


METHODS = {
  'per_layer': (PerLayerPrompt(2),),
  'several': (PROMPT, Lora(2), IA3(learning_rate_scale=0.1)),
  'prefix': (Prefix(2, ('encoder', 'decoder', 'cross'), hidden=3),),
  'dept': (DePT(3, 2, inputs_length=5), Prefix(2, ('cross',)), Lora(2)),
  'adept': (ADePT(3, 2),),
  'residual': (Prompt(3, 1, uniform(), reparametrization=Residual(4)),),
  'low_rank': (Prompt(3, 1, uniform(), reparametrization=LowRank(2)),),
  'superposition': (
    Prompt(3, 1, uniform(), reparametrization=Superposition(4)),
  ),
}


@pytest.mark.parametrize(
  ('methods', 'scan'),
  [(methods, False) for methods in METHODS.values()]
  + [(METHODS[name], True) for name in ('per_layer', 'several', 'prefix')],
  ids=[*METHODS, 'per_layer scanned', 'several scanned', 'prefix scanned'],
)
def test_methods_train_resume_and_leave_their_files(tmp_path, methods, scan):
  config = dataclasses.replace(CONFIG, num_encoder_layers=2, scan_layers=scan)
  model = EncoderDecoderModel(config)
  params = jax.jit(model.init_params)(jax.random.key(5))
  start = BaseCheckpoint('two layers', 1000, parameters.flatten(params))
  settings = {'model': model, 'base': start, 'methods': methods}
  whole = run(tmp_path / 'whole', 4, **settings)
  run(tmp_path / 'parts', 2, **settings)
  parts = run(tmp_path / 'parts', 4, **settings)
  for one, other in zip(
    jax.tree.leaves(whole.variables),
    jax.tree.leaves(parts.variables),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)
  folder = tmp_path / 'whole'
  names = {method.collection for method in methods}
  assert set(whole.variables) == names
  written = {pathlib.Path(file).parent.name for file in whole.files}
  assert written == names
  for one in of_run(folder):
    name = one.method.collection
    (loaded,) = load_trained(folder / name / f'{name}.safetensors')
    assert loaded.method.settings() == one.method.settings()
    assert loaded.facts['base_fingerprint'] == start.fingerprint()
    # Layers are unrolled in files, whatever the run's form.
    assert not any(map(parameters.is_scanned, loaded.arrays))
    assert set(loaded.arrays) == set(one.arrays)
    for path, array in loaded.arrays.items():
      np.testing.assert_array_equal(array, one.arrays[path])
