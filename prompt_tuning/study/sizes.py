"""How many parameters a command would train, without running it."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from prompt_tuning import methods as methods_lib
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.methods.method import Method
from prompt_tuning.models import network
from prompt_tuning.models.network import T5Config
from prompt_tuning.models.parameters import PARAMS
from prompt_tuning.training import setup
from prompt_tuning.training.reporting import count_parameters

_PLAIN = (bool, int, float, str, tuple)


def parameters(settings: Mapping[str, Any]) -> tuple[int, int]:
  """(trained, all) parameters.

  Args:
    settings: of a `train`, as `Commands.settings` gives them (see `study`).

  Raises:
    UserError: a method is not known.
  """
  config = _made(T5Config, settings)
  shapes = network.parameter_shapes(config)
  methods = []
  for reference in settings['train.methods']:
    kind = methods_lib.configurables().get(reference.strip('@()'))
    if kind not in methods_lib.by_collection().values():
      raise UserError(f'parameters are not known of the method {reference}')
    methods.append(_made(kind, settings))
  trainable = {one.collection: _shapes(one, shapes) for one in methods}
  trained = setup.count_trained(trainable, setup.rates_of(methods, trainable))
  return trained, count_parameters({PARAMS: shapes, **trainable})


def _shapes(method: Method, params: Any) -> Any:
  """Of what a method starts with."""
  return jax.eval_shape(
    lambda params: method.init(jax.random.key(0), params, ANY_TEXT), params
  )


def _made(kind: type, settings: Mapping[str, Any]) -> Any:
  """An object with those of its settings that sizes can depend on.

  They are plain values, and objects made of such: '@Prompt()'.
  """
  given = {}
  for field in dataclasses.fields(kind):
    value = settings.get(f'{kind.__name__}.{field.name}')
    if isinstance(value, str) and value.startswith('@'):
      part = methods_lib.configurables().get(value.strip('@()'))
      if dataclasses.is_dataclass(part):
        given[field.name] = _made(part, settings)
    elif isinstance(value, list):
      given[field.name] = tuple(value)
    elif isinstance(value, _PLAIN):
      given[field.name] = value
  return kind(**given)
