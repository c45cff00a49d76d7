"""Prompt ensembles: one model, several prompts, a vote (Lester et al. 2021, 6).

An example's row stands once for each prompt of the table in the same batch, so
that one pass of the frozen model answers for all of them.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Int, Shaped
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError


def members(virtual_tokens: VirtualTokens | None) -> int:
  """K, the prompts that vote.

  Raises:
    UserError: there are no several prompts.
  """
  if virtual_tokens is None or virtual_tokens.num_prompts < 2:
    raise UserError(
      'an ensemble needs two prompts or more: give PROMPT_FILE a list of them,'
      " PROMPT_FILE=\"['runs/a', 'runs/b']\""
    )
  return virtual_tokens.num_prompts


def for_each_member(
  batch: Mapping[str, Shaped[np.ndarray, 'B ...']],
  virtual_tokens: VirtualTokens,
) -> dict[str, Shaped[np.ndarray, 'K*B ...']]:
  """All rows with prompt 0, then all with prompt 1, and so on."""
  count = virtual_tokens.num_prompts
  tiled = {name: np.concatenate([rows] * count) for name, rows in batch.items()}
  ids = tiled['encoder_input_tokens']
  member = np.repeat(np.arange(count), len(ids) // count)[:, None]
  shift = (member * virtual_tokens.length).astype(ids.dtype)
  is_virtual = ids >= virtual_tokens.first_id
  tiled['encoder_input_tokens'] = np.where(is_virtual, ids + shift, ids)
  return tiled


def vote(answers: Int[np.ndarray, 'K N L']) -> Int[np.ndarray, 'N L']:
  """The answer that most members give to each example.

  Of answers with equally many votes it is that of the first member among
  those who gave them.
  """
  return np.stack([_majority(given) for given in np.moveaxis(answers, 0, 1)])


def _majority(given: Int[np.ndarray, 'K L']) -> Int[np.ndarray, 'L']:
  votes: Sequence[int] = [int((given == one).all(-1).sum()) for one in given]
  return given[int(np.argmax(votes))]  # of equals argmax takes the first
