"""Methods against other implementations of them, on a T5 made of formulas.

`reference.npz` holds, for each method, the logits of the batch of `tiny_t5` and
the gradient of the summed cross entropy by the trained arrays (in the order of
their sorted paths), flat, one after the other. They were made in float32 on a
CPU with torch 2.13.0: a T5ForConditionalGeneration was given the parameters of
`tiny_t5` and a method's own arrays by the formulas below, and its
`backward` gave the gradients.

- lora, ia3, prompt, p_tuning, multitask_prompt: PEFT 0.21.2 with transformers
  5.24.0 (its multitask prompt with one submodule and task ids 1 and 0; of
  P-tuning the rows that its encoder, an MLP, gave, which are stored too).
- hard_prompt: `nn_project` of YuxinWenRick/hard-prompts-made-easy, its loop of
  four steps with torch's AdamW (rate 0.5, weight decay 0.1): first logits and
  gradient, the ids that each step projects to, the table after each step.
- attempt, adapters: the modified T5 of AkariAsai/ATTEMPT with transformers
  4.30.2 (attention 'sub' of size 4, temperature 7, two target prompts, two
  sources, task ids 1 and 0; adapters of size 4, gelu_new, without layer norm).
- norm_scales: the same T5 plain; gradients of its own norms' weights.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.methods.adapters import Adapters
from prompt_tuning.methods.attempt import Attempt
from prompt_tuning.methods.hard_prompt import HardPrompt
from prompt_tuning.methods.ia3 import IA3
from prompt_tuning.methods.lora import Lora
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning.methods.norm_scales import NormScales
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import train_step

sys.path.insert(0, __file__.rpartition('/')[0])
import tiny_t5  # noqa: E402

REFERENCE = np.load(pathlib.Path(__file__).with_name('reference.npz'))
METHODS = {
  'lora': Lora(2, alpha=3.0),
  'ia3': IA3(),
  'prompt': Prompt(3),
  'p_tuning': Prompt(3),
  'multitask_prompt': MultitaskPrompt(Prompt(3, 2), rank=2),
  'attempt': Attempt(Prompt(3, 2), num_sources=2, size=4, temperature=7.0),
  'adapters': Adapters(4),
  'norm_scales': NormScales(),
  'hard_prompt': HardPrompt(Prompt(4), pieces=lambda rows: np.ones(rows, bool)),
}
TOLERANCE = 1e-5


def array(name, path, shape):
  """What the reference had, by the end of the path."""
  formula = tiny_t5.seeded
  match name, path.rpartition('/')[2]:
    case 'lora' | 'adapters', _:
      return formula(path, shape, 0.5)
    case 'ia3', _:
      return 1 + formula(path, shape, 0.5)
    case 'prompt', _:
      return formula('prompt', shape)
    case 'p_tuning', _:
      return REFERENCE['p_tuning/rows'][None]
    case 'attempt', 'norm_scale':
      return 1 + formula(path, shape, 0.3)
    case 'attempt', 'norm_bias':
      return formula(path, shape, 0.3)
    case 'norm_scales', _:
      return np.zeros(shape, np.float32)
    case 'hard_prompt', 'table':
      return formula('hard_prompt', shape)
  return formula(path, shape)


def model_and_arrays(name):
  method = METHODS[name]
  params = jax.tree.map(jnp.asarray, parameters.nest(tiny_t5.params()))
  start = parameters.flatten(method.init(jax.random.key(0), params, ANY_TEXT))
  arrays = {
    path: jnp.asarray(array(name, path, x.shape)) for path, x in start.items()
  }
  if name == 'hard_prompt':
    arrays |= method.refreshed(arrays, params)
  model = EncoderDecoderModel(tiny_t5.CONFIG, z_loss=0.0, methods=(method,))
  return model, {'params': params}, {method.collection: parameters.nest(arrays)}


def batch_of(name):
  tokens = METHODS[name].virtual_tokens(tiny_t5.CONFIG)
  virtual = None
  if tokens is not None:
    several = tokens.num_prompts > 1
    virtual = np.stack([tokens.ids(1 if several else 0), tokens.ids(0)])
  full = name == 'attempt'
  return tiny_t5.batch(tiny_t5.FULL_INPUTS if full else tiny_t5.INPUTS, virtual)


@pytest.mark.parametrize('name', METHODS)
def test_logits_and_gradients_equal_the_references(name):
  model, frozen, trained = model_and_arrays(name)
  batch = batch_of(name)

  @jax.jit
  def both(trained):
    variables = {**frozen, **trained}
    return model.logits(variables, batch), jax.grad(
      lambda trained: model.loss_fn({**frozen, **trained}, batch)[0]
    )(trained)

  logits, gradients = both(trained)
  (found,) = map(parameters.flatten, gradients.values())
  for path in [path for path in found if not METHODS[name].rate(path)]:
    assert not found.pop(path).any()  # nothing reaches them
  expected = REFERENCE[name]
  np.testing.assert_allclose(
    np.ravel(logits), expected[: logits.size], atol=TOLERANCE
  )
  flat = np.concatenate([np.ravel(found[path]) for path in sorted(found)])
  expected = expected[logits.size :]
  assert np.abs(expected).max() > 0.05
  scale = max(1.0, np.abs(expected).max())
  if name == 'norm_scales':
    # Gradients of 10 that others of 100 end in: rounding is 1.6e-5 of them.
    scale *= 2
  np.testing.assert_allclose(flat, expected, atol=TOLERANCE * scale)


def test_steps_of_a_hard_prompt_equal_the_authors():
  model, frozen, trained = model_and_arrays('hard_prompt')
  optimizer = optax.adamw(0.5, weight_decay=0.1)
  state = TrainState.create(trained, optimizer)
  step = jax.jit(
    lambda state: train_step(
      *(model, optimizer, state, frozen, batch_of('hard_prompt')),
      jax.random.key(0),
    )[0]
  )
  wanted = zip(REFERENCE['hard_prompt/ids'], REFERENCE['hard_prompt/tables'])
  for ids, table in wanted:
    arrays = state.trainable['hard_prompt']
    np.testing.assert_array_equal(arrays['ids'][0], ids)
    np.testing.assert_array_equal(
      arrays['rows'][0], tiny_t5.params()['token_embedder/embedding'][ids]
    )
    with jax.numpy_dtype_promotion('standard'):  # optax's Adam needs it
      state = step(state)
    found = state.trainable['hard_prompt']['table'][0]
    # optax computes 1 - 0.999^t in float32, torch in float64: 1e-5 of a step.
    np.testing.assert_allclose(found, table, atol=5e-5)
  assert len(np.unique(REFERENCE['hard_prompt/ids'])) > 6  # they change


def test_padding_does_not_change_what_attempt_mixes():
  model, frozen, trained = model_and_arrays('attempt')
  logits = jax.jit(model.logits)
  for row in (0, 1):
    batch = {k: v[row : row + 1] for k, v in batch_of('attempt').items()}
    wide = np.pad(batch['encoder_input_tokens'], ((0, 0), (0, 4)))
    padded = batch | {'encoder_input_tokens': wide}
    np.testing.assert_allclose(
      *(logits({**frozen, **trained}, one) for one in (batch, padded)),
      atol=TOLERANCE,
    )


def test_a_hard_prompt_is_its_pieces_in_front_of_the_text():
  model, frozen, trained = model_and_arrays('hard_prompt')
  ids = np.asarray(trained['hard_prompt']['ids']).astype(int)
  as_text = tiny_t5.batch(virtual=np.repeat(ids, 2, axis=0))
  plain = EncoderDecoderModel(tiny_t5.CONFIG)
  np.testing.assert_allclose(
    jax.jit(model.logits)({**frozen, **trained}, batch_of('hard_prompt')),
    jax.jit(plain.logits)(frozen, as_text),
    atol=TOLERANCE,
  )
