"""Soft prompts on a frozen T5: train, evaluate, export (Lester et al. 2021).

The names below, and those of `prompt_tuning.methods`, can be had from here:

  import prompt_tuning
  predictor = prompt_tuning.load('t5_1_1_mini', 'runs/bbc')
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# Imported when they are asked for: JAX takes a second, seqio several.
_HOMES = {
  'load': 'prompt_tuning.serving.predictor',
  'Predictor': 'prompt_tuning.serving.predictor',
  'train': 'prompt_tuning.training.loop',
  'export': 'prompt_tuning.training.trained',
  'load_checkpoint': 'prompt_tuning.interop.base_checkpoints',
  'load_trained': 'prompt_tuning.interop.prompts',
  'Task': 'prompt_tuning.data.task',
  'TaskData': 'prompt_tuning.data.task_data',
  'Evaluation': 'prompt_tuning.training.evaluator',
  'T5Config': 'prompt_tuning.models.network',
  'EncoderDecoderModel': 'prompt_tuning.models.model',
  'adafactor': 'prompt_tuning.training.optimizers',
  'create_learning_rate_scheduler': 'prompt_tuning.training.optimizers',
}


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  if not name.startswith('_'):
    try:
      return importlib.import_module(f'{__name__}.{name}')
    except ModuleNotFoundError as error:
      if error.name != f'{__name__}.{name}':
        raise
    methods = importlib.import_module('prompt_tuning.methods')
    if name in methods.configurables():
      return methods.configurables()[name]
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  methods = importlib.import_module('prompt_tuning.methods')
  return sorted([*globals(), *_HOMES, *methods.configurables()])
