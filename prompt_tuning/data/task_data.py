"""Training batches from a seqio task or mixture.

seqio and TensorFlow are imported by the functions, not by this module, so that
a configuration naming a task costs nothing until its data is read.
"""

from collections.abc import Iterator, Mapping
import dataclasses

from jaxtyping import Int
import numpy as np

from prompt_tuning.data import checking
from prompt_tuning.data import packing
from prompt_tuning.data.task import Task
from prompt_tuning.data.task import import_seqio
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError


@dataclasses.dataclass(frozen=True)
class TaskData:
  """A task as an endless stream of training batches.

  Attributes:
    task: which.
    batch_size: rows of a batch.
    split: the task's split to read.
    pack: several examples in one row (see `data.packing`), whose targets are
      longer than those of one; a row is one of `batch_size`.
    packed_targets_length: of such rows, in ids; None: as a sample of the data
      needs it.
    shuffle: whether examples come in a random order (drawn from the seed).
    num_shards: parts the data are read in (see `batches`); None leaves it to
      the run: as many as its processes need. The order of examples depends on
      it.
  """

  task: Task
  batch_size: int
  split: str = 'train'
  pack: bool = False
  packed_targets_length: int | None = None
  shuffle: bool = True
  num_shards: int | None = None

  @property
  def name(self) -> str:
    return self.task.name

  @property
  def feature_lengths(self) -> Mapping[str, int]:
    return self.task.lengths()

  @property
  def vocabulary(self) -> str | None:
    return self.task.vocabulary

  def class_labels(self) -> list[str] | None:
    return self.task.class_labels()

  def facts(self) -> Mapping[str, object]:
    return self.task.facts()

  def digest(self) -> str:
    return self.task.digest(self.split)

  def batches(
    self,
    *,
    virtual_tokens: VirtualTokens | None,
    seed: int,
    start: int = 0,
    rows: Int[np.ndarray, 'r'] | None = None,
    num_shards: int | None = None,
  ) -> Iterator[dict[str, Int[np.ndarray, 'r length']]]:
    """The batches from number `start` on, without end.

    The order is seqio's for this seed, epoch after epoch, so batch i is a
    function of (seed, num_shards, i), whoever reads it. A resumed run reads and
    drops what the earlier one consumed: seqio's shuffling and random
    preprocessors have no other way to the same state, and examples are dropped
    before they are converted.

    Args:
      virtual_tokens: placed in the inputs; None for none.
      seed: of the order.
      start: batches to skip.
      rows: numbers of the rows of each batch that are wanted; None: all.
      num_shards: S parts of the data (seqio's `ShardInfo`), each of which gives
        B / S rows of every batch, one after the other; only those that `rows`
        asks for are read. None: the attribute, else 1.

    Raises:
      UserError: for an unknown task or split, missing lengths, a data set that
        has no examples or cannot be read. Raised here, not at the first batch.
    """
    import_seqio()
    import seqio

    from prompt_tuning.data import feature_converter
    from prompt_tuning.data import lengths as lengths_lib

    num_shards = num_shards or self.num_shards or 1
    if self.batch_size % num_shards:
      raise UserError(
        f'BATCH_SIZE {self.batch_size} does not divide by the {num_shards}'
        ' parts that the data are read in (TaskData.num_shards)'
      )
    lengths = self.feature_lengths
    task = self.task.checked(
      self.split,
      None if virtual_tokens is None else virtual_tokens.first_id,
      virtual_tokens,
      self.shuffle,
    )
    sample = lengths_lib.check_truncation(
      task, self.split, lengths, self.task.target_sentinel
    )
    targets_length = self._targets_length(sample, virtual_tokens)
    options = {
      'sequence_length': dict(lengths),
      'split': self.split,
      'shuffle': self.shuffle,
      'seed': seed,
      'num_epochs': None,
      # A cache would keep the first epoch's order of a source that shuffles.
      'try_in_mem_cache': not any(
        part.source.performs_internal_shuffling
        for part in seqio.get_subtasks(task)
      ),
    }
    if isinstance(task, seqio.Mixture):  # drops what it does not know
      options['passthrough_features'] = (feature_converter.PROMPT_INDEX,)
    converter = feature_converter.VirtualTokensFeatureConverter(virtual_tokens)
    share = self.batch_size // num_shards
    wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
    parts = []  # (batches, which rows of them)
    for index in np.unique(wanted // share).tolist():
      if num_shards > 1:
        options['shard_info'] = seqio.ShardInfo(index, num_shards)
      with checking.reading(task, self.split):
        dataset = task.get_dataset(**options)
        if not self.pack:
          dataset = dataset.skip(start * share)
        dataset = converter(dataset, lengths)
        if self.pack:
          # How many examples a packed row takes depends on their lengths.
          examples = dataset.prefetch(2 * share).as_numpy_iterator()
          packed = packing.rows(examples, targets_length)
          batches = packing.batches(packed, share, start)
        else:
          dataset = dataset.batch(share, drop_remainder=True).prefetch(2)
          batches = dataset.as_numpy_iterator()
      parts.append((batches, wanted[wanted // share == index] % share))
    return self._read(parts, task, num_shards)

  def targets_length(self, virtual_tokens: VirtualTokens | None) -> int:
    """Of the decoder's rows; packed, it may take a look at the data."""
    if not self.pack or self.packed_targets_length is not None:
      return self._targets_length({}, virtual_tokens)

    from prompt_tuning.data import lengths as lengths_lib

    first_id = None if virtual_tokens is None else virtual_tokens.first_id
    task = self.task.checked(self.split, first_id, virtual_tokens, self.shuffle)
    sample = lengths_lib.sample(task, self.split)
    return self._targets_length(sample, virtual_tokens)

  def _targets_length(
    self,
    sample: Mapping[str, Int[np.ndarray, 'N']],
    virtual_tokens: VirtualTokens | None,
  ) -> int:
    """`targets_length`, given the lengths of a sample."""
    least = self.feature_lengths['targets']
    if not self.pack:
      return least
    given = self.packed_targets_length
    if given is not None:
      if given < least:
        raise UserError(
          f'TaskData.packed_targets_length must be {least} or more, the length'
          f' of one example (TASK_FEATURE_LENGTHS), got {given}'
        )
      return given
    return packing.targets_length(
      sample['inputs'],
      sample['targets'],
      self.feature_lengths,
      0 if virtual_tokens is None else virtual_tokens.length,
    )

  def _read(self, parts, task, num_shards):
    with checking.reading(task, self.split):
      for batches in zip(*(part for part, _ in parts)):
        yield {
          name: np.concatenate(
            [batch[name][rows] for batch, (_, rows) in zip(batches, parts)]
          )
          for name in batches[0]
        }
    raise UserError(
      f'task {task.name}, split {self.split!r}: one of {num_shards} parts of'
      ' the data has no examples; bind a smaller TaskData.num_shards'
    )
