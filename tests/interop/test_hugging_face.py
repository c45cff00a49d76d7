"""Hugging Face models read and written."""

import json

from flax import traverse_util
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import conversion
from prompt_tuning.interop import hugging_face
from prompt_tuning.interop import hugging_face_writing
from prompt_tuning.interop.base_checkpoints import load_checkpoint
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import base as base_lib

SIZES = {
  'vocab_size': 48,
  'emb_dim': 16,
  'num_heads': 2,
  'head_dim': 8,
  'mlp_dim': 24,
  'num_encoder_layers': 2,
  'num_decoder_layers': 1,
}
GATED = network.T5Config(**SIZES)
TIED = network.T5Config(
  **SIZES, mlp_activations=('relu',), logits_via_embedding=True
)


def parameters(config):
  tree = EncoderDecoderModel(config).init_params(jax.random.key(0))
  return {
    name: np.asarray(array)
    for name, array in traverse_util.flatten_dict(tree, sep='/').items()
  }


@pytest.mark.parametrize('config', [GATED, TIED], ids=['1.1', '1.0'])
def test_a_written_model_comes_back(tmp_path, config):
  params = parameters(config)
  hugging_face_writing.save_model(tmp_path, params, 1_000_000)
  base = load_checkpoint(tmp_path)
  assert base.step == 1_000_000
  assert base.arrays.keys() == params.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(np.asarray(base.arrays[name]), array)
    np.testing.assert_array_equal(base.arrays[name][1:3], array[1:3])
    if array.ndim == 2:
      index = (slice(1, 5), slice(0, 2))
      np.testing.assert_array_equal(base.arrays[name][index], array[index])
  assert base.fingerprint() == base_lib.fingerprint(params)


def test_names_and_transposes_are_hugging_faces(tmp_path):
  params = parameters(GATED)
  hugging_face_writing.save_model(tmp_path, params, 5)
  stored = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  expected = {
    'shared.weight': params['token_embedder/embedding'],
    'lm_head.weight': params['decoder/logits_dense/kernel'].T,
    'encoder.block.1.layer.0.SelfAttention.q.weight': params[
      'encoder/layers_1/attention/query/kernel'
    ].T,
    'encoder.block.0.layer.1.DenseReluDense.wi_1.weight': params[
      'encoder/layers_0/mlp/wi_1/kernel'
    ].T,
    'decoder.block.0.layer.1.EncDecAttention.o.weight': params[
      'decoder/layers_0/encoder_decoder_attention/out/kernel'
    ].T,
    'decoder.block.0.layer.2.layer_norm.weight': params[
      'decoder/layers_0/pre_mlp_layer_norm/scale'
    ],
    'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (
      params['decoder/relpos_bias/rel_embedding'].T
    ),
    'encoder.final_layer_norm.weight': params['encoder/encoder_norm/scale'],
  }
  for name, array in expected.items():
    np.testing.assert_array_equal(stored[name], array)
  for name in stored:
    assert hugging_face.their_name(hugging_face.our_path(name)) == name
  config = json.loads((tmp_path / 'config.json').read_text())
  for name, value in {
    'vocab_size': 48,
    'd_model': 16,
    'd_kv': 8,
    'd_ff': 24,
    'num_layers': 2,
    'num_decoder_layers': 1,
    'num_heads': 2,
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
  }.items():
    assert config[name] == value


def test_sharded_files_are_written_and_read(tmp_path, monkeypatch):
  params = parameters(GATED)
  monkeypatch.setattr(hugging_face_writing, '_SHARD_BYTES', 4000)
  files = hugging_face_writing.save_model(tmp_path, params, 5, dtype='bfloat16')
  assert sum(file.suffix == '.safetensors' for file in files) > 3
  base = load_checkpoint(tmp_path)
  for name, array in params.items():
    np.testing.assert_array_equal(
      np.asarray(base.arrays[name]), array.astype(ml_dtypes.bfloat16)
    )
  files[1].unlink()
  with pytest.raises(UserError, match='lacks model-00002-of-'):
    load_checkpoint(tmp_path)
  # Written over by a model in one file: nothing of the shards stays.
  monkeypatch.undo()
  doubled = {name: 2 * array for name, array in params.items()}
  hugging_face_writing.save_model(tmp_path, doubled, 6, dtype='float32')
  base = load_checkpoint(tmp_path)
  name = 'encoder/layers_0/mlp/wo/kernel'
  np.testing.assert_array_equal(np.asarray(base.arrays[name]), doubled[name])
  assert len(list(tmp_path.glob('model*'))) == 1


def test_whether_a_model_is_tied_shows_in_its_file(tmp_path):
  output = 'decoder/logits_dense/kernel'
  params = parameters(GATED)
  config = tmp_path / 'config.json'

  def arrays(**change):
    hugging_face_writing.save_model(tmp_path, params, 5)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    return load_checkpoint(tmp_path).arrays

  # Untied though the configuration says tied, as fresh 1.1 models are saved.
  assert output in arrays(tie_word_embeddings=True)
  # A copy of the table is none.
  params[output] = params['token_embedder/embedding'].T
  assert output not in arrays(tie_word_embeddings=True)


def test_a_bias_of_cross_attention_is_passed_over(tmp_path):
  """The public T5 1.0 files have one, in the decoder's place for its own."""
  params = parameters(TIED)
  hugging_face_writing.save_model(tmp_path, params, 5)
  weights = tmp_path / 'model.safetensors'
  stored = safetensors.numpy.load_file(weights)
  name = 'decoder.block.0.layer.{}.relative_attention_bias.weight'
  own = stored[name.format('0.SelfAttention')]
  stored[name.format('1.EncDecAttention')] = own + 1
  safetensors.numpy.save_file(stored, weights)
  found = load_checkpoint(tmp_path).arrays
  assert found.keys() == params.keys()
  np.testing.assert_array_equal(
    found['decoder/relpos_bias/rel_embedding'][...], own.T
  )


def test_a_step_is_asked_for(tmp_path):
  hugging_face_writing.save_model(tmp_path, parameters(GATED), 5)
  config = json.loads((tmp_path / 'config.json').read_text())
  del config['prompt_tuning_step']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='load_checkpoint.step.*1100000'):
    load_checkpoint(tmp_path)
  assert load_checkpoint(tmp_path, step=1_100_000).step == 1_100_000


def test_a_prompt_as_tokens_is_the_prompt(tmp_path):
  """Embedded token by token, the prompt's text is the prompt."""
  base = load_checkpoint('t5_1_1_mini')
  vocabulary = load_vocabulary('t5_1_1_mini')
  rng = np.random.default_rng(0)
  prompt = rng.normal(size=(5, 192)).astype(np.float32)
  hugging_face_writing.save_with_prompt_tokens(
    tmp_path, base.arrays, base.step, prompt, vocabulary
  )
  served = load_checkpoint(tmp_path)
  config = network.T5Config(8197, 192, 4, 48, 512, 4, 2)
  model = EncoderDecoderModel(config)
  params = base_lib.load_params(
    served, network.parameter_shapes(config), dtype='float32'
  )
  text = [*vocabulary.encode('The cup final.'), 1]
  batch = {
    'encoder_input_tokens': jnp.array([[*range(8192, 8197), *text]]),
    'decoder_input_tokens': jnp.array([[0, 5, 17]]),
    'decoder_target_tokens': jnp.array([[5, 17, 1]]),
  }
  logits = model.logits({'params': params}, batch)
  plain = EncoderDecoderModel(
    network.T5Config(8192, 192, 4, 48, 512, 4, 2), methods=(Prompt(5),)
  )
  params = base_lib.load_params(
    base, network.parameter_shapes(plain.config), dtype='float32'
  )
  variables = {'params': params, 'prompt': {'table': jnp.array(prompt[None])}}
  expected = plain.logits(variables, batch)
  np.testing.assert_allclose(
    logits[..., :8192], expected, atol=1e-5 * float(jnp.abs(expected).max())
  )
  # Nothing writes the new tokens: they have padding's logit.
  np.testing.assert_allclose(
    logits[..., 8192:], np.repeat(logits[..., :1], 5, axis=-1), rtol=1e-5
  )
  generation = json.loads((tmp_path / 'generation_config.json').read_text())
  assert generation['suppress_tokens'] == list(range(8192, 8197))
  tokens = json.loads((tmp_path / 'added_tokens.json').read_text())
  assert tokens['<prompt_4>'] == 8196
  assert load_vocabulary(tmp_path).encode('The') == vocabulary.encode('The')


# Faults.


def refused(path, *words):
  with pytest.raises(UserError) as fault:
    for array in load_checkpoint(path, step=1).arrays.values():
      np.asarray(array)
  message = str(fault.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def test_damaged_and_foreign_models_are_one_line(tmp_path):
  hugging_face_writing.save_model(tmp_path, parameters(GATED), 5)
  weights = tmp_path / 'model.safetensors'
  data = weights.read_bytes()
  weights.write_bytes(data[: len(data) // 2])
  refused(tmp_path, 'cannot read', 'damaged')
  arrays = {'transformer.h.0.weight': np.zeros((2, 2), np.float32)}
  safetensors.numpy.save_file(arrays, weights)
  refused(tmp_path, 'transformer.h.0.weight', 'no parameter of a T5')
  weights.unlink()
  refused(tmp_path, 'has no weights')
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  refused(tmp_path, "model_type 'bert'")
  (tmp_path / 'config.json').write_text('not json')
  refused(tmp_path, 'cannot read', 'config.json')


def test_an_id_that_the_hub_does_not_have_is_one_line(monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  with pytest.raises(UserError) as error:
    load_checkpoint('nobody/no-such-model-here', step=1)
  assert 'hub' in str(error.value) and '\n' not in str(error.value)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_the_reader(tmp_path_factory, data, in_config):
  folder = tmp_path_factory.mktemp('fuzz')
  (folder / 'config.json').write_bytes(
    data if in_config else b'{"model_type": "t5"}'
  )
  (folder / 'model.safetensors').write_bytes(data)
  try:
    load_checkpoint(folder, step=1)
  except UserError as error:
    assert '\n' not in str(error)


# Hugging Face's own numbers.


def test_logits_equal_those_of_transformers(shared_dir):
  folder = shared_dir / 'golden/08_hf'
  facts = json.loads((folder / 'hf_tiny/config.json').read_text())
  config = network.T5Config(
    facts['vocab_size'],
    facts['d_model'],
    facts['num_heads'],
    facts['d_kv'],
    facts['d_ff'],
    facts['num_layers'],
    facts['num_decoder_layers'],
  )
  params = base_lib.load_params(
    load_checkpoint(folder / 'hf_tiny', step=0),
    network.parameter_shapes(config),
    dtype='float32',
  )
  data = np.load(folder / 'hf_tiny_io.npz')
  for name in ('', 'long_'):
    ids = data[f'{name}input_ids'] * data[f'{name}attention_mask']
    decoder = jnp.asarray(data[f'{name}decoder_input_ids'], jnp.int32)
    batch = {
      'encoder_input_tokens': jnp.asarray(ids, jnp.int32),
      'decoder_input_tokens': decoder,
      'decoder_target_tokens': jnp.ones_like(decoder),
    }
    logits = EncoderDecoderModel(config).logits({'params': params}, batch)
    np.testing.assert_allclose(logits, data[f'{name}logits'], atol=1e-4)


def rewritten(folder, **changes):
  hugging_face_writing.save_model(folder, parameters(GATED), 5)
  file = folder / 'config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
  return folder


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'num_heads': 4}, 'num_heads 4, the model has 2'),
    ({'num_layers': 3}, 'num_encoder_layers 3, the model has 2'),
    ({'feed_forward_proj': 'gated-silu'}, r"mlp_activations \('silu', 'lin"),
    ({'relative_attention_max_distance': 64}, 'max_distance 64'),
    ({'vocab_size': 50}, 'vocab_size 50, the model has 48'),
  ],
)
def test_a_configuration_of_another_network_is_refused(tmp_path, changes, said):
  base = load_checkpoint(rewritten(tmp_path, **changes))
  with pytest.raises(UserError, match=said):
    base.load(GATED)


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon 1e-05'),
    ({'feed_forward_proj': 'gated-tanh'}, "feed_forward_proj 'gated-tanh'"),
    ({'d_kv': 'eight'}, "head_dim 'eight'"),
  ],
)
def test_a_network_that_is_not_ours_is_told_at_once(tmp_path, changes, said):
  with pytest.raises(UserError, match=said):
    load_checkpoint(rewritten(tmp_path, **changes))


def test_what_shapes_do_not_tell_survives_a_round_trip(tmp_path, caplog):
  stated = {
    'feed_forward_proj': 'gated-silu',
    'relative_attention_max_distance': 64,
    'dropout_rate': 0.25,
  }
  rewritten(tmp_path / 'one', **stated)
  base = load_checkpoint(tmp_path / 'one')
  assert base.config().mlp_activations == ('silu', 'linear')
  assert base.config().max_distance == 64
  conversion.convert([str(tmp_path / 'one')], tmp_path / 'two', 'hugging_face')
  written = json.loads((tmp_path / 'two' / 'config.json').read_text())
  assert {name: written[name] for name in stated} == stated
  # Our own file says it too, T5X's cannot.
  conversion.convert([str(tmp_path / 'one')], tmp_path / 'ours', 'safetensors')
  ours = load_checkpoint(tmp_path / 'ours').config()
  assert (ours.mlp_activations, ours.max_distance) == (('silu', 'linear'), 64)
  conversion.convert([str(tmp_path / 'one')], tmp_path / 't5x', 't5x')
  assert 'T5Config.max_distance=64: bind it where this one' in caplog.text


def test_a_step_is_asked_for_by_the_name_that_the_user_knows(tmp_path):
  folder = rewritten(tmp_path / 'one', prompt_tuning_step=None)
  with pytest.raises(UserError, match='bind load_checkpoint.step'):
    load_checkpoint(folder)
  with pytest.raises(UserError, match='give --step'):
    conversion.convert([str(folder)], tmp_path / 'two', 't5x')
  with pytest.raises(UserError, match='must be 0 or more, got -1'):
    conversion.convert([str(folder)], tmp_path / 'two', 't5x', step=-1)
  with pytest.raises(UserError, match='written over'):
    conversion.convert([str(folder)], folder, 'hugging_face', overwrite=True)
