"""Contextual calibration of labels (Zhao et al. 2021, section 5)."""

from jaxtyping import Float, Int
import numpy as np

from prompt_tuning.data.demonstrations import CONTENT_FREE
from prompt_tuning.data.templates import Template
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.virtual_tokens import encoder_row


def content_free_rows(
  prefix: str,
  template: str | None,
  vocabulary,
  inputs_length: int,
  virtual_tokens: VirtualTokens | None,
  prompt_index: int = 0,
) -> Int[np.ndarray, 'F T']:
  """The encoder's rows for inputs that say nothing.

  Args:
    prefix: what stands in front of every input.
    template: of the task's inputs, whose fields all say nothing; None: it is
      not known, and the whole input does.
    vocabulary: seqio's.
    inputs_length: of the rows, virtual tokens not counted.
    virtual_tokens: that stand among them.
    prompt_index: which prompt of the table.
  """
  rows = []
  for nothing in CONTENT_FREE:
    text = nothing
    if template is not None:
      fields = dict.fromkeys(Template(template).fields, nothing)
      text = Template(template).fill(fields, 'a content-free input')
    ids = vocabulary.encode(prefix + text)
    rows.append(encoder_row(ids, inputs_length, virtual_tokens, prompt_index))
  return np.stack(rows)


def calibrated(
  likelihoods: Float[np.ndarray, 'N C'],
  content_free: Float[np.ndarray, 'F C'],
) -> Float[np.ndarray, 'N C']:
  """Log-likelihoods of labels less what the model thinks of them anyway.

  That is the mean of the labels' probabilities over the content-free inputs,
  each normalised over the labels.
  """
  from scipy import special

  anyway = special.softmax(content_free, axis=-1).mean(axis=0)
  return likelihoods - np.log(anyway)
