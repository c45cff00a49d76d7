"""PEFT adapters, serving tables, and conversion between formats."""

import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning import cli
from prompt_tuning.errors import UserError
from prompt_tuning.interop import adapters
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import save_prompt
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training.inference import load_variables


@pytest.fixture
def table():
  return np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32)


def adapter(folder, **change):
  """Rewrites an adapter's configuration."""
  file = folder / 'adapter_config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_an_adapter_comes_back(tmp_path, table):
  adapters.save_peft(tmp_path, table, base='t5', num_layers=4, num_heads=4)
  found, facts = load_prompt(tmp_path)
  np.testing.assert_array_equal(found, table[None])
  assert facts == {'base': 't5', 'format': 'peft PROMPT_TUNING'}
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['num_transformer_submodules'] == 1
  stored = safetensors.numpy.load_file(tmp_path / 'adapter_model.safetensors')
  assert stored.keys() == {'prompt_embeddings'}


@pytest.mark.parametrize('kind', ['PROMPT_TUNING', 'P_TUNING'])
def test_the_first_half_is_the_encoders(tmp_path, table, kind):
  adapters.save_peft(tmp_path, table, base='t5', num_layers=4, num_heads=4)
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
  adapters.save_peft(tmp_path, table, base='t5', num_layers=4, num_heads=4)
  adapter(tmp_path, num_virtual_tokens=4)
  refused(tmp_path, 'shape [5, 192]', '4 virtual tokens')
  adapter(tmp_path, peft_type='LORA')
  refused(tmp_path, 'type LORA')
  (tmp_path / 'adapter_config.json').write_text('{}')
  refused(tmp_path, 'adapter_config.json', 'peft_type')
  adapters.save_peft(tmp_path, table, base='t5', num_layers=4, num_heads=4)
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
  variables, virtual_tokens = load_variables(
    model, base, prompt, dtype='float32'
  )
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
