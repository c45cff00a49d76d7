"""Runs of each method: two parts as one, files as arrays, plain prompts."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop.prompts import attempt_attention
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.interop.prompts import save_prompt
from prompt_tuning.interop.prompts import source_prompts
from prompt_tuning.interop.t5x_host import is_trained
from prompt_tuning.methods.adapters import Adapters
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.hard_prompt import HardPrompt
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.nearest_pieces import word_pieces
from prompt_tuning.methods.norm_scales import NormScales
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import uniform
from prompt_tuning.methods.tied_prompt import TiedPrompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.serving import loading
from prompt_tuning.training import loop
from prompt_tuning.training import tensor_files
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.trained import export

CONFIG = network.T5Config(192, 16, 2, 8, 32, 1, 1)
MODEL = EncoderDecoderModel(CONFIG)
PROMPT = Prompt(3, 1, uniform())
TWO = Prompt(3, 2, uniform())


def method_of(name, vocabulary):
  return {
    'hard_prompt': HardPrompt(PROMPT, pieces=word_pieces(vocabulary)),
    'tied_prompt': TiedPrompt(PROMPT, 'bad dull review', 0.5),
    'multitask_prompt': MultitaskPrompt(TWO, rank=2),
    'attempt': Attempt(TWO, num_sources=2, sources=uniform(), size=4),
    'norm_scales': NormScales(),
    'adapters': Adapters(3),
  }[name]


NAMES = (
  *('hard_prompt', 'tied_prompt', 'multitask_prompt', 'attempt'),
  *('norm_scales', 'adapters'),
)
PLAIN = ('hard_prompt', 'tied_prompt', 'multitask_prompt')


@dataclasses.dataclass(frozen=True)
class Alternating:
  """Random texts; the target is 7, or 8 for those of the second prompt."""

  vocabulary: str
  batch_size: int = 4
  feature_lengths = {'inputs': 5, 'targets': 2}
  name: str | None = None
  num_shards: int | None = None

  def class_labels(self):
    return None

  def batches(self, *, virtual_tokens, seed, start, rows, num_shards):
    index = start
    while True:
      rng = np.random.default_rng((seed, index))
      text = rng.integers(3, 60, (self.batch_size, 5), dtype=np.int32)
      number = np.arange(self.batch_size) % 2
      if virtual_tokens is not None:
        number %= virtual_tokens.num_prompts
        virtual = virtual_tokens.table()[number].astype(np.int32)
        text = np.concatenate([virtual, text], axis=1)
      target = np.stack([7 + number, np.ones_like(number)], axis=1)
      target = target.astype(np.int32)
      yield {
        'encoder_input_tokens': text,
        'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))),
        'decoder_target_tokens': target,
        'decoder_loss_weights': np.ones_like(target),
      }
      index += 1


@functools.cache
def base():
  params = jax.jit(MODEL.init_params)(jax.random.key(5))
  flat = {
    '/'.join(key.key for key in path): np.asarray(value)
    for path, value in jax.tree_util.tree_leaves_with_path(params)
  }
  return BaseCheckpoint('tiny base', 1000, flat, {})


class OneDevice(Partitioner):
  """The first of the eight devices that tests have."""

  def layout(self, workload, devices=None):
    return super().layout(workload, jax.devices()[:1])


def run(folder, method, steps, vocabulary, **settings):
  return loop.train(
    model_dir=folder,
    model=MODEL,
    data=Alternating(vocabulary),
    base=base(),
    methods=method if isinstance(method, tuple) else (method,),
    train_steps_relative=steps,
    log_period=1,
    checkpoint_period=2,
    partitioner=OneDevice(),
    progress=False,
    **settings,
  )


def logits_of(trained, number=0):
  loaded = loading.load(MODEL, base(), trained, dtype='float32')
  text = np.array([[9, 20, 30, 4, 1]])
  if loaded.virtual_tokens is not None:
    ids = loaded.virtual_tokens.ids(number)[None]
    text = np.concatenate([ids, text], axis=1)
  batch = {
    'encoder_input_tokens': jnp.asarray(text, jnp.int32),
    'decoder_input_tokens': jnp.array([[0, 7]], jnp.int32),
    'decoder_target_tokens': jnp.array([[7, 1]], jnp.int32),
  }
  return np.asarray(jax.jit(loaded.model.logits)(loaded.variables, batch))


@functools.cache
def logits_of_the_base():
  return logits_of(())


def lines_of(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').open()]


@pytest.mark.parametrize('name', NAMES)
def test_a_run_in_two_parts_is_one_and_its_files_hold_it(
  tmp_path, tiny_vocabulary, name
):
  method = method_of(name, tiny_vocabulary)
  whole = run(tmp_path / 'whole', method, 4, tiny_vocabulary)
  run(tmp_path / 'parts', method, 2, tiny_vocabulary)
  parts = run(tmp_path / 'parts', method, 4, tiny_vocabulary)
  assert parts.step == 1004
  trained = whole.variables[name]
  for one, other in zip(
    jax.tree.leaves(trained), jax.tree.leaves(parts.variables[name])
  ):
    np.testing.assert_array_equal(one, other)

  # The run, its files and its export are one.
  export(tmp_path / 'whole', tmp_path / 'exported')
  found = [
    load_trained(path)
    for path in (
      tmp_path / 'whole',
      tmp_path / f'whole/{name}',
      tmp_path / 'exported',
    )
  ]
  for (one,) in found:
    assert type(one.method) is type(method)
    for path, array in one.arrays.items():
      np.testing.assert_array_equal(array, found[0][0].arrays[path])
  number = int(name in ('multitask_prompt', 'attempt'))
  logits = logits_of(found[2], number)
  assert np.abs(logits - logits_of_the_base()).max() > 1e-4  # it acts

  # For readers that know prompts alone.
  if name not in PLAIN:
    assert not list((tmp_path / 'exported').glob('prompt.*'))
    return
  table, facts = load_prompt(tmp_path / 'exported')
  np.testing.assert_array_equal(
    np.load(tmp_path / 'exported/prompt.npy').reshape(table.shape), table
  )
  assert facts['plain_of'] == name
  plain = load_trained(tmp_path / 'exported/prompt.npy')
  np.testing.assert_allclose(logits_of(plain, number), logits, atol=1e-5)


def test_a_hard_prompt_is_pieces_that_may_be_chosen_and_says_its_text(
  tmp_path, tiny_vocabulary
):
  method = method_of('hard_prompt', tiny_vocabulary)
  run(tmp_path, method, 3, tiny_vocabulary)
  (found,) = load_trained(tmp_path / 'hard_prompt')
  vocabulary = load_vocabulary(tiny_vocabulary)
  ids = np.asarray(found.arrays['ids'][...]).astype(int)
  for token in ids.ravel():
    assert vocabulary.piece(token).startswith('▁')
    assert vocabulary.piece(token)[1:].isalpha()
  embedding = base().arrays['token_embedder/embedding']
  np.testing.assert_array_equal(found.arrays['rows'], embedding[ids])
  assert found.facts['ids'] == str(ids.tolist())
  assert found.facts['text'] == vocabulary.decode(ids[0])
  assert vocabulary.encode(found.facts['text']) == ids[0].tolist()
  assert found.facts['texts_that_give_their_ids_back'] == '1 of 1'
  # What a reader of plain prompts is told too.
  _, texts = tensor_files.read(tmp_path / 'hard_prompt/prompt.safetensors')
  assert texts['text'] == found.facts['text']


def test_arrays_of_rate_0_are_kept_whatever_the_optimiser_does(
  tmp_path, tiny_vocabulary
):
  """Weight decay does not reach them."""
  decaying = functools.partial(optax.adamw, weight_decay=0.5)
  method = method_of('attempt', tiny_vocabulary)
  settings = {'optimizer': decaying, 'learning_rate': 0.3}
  with jax.numpy_dtype_promotion('standard'):  # optax needs it
    runs = [
      run(tmp_path, method, steps, tiny_vocabulary, **settings)
      for steps in (1, 3)
    ]
  first, last = (one.variables['attempt'] for one in runs)
  for name in first:
    equal = (first[name] == last[name]).all()
    assert equal == (name == 'sources')
  # Another run begins with what this one's attention is.
  params = {'token_embedder': {'embedding': jnp.zeros((192, 16))}}
  other = Attempt(
    *(PROMPT, 3, uniform(), 4), attention=attempt_attention(tmp_path)
  )
  found = other.init(jax.random.key(0), params, TaskText())
  for name in ('down', 'up', 'norm_scale', 'norm_bias'):
    np.testing.assert_array_equal(found[name], last[name])
  assert found['table'].shape == (1, 3, 16)
  assert found['sources'].shape == (3, 3, 16)
  with pytest.raises(
    UserError, match=r'has down \[16, 4\], .* \[16, 5\]: bind'
  ):
    wider = dataclasses.replace(other, size=5)
    wider.init(jax.random.key(0), params, TaskText())


def test_a_tied_prompt_goes_to_its_text_as_its_weight_grows(
  tmp_path, tiny_vocabulary
):
  embedding = base().arrays['token_embedder/embedding']
  ids = load_vocabulary(tiny_vocabulary).encode('bad dull review')
  distances = []
  for weight in (0.0, 50.0):
    method = TiedPrompt(PROMPT, 'bad dull review', weight)
    folder = tmp_path / str(weight)
    settings = {'optimizer': optax.sgd, 'learning_rate': 0.02}
    result = run(folder, method, 12, tiny_vocabulary, **settings)
    table = result.variables['tied_prompt']['table']
    distance = np.mean(np.sum((table[0] - embedding[ids]) ** 2, -1))
    distances.append(distance)
    assert ('penalty' in lines_of(folder)[-1]) == (weight > 0)
    facts = load_trained(folder / 'tied_prompt')[0].facts
    assert facts['tied_to'] == 'bad dull review'
    assert float(facts['squared_distance']) == pytest.approx(distance, rel=1e-4)
  assert distances[1] < 1e-2 < 1 < distances[0]


def test_the_penalty_counts_once_however_a_batch_is_divided(
  tmp_path, tiny_vocabulary
):
  method = TiedPrompt(PROMPT, 'bad dull review', 2.0)
  settings = {'optimizer': optax.sgd, 'learning_rate': 0.02}
  found = [
    run(
      tmp_path / str(n), method, 2, tiny_vocabulary, microbatches=n, **settings
    )
    for n in (1, 2)
  ]
  tables = [one.variables['tied_prompt']['table'] for one in found]
  np.testing.assert_allclose(*tables, atol=1e-6)
  embedding = base().arrays['token_embedder/embedding']
  ids = load_vocabulary(tiny_vocabulary).encode('bad dull review')
  # The first step's penalty by hand, of the table that both began with.
  one, other = (lines_of(tmp_path / str(n)) for n in (1, 2))
  start = found[0].variables['tied_prompt']
  assert one[0]['penalty'] == pytest.approx(other[0]['penalty'], rel=1e-6)
  np.testing.assert_array_equal(start['ids'], np.float32(ids))
  np.testing.assert_array_equal(start['text_rows'], embedding[ids])
  arrays = {name: jnp.asarray(array) for name, array in start.items()}
  by_hand = 2.0 * np.sum((tables[0][0] - embedding[ids]) ** 2) / 3
  assert float(method.penalty(arrays, {})) == pytest.approx(by_hand)


def test_trained_prompts_teach_however_a_batch_is_divided(
  tmp_path, tiny_vocabulary
):
  rng = np.random.default_rng(0)
  paths = [tmp_path / 'a', tmp_path / 'b']
  for path in paths:
    save_prompt(path, rng.normal(size=(3, 16)).astype('f'), {})
  method = MultitaskPrompt(TWO, teachers=source_prompts(paths))
  settings = {'optimizer': optax.sgd, 'learning_rate': 0.02}
  found = []
  for parts in (1, 2):
    folder = tmp_path / str(parts)
    run(folder, method, 2, tiny_vocabulary, microbatches=parts, **settings)
    (trained,) = load_trained(folder / 'multitask_prompt')
    assert set(trained.arrays) == {'shared', 'columns', 'rows'}
    found.append((lines_of(folder), trained.arrays))
  (lines, arrays), (in_parts, others) = found
  for one, other in zip(lines, in_parts):
    assert one['penalty'] > 0.01
    assert one['penalty'] == pytest.approx(other['penalty'], rel=1e-5)
  for name, array in arrays.items():
    np.testing.assert_allclose(array, others[name], atol=1e-6)


def test_a_text_of_another_length_is_told(tiny_vocabulary):
  params = {'token_embedder': {'embedding': jnp.zeros((192, 16))}}
  encode = load_vocabulary(tiny_vocabulary).encode
  with pytest.raises(UserError, match='bind PROMPT_LENGTH = 2'):
    TiedPrompt(PROMPT, 'bad dull').init(
      jax.random.key(0), params, TaskText(encode)
    )


def test_sources_are_files_of_prompts(tmp_path):
  rng = np.random.default_rng(0)
  tables = rng.normal(size=(2, 3, 16)).astype('f')
  for number, table in enumerate(tables):
    save_prompt(tmp_path / str(number), table, {})
  paths = [tmp_path / '0', tmp_path / '1']
  params = {'token_embedder': {'embedding': jnp.zeros((192, 16))}}

  def start(count, length=3):
    prompt = Prompt(length, 1, uniform())
    method = Attempt(prompt, count, sources=source_prompts(paths), size=4)
    return method.init(jax.random.key(0), params, TaskText())

  np.testing.assert_array_equal(start(2)['sources'], tables)
  with pytest.raises(UserError, match='bind Attempt.num_sources = 2'):
    start(3)
  with pytest.raises(UserError, match=r'has shape \[1, 3, 16\], \[1, 4, 16\]'):
    start(2, length=4)


def test_the_attention_of_attempt_has_a_rate_of_its_own(tmp_path):
  method = Attempt(PROMPT, attention_rate=0.1, learning_rate_scale=2.0)
  rates = {'table': 2.0, 'sources': 0.0, 'down': 0.2, 'norm_bias': 0.2}
  assert {name: method.rate(name) for name in rates} == rates
  save_prompt(tmp_path, np.ones((3, 16), np.float32), {})
  with pytest.raises(UserError, match='holds prompt, attempt is required'):
    attempt_attention(tmp_path)


@pytest.mark.parametrize('method', [Attempt(PROMPT), PerLayerPrompt(3)])
def test_packed_examples_are_refused_by_some(method):
  packed = {
    'encoder_input_tokens': jnp.ones((1, 4), jnp.int32),
    'encoder_segment_ids': jnp.ones((1, 4), jnp.int32),
    'decoder_input_tokens': jnp.zeros((1, 2), jnp.int32),
    'decoder_target_tokens': jnp.ones((1, 2), jnp.int32),
  }
  model = dataclasses.replace(MODEL, methods=(method,))
  with pytest.raises(UserError, match='TaskData.pack = False'):
    model.logits({'params': {}, method.collection: {}}, packed)


def test_several_methods_act_in_their_order_wherever_they_are_read(
  tmp_path, tiny_vocabulary
):
  """LoRA outside of IA3 is another network than IA3 outside of LoRA."""
  ordered = (Lora(2, targets=('value',)), IA3(('value',), ()))
  kwargs = {'learning_rate': 0.3}
  result = run(tmp_path / 'run', ordered, 4, tiny_vocabulary, **kwargs)
  model = dataclasses.replace(MODEL, methods=ordered)
  variables = {'params': parameters.nest(base().arrays), **result.variables}
  batch = {
    'encoder_input_tokens': jnp.array([[9, 20, 30, 4, 1]], jnp.int32),
    'decoder_input_tokens': jnp.array([[0, 7]], jnp.int32),
    'decoder_target_tokens': jnp.array([[7, 1]], jnp.int32),
  }
  wanted = jax.jit(model.logits)(variables, batch)
  export(tmp_path / 'run', tmp_path / 'exported')
  without = tmp_path / 'without_checkpoints'
  shutil.copytree(tmp_path / 'run', without)
  shutil.rmtree(without / 'checkpoints')
  for folder in (tmp_path / 'run', tmp_path / 'exported', without):
    found = load_trained(folder)
    names = [one.method.collection for one in found]
    assert names == ['lora', 'ia3'], folder
    np.testing.assert_allclose(logits_of(found), wanted, atol=1e-5)
  other = dataclasses.replace(model, methods=ordered[::-1])
  assert np.abs(jax.jit(other.logits)(variables, batch) - wanted).max() > 1e-4
  with pytest.raises(UserError, match='list of methods'):
    run(tmp_path / 'run', ordered[::-1], 6, tiny_vocabulary, **kwargs)

  # Over an export of others nothing of them stays.
  run(tmp_path / 'prompt', PROMPT, 2, tiny_vocabulary)
  export(tmp_path / 'prompt', tmp_path / 'exported', overwrite=True)
  (one,) = load_trained(tmp_path / 'exported')
  assert one.method.collection == 'prompt'


def test_a_run_makes_a_damaged_checkpoint_again(tmp_path, tiny_vocabulary):
  whole = run(tmp_path, PROMPT, 4, tiny_vocabulary)
  folder = tmp_path / 'checkpoints/1004/state'
  files = [path for path in folder.rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  damaged = bytearray(largest.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  largest.write_bytes(damaged)
  again = run(tmp_path, PROMPT, 4, tiny_vocabulary)
  for one, other in zip(
    jax.tree.leaves(again.variables), jax.tree.leaves(whole.variables)
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ('method', 'said'),
  [
    (Lora(2, targets=('quer', 'value')), "Lora.targets has 'quer'"),
    (IA3(('key', 'valeu'), ()), "IA3.outputs has 'valeu'"),
    (IA3(('key', 'wo'), ('wo',)), "'wo' is in both lists"),
  ],
)
def test_projections_are_those_that_there_are(method, said):
  with pytest.raises(UserError, match=said):
    method.init(jax.random.key(0), base().arrays, TaskText())


def test_a_new_task_starts_from_a_multitask_prompt(tmp_path):
  params = {'token_embedder': {'embedding': jnp.zeros((192, 16))}}
  key = jax.random.key(0)
  trained = MultitaskPrompt(TWO).init(key, params, TaskText())
  new = MultitaskPrompt(Prompt(3, 1, uniform()), source=lambda: trained)
  found = new.init(jax.random.key(1), params, TaskText())
  np.testing.assert_array_equal(found['shared'], trained['shared'])
  np.testing.assert_allclose(
    found['rows'][0], np.mean(trained['rows'], axis=0), atol=1e-7
  )
  with pytest.raises(UserError, match='bind its length and rank'):
    MultitaskPrompt(TWO, rank=2, source=lambda: trained).init(
      key, params, TaskText()
    )


def test_all_tasks_start_near_the_shared_prompt():
  params = {'token_embedder': {'embedding': jnp.zeros((192, 16))}}
  for rank in (1, 3):
    method = MultitaskPrompt(TWO, rank)
    arrays = method.init(jax.random.key(0), params, TaskText())
    ratio = method.table(arrays) / arrays['shared'][None]
    assert 0.8 < ratio.min() and ratio.max() < 1.2
    assert (ratio[0] != ratio[1]).all()


def test_t5x_is_not_given_what_its_step_does_not_know():
  for method in (HardPrompt(PROMPT), TiedPrompt(PROMPT)):
    with pytest.raises(UserError, match='train it with prompt-tuning train'):
      is_trained((method,))
  selects = is_trained((Lora(), Adapters(), Attempt(PROMPT)))
  assert selects('/attempt/table', None)
  assert not selects('/attempt/sources', None)
