import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from prompt_tuning.data.feature_converter import VirtualTokensFeatureConverter
from prompt_tuning.data.virtual_tokens import PLACEMENTS
from prompt_tuning.data.virtual_tokens import VirtualTokens

LENGTHS = {'inputs': 6, 'targets': 4}
EXAMPLES = [
  {'inputs': [7, 8, 9, 1], 'targets': [3, 1]},
  {'inputs': [5, 1], 'targets': [4, 6, 1]},
  {'inputs': [2, 3, 4, 5, 6, 1], 'targets': [1]},
]


def dataset(examples, **features):
  spec = {
    'inputs': tf.TensorSpec([None], tf.int32),
    'targets': tf.TensorSpec([None], tf.int32),
    **features,
  }
  return tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=spec
  )


def converted(examples, virtual_tokens=None, pack=False, lengths=LENGTHS, **kw):
  converter = VirtualTokensFeatureConverter(virtual_tokens, pack=pack)
  return list(converter(dataset(examples, **kw), lengths).as_numpy_iterator())


@pytest.mark.parametrize('pack', [False, True])
def test_without_virtual_tokens_batches_equal_the_reference(shared_dir, pack):
  golden = json.loads(
    (shared_dir / 'golden/09_feature_conversion/encdec.json').read_text()
  )
  lengths = golden['task_feature_lengths']
  vocabulary = seqio.PassThroughVocabulary(100, eos_id=1)
  trimmed = seqio.preprocessors.append_eos_after_trim(
    dataset([{k: v[:-1] for k, v in ex.items()} for ex in golden['examples']]),
    output_features=dict.fromkeys(lengths, seqio.Feature(vocabulary)),
    sequence_length=lengths,
  )
  converter = VirtualTokensFeatureConverter(pack=pack)
  rows = list(converter(trimmed, lengths).as_numpy_iterator())
  expected = golden['cases']['packed' if pack else 'unpacked']
  assert len(rows) == len(expected)
  for row, reference in zip(rows, expected, strict=True):
    assert row.keys() == reference.keys()
    for name, values in reference.items():
      np.testing.assert_array_equal(row[name], values, err_msg=name)


@pytest.mark.parametrize('placement', PLACEMENTS)
@pytest.mark.parametrize('length', [1, 3])
def test_the_pipeline_places_as_numpy_does(placement, length):
  virtual = VirtualTokens(100, length, placement=placement)
  examples = [*EXAMPLES, {'inputs': [7, 8], 'targets': [1]}]  # without EOS
  rows = converted(examples, virtual)
  for row, example in zip(rows, examples, strict=True):
    ids = virtual.place(np.array(example['inputs']), virtual.ids())
    expected = np.pad(ids, (0, 6 + length - len(ids)))
    np.testing.assert_array_equal(row['encoder_input_tokens'], expected)
    np.testing.assert_array_equal(
      row['decoder_loss_weights'], row['decoder_target_tokens'] > 0
    )


def test_every_example_of_a_packed_row_has_its_own_virtual_tokens():
  # Worked out by hand: the first two examples fill 4 + 2 and 2 + 2 places of
  # 2 + 8, the third needs a row of its own.
  rows = converted(
    EXAMPLES,
    VirtualTokens(100, 2, placement='suffix'),
    pack=True,
    lengths={'inputs': 8, 'targets': 6},
  )
  assert len(rows) == 2
  first = {name: values.tolist() for name, values in rows[0].items()}
  assert first['encoder_input_tokens'] == [7, 8, 9, 100, 101, 1, 5, 100, 101, 1]
  assert first['encoder_segment_ids'] == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
  assert first['encoder_positions'] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
  assert first['decoder_target_tokens'] == [3, 1, 4, 6, 1, 0]
  assert first['decoder_input_tokens'] == [0, 3, 0, 4, 6, 0]


@pytest.mark.parametrize('pack', [False, True])
def test_examples_of_one_batch_may_use_different_prompts(pack):
  examples = [
    {**example, 'prompt_index': index}
    for example, index in zip(EXAMPLES, [1, 0, 2], strict=True)
  ]
  rows = converted(
    examples,
    VirtualTokens(100, 2, num_prompts=3),
    pack=pack,
    lengths={'inputs': 16, 'targets': 8},
    prompt_index=tf.TensorSpec([], tf.int32),
  )
  ids = np.concatenate([row['encoder_input_tokens'] for row in rows])
  assert ids[ids >= 100].tolist() == [102, 103, 100, 101, 104, 105]
  assert 'prompt_index' not in rows[0]
