"""What is trained beside T5, or instead of it: the protocol of a method.

A method is a file of this folder with a subclass of `Method`. Its arrays are a
variable collection of their own, `{collection: arrays}`, beside T5's `params`;
training, checkpoints, partitioning, files and inference know it by what stands
here. It acts on the network through Flax's interceptors: a function
`(next_fun, args, kwargs, context)` around each call of a module's method, where
`context.module` is the module, `context.method_name` the method, and
`context.module.get_variable(collection, name)` an array of this place in the
network. `args` are those of the call, without the module. Places to act on:
`Transformer.embed`, `EncoderLayer.__call__`, `DecoderLayer.__call__`,
`Attention.attend`, `RelativePositionBias.__call__`, `MLP.__call__`,
`RMSNorm.__call__` and every `Dense.__call__`. Within a scanned stack an array
of the method is its layer's own; outside, all layers stand on axis 0 (of T5's
parameters on axis 1).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.models import parameters
from prompt_tuning.models.network import T5Config

Interceptor = Callable[..., Any]
TokenPenalty = Callable[..., Float[Array, 'B L']]


@dataclasses.dataclass(frozen=True)
class TaskText:
  """Words of the task, for methods whose start depends on them.

  Attributes:
    encode: from a string to the ids of its pieces; None without a vocabulary.
    labels: the task's class labels, where it has a fixed set of them.
  """

  encode: Callable[[str], Sequence[int]] | None = None
  labels: Sequence[str] = ()


# For whom only the shapes of what a method starts with matter.
ANY_TEXT = TaskText(encode=lambda text: [0], labels=('any',))


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train; subclasses are frozen dataclasses of its settings.

  Attributes:
    collection: name of its variable collection, and of its files.
    reads_weights: it computes with T5's weights by itself, where what other
      methods make of them does not reach.
    acts_on_keys: its interceptor looks at the keys or values of the attention
      over the encoder (`Dense.__call__` of 'key' and 'value', `attend`), which
      are not computed otherwise where targets are short; False says that it
      does not.
    learning_rate_scale: its learning rate is the run's times this.
  """

  collection: ClassVar[str]
  reads_weights: ClassVar[bool] = False
  acts_on_keys: ClassVar[bool] = True

  learning_rate_scale: float = dataclasses.field(default=1.0, kw_only=True)

  def init(self, rng: jax.Array, params: Any, text: TaskText) -> dict:
    """Its arrays at the start, float32.

    Args:
      rng: a key.
      params: T5's parameters, or their shapes where only shapes are wanted.
      text: words of the task.
    """
    raise NotImplementedError

  def axes(self, arrays: Any) -> Any:
    """The logical names of each array's axes, a tuple in place of each array.

    'layers' and 'prompts' are axes that stack independent arrays; None is an
    axis that every device holds whole, as all of a small method are.
    """

    def whole(path, array):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      rest = (None,) * (len(array.shape) - parameters.is_scanned(name))
      return ('layers', *rest) if parameters.is_scanned(name) else rest

    return jax.tree_util.tree_map_with_path(whole, arrays)

  def rate(self, path: str) -> float:
    """What an array's learning rate is of the run's.

    Where it is 0, no optimiser touches the array; `refreshed` may change it.
    """
    del path
    return self.learning_rate_scale

  def virtual_tokens(self, config: T5Config) -> VirtualTokens | None:
    """The virtual tokens that it wants among the inputs' ids."""
    del config
    return None

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor | None:
    """How it acts in the network, on this batch.

    Args:
      batch: has `encoder_input_tokens` [B, T] and, of packed examples,
        `encoder_segment_ids` [B, T].
    """
    del batch
    return None

  def penalty(
    self, arrays: Mapping[str, Any], params: Mapping[str, Any]
  ) -> Float[jax.Array, ''] | None:
    """What is added to the loss of a step; logged as 'penalty'.

    Once a step, whatever the size of the batch and the number of its parts:
    its weight counts against a loss that `loss_normalizing_factor` divides.

    Args:
      arrays: its own.
      params: T5's.
    """
    del arrays, params
    return None

  def token_penalty(self) -> TokenPenalty | None:
    """How it adds to each token's loss in training; logged in 'penalty' too.

    Returns:
      A function `(arrays, outputs, alone) -> [B, L]` of its own arrays, of the
      network's `model.Outputs`, and of a function `alone(method, arrays)` that
      gives those of T5 with this method and no other on the same batch, without
      dropout or gradient. What it gives is weighed as each token's loss is, so
      that no division of a batch changes it.
    """
    return None

  def refreshed(
    self, arrays: Mapping[str, Any], params: Mapping[str, Any]
  ) -> dict[str, Any]:
    """New values of arrays of rate 0, by name, after an update of the others.

    Args: as `penalty`'s.
    """
    del arrays, params
    return {}

  def fold(
    self, params: Mapping[str, Any], arrays: Mapping[str, Any]
  ) -> dict[str, Any] | None:
    """T5's parameters that act as they and the arrays together do.

    Args:
      params: by path, layers unrolled.
      arrays: likewise.

    Returns:
      As `params`; None: no plain T5 acts like it.
    """
    del params, arrays
    return None

  def plain(
    self, arrays: Mapping[str, Any]
  ) -> tuple['Method', Mapping[str, Any]]:
    """The method and arrays that act like it and have nothing for training.

    Checkpoints hold what is trained; files, and all who read a run, have this.

    Args:
      arrays: by path, layers unrolled; they may still be on disk.
    """
    return self, arrays

  def as_prompt(
    self, arrays: Mapping[str, Any]
  ) -> tuple['Method', dict[str, Any]] | None:
    """A plain prompt (`prompt.Prompt`) that acts alike, and its arrays.

    Its file is written beside this method's own, for other readers.

    Args:
      arrays: as `plain` gave them.

    Returns:
      None: no plain prompt acts like it, or it is one itself.
    """
    del arrays
    return None

  def in_words(
    self, arrays: Mapping[str, Any], vocabulary: Vocabulary | ByteVocabulary
  ) -> dict[str, str]:
    """What its arrays say to people, by name; its file has it as facts."""
    del arrays, vocabulary
    return {}

  def settings(self) -> dict[str, Any]:
    """Those settings that its arrays need to act again, as plain values."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del values['learning_rate_scale']
    plain = (bool, int, float, str, tuple, list)
    return {k: v for k, v in values.items() if isinstance(v, plain)}

  @classmethod
  def with_settings(cls, settings: Mapping[str, Any]) -> 'Method':
    """The method of what `settings` gave; what is not there is the default."""
    names = {field.name for field in dataclasses.fields(cls)}
    # JSON has lists for tuples.
    return cls(
      **{
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name in names
      }
    )

  def to_file(
    self, arrays: Mapping[str, Any]
  ) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Its arrays, layers unrolled, as its file has them, and further facts."""
    return arrays, {}

  @classmethod
  def from_file(
    cls,
    arrays: Mapping[str, Any],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
  ) -> tuple['Method', Mapping[str, Any]]:
    """The method and its arrays out of its file; a ValueError if it cannot."""
    del facts
    return cls.with_settings(settings), arrays
