"""Each method against numpy, folded into a plain T5, and while decoding."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import methods
from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop.t5x_network import Network
from prompt_tuning.methods.adapters import Adapters
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.dept import ADePT
from prompt_tuning.methods.dept import DePT
from prompt_tuning.methods.hard_prompt import HardPrompt
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.norm_scales import NormScales
from prompt_tuning.methods.per_layer import PerLayerPrompt
from prompt_tuning.methods.prefix import Prefix
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.tied_prompt import TiedPrompt
from prompt_tuning.models import decoding
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel

sys.path.insert(0, __file__.rpartition('/')[0])
import numpy_t5  # noqa: E402

CONFIG = network.T5Config(
  vocab_size=40,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=12,
  num_encoder_layers=2,
  num_decoder_layers=2,
  num_buckets=8,
  max_distance=12,
)
METHODS = {
  'prompt': Prompt(3),
  'lora': Lora(2, alpha=3.0, targets=('query', 'value', 'wi_0', 'wo')),
  'ia3': IA3(),
  'per_layer': PerLayerPrompt(3),
  'prefix': Prefix(3, ('encoder', 'decoder', 'cross')),
  'dept': DePT(3, 2, inputs_length=7),
  'adept': ADePT(3, 2),
  'norm_scales': NormScales(),
  'adapters': Adapters(
    3, ('attention', 'encoder_decoder_attention', 'mlp'), 'relu'
  ),
}
# Their tables are computed, and in no layer.
COMPUTED = {
  'hard_prompt': HardPrompt(Prompt(3)),
  'tied_prompt': TiedPrompt(Prompt(3), 'two'),
  'multitask_prompt': MultitaskPrompt(Prompt(3, 2), rank=2),
  'attempt': Attempt(Prompt(3, 2), num_sources=2, size=4),
}
IN_LAYERS = ['lora', 'ia3', 'per_layer', 'prefix', 'norm_scales', 'adapters']
FOLDING = ['lora', 'ia3', 'norm_scales']
TEXTS = ([5, 6, 7, 8, 9, 1], [9, 30, 1])
TARGETS = ([11, 12, 1], [13, 1])


@functools.cache
def params():
  model = EncoderDecoderModel(CONFIG)
  return jax.jit(model.init_params)(jax.random.key(0))


@functools.cache
def arrays_of(name):
  """Arrays that are not those of the start, by path, layers unrolled."""
  method = (METHODS | COMPUTED)[name]
  start = method.init(jax.random.key(1), params(), ANY_TEXT)
  rng = np.random.default_rng(2)
  return {
    path: np.asarray(array) + 0.3 * rng.normal(size=array.shape).astype('f')
    for path, array in parameters.flatten(start).items()
  }


def batch_of(method):
  """The texts and targets as a padded batch, virtual tokens in front."""
  tokens = method.virtual_tokens(CONFIG)
  virtual = [] if tokens is None else tokens.ids().tolist()

  def rows(lists, length):
    return np.array([ids + [0] * (length - len(ids)) for ids in lists], 'i4')

  targets = rows([list(t) for t in TARGETS], 3)
  return {
    'encoder_input_tokens': rows([virtual + list(t) for t in TEXTS], 9),
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
  }


def model_of(name, scan=False):
  config = dataclasses.replace(
    CONFIG, scan_layers=scan, remat_policy='minimal' if scan else 'none'
  )
  model = EncoderDecoderModel(
    config, methods=(METHODS[name],), decode_fn=decoding.temperature_sample
  )
  flat, arrays = parameters.flatten(params()), arrays_of(name)
  if scan:
    flat, arrays = parameters.scanned(flat), parameters.scanned(arrays, 0)
  as_tree = lambda flat: parameters.nest(
    {k: jnp.asarray(np.asarray(v)) for k, v in flat.items()}
  )
  return model, {'params': as_tree(flat), name: as_tree(arrays)}


@functools.cache
def logits_of(name, scan=False):
  model, variables = model_of(name, scan)
  return np.asarray(jax.jit(model.logits)(variables, batch_of(METHODS[name])))


@pytest.mark.parametrize('name', IN_LAYERS)
def test_a_method_does_what_its_paper_says(name):
  arrays = arrays_of(name)
  acting = {name: arrays}
  if name == 'lora':
    acting = {'lora': (arrays, 3.0 / 2)}
  if name == 'adapters':
    acting = {'adapters': (arrays, lambda x: np.maximum(x, 0))}
  flat = parameters.flatten(params())
  plain = EncoderDecoderModel(CONFIG).logits(
    {'params': params()}, batch_of(Lora())
  )
  for row, (text, target) in enumerate(zip(TEXTS, TARGETS)):
    want = numpy_t5.logits(flat, CONFIG, text, target, **acting)
    got = logits_of(name)[row, : len(target)]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    # Not because it does nothing.
    assert np.abs(plain[row, : len(target)] - want).max() > 0.05
    # And the T5 in numpy is T5.
    want = numpy_t5.logits(flat, CONFIG, text, target)
    got = plain[row, : len(target)]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize('name', ['dept', 'adept'])
def test_the_embeddings_of_the_text_alone_are_updated(name):
  """By position behind the prompt, or by the token: by another table."""
  arrays = {k: np.float64(v) for k, v in arrays_of(name).items()}
  flat = parameters.flatten(params())
  table = np.asarray(flat['token_embedder/embedding'], np.float64)
  for row, (text, target) in enumerate(zip(TEXTS, TARGETS)):
    x = table[text]
    if name == 'dept':
      x = x + 8 / np.sqrt(2) * (arrays['a'] @ arrays['b'])[: len(text)]
    else:
      hidden = np.maximum(x @ arrays['down'] + arrays['down_bias'], 0)
      x = x + hidden @ arrays['up'] + arrays['up_bias']
      folded = ADePT.table(np.asarray(table, np.float32), arrays_of(name))
      np.testing.assert_allclose(folded[text], x, atol=1e-5)
    x = np.concatenate([arrays['table'], x])
    want = numpy_t5.logits(flat, CONFIG, x, target)
    got = logits_of(name)[row, : len(target)]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_positions_begin_anew_for_each_example_of_a_packed_row():
  method = METHODS['dept']
  batch = batch_of(method)
  virtual = method.virtual_tokens(CONFIG).ids().tolist()
  row, segments = [], []
  for number, text in enumerate(TEXTS, 1):
    row += virtual + text
    segments += [number] * (3 + len(text))
  packed = {
    'encoder_input_tokens': np.array([row], 'i4'),
    'encoder_segment_ids': np.array([segments], 'i4'),
    'decoder_segment_ids': np.array([[1] * 3 + [2] * 2], 'i4'),
  }
  for name in ('decoder_input_tokens', 'decoder_target_tokens'):
    one, other = batch[name]
    packed[name] = np.concatenate([one, other[:2]])[None]
  longer = dataclasses.replace(method, inputs_length=13)
  arrays = dict(arrays_of('dept'))
  arrays['a'] = np.pad(arrays['a'], ((0, 6), (0, 0)), constant_values=9.0)
  model = EncoderDecoderModel(CONFIG, methods=(longer,))
  variables = {'params': params(), 'dept': arrays}
  got = np.asarray(jax.jit(model.logits)(variables, packed))[0]
  np.testing.assert_allclose(got[:3], logits_of('dept')[0], atol=2e-5)
  np.testing.assert_allclose(got[3:], logits_of('dept')[1, :2], atol=2e-5)


def test_a_text_that_is_longer_than_the_update_is_refused():
  method = dataclasses.replace(METHODS['dept'], inputs_length=5)
  model = EncoderDecoderModel(CONFIG, methods=(method,))
  start = method.init(jax.random.key(1), params(), ANY_TEXT)
  with pytest.raises(UserError, match='inputs_length is 5, the inputs have up'):
    model.logits({'params': params(), 'dept': start}, batch_of(method))


@pytest.mark.parametrize('name', METHODS)
def test_scanned_layers_act_as_unrolled_ones(name):
  np.testing.assert_allclose(
    logits_of(name, scan=True), logits_of(name), atol=2e-5
  )


@pytest.mark.parametrize('name', FOLDING)
def test_a_folded_model_is_a_plain_t5_that_acts_alike(name):
  flat = {k: np.asarray(v) for k, v in parameters.flatten(params()).items()}
  folded = METHODS[name].fold(flat, arrays_of(name))
  assert set(folded) == set(flat)
  got = jax.jit(EncoderDecoderModel(CONFIG).logits)(
    {'params': parameters.nest(folded)}, batch_of(METHODS[name])
  )
  np.testing.assert_allclose(got, logits_of(name), atol=2e-5)


def test_what_no_plain_t5_acts_like_does_not_fold():
  for name in {**METHODS, **COMPUTED}.keys() - set(FOLDING):
    assert (METHODS | COMPUTED)[name].fold({}, arrays_of(name)) is None


@pytest.mark.parametrize('name', IN_LAYERS)
def test_decoding_with_a_cache_sees_what_training_sees(name):
  """The likeliest next token at each position, one step at a time or all."""
  model, variables = model_of(name)
  batch = batch_of(METHODS[name])
  ids = np.asarray(jax.jit(model.predict_batch)(variables, batch))
  again = batch | {
    'decoder_input_tokens': np.pad(ids[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': np.maximum(ids, 2),  # padding is masked
  }
  likeliest = np.asarray(jax.jit(model.logits)(variables, again)).argmax(-1)
  for row, want in zip(ids, likeliest):
    ends = [*np.flatnonzero(row == 1), len(row) - 1][0] + 1
    # A 0 in the middle is hidden from those after it, but not in decoding.
    zeros = [*np.flatnonzero(row == 0) + 1, ends][0]
    np.testing.assert_array_equal(
      row[: min(ends, zeros)], want[: min(ends, zeros)]
    )


def test_a_method_starts_from_the_frozen_model():
  """None of these changes anything before it is trained."""
  plain = EncoderDecoderModel(CONFIG).logits(
    {'params': params()}, batch_of(Lora())
  )
  for method in (Lora(2), IA3(), NormScales(), Adapters(3)):
    start = method.init(jax.random.key(1), params(), ANY_TEXT)
    model = EncoderDecoderModel(CONFIG, methods=(method,))
    variables = {'params': params(), method.collection: start}
    got = model.logits(variables, batch_of(method))
    # Who acts on keys has them computed, which rounds elsewhere.
    np.testing.assert_allclose(got, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', [*METHODS, *COMPUTED])
def test_shapes_are_known_without_weights(name):
  """Of a scanned network too; stacked axes are named 'layers'."""
  method = (METHODS | COMPUTED)[name]
  for scan in (False, True):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    shapes = network.parameter_shapes(config)
    init = functools.partial(method.init, text=ANY_TEXT)
    found = jax.eval_shape(init, jax.random.key(0), shapes)
    wanted = arrays_of(name)
    if scan:
      wanted = parameters.scanned(wanted, 0)
    found = parameters.flatten(found)
    assert {k: v.shape for k, v in found.items()} == {
      k: v.shape for k, v in wanted.items()
    }
    axes = parameters.flatten(method.axes(parameters.nest(found)))
    for path, names in axes.items():
      assert len(names) == len(found[path].shape)
      assert ('layers' in names) == parameters.is_scanned(path)


@pytest.mark.parametrize('name', [*METHODS, *COMPUTED])
def test_t5x_has_a_place_for_every_array(name):
  """And gives them back as the network's collections."""
  method = (METHODS | COMPUTED)[name]
  of_two_rates = {
    'dept': 'update_rate',
    'adept': 'update_rate',
    'multitask_prompt': 'factor_rate',
  }
  if name in of_two_rates:
    with pytest.raises(UserError, match="T5X's optimiser has one learning rat"):
      jax.eval_shape(Network(CONFIG, (method,)).init, jax.random.key(0))
    method = dataclasses.replace(method, **{of_two_rates[name]: 1.0})
  vocabulary = ByteVocabulary()
  module = Network(CONFIG, (method,), vocabulary=vocabulary)
  made = jax.eval_shape(module.init, jax.random.key(0))
  ours = jax.eval_shape(module.variables, made['params'])
  shapes = {k: v.shape for k, v in parameters.flatten(ours[name]).items()}
  assert shapes == {k: v.shape for k, v in arrays_of(name).items()}
  t5 = parameters.flatten(ours['params'])
  assert set(t5) == set(parameters.flatten(params()))


def test_a_file_in_the_folder_is_a_method():
  """Nothing else names them: not gin's names, not the files' reader."""
  found = methods.by_collection()
  known = {**METHODS, **COMPUTED}
  assert {name: found[name] for name in known} == {
    name: type(method) for name, method in known.items()
  }
  assert found['params'] is ModelTuning
  assert methods.of_collection('no such') is None
  assert {'Prompt', 'class_labels', 'Lora'} <= set(methods.configurables())
  for kind in found.values():
    settings = kind().settings()
    assert kind.with_settings(settings).settings() == settings


def test_a_method_of_ones_own_needs_its_file_alone():
  """A bias on the encoder's output, in a few lines."""

  @dataclasses.dataclass(frozen=True)
  class Shift(Method):
    collection = 'shift'

    def init(self, rng, params, text):
      return {'by': np.ones(params['token_embedder']['embedding'].shape[1])}

    def intercept(self, batch):
      def shift(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.method_name == 'encode':
          y = y + context.module.get_variable('shift', 'by')[None, None]
        return y

      return shift

  method = Shift()
  model = EncoderDecoderModel(CONFIG, methods=(method,))
  start = method.init(None, params(), ANY_TEXT)
  batch = batch_of(method)
  loss = lambda arrays: model.loss_fn(
    {'params': params(), 'shift': arrays}, batch
  )[0]
  gradient = jax.grad(loss)(jax.tree.map(jnp.float32, start))
  assert np.abs(gradient['by']).min() > 0
