"""PEFT adapters, serving tables, and conversion between formats."""

import dataclasses
import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning import cli
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.interop.prompts import save_prompt
from prompt_tuning.methods.hard_prompt import HardPrompt
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.norm_scales import NormScales
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.serving import loading
from prompt_tuning.training.trained import Trained
from prompt_tuning.training.trained import save_trained


@pytest.fixture
def table():
  return np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32)


def save_peft(folder, table):
  trained = Trained(Prompt(len(table)), {'table': table[None]})
  config = network.T5Config(8192, 192, 4, 48, 512, 4, 2)
  return adapters.save_peft(folder, trained, base='t5', config=config)


def adapter(folder, **change):
  """Rewrites an adapter's configuration."""
  file = folder / 'adapter_config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_an_adapter_comes_back(tmp_path, table):
  save_peft(tmp_path, table)
  found, facts = load_prompt(tmp_path)
  np.testing.assert_array_equal(found, table[None])
  assert facts == {'base': 't5', 'format': 'peft PROMPT_TUNING'}
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['num_transformer_submodules'] == 1
  stored = safetensors.numpy.load_file(tmp_path / 'adapter_model.safetensors')
  assert stored.keys() == {'prompt_embeddings'}


@pytest.mark.parametrize('kind', ['PROMPT_TUNING', 'P_TUNING'])
def test_the_first_half_is_the_encoders(tmp_path, table, kind):
  save_peft(tmp_path, table)
  both = np.concatenate([table, table + 1])
  safetensors.numpy.save_file(
    {'prompt_embeddings': both}, tmp_path / 'adapter_model.safetensors'
  )
  adapter(tmp_path, num_transformer_submodules=None, peft_type=kind)
  np.testing.assert_array_equal(load_prompt(tmp_path)[0][0], table)


def refused(path, *words):
  with pytest.raises(UserError) as fault:
    load_prompt(path)
  message = str(fault.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def test_other_adapters_and_shapes_are_refused(tmp_path, table):
  save_peft(tmp_path, table)
  adapter(tmp_path, num_virtual_tokens=4)
  refused(tmp_path, 'shape [5, 192]', '4 virtual tokens')
  adapter(tmp_path, peft_type='ADALORA')
  refused(tmp_path, 'type ADALORA', 'PREFIX_TUNING, LORA')
  (tmp_path / 'adapter_config.json').write_text('{}')
  refused(tmp_path, 'adapter_config.json', 'peft_type')
  save_peft(tmp_path, table)
  (tmp_path / 'adapter_model.safetensors').rename(
    tmp_path / 'adapter_model.bin'
  )
  refused(tmp_path, 'safe_serialization=True')


def test_a_serving_table_pads_with_zeros(tmp_path, table):
  file = adapters.save_serving_table(
    tmp_path / 'table.npy', [table, table[:2] + 1]
  )
  stored = np.load(file, allow_pickle=False)
  assert stored.shape == (2, 5, 192) and stored.dtype == np.float32
  np.testing.assert_array_equal(stored[0], table)
  np.testing.assert_array_equal(stored[1, :2], table[:2] + 1)
  assert not stored[1, 2:].any()
  with pytest.raises(UserError, match='one embed'):
    adapters.save_serving_table(tmp_path / 'a.npy', [table, table[:, :9]])


@given(st.binary(max_size=120), st.binary(max_size=120))
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_the_readers(tmp_path_factory, config, weights):
  folder = tmp_path_factory.mktemp('fuzz')
  (folder / 'adapter_config.json').write_bytes(config)
  (folder / 'adapter_model.safetensors').write_bytes(weights)
  (folder / 'prompt.npy').write_bytes(b'\x93NUMPY' + weights)
  (folder / 'other.safetensors').write_bytes(weights)
  for path in (folder, folder / 'prompt.npy', folder / 'other.safetensors'):
    try:
      load_prompt(path)
    except UserError as error:
      assert '\n' not in str(error)


# Conversion.


@pytest.fixture
def prompt(tmp_path, table):
  save_prompt(tmp_path / 'prompt', table, {'task': 'bbc', 'step': 7})
  return str(tmp_path / 'prompt')


def run(*words):
  return cli.main([str(word) for word in words])


def test_a_model_goes_through_every_format_unchanged(tmp_path, capsys):
  steps = ['t5_1_1_mini']
  for to in ('hugging_face', 't5x', 'safetensors'):
    steps.append(str(tmp_path / to))
    assert run('convert', steps[-2], steps[-1], f'--to={to}') == 0
    capsys.readouterr()
    assert run('diff', steps[0], steps[-1]) == 0
    assert capsys.readouterr().out == ''
    assert load_checkpoint(steps[-1]).step == load_checkpoint(steps[0]).step


def test_a_prompt_goes_through_every_format_unchanged(tmp_path, prompt, capsys):
  folded = tmp_path / 't5x'
  assert (
    run('convert', 't5_1_1_mini', folded, '--to=t5x', f'--prompt={prompt}') == 0
  )
  peft = tmp_path / 'peft'
  assert run('convert', folded, peft, '--to=peft', '--base=t5_1_1_mini') == 0
  back = tmp_path / 'numpy'
  assert run('convert', peft, back, '--to=numpy') == 0
  capsys.readouterr()
  for path in (peft, back, back / 'prompt.npy'):
    assert run('diff', prompt, path) == 0
  table = tmp_path / 'table.npy'
  assert run('convert', prompt, back, table, '--to=serving_table') == 0
  assert np.load(table).shape == (2, 5, 192)
  config = json.loads((peft / 'adapter_config.json').read_text())
  assert config['num_layers'] == 4 and config['num_attention_heads'] == 4


def test_differences_are_counted(tmp_path, prompt, table, capsys):
  changed = table.copy()
  changed[0, 0] += 1
  save_prompt(tmp_path / 'other', changed, {})
  assert run('diff', prompt, tmp_path / 'other') == 1
  assert (
    'table: 1 of 960 values differ, by 1 at most' in capsys.readouterr().out
  )
  save_prompt(tmp_path / 'short', table[:2], {})
  assert run('diff', prompt, tmp_path / 'short') == 1
  assert 'shape [1, 5, 192] and [1, 2, 192]' in capsys.readouterr().out
  assert run('diff', prompt, 't5_1_1_mini') == 2
  assert 'is a prompt' in capsys.readouterr().err


def test_inspect_says_what_is_there_and_compares_prompts(
  tmp_path, prompt, table, capsys
):
  save_prompt(tmp_path / 'other', -table, {})
  assert run('inspect', 't5_1_1_mini', prompt, tmp_path / 'other') == 0
  out = capsys.readouterr().out
  assert '6,098,176 parameters in 70 arrays' in out
  assert 'step: ' in out and 'fingerprint: ' in out
  assert 'task: bbc' in out
  norms = np.linalg.norm(table, axis=-1)
  assert f'row norms {norms.min():.4g} to {norms.max():.4g}' in out
  assert 'cosine of rows -1.000 to -1.000' in out
  distance = 2 * np.linalg.norm(table)
  assert f'distance {distance:.4g}' in out


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['convert', 'nothing', 'out', '--to=t5x'], 'no checkpoint nothing'),
    (['convert', 'PROMPT', 'out', '--to=peft'], 'needs --base'),
    (
      ['convert', 't5_1_1_mini', 'out', '--to=prompt_tokens'],
      'needs --prompt',
    ),
    (
      ['convert', 't5_1_1_mini', 'out', '--to=safetensors', '--prompt=PROMPT'],
      'no place for a prompt',
    ),
    (
      ['convert', 't5_1_1_mini', 'out', '--to=safetensors', '--trained=PROMPT'],
      'no plain T5 acts as one with the prompt',
    ),
    (
      ['convert', 'PROMPT', 'out', '--to=numpy', '--trained=PROMPT'],
      'leave --trained away',
    ),
    (['convert', 'a', 'b', 'out', '--to=numpy'], 'made of one source, got 2'),
    (['inspect', 'nothing'], 'no checkpoint nothing'),
  ],
)
def test_faults_are_one_line(
  tmp_path, monkeypatch, prompt, capsys, words, message
):
  monkeypatch.chdir(tmp_path)
  assert run(*[word.replace('PROMPT', prompt) for word in words]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error
  assert not (tmp_path / 'out').exists()


# Methods.


def save_method(folder, method, base='t5_1_1_mini', **facts):
  """A file of a method on a base, with arrays other than those of the start."""
  base = load_checkpoint(base)
  params = parameters.nest(
    {path: np.zeros(x.shape, 'f') for path, x in base.arrays.items()}
  )
  start = method.init(jax.random.key(0), params, ANY_TEXT)
  rng = np.random.default_rng(1)
  arrays = {
    path: np.asarray(array) + 0.1 * rng.normal(size=array.shape).astype('f')
    for path, array in parameters.flatten(start).items()
  }
  facts = {'base': base.path, 'base_fingerprint': base.fingerprint(), **facts}
  save_trained(folder, Trained(method, arrays, facts))
  return arrays


def logits_of(base, *trained):
  """Logits of a base with what was trained on it."""
  model = EncoderDecoderModel(base.config())
  loaded = loading.load(model, base, trained, dtype='float32')
  decoder = jnp.array([[0, 5, 17]], jnp.int32)
  batch = {
    'encoder_input_tokens': jnp.array([[31, 7, 9, 4, 1, 0]], jnp.int32),
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': jnp.ones_like(decoder),
  }
  return np.asarray(loaded.model.logits(loaded.variables, batch))


LORA = Lora(2, alpha=3.0, targets=('query', 'out', 'wi_1', 'wo'))


@pytest.mark.parametrize('to', ['safetensors', 't5x', 'hugging_face'])
def test_a_folded_method_is_the_method(tmp_path, to):
  save_method(tmp_path / 'methods', LORA)
  save_method(tmp_path / 'methods', IA3(outputs=('key', 'query')))
  trained = f'--trained={tmp_path / "methods"}'
  folded = tmp_path / 'folded'
  assert run('convert', 't5_1_1_mini', folded, f'--to={to}', trained) == 0
  base = load_checkpoint('t5_1_1_mini')
  both = load_trained(tmp_path / 'methods')
  assert {one.method.collection for one in both} == {'lora', 'ia3'}
  expected = logits_of(base, *both)
  bound = 1e-5 * np.abs(expected).max()
  assert np.abs(logits_of(base) - expected).max() > 100 * bound
  np.testing.assert_allclose(
    logits_of(load_checkpoint(folded)), expected, atol=bound
  )


def test_methods_are_inspected_and_compared(tmp_path, capsys):
  save_method(tmp_path / 'one', LORA)
  arrays = save_method(tmp_path / 'other', LORA)
  path = 'encoder/layers_0/mlp/wo/a'
  arrays[path][0, 0] += 1
  save_trained(tmp_path / 'other', Trained(LORA, arrays))
  assert run('inspect', tmp_path / 'one') == 0
  out = capsys.readouterr().out
  assert 'one: lora, ' in out and 'in 56 arrays of float32\n' in out
  assert '512x2' not in out
  assert run('inspect', tmp_path / 'one', '--arrays') == 0
  assert '512x2' in capsys.readouterr().out
  assert run('diff', tmp_path / 'one', tmp_path / 'other') == 1
  assert f'{path}: 1 of 1,024 values differ' in capsys.readouterr().out


def test_methods_that_do_not_fit_are_one_line(tmp_path, capsys):
  def said(method, **facts):
    save_method(tmp_path / method.collection, method, **facts)
    source = tmp_path / method.collection
    words = ['t5_1_1_mini', tmp_path / 'out', '--to=t5x', f'--trained={source}']
    assert run('convert', *words) == 1
    words = [source, tmp_path / 'out', '--to=peft', '--base=t5_1_1_mini']
    assert run('convert', *words) == 1
    folding, adapter = capsys.readouterr().err.splitlines()
    assert not (tmp_path / 'out').exists()
    return folding, adapter

  folding, adapter = said(PerLayerPrompt(3))
  assert 'no plain T5 acts as one with the per_layer' in folding
  assert (
    'peft has an adapter for prompt, lora, ia3, prefix, multitask_prompt, got'
    ' per_layer' in adapter
  )
  for message in said(LORA, base_fingerprint='0' * 16):
    assert 'was trained on t5_1_1_mini (fingerprint 0000' in message
  arrays = {
    'encoder/layers_0/mlp/wo/a': np.zeros((5, 2), 'f'),
    'encoder/layers_0/mlp/wo/b': np.zeros((2, 192), 'f'),
  }
  save_trained(tmp_path / 'small', Trained(LORA, arrays))
  trained = f'--trained={tmp_path / "small"}'
  assert run('convert', 't5_1_1_mini', 'out', '--to=t5x', trained) == 1
  assert 'does not fit t5_1_1_mini' in capsys.readouterr().err


def peft_of(tmp_path, source):
  """Arrays and configuration of a method's PEFT adapter."""
  words = [source, tmp_path / 'peft', '--to=peft', '--base=t5_1_1_mini']
  assert run('convert', *words) == 0
  text = (tmp_path / 'peft/adapter_config.json').read_text()
  weights = tmp_path / 'peft/adapter_model.safetensors'
  return safetensors.numpy.load_file(weights), json.loads(text)


def test_lora_is_pefts_lora(tmp_path):
  arrays = save_method(tmp_path / 'lora', LORA)
  stored, config = peft_of(tmp_path, tmp_path / 'lora')
  assert {config[key] for key in ('peft_type', 'task_type')} == {
    'LORA',
    'SEQ_2_SEQ_LM',
  }
  assert (config['r'], config['lora_alpha']) == (2, 3.0)
  assert config['target_modules'] == ['o', 'q', 'wi_1', 'wo']
  assert config['base_model_name_or_path'] == 't5_1_1_mini'
  # 4 encoder layers of 4 kernels, 2 decoder layers of 6, with A and B each.
  assert len(stored) == 2 * (4 * 4 + 2 * 6)
  for theirs, ours, shape in (
    (
      'encoder.block.3.layer.0.SelfAttention.q.lora_A',
      'encoder/layers_3/attention/query/a',
      (2, 192),
    ),
    (
      'decoder.block.1.layer.1.EncDecAttention.o.lora_B',
      'decoder/layers_1/encoder_decoder_attention/out/b',
      (192, 2),
    ),
    (
      'decoder.block.0.layer.2.DenseReluDense.wo.lora_A',
      'decoder/layers_0/mlp/wo/a',
      (2, 512),
    ),
  ):
    found = stored[f'base_model.model.{theirs}.weight']
    assert found.shape == shape
    np.testing.assert_array_equal(found, arrays[ours].T)


def test_ia3_is_pefts_ia3(tmp_path):
  arrays = save_method(tmp_path / 'ia3', IA3())
  stored, config = peft_of(tmp_path, tmp_path / 'ia3')
  assert config['peft_type'] == 'IA3'
  assert config['target_modules'] == ['k', 'v', 'wo']
  assert config['feedforward_modules'] == ['wo']
  assert len(stored) == 4 * 3 + 2 * 5
  for theirs, ours, shape in (
    (
      'encoder.block.3.layer.1.DenseReluDense.wo',
      'encoder/layers_3/mlp/wo/scale',
      (1, 512),
    ),
    (
      'decoder.block.1.layer.0.SelfAttention.k',
      'decoder/layers_1/self_attention/key/scale',
      (192, 1),
    ),
  ):
    found = stored[f'base_model.model.{theirs}.ia3_l']
    assert found.shape == shape
    np.testing.assert_array_equal(found.ravel(), arrays[ours])


def test_a_prefix_of_the_decoder_is_pefts_and_comes_back(tmp_path, capsys):
  """PEFT gives layer i of a T5's decoder the pair 2 * i."""
  arrays = save_method(tmp_path / 'prefix', Prefix(3, ('decoder',)))
  stored, config = peft_of(tmp_path, tmp_path / 'prefix')
  assert config['peft_type'] == 'PREFIX_TUNING'
  assert (config['num_layers'], config['token_dim']) == (4, 192)
  assert config['num_transformer_submodules'] == 2
  assert stored.keys() == {'prompt_embeddings'}
  pairs = stored['prompt_embeddings'].reshape(3, 4, 2, 192)
  for i in range(2):
    for k, name in enumerate(('keys', 'values')):
      array = arrays[f'decoder/layers_{i}/self_attention/{name}']
      np.testing.assert_array_equal(pairs[:, 2 * i, k], array)
  assert not pairs[:, 1::2].any()
  capsys.readouterr()
  assert run('diff', tmp_path / 'prefix', tmp_path / 'peft') == 0
  (back,) = load_trained(tmp_path / 'peft')
  assert back.method == Prefix(3, ('decoder',))
  assert back.facts == {'base': 't5_1_1_mini', 'format': 'peft PREFIX_TUNING'}
  refused(tmp_path / 'peft', 'holds prefix, a prompt alone')


def test_layers_share_the_pairs_of_pefts_own_prefix(tmp_path):
  """Of its default as many as the encoder has layers, here four."""
  save_method(tmp_path / 'prefix', Prefix(3, ('decoder',)))
  stored, _ = peft_of(tmp_path, tmp_path / 'prefix')
  table = np.random.default_rng(0).normal(size=(3, 4 * 2 * 192)).astype('f')
  safetensors.numpy.save_file(
    {'prompt_embeddings': table}, tmp_path / 'peft/adapter_model.safetensors'
  )
  keys = table.reshape(3, 4, 2, 192)[:, :, 0]
  place = 'decoder/layers_{}/self_attention/keys'

  def taken():
    (found,) = load_trained(tmp_path / 'peft')
    return [
      found.arrays[place.format(i)] for i in range(len(found.arrays) // 2)
    ]

  for got, want in zip(taken(), (0, 2, 0, 2), strict=True):
    np.testing.assert_array_equal(got, keys[:, want])
  # The base says how many layers there are to give them to.
  (tmp_path / 'base').mkdir()
  (tmp_path / 'base/config.json').write_text(
    '{"num_layers": 4, "num_decoder_layers": 2}'
  )
  adapter(tmp_path / 'peft', base_model_name_or_path=str(tmp_path / 'base'))
  for got, want in zip(taken(), (0, 2), strict=True):
    np.testing.assert_array_equal(got, keys[:, want])
  adapter(tmp_path / 'peft', num_transformer_submodules=1)
  refused(tmp_path / 'peft', 'num_transformer_submodules 1')
  adapter(tmp_path / 'peft', num_transformer_submodules=None, num_layers=3)
  refused(tmp_path / 'peft', 'shape [3, 1536]', '3 layers')


def test_pefts_prefix_reaches_no_encoder(tmp_path, capsys):
  save_method(tmp_path / 'prefix', Prefix(3))
  words = [tmp_path / 'prefix', tmp_path / 'out', '--to=peft']
  assert run('convert', *words, '--base=t5_1_1_mini') == 1
  assert 'this prefix has encoder, decoder: train' in capsys.readouterr().err


# PEFT's own numbers.


@pytest.mark.parametrize(
  'name', ['peft_prompt_tuning', 'peft_prompt_tuning_submodules1']
)
def test_logits_equal_those_of_peft(shared_dir, name):
  folder = shared_dir / 'golden/08_hf'
  facts = json.loads((folder / 'hf_tiny/config.json').read_text())
  names = ['vocab_size', 'd_model', 'num_heads', 'd_kv', 'd_ff', 'num_layers']
  sizes = [facts[key] for key in (*names, 'num_decoder_layers')]
  model = EncoderDecoderModel(network.T5Config(*sizes))
  prompt = load_prompt(folder / name)
  base = load_checkpoint(folder / 'hf_tiny', step=0)
  loaded = loading.load(
    model, base, load_trained(folder / name), dtype='float32'
  )
  model, variables = loaded.model, loaded.variables
  virtual_tokens = loaded.virtual_tokens
  data = np.load(folder / f'{name}_io.npz')
  np.testing.assert_array_equal(prompt[0][0], data['prompt_used'])
  ids = data['input_ids'] * data['attention_mask']
  rows = [virtual_tokens.place(row, virtual_tokens.ids()) for row in ids]
  decoder = jnp.asarray(data['decoder_input_ids'], jnp.int32)
  batch = {
    'encoder_input_tokens': jnp.asarray(np.stack(rows), jnp.int32),
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': jnp.ones_like(decoder),
  }
  logits = model.logits(variables, batch)
  np.testing.assert_allclose(logits, data['logits'], atol=1e-4)


# PEFT's adapters in.


@pytest.mark.parametrize(
  'method',
  [
    LORA,
    IA3(outputs=('key', 'query'), inputs=('wo',)),
    MultitaskPrompt(Prompt(3, 2), rank=2),
  ],
  ids=['lora', 'ia3', 'multitask_prompt'],
)
def test_a_methods_adapter_comes_back(tmp_path, method):
  arrays = save_method(tmp_path / 'ours', method)
  _, config = peft_of(tmp_path, tmp_path / 'ours')
  (found,) = load_trained(tmp_path / 'peft')
  assert found.method.collection == method.collection
  assert found.facts['format'] == f'peft {config["peft_type"]}'
  assert found.arrays.keys() == arrays.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(found.arrays[path], array)
  if method is LORA:
    assert (found.method.rank, found.method.alpha) == (2, 3.0)
    assert set(found.method.targets) == set(LORA.targets)
  elif isinstance(method, IA3):
    assert found.method.outputs == ('key', 'query')
    assert found.method.inputs == ('wo',)
  else:
    assert config['num_transformer_submodules'] == 1
    assert (config['num_tasks'], config['num_ranks']) == (2, 2)
    assert found.method.prompt.num_prompts == 2


def test_of_two_submodules_the_encoders_rows_are_read(tmp_path):
  method = MultitaskPrompt(Prompt(3, 2))
  arrays = save_method(tmp_path / 'ours', method)
  stored, _ = peft_of(tmp_path, tmp_path / 'ours')
  for name, axis in (('prompt_embeddings', 0), ('prefix_task_cols', 1)):
    stored[name] = np.concatenate([stored[name], stored[name] + 1], axis)
  safetensors.numpy.save_file(
    stored, tmp_path / 'peft/adapter_model.safetensors'
  )
  adapter(tmp_path / 'peft', num_transformer_submodules=2)
  (found,) = load_trained(tmp_path / 'peft')
  for path, array in arrays.items():
    np.testing.assert_array_equal(found.arrays[path], array)


def test_lora_of_ranks_square_root_is_scaled_alike(tmp_path):
  save_method(tmp_path / 'ours', LORA)
  peft_of(tmp_path, tmp_path / 'ours')
  adapter(tmp_path / 'peft', use_rslora=True)
  method = load_trained(tmp_path / 'peft')[0].method
  assert method.alpha / method.rank == pytest.approx(3.0 / 2**0.5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'use_dora': True}, 'has use_dora True'),
    ({'bias': 'all'}, "has bias 'all'"),
    ({'rank_pattern': {'q': 4}}, "has rank_pattern {'q': 4}"),
    ({'init_lora_weights': 'pissa_niter_4'}, 'has init_lora_weights'),
    ({'alora_invocation_tokens': [3, 4]}, 'has alora_invocation_tokens [3, 4]'),
    ({'of_a_later_peft': {'scale': 2}}, 'has of_a_later_peft'),
    ({'r': None}, 'cannot read'),
  ],
)
def test_what_lora_here_is_not_is_refused(tmp_path, change, message):
  save_method(tmp_path / 'ours', LORA)
  peft_of(tmp_path, tmp_path / 'ours')
  adapter(tmp_path / 'peft', **change)
  with pytest.raises(UserError) as fault:
    load_trained(tmp_path / 'peft')
  assert message in str(fault.value) and '\n' not in str(fault.value)


def test_settings_that_change_no_number_are_no_fault(tmp_path):
  save_method(tmp_path / 'ours', LORA)
  peft_of(tmp_path, tmp_path / 'ours')
  adapter(
    tmp_path / 'peft',
    init_lora_weights='gaussian',
    lora_dropout=0.1,
    megatron_core='megatron.core',
    qalora_group_size=16,
    runtime_config={'ephemeral_gpu_offload': False},
    of_a_later_peft=None,
  )
  method = load_trained(tmp_path / 'peft')[0].method
  assert dataclasses.replace(method, targets=LORA.targets) == LORA


def test_a_computed_prompt_is_a_plain_one_for_others(tmp_path, capsys):
  """peft, numpy, serving_table and inspect take what acts like it."""
  source = tmp_path / 'hard'
  arrays = save_method(source, HardPrompt(Prompt(3)), vocabulary='t5_1_1_mini')
  stored, config = peft_of(tmp_path, source)
  assert config['peft_type'] == 'PROMPT_TUNING'
  np.testing.assert_array_equal(stored['prompt_embeddings'], arrays['rows'][0])
  table = tmp_path / 'table.npy'
  assert run('convert', source, table, '--to=serving_table') == 0
  np.testing.assert_array_equal(np.load(table), arrays['rows'])


@pytest.mark.parametrize('to', ['serving_table', 't5x', 'prompt_tokens'])
def test_who_puts_prompts_in_front_takes_no_others(tmp_path, capsys, to):
  save_method(tmp_path / 'behind', Prompt(3, placement='suffix'))
  source = [tmp_path / 'behind']
  if to != 'serving_table':
    source = ['t5_1_1_mini', '--prompt', tmp_path / 'behind']
  words = ['--vocabulary=t5_1_1_mini'] if to == 'prompt_tokens' else []
  assert (
    run(
      'convert',
      *source[:1],
      tmp_path / 'out',
      f'--to={to}',
      *source[1:],
      *words,
    )
    == 1
  )
  assert 'in front of the text' in capsys.readouterr().err


def test_a_model_of_bytes_says_so_in_its_folder(tmp_path, capsys):
  words = ['convert', 't5_1_1_mini', tmp_path / 'hf', '--vocabulary=byt5']
  assert run(*words, '--to=hugging_face') == 0
  assert load_vocabulary(tmp_path / 'hf').path == 'byt5'
  save_method(tmp_path / 'one', Prompt(3))
  words[2:3] = [tmp_path / 'tokens', '--prompt', tmp_path / 'one']
  assert run(*words, '--to=prompt_tokens') == 1
  assert 'bytes have none' in capsys.readouterr().err


def test_inspect_reads_prompts_as_text(tmp_path, capsys):
  embedding = load_checkpoint('t5_1_1_mini').arrays['token_embedder/embedding']
  ids = load_vocabulary('t5_1_1_mini').encode('Name the topic')
  facts = {'base': 't5_1_1_mini', 'vocabulary': 't5_1_1_mini'}
  save_prompt(tmp_path / 'a', np.asarray(embedding, 'f')[ids] + 0.01, facts)
  save_prompt(tmp_path / 'b', np.asarray(embedding, 'f')[ids], {})
  assert run('inspect', tmp_path / 'a', '--text=words') == 0
  out = capsys.readouterr().out
  assert "prompt 0 as text: 'Name the topic' (all 3 pieces come back)" in out
  assert f'squared distance {192 * 1e-4:.4g}' in out
  assert run('inspect', tmp_path / 'b', '--text') == 1
  assert '--text needs --base' in capsys.readouterr().err
  named = ('--base=t5_1_1_mini', '--vocabulary=t5_1_1_mini')
  assert run('inspect', tmp_path / 'b', '--text', *named) == 0
  assert "'Name the topic'" in capsys.readouterr().out


def test_norm_scales_fold(tmp_path):
  save_method(tmp_path / 'ours', NormScales())
  trained = f'--trained={tmp_path / "ours"}'
  words = ['t5_1_1_mini', tmp_path / 'folded', '--to=safetensors', trained]
  assert run('convert', *words) == 0
  base = load_checkpoint('t5_1_1_mini')
  expected = logits_of(base, *load_trained(tmp_path / 'ours'))
  bound = 1e-5 * np.abs(expected).max()
  assert np.abs(logits_of(base) - expected).max() > 100 * bound
  folded = logits_of(load_checkpoint(tmp_path / 'folded'))
  np.testing.assert_allclose(folded, expected, atol=bound)
