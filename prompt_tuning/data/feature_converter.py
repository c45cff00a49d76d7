"""From seqio's task features to the model's batch, virtual tokens included."""

from collections.abc import Mapping
import contextlib

import seqio
import tensorflow as tf

from prompt_tuning.data.virtual_tokens import EOS_ID
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.virtual_tokens import encoder_length

PROMPT_INDEX = 'prompt_index'

# TensorFlow only reads data here; left alone it would take the accelerator's
# memory from JAX. It refuses once its devices are in use, which is then a
# choice of the program that imported us.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], 'GPU')


class VirtualTokensFeatureConverter(seqio.EncDecFeatureConverter):
  """seqio's encoder-decoder converter that also places virtual tokens.

  Each example's `inputs` get the ids of one prompt before the example is
  padded or packed, so that every example of a packed row has its own. Encoder
  features are P + inputs long. Without virtual tokens the result is that of
  `seqio.EncDecFeatureConverter`.

  An example chooses its prompt by an int scalar feature `prompt_index` (see
  `Task.prompt_indices`); examples without one get prompt 0.
  """

  def __init__(
    self,
    virtual_tokens: VirtualTokens | None = None,
    pack: bool = False,
    **kwargs,
  ):
    super().__init__(pack=pack, **kwargs)
    self._virtual_tokens = virtual_tokens

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    virtual = self._virtual_tokens
    if virtual is not None:
      inputs_length = task_feature_lengths['inputs']
      table = tf.constant(virtual.table())  # [K, P]

      def place(example):
        ids = example['inputs'][:inputs_length]
        ends_in_eos = tf.reduce_sum(tf.cast(ids[-1:] == EOS_ID, tf.int32))
        placed = virtual.place(
          ids,
          tf.gather(table, example.get(PROMPT_INDEX, 0)),
          concat=tf.concat,
          eos_position=tf.shape(ids)[0] - ends_in_eos,
        )
        return {**example, 'inputs': placed}

      ds = ds.map(place, num_parallel_calls=tf.data.AUTOTUNE)
    return super()._convert_features(ds, self._lengths(task_feature_lengths))

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    return super().get_model_feature_lengths(
      self._lengths(task_feature_lengths)
    )

  def _lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """The task's lengths with room for the virtual tokens."""
    inputs_length = encoder_length(
      task_feature_lengths['inputs'], self._virtual_tokens
    )
    return {**task_feature_lengths, 'inputs': inputs_length}
