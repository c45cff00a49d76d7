"""The prompt: its table of virtual tokens and how the table starts.

An initialiser is a function
`init(rng, shape, embedding, *, encode=None, labels=()) -> table`
of a random key, the shape (K, P, E), the base model's own embeddings [V, E],
a function from a string to ids, and the task's class labels. It returns a
float32 table.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_tuning.errors import UserError

Initializer = Callable[..., jax.Array]


def uniform(low: float = -0.5, high: float = 0.5) -> Initializer:
  """Every entry from U[low, high); the paper's is U[-0.5, 0.5].

  The public code draws U[0, 0.5): `low=0`.
  """

  def init(rng, shape, embedding, *, encode=None, labels=()):
    del embedding, encode, labels
    return jax.random.uniform(rng, shape, jnp.float32, low, high)

  return init


def sampled_vocabulary(first: int = 5000) -> Initializer:
  """Embeddings of pieces drawn from the `first` rows, the most common ones.

  Drawn without replacement within a prompt while P <= first (paper, section
  3.2: the 5,000 most common pieces). 0 draws from the whole table.
  """

  def init(rng, shape, embedding, *, encode=None, labels=()):
    del encode, labels
    num_prompts, length, _ = shape
    rows = min(first, embedding.shape[0]) or embedding.shape[0]
    drawn = [
      jax.random.choice(key, rows, (length,), replace=length > rows)
      for key in jax.random.split(rng, num_prompts)
    ]
    return jnp.take(embedding, jnp.stack(drawn), axis=0).astype(jnp.float32)

  return init


def _fill(
  known: Float[Array, 'R E'], rest: Float[Array, 'K P E']
) -> Float[Array, 'K P E']:
  """Puts the first P known rows at the start of every prompt."""
  known = known[: rest.shape[1]].astype(jnp.float32)
  return rest.at[:, : known.shape[0]].set(known[None])


def class_labels(
  words: Sequence[str] | None = None, fallback: Initializer | None = None
) -> Initializer:
  """Row i is the embedding of label i, the mean of its pieces' embeddings.

  Args:
    words: the labels; None takes those of the task that is trained.
    fallback: fills the rows that are left (paper: sampled vocabulary, which is
      the default). Labels past the prompt's length are left out.
  """
  fallback = fallback or sampled_vocabulary()

  def init(rng, shape, embedding, *, encode=None, labels=()):
    chosen = list(labels if words is None else words)
    if not chosen:
      raise UserError(
        'class_labels needs labels: the task names none, so bind'
        ' class_labels.words to a list of strings'
      )
    if encode is None:
      raise UserError('class_labels needs a vocabulary to encode the labels')
    pieces = [encode(label) for label in chosen]
    if not all(pieces):
      empty = chosen[pieces.index([])]
      raise UserError(f'class_labels has {empty!r}, a label without pieces')
    means = [jnp.mean(embedding[jnp.asarray(ids)], axis=0) for ids in pieces]
    rest = fallback(rng, shape, embedding, encode=encode, labels=labels)
    return _fill(jnp.stack(means), rest)

  return init


def from_string(text: str, fallback: Initializer | None = None) -> Initializer:
  """The embeddings of the text's pieces, in order, from the first row on.

  Rows that are left start as `fallback` says (default: sampled vocabulary);
  pieces past the prompt's length are left out.
  """
  fallback = fallback or sampled_vocabulary()

  def init(rng, shape, embedding, *, encode=None, labels=()):
    if encode is None:
      raise UserError('from_string needs a vocabulary to encode its text')
    ids = encode(text)
    if not ids:
      raise UserError(f'from_string has {text!r}, a text without pieces')
    pieces = embedding[jnp.asarray(ids)]
    rest = fallback(rng, shape, embedding, encode=encode, labels=labels)
    return _fill(pieces, rest)

  return init


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the soft prompt is.

  Attributes:
    length: P, virtual tokens of one prompt.
    num_prompts: K, prompts in the table; an example chooses one by its ids.
    initializer: how the table starts; the paper's default is class labels.
    placement: where the virtual tokens stand: 'prefix' (before the text),
      'after_bos', 'suffix' (before EOS) or 'around' (half before, half after).
  """

  length: int = 100
  num_prompts: int = 1
  initializer: Initializer = dataclasses.field(
    default_factory=sampled_vocabulary
  )
  placement: Literal['prefix', 'after_bos', 'suffix', 'around'] = 'prefix'

  def init(
    self,
    rng: jax.Array,
    embedding: Float[Array, 'V E'],
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    labels: Sequence[str] = (),
  ) -> dict[str, Float[Array, 'K P E']]:
    """The collection `prompt` at its start: {'table': [K, P, E]}, float32."""
    shape = (self.num_prompts, self.length, embedding.shape[1])
    table = self.initializer(
      rng, shape, embedding, encode=encode, labels=labels
    )
    return {'table': jnp.asarray(table, jnp.float32)}
