"""The loss on batches that are held out."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
from typing import Any

import jax
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import partitioning
from prompt_tuning.training import reporting
from prompt_tuning.training import slices
from prompt_tuning.training.batches import TrainData


class Validation:
  """Mean loss per token of a few fixed batches."""

  def __init__(
    self,
    model: EncoderDecoderModel,
    data: TrainData,
    virtual_tokens: VirtualTokens | None,
    num_batches: int,
    layout: partitioning.Layout,
  ):
    if data.batch_size % layout.batch_shards:
      raise UserError(
        f'the validation data have batch_size {data.batch_size}, which the'
        f' {layout.batch_shards} devices that share a batch do not divide'
      )
    batches = data.batches(
      virtual_tokens=virtual_tokens,
      seed=0,
      start=0,
      rows=None,
      num_shards=data.num_shards or 1,
    )
    batches = list(itertools.islice(batches, num_batches))
    self._batches = [
      layout.shard_batch(batch)
      for batch in _sliced(batches, layout, data.batch_size)
    ]
    self._sums = layout.jit(
      lambda variables, batch: model.loss_fn(variables, batch)[1],
      out_shardings=layout.replicated,
    )

  def metric_names(self) -> set[str]:
    """The names of `evaluate`'s metrics."""
    return {'validation/loss', 'validation/accuracy'}

  def evaluate(
    self, variables: Mapping[str, Any], step: int
  ) -> dict[str, float]:
    del step
    sums = jax.device_get(
      [self._sums(variables, batch) for batch in self._batches]
    )
    total = reporting.per_token(jax.tree.map(lambda *x: sum(x), *sums))
    return {
      'validation/loss': total['loss_per_token'],
      'validation/accuracy': total['accuracy'],
    }


def _sliced(
  batches: Sequence[Mapping[str, np.ndarray]],
  layout: partitioning.Layout,
  batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
  """All rows of all batches in slices; rows that fill one weigh nothing."""
  rows = {
    name: np.concatenate([batch[name] for batch in batches])
    for name in batches[0]
  }
  inputs = slices.row_lengths(rows['encoder_input_tokens'])
  targets = slices.target_lengths(rows)
  shapes = slices.choose(
    [inputs],
    rows['encoder_input_tokens'].shape[1],
    rows=layout.padded(batch_size),
    targets=(int(targets.max()),),
  )
  for one in shapes.slices(inputs, targets):
    batch = one.of(rows)
    ones = np.ones_like(batch['decoder_target_tokens'])
    batch.setdefault('decoder_loss_weights', ones)
    batch['decoder_loss_weights'][one.filled :] = 0
    yield batch
