"""Decoding and scoring of whole models, against what T5X returned.

golden/04_decoding holds a T5X model, plain and with the original prompt, and
the outputs of T5X's decoding functions for it.
"""

import functools
import json

from flax import traverse_util
import jax
import jax.numpy as jnp
import layer_stacks
import numpy as np
import pytest

from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import decoding
from prompt_tuning.models import model as model_lib
from prompt_tuning.models import network

EMPTY = -1e7  # the score of a place no sequence took; its ids mean nothing

CASES = [
  f'{kind}/{name}'
  for kind in ('plain', 'prompted')
  for name in (
    'beam1',
    'beam4',
    'beam4_alpha0',
    'greedy_temperature0',
    'greedy_temperature0_no_rescale',
    'topk1',
    'topk1_no_rescale',
  )
] + ['forced_prefix/beam4', 'forced_prefix/greedy']


@pytest.fixture(scope='module')
def golden(shared_dir):
  folder = shared_dir / 'golden' / '04_decoding'
  arrays = dict(np.load(folder / 'decoding.npz'))
  return arrays, json.loads((folder / 'decoding.json').read_text())


def nest(arrays, prefix):
  flat = {
    name.removeprefix(prefix): jnp.asarray(array)
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
  return traverse_util.unflatten_dict(flat, sep='/')


def load(golden, prompted, **config):
  """The network's config and variables, and its methods."""
  arrays, meta = golden
  settings = meta['config'] | config
  settings['mlp_activations'] = tuple(settings['mlp_activations'])
  config = network.T5Config(**settings)
  variables = {'params': nest(arrays, 'params/')}
  if config.scan_layers:
    variables['params'] = layer_stacks.stack(variables['params'])
  if prompted:
    table = arrays['params_prompt/encoder/prompt/prompt/prompt']
    variables['prompt'] = {'table': jnp.asarray(table)[None]}
  return config, variables, (Prompt(),) if prompted else ()


def encoder_inputs(golden, ids, prompted):
  """The ids, after the virtual tokens if there is a prompt."""
  _, meta = golden
  if not prompted:
    return jnp.asarray(ids)
  first = meta['config']['vocab_size']
  virtual = np.arange(first, first + meta['prompt_length'], dtype=ids.dtype)
  virtual = np.tile(virtual, (len(ids), 1))
  return jnp.asarray(np.concatenate([virtual, ids], axis=1))


def predictor(golden, case, **config):
  """Of a golden case: rows -> our decodes and scores for those examples."""
  arrays, meta = golden
  settings = meta['cases'][case]
  forced = settings.get('prompt_with_targets', False)
  config, variables, methods = load(golden, settings['prompted'], **config)
  model = model_lib.EncoderDecoderModel(
    config, methods=methods, decode_fn=getattr(decoding, settings['decode_fn'])
  )
  inputs = encoder_inputs(
    golden, arrays['encoder_input_tokens'], settings['prompted']
  )
  starts = arrays[('forced_prefix/' if forced else '') + 'decoder_input_tokens']
  run = jax.jit(
    functools.partial(
      model.predict_batch_with_aux,
      num_decodes=settings['num_decodes'],
      return_all_decodes=True,
      decoder_params=settings['decoder_params'],
      prompt_with_targets=forced,
    )
  )

  def predict(rows):
    batch = {
      'encoder_input_tokens': inputs[rows],
      'decoder_input_tokens': jnp.asarray(starts[rows]),
    }
    decodes, aux = run(variables, batch)
    return np.asarray(decodes), np.asarray(aux['scores'])

  return predict


def assert_is_golden(golden, case, decodes, scores, rows=slice(None)):
  arrays, _ = golden
  expected_scores = arrays[f'{case}/scores'][rows]
  np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-4)
  taken = expected_scores > EMPTY / 2
  np.testing.assert_array_equal(
    decodes[taken], arrays[f'{case}/decodes'][rows][taken]
  )
  np.testing.assert_array_equal(
    decodes[:, -1], arrays[f'{case}/predict_batch'][rows]
  )


def test_every_golden_case_is_tested(golden):
  _, meta = golden
  assert sorted(CASES) == sorted(meta['cases'])


@pytest.mark.parametrize('case', CASES)
def test_ids_and_scores_are_those_of_t5x(golden, case):
  decodes, scores = predictor(golden, case)(slice(None))
  assert_is_golden(golden, case, decodes, scores)


@pytest.mark.parametrize('case', ['prompted/beam4', 'forced_prefix/beam4'])
def test_scanned_layers_decode_as_unrolled_ones(golden, case):
  decodes, scores = predictor(golden, case, scan_layers=True)(slice(None))
  assert_is_golden(golden, case, decodes, scores)


@pytest.mark.parametrize('case', ['prompted/beam4', 'plain/topk1_no_rescale'])
def test_each_example_decodes_alone_as_in_its_batch(golden, case):
  predict = predictor(golden, case)
  for row in range(6):
    rows = slice(row, row + 1)
    decodes, scores = predict(rows)
    assert_is_golden(golden, case, decodes, scores, rows)


def test_golden_sequences_hold_an_id_0_before_their_end(golden):
  # Or no golden case would tell id 0 in mid-sequence from padding.
  arrays, _ = golden
  best = arrays['plain/greedy_temperature0/predict_batch']
  assert any(0 in row[: np.flatnonzero(row)[-1]] for row in best)


@pytest.mark.parametrize('kind', ['plain', 'prompted'])
def test_scores_of_given_targets_are_those_of_t5x(golden, kind):
  arrays, _ = golden
  config, variables, methods = load(golden, kind == 'prompted')
  batch = {
    name.removeprefix('score/'): jnp.asarray(array)
    for name, array in arrays.items()
    if name.startswith('score/decoder')
  }
  batch['encoder_input_tokens'] = encoder_inputs(
    golden, arrays['score/encoder_input_tokens'], kind == 'prompted'
  )
  model = model_lib.EncoderDecoderModel(config, methods=methods)
  scores = jax.jit(model.score_batch)(variables, batch)
  expected = arrays[f'score/{kind}/sequence_scores']
  np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', ['plain', 'prompted'])
def test_sampled_sequences_score_as_given_targets(golden, kind):
  """Cached decoding adds up the log-probabilities of uncached scoring."""
  config, variables, methods = load(golden, kind == 'prompted')
  arrays, _ = golden
  model = model_lib.EncoderDecoderModel(
    config, methods=methods, decode_fn=decoding.temperature_sample
  )
  inputs = encoder_inputs(
    golden, arrays['encoder_input_tokens'], kind == 'prompted'
  )
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': jnp.asarray(arrays['decoder_input_tokens']),
  }
  sample = functools.partial(
    model.predict_batch_with_aux,
    num_decodes=4,
    return_all_decodes=True,
    decoder_params={'topk': 0},
  )
  decodes, aux = jax.jit(sample)(variables, batch, jax.random.key(7))
  score = jax.jit(model.score_batch)
  compared = 0
  for n in range(4):
    ids = np.asarray(decodes[:, n])
    ended_before = np.cumsum(ids == 1, axis=1) > (ids == 1)
    scored = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.pad(ids[:, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': ids,
      'decoder_loss_weights': np.where(ended_before, 0, 1).astype(np.float32),
    }
    # Where a target is 0, scoring takes it for padding that no later token
    # attends to; a decoder in its steps has seen it.
    same = ~np.any((ids == 0) & ~ended_before, axis=1)
    compared += np.sum(same)
    np.testing.assert_allclose(
      aux['scores'][same, n], score(variables, scored)[same], rtol=0, atol=1e-4
    )
  assert compared > 12
