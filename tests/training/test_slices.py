"""Rows by length: which shapes, and that what is computed is the same."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.model_tuning import ModelTuning
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.methods.prompt import uniform
from prompt_tuning.methods.tied_prompt import TiedPrompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import batches as batches_lib
from prompt_tuning.training import loop
from prompt_tuning.training import partitioning
from prompt_tuning.training import slices
from prompt_tuning.training import stepping
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.mesh_choice import Partitioner
from prompt_tuning.training.train_state import TrainState
from prompt_tuning.training.train_step import train_step
from prompt_tuning.training.validation import Validation

CONFIG = network.T5Config(
  vocab_size=32,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
P, T, L = 3, 24, 6
SHAPES = slices.Shapes((8, 16, T), (3, 2, 1), (4, L))
FEWER = slices.Shapes((12, T), (3, 2), (4, L))
RNG = jax.random.key(7)


def padded_to(lengths, rows):
  return sum(min(n for n in lengths if n >= row) for row in rows)


def test_the_lengths_are_the_best_of_all():
  rng = np.random.default_rng(0)
  for _ in range(100):
    rows = rng.integers(1, 12, rng.integers(1, 10))
    number = int(rng.integers(1, 4))
    different = sorted(set(rows.tolist()))
    least = min(
      padded_to(lengths, rows)
      for lengths in itertools.combinations(
        different, min(number, len(different))
      )
      if lengths[-1] == different[-1]
    )
    assert padded_to(slices.best_lengths(rows, number), rows) == least


def test_slices_take_every_row_once_the_longest_first():
  lengths = np.array([5, 17, 8, 9, 2, 16, 7])
  found = SHAPES.slices(lengths)
  # 17 needs all 24; then 16 and 9 in two rows of 16; the rest in rows of 8.
  assert [(one.inputs, len(one.rows)) for one in found] == [
    *((T, 1), (16, 2), (8, 3), (8, 3))
  ]
  taken = [one.rows[: one.filled].tolist() for one in found]
  assert taken == [[1], [5, 3], [2, 6, 0], [4]]
  # What fills up a slice is its first row.
  assert found[-1].rows.tolist() == [4, 4, 4]
  assert slices.computed(SHAPES, [lengths]) == (T + 2 * 16 + 2 * 3 * 8, 4)
  targets = np.array([4, 4, 4, 5, 4, 4, 4])
  found = SHAPES.slices(lengths, targets)
  assert [one.targets for one in found] == [4, L, 4, 4]


def test_a_row_ends_at_its_last_token():
  ids = np.array([[3, 0, 4, 0], [0, 0, 0, 0], [1, 2, 3, 4], [9, 0, 0, 0]])
  assert slices.row_lengths(ids).tolist() == [3, 1, 4, 1]


def test_shapes_follow_the_data_and_bounds():
  few = [np.array([100] * 20 + [300] * 10 + [600] * 2)]
  chosen = slices.choose(few, 612, rows=32, tokens=1024)
  assert chosen.lengths == (104, 304, 600, 612)
  assert all(
    r == 1 or r * n <= 1024
    for n, r in zip(chosen.lengths, chosen.rows, strict=True)
  )
  # Lengths that hardly differ are not worth a shape.
  even = [np.full(32, 610)]
  assert slices.choose(even, 612, rows=32).lengths == (612,)
  assert slices.choose(few, 612, rows=8, multiple=8).rows == (8,) * 4
  by_hand = slices.choose(few, 612, rows=32, lengths=(612, 200))
  assert by_hand.lengths == (200, 612) and by_hand.rows == (32, 32)
  with pytest.raises(UserError, match='from 1 to 612.*700'):
    slices.choose(few, 612, rows=32, lengths=(700,))


def batch(seed=0, rows=8):
  """Rows of many lengths, two in one; some targets count for half."""
  rng = np.random.default_rng(seed)
  inputs = np.zeros((rows, T), np.int32)
  targets = np.zeros((rows, L), np.int32)
  for row in range(rows):
    text = rng.integers(2, 30, rng.integers(1, T - P + 1))
    inputs[row, : P + len(text)] = [*range(32, 32 + P), *text]
    answer = rng.integers(2, 30, rng.integers(1, 4 if row else L))
    targets[row, : len(answer) + 1] = [*answer, 1]
  weights = (targets > 0).astype(np.float32)
  weights[1] *= 0.5
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': weights,
  }


@pytest.fixture(scope='module')
def variables():
  params = jax.jit(EncoderDecoderModel(CONFIG).init_params)(jax.random.key(0))
  table = jax.random.normal(jax.random.key(1), (1, P, 16))
  return {'params': params, 'prompt': {'table': table}}


@pytest.mark.parametrize(
  'trained, normalizer',
  [
    ('prompt', 'NUM_TOTAL_TARGET_TOKENS'),
    ('params', 'AVERAGE_PER_SEQUENCE'),
    ('tied', 'NUM_REAL_TARGET_TOKENS'),
  ],
)
def test_a_sliced_step_equals_the_padded_one(variables, trained, normalizer):
  """Plain descent at rate 1: the update is the gradient."""
  methods = (Prompt(P, 1, uniform()),)
  frozen = {'params': variables['params']}
  trainable = {'prompt': variables['prompt']}
  if trained == 'params':
    methods = (*methods, ModelTuning())
    frozen, trainable = {}, variables
  if trained == 'tied':
    methods = (TiedPrompt(methods[0], '', weight=0.5),)
    tied = {'ids': jnp.ones(P), 'text_rows': jnp.ones((P, 16))}
    trainable = {'tied_prompt': variables['prompt'] | tied}
  model = EncoderDecoderModel(
    CONFIG, methods=methods, loss_normalizing_factor=normalizer
  )
  optimizer = optax.sgd(1.0)
  expected, metrics = jax.jit(
    lambda s, f, b: train_step(model, optimizer, s, f, b, RNG)
  )(TrainState.create(trainable, optimizer), frozen, batch())
  layout = partitioning.single_device()
  placed = batches_lib.placed(
    batch(), layout, 8, 32 + P, FEWER, model.token_weights
  )
  assert len(placed.content) > 2 and placed.tokens < 8 * (T + L)
  assert placed.filled == np.count_nonzero(
    batch()['encoder_input_tokens']
  ) + np.count_nonzero(batch()['decoder_target_tokens'])
  step = stepping.SlicedStep(
    *(model, optimizer, 1.0, RNG, layout),
    TrainState(*[layout.replicated] * 3),
  )
  copied = jax.tree.map(jnp.array, trainable)  # the step takes them over
  state = TrainState.create(copied, optimizer)
  with jax.transfer_guard('disallow'):
    new, found = step(state, frozen, placed.content)
  for name, value in metrics.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    new.trainable,
    expected.trainable,
  )
  # A function for each shape that there was, no more.
  seen = {
    tuple(part.batch[name].shape for name in sorted(part.batch))
    for part in placed.content
  }
  assert step._add._cache_size() == len(seen) <= 3


@pytest.mark.parametrize('given', ['none', 'behind the targets'])
def test_what_counts_behind_the_last_target_is_not_cut(given):
  whole, layout = batch(), partitioning.single_device()
  if given == 'none':  # then padding counts too
    del whole['decoder_loss_weights']
  else:
    whole['decoder_loss_weights'][2, -1] = 1.0
  model = EncoderDecoderModel(CONFIG)
  shapes = dataclasses.replace(FEWER, targets=(4, L))
  placed = batches_lib.placed(
    whole, layout, 8, 32 + P, shapes, model.token_weights
  )
  assert len(placed.content) > 2
  found = sum(float(part.weights.sum()) for part in placed.content)
  assert found == float(model.token_weights(whole).sum())


def test_decoding_scores_and_ranks_do_not_depend_on_padding(variables):
  model = EncoderDecoderModel(CONFIG, methods=(Prompt(P, 1, uniform()),))
  rows = batch(3)
  labels = jnp.array([[5, 1, 0], [7, 8, 1]], jnp.int32)
  for function in (
    model.predict_batch_with_aux,
    model.score_batch,
    lambda v, b: model.rank_classify(v, b, labels),
  ):
    function = jax.jit(function)
    expected = jax.device_get(function(variables, rows))
    found = slices.run(
      dataclasses.replace(FEWER, targets=(None,)),
      rows,
      lambda part, number, function=function: function(variables, part),
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-5),
      found,
      expected,
    )


def test_the_rows_of_all_members_come_back_in_order():
  rows = {'encoder_input_tokens': np.array([[3, 0], [4, 5], [6, 0]])}
  shapes = slices.Shapes((1, 2), (2, 2), (None,))
  found = slices.run(
    shapes,
    rows,
    lambda part, number: np.concatenate(
      [k * 10 + part['encoder_input_tokens'][:, :1] for k in range(2)]
    ),
    members=2,
  )
  assert found.tolist() == [[[3], [4], [6]], [[13], [14], [16]]]


@dataclasses.dataclass(frozen=True)
class Varied:
  """Texts of 1 to 45 ids, most of them short."""

  batch_size: int = 8
  feature_lengths = {'inputs': 45, 'targets': 16}
  vocabulary: str | None = None
  name: str | None = None
  num_shards: int | None = None

  def class_labels(self):
    return None

  def batches(self, *, virtual_tokens, seed, start, rows, num_shards):
    virtual = [] if virtual_tokens is None else virtual_tokens.ids()
    for index in itertools.count(start):
      rng = np.random.default_rng((seed, index))
      inputs = np.zeros((self.batch_size, len(virtual) + 45), np.int32)
      targets = np.zeros((self.batch_size, 16), np.int32)
      for row, target in zip(inputs, targets, strict=True):
        length = rng.integers(1, 46 if rng.random() < 0.2 else 12)
        text = [*virtual, *rng.integers(2, 30, length)]
        row[: len(text)] = text
        target[:2] = 7, 1
      yield {
        'encoder_input_tokens': inputs,
        'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        'decoder_target_tokens': targets,
        'decoder_loss_weights': (targets > 0).astype(np.float32),
      }


def test_batches_keep_their_order_and_a_run_its_shapes():
  def batches(start=0):
    return Varied().batches(
      virtual_tokens=None, seed=3, start=start, rows=None, num_shards=1
    )

  layout = partitioning.single_device()
  record = types.SimpleNamespace(lengths=None)
  how = (layout, 8, None, 1, None)
  given, shapes = stepping.sliced(batches(), record, *how)
  for one, other in zip(itertools.islice(given, 80), batches()):
    jax.tree.map(np.testing.assert_array_equal, one, other)
  assert shapes.lengths[-1] == 45 and 1 < len(shapes.lengths) <= 7
  assert shapes.targets == (8, 16)
  # Rounded up, and as JSON gives it back.
  assert sum(record.lengths['inputs'].values()) == 32 * 8
  saved = types.SimpleNamespace(lengths=json.loads(json.dumps(record.lengths)))
  _, again = stepping.sliced(batches(70), saved, *how)
  assert again == shapes
  _, fixed = stepping.sliced(batches(), record, layout, 8, 4, 4, (20,))
  assert (fixed.lengths, fixed.rows) == ((20, 45), (2, 2))
  _, none = stepping.sliced(batches(), record, layout, 8, 4, 4, (45,))
  assert none is None


def test_a_sliced_run_ends_where_a_padded_one_does(tmp_path):
  params = jax.jit(EncoderDecoderModel(CONFIG).init_params)(jax.random.key(5))
  arrays = jax.tree.map(np.asarray, parameters.flatten(params))

  def run(folder, steps, **settings):
    result = loop.train(
      model_dir=tmp_path / folder,
      model=EncoderDecoderModel(CONFIG),
      data=Varied(),
      base=BaseCheckpoint('tiny base', 1000, arrays, {}),
      methods=(Prompt(P, 1, uniform()),),
      train_steps_relative=steps,
      log_period=1,
      partitioner=OneDevice(),
      **settings,
    )
    lines = (tmp_path / folder / 'metrics.jsonl').read_text().splitlines()
    return result.variables['prompt']['table'], list(map(json.loads, lines))

  padded, lines = run('padded', 4, row_lengths=(), microbatches=2)
  sliced, fewer = run('sliced', 4, row_lengths=(16,))
  np.testing.assert_allclose(sliced, padded, atol=1e-4)
  for one, other in zip(lines, fewer, strict=True):
    for name in ('loss', 'accuracy', 'tokens'):
      np.testing.assert_allclose(one[name], other[name], rtol=1e-4)
  assert fewer[2]['padding_share'] < lines[2]['padding_share'] - 0.1
  run('resumed', 2, row_lengths=(16,))
  resumed, _ = run('resumed', 4, row_lengths=(16,))
  np.testing.assert_array_equal(resumed, sliced)
  # How it is computed is no other run.
  changed, _ = run('resumed', 5, row_lengths=(), microbatches=1)
  assert np.isfinite(changed).all()


def test_validation_is_that_of_padded_batches(variables):
  model = EncoderDecoderModel(CONFIG, methods=(Prompt(P, 1, uniform()),))
  tokens = VirtualTokens(first_id=32, length=P)
  validation = Validation(
    model, Varied(), tokens, 2, partitioning.single_device()
  )
  found = validation.evaluate(variables, 0)
  batches = Varied().batches(
    virtual_tokens=tokens, seed=0, start=0, rows=None, num_shards=1
  )
  loss_fn = jax.jit(lambda batch: model.loss_fn(variables, batch)[1])
  sums = [loss_fn(batch) for batch in itertools.islice(batches, 2)]
  loss, tokens = (
    sum(one[name] for one in sums) for name in ('cross_entropy', 'tokens')
  )
  np.testing.assert_allclose(found['validation/loss'], loss / tokens, rtol=1e-5)


class OneDevice(Partitioner):
  """All on the first of the eight devices that tests have."""

  def layout(self, workload, devices=None):
    return super().layout(workload, jax.devices()[:1])
