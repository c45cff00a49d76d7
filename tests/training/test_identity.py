"""What decides a result, as plain values."""

import dataclasses
import functools
import json

import numpy as np
import optax
import pytest

from prompt_tuning.methods import prompt
from prompt_tuning.training import identity
from prompt_tuning.training import optimizers


@dataclasses.dataclass(frozen=True)
class Data:
  split: str = 'train'
  vocabulary: str = 'a/b'
  lengths: tuple = (1, 2)


def differences(one, other, same_code=True):
  one, other = ({'x': identity.describe(value)} for value in (one, other))
  # As a checkpoint's JSON gives it back.
  other = json.loads(json.dumps(other))
  return [name for name, _, _ in identity.differences(one, other, same_code)]


@pytest.mark.parametrize(
  'make',
  [
    lambda: Data(),
    lambda: prompt.class_labels(['a'], prompt.uniform(0.0)),
    lambda: optimizers.adafactor(0.3, weight_decay_rate=1e-5),
    lambda: optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
    lambda: optimizers.create_learning_rate_scheduler(),
    lambda: functools.partial(prompt.uniform, low=0.1),
    lambda: np.arange(4.0),
    lambda: {'a': (1, None, True), 'b': {3, 4}},
  ],
)
def test_equal_settings_are_equal(make):
  assert differences(make(), make()) == []


@pytest.mark.parametrize(
  'one, other, names',
  [
    (Data(), Data(split='test'), ['x split']),
    (Data(), Data(lengths=(1, 3)), ['x lengths']),
    (prompt.uniform(), prompt.uniform(0.0), ['x low']),
    (prompt.uniform(), prompt.sampled_vocabulary(), ['x']),
    (np.arange(4.0), np.arange(4.0) + 1e-9, ['x']),
    (optax.adamw(1e-3, b1=0.9), optax.adamw(1e-3, b1=0.8), None),
    (optax.adamw(1e-3), optax.lion(1e-3), None),
    (
      optimizers.create_learning_rate_scheduler(warmup_steps=5),
      optimizers.create_learning_rate_scheduler(warmup_steps=6),
      ['x apply warmup_steps'],
    ),
  ],
)
def test_every_difference_is_named(one, other, names):
  found = differences(one, other)
  assert found == names if names else found


def test_what_may_change_is_no_difference():
  assert differences(Data(), Data(vocabulary='c/d')) == []
  assert not identity.MAY_CHANGE & {'seed', 'batch_size', 'learning_rate'}


def test_settings_that_one_version_lacks_are_no_difference_to_another():
  one, other = {'a': 1, 'b': 2}, {'a': 1}
  assert list(identity.differences(one, other, same_code=False)) == []
  (found,) = identity.differences(one, other, same_code=True)
  assert found == ('b', 2, 'nothing')
