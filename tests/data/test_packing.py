"""First-fit packing: which rows, and what stands in them."""

import numpy as np

from prompt_tuning.data import packing


def examples(sizes, first=0, inputs=10, targets=4):
  """An example of these (inputs, targets) lengths; its number is in its ids."""
  for number, (n, m) in enumerate(sizes, first):
    encoder = np.zeros(inputs, np.int32)
    encoder[:n] = 10 * (number + 1) + np.arange(n)
    decoder = np.zeros(targets, np.int32)
    decoder[:m] = 100 + number
    yield {
      'encoder_input_tokens': encoder,
      'decoder_input_tokens': np.pad(decoder[:-1], (1, 0)) * (decoder > 0),
      'decoder_target_tokens': decoder,
      'decoder_loss_weights': (decoder > 0).astype(np.int32),
    }


def test_an_example_goes_into_the_first_row_with_room():
  # Worked out by hand: 6 and 3 fill a row of 10 but for one, 7 needs a row of
  # its own, 1 goes back to the first; the targets of the last 3 do not fit 6.
  sizes = [(6, 2), (7, 2), (3, 2), (1, 1), (3, 4)]
  rows = list(packing.rows(with_end(examples(sizes)), 6))
  first = {name: values.tolist() for name, values in rows[0].items()}
  assert first['encoder_segment_ids'] == [1] * 6 + [2] * 3 + [3]
  assert first['encoder_input_tokens'][6:] == [30, 31, 32, 40]
  assert first['encoder_positions'] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
  assert first['decoder_target_tokens'] == [100, 100, 102, 102, 103, 0]
  assert first['decoder_input_tokens'] == [0, 100, 0, 102, 0, 0]
  assert first['decoder_segment_ids'] == [1, 1, 2, 2, 3, 0]
  assert first['decoder_positions'] == [0, 1, 0, 1, 0, 0]
  assert first['decoder_loss_weights'] == [1, 1, 1, 1, 1, 0]
  assert rows[1]['encoder_segment_ids'].tolist() == [1] * 7 + [2] * 3
  assert rows[1]['decoder_target_tokens'].tolist() == [101] * 2 + [104] * 4


def with_end(few):
  """As many full rows behind them as push these out."""
  yield from few
  yield from examples([(10, 1)] * (packing.OPEN + 2), first=1000)


def test_every_example_is_in_one_row_as_it_was():
  rng = np.random.default_rng(0)
  sizes = [(rng.integers(1, 11), rng.integers(1, 5)) for _ in range(200)]
  rows = list(packing.rows(with_end(examples(sizes)), 8))
  found = []
  for row in rows:
    for segment in range(1, row['encoder_segment_ids'].max() + 1):
      targets = row['decoder_segment_ids'] == segment
      number = int(row['decoder_target_tokens'][targets][0])
      inputs = int(np.sum(row['encoder_segment_ids'] == segment))
      found.append((number, inputs, int(targets.sum())))
  expected = [(100 + i, *size) for i, size in enumerate(sizes)]
  assert sorted(found)[: len(sizes)] == expected


def test_batches_begin_anywhere():
  rows = list(packing.rows(with_end(examples([(5, 1)] * 40)), 8))
  batches = list(packing.batches(iter(rows), 4, 0))
  assert all(len(v) == 4 for batch in batches for v in batch.values())
  # No row is lost between two of them.
  together = np.concatenate([b['encoder_input_tokens'] for b in batches])
  one_by_one = np.stack([row['encoder_input_tokens'] for row in rows])
  np.testing.assert_array_equal(together, one_by_one[: len(together)])
  assert len(together) > len(rows) - 4
  later = list(packing.batches(iter(rows), 4, 3))
  assert len(later) == len(batches) - 3
  np.testing.assert_array_equal(
    later[0]['encoder_input_tokens'], batches[3]['encoder_input_tokens']
  )


def test_targets_have_room_for_as_many_examples_as_inputs():
  limits = {'inputs': 512, 'targets': 8}
  # 612 / (53 + 100) is four examples, with targets of 5: 25 with a quarter
  # more, in steps of 8.
  found = packing.targets_length(np.array([53]), np.array([5]), limits, 100)
  assert found == 32
  assert packing.targets_length(*np.zeros((2, 0), int), limits, 100) == 8
