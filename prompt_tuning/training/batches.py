"""Where training batches come from, on their way to the devices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import queue
import threading
import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.training import partitioning
from prompt_tuning.training.slices import Shapes
from prompt_tuning.training.slices import row_lengths
from prompt_tuning.training.slices import target_lengths


@runtime_checkable
class TrainData(Protocol):
  """A source of training batches (`data.TaskData`, `data.TokenArrayData`).

  Attributes:
    batch_size: rows B of a batch, of all processes together.
    feature_lengths: {'inputs': ..., 'targets': ...}, in ids; inputs without
      virtual tokens.
    vocabulary: path or name of the vocabulary that makes its ids; None: the
      data's own, which nobody else is told of.
    name: of the task; None: it has none.
    num_shards: parts that the data must be read in; None: as many as the
      processes need.
  """

  batch_size: int
  feature_lengths: Mapping[str, int]
  vocabulary: str | None
  name: str | None
  num_shards: int | None

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None,
    seed: int,
    start: int,
    rows: np.ndarray | None,
    num_shards: int,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, a function of seed, index and num_shards.

    Args:
      virtual_tokens: to be placed in the inputs.
      seed: of the order.
      start: batches to skip.
      rows: numbers of the rows of each batch that this process needs, and that
        are yielded; None: all.
      num_shards: parts that the data may be read in, so that a process reads
        only some; who reads single rows at will need not look at it.
    """

  def class_labels(self) -> Sequence[str] | None:
    """The task's labels, where it has a fixed set of them."""


@runtime_checkable
class Described(Protocol):
  """A source that can say what its examples are; others are taken on trust."""

  def facts(self) -> Mapping[str, Any]:
    """What the files of a trained method tell of their task.

    Names are 'template' (the inputs, fields in braces), 'labels' and
    'target_sentinel', as far as there are any.
    """

  def digest(self) -> str:
    """Another one for other examples, wherever they lie."""


@runtime_checkable
class Packs(Protocol):
  """A source whose rows may hold the targets of several examples."""

  def targets_length(self, virtual_tokens: VirtualTokens | None) -> int:
    """Ids of the decoder's rows."""


class Part(NamedTuple):
  """Some rows of a batch.

  Attributes:
    batch: the model's features.
    weights: the model's `token_weights` of the whole batch, for these rows.
    number: of the part, int32.
  """

  batch: dict[str, jax.Array]
  weights: jax.Array
  number: jax.Array


class Placed(NamedTuple):
  """A batch on the mesh, whole or in parts.

  Attributes:
    content: the model's features, or the parts of a batch that is in slices.
    examples: rows.
    tokens: encoder's and decoder's, as they are computed.
    filled: those of them that are no padding.
  """

  content: dict[str, jax.Array] | list[Part]
  examples: int
  tokens: int
  filled: int


def placed(
  batch: Mapping[str, np.ndarray],
  layout: partitioning.Layout,
  batch_size: int,
  rows: int,
  shapes: Shapes | None,
  token_weights: Callable[[Any], Any],
) -> Placed:
  """The batch on the mesh, if the network has a row for every id.

  Args:
    batch: this process's rows.
    layout: of the mesh.
    batch_size: B.
    rows: of the embedding, virtual tokens included.
    shapes: of the slices; None: the batch stays whole.
    token_weights: the model's.
  """
  largest = int(batch['encoder_input_tokens'].max())
  if largest >= rows:
    raise UserError(
      f'the data has id {largest}, the model embeds ids below {rows}; give the'
      ' vocabulary of the model'
    )
  pair = batch['encoder_input_tokens'], batch['decoder_target_tokens']
  filled = sum(map(np.count_nonzero, pair))
  if shapes is None:
    content = layout.shard_batch(batch, batch_size)
    width = sum(ids.shape[1] for ids in pair)
    filled = filled * batch_size // len(pair[0])  # of others, about
    return Placed(content, batch_size, batch_size * width, filled)
  weights = np.asarray(token_weights(batch))
  lengths = row_lengths(pair[0]), target_lengths(batch)
  content, tokens = [], 0
  for number, one in enumerate(shapes.slices(*lengths)):
    counted = weights[one.rows, : one.targets]
    counted[one.filled :] = 0
    content.append(
      Part(
        layout.shard_batch(one.of(batch)),
        layout.shard_batch({'weights': counted})['weights'],
        layout.replicate(np.int32(number)),
      )
    )
    tokens += len(one.rows) * (one.inputs + one.targets)
  return Placed(content, batch_size, tokens, filled)


class Prefetch:
  """Makes the next batches in a thread while the devices work."""

  def __init__(
    self, batches: Iterator[Any], place: Callable[[Any], Any], ahead: int = 2
  ):
    self._queue = queue.Queue(ahead)
    self._closed = threading.Event()
    self._ended = threading.Event()

    def fill():
      try:
        for batch in batches:
          item = (place(batch), None)
          while not self._closed.is_set():
            try:
              self._queue.put(item, timeout=0.1)
              break
            except queue.Full:
              continue
          if self._closed.is_set():
            return
        raise UserError('the training data ended; it must repeat')
      except BaseException as error:  # Raised again where `next` is called.
        self._queue.put((None, error))
      finally:
        self._ended.set()

    threading.Thread(target=fill, daemon=True).start()

  def next(self) -> tuple[Any, float]:
    """A batch, and the seconds it was waited for."""
    start = time.monotonic()
    batch, error = self._queue.get()
    if error is not None:
      raise error
    return batch, time.monotonic() - start

  def close(self) -> None:
    """Returns when nothing is put on devices any more.

    The thread itself may take seconds to end: tf.data's iterator, which goes
    with it, can wait for its tuner to wake.
    """
    self._closed.set()
    while not self._queue.empty():
      self._queue.get_nowait()
    self._ended.wait(timeout=5)
