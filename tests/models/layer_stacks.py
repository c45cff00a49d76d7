"""Parameters of unrolled layers as those of scanned ones, and back."""

import numpy as np

from prompt_tuning.models import parameters


def stack(params):
  return _in_memory(parameters.scanned(parameters.flatten(params)))


def unstack(params):
  return _in_memory(parameters.unrolled(parameters.flatten(params)))


def _in_memory(flat):
  return parameters.nest({path: np.asarray(x) for path, x in flat.items()})
