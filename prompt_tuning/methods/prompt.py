"""Prompt tuning: a table of virtual tokens (Lester et al. 2021, section 2).

Virtual tokens are ids from V upwards among the inputs' ids (see
`data.virtual_tokens`), which look their embeddings up here. An initialiser is
a function `init(rng, shape, embedding, text) -> table` of a random key, the
shape (K, P, E), the base model's own embeddings [V, E] and the task's words
(`method.TaskText`). It returns a float32 table.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Interceptor
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.reparametrization import Reparametrization
from prompt_tuning.models import layers
from prompt_tuning.models.network import T5Config

Initializer = Callable[..., jax.Array]


def uniform(low: float = -0.5, high: float = 0.5) -> Initializer:
  """Every entry from U[low, high); the paper's is U[-0.5, 0.5].

  The public code draws U[0, 0.5): `low=0`.
  """

  def init(rng, shape, embedding, text):
    del embedding, text
    return jax.random.uniform(rng, shape, jnp.float32, low, high)

  return init


def sampled_vocabulary(first: int = 5000) -> Initializer:
  """Embeddings of pieces drawn from the `first` rows, the most common ones.

  Drawn without replacement within a prompt while P <= first (paper, section
  3.2: the 5,000 most common pieces). 0 draws from the whole table.
  """

  def init(rng, shape, embedding, text):
    del text
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

  def init(rng, shape, embedding, text):
    chosen = list(text.labels if words is None else words)
    if not chosen:
      raise UserError(
        'class_labels needs labels: the task names none, so bind'
        ' class_labels.words to a list of strings'
      )
    if text.encode is None:
      raise UserError('class_labels needs a vocabulary to encode the labels')
    pieces = [text.encode(label) for label in chosen]
    if not all(pieces):
      empty = chosen[pieces.index([])]
      raise UserError(f'class_labels has {empty!r}, a label without pieces')
    means = [jnp.mean(embedding[jnp.asarray(ids)], axis=0) for ids in pieces]
    return _fill(jnp.stack(means), fallback(rng, shape, embedding, text))

  return init


def from_string(text: str, fallback: Initializer | None = None) -> Initializer:
  """The embeddings of the text's pieces, in order, from the first row on.

  Rows that are left start as `fallback` says (default: sampled vocabulary);
  pieces past the prompt's length are left out.
  """
  fallback = fallback or sampled_vocabulary()

  def init(rng, shape, embedding, words):
    if words.encode is None:
      raise UserError('from_string needs a vocabulary to encode its text')
    ids = words.encode(text)
    if not ids:
      raise UserError(f'from_string has {text!r}, a text without pieces')
    rest = fallback(rng, shape, embedding, words)
    return _fill(embedding[jnp.asarray(ids)], rest)

  return init


def embed_virtual(
  embed: Callable[..., Float[Array, 'B T E']],
  ids: Int[Array, 'B T'],
  first_id: int,
  rows: Float[Array, 'R E'] | None = None,
) -> Float[Array, 'B T E']:
  """Embeddings of ids: from `first_id` on they look up rows.

  Args:
    embed: gives the embeddings of a vocabulary's ids.
    ids: of tokens and of virtual tokens.
    first_id: the id of row 0.
    rows: None leaves something finite in the virtual tokens' places.
  """
  is_virtual = ids >= first_id
  tokens = embed(jnp.where(is_virtual, 0, ids))
  if rows is None:
    return tokens
  return put_rows(tokens, ids, first_id, rows)


def put_rows(
  x: Float[Array, 'B T E'],
  ids: Int[Array, 'B T'],
  first_id: int,
  rows: Float[Array, 'R E'],
) -> Float[Array, 'B T E']:
  """`x` with rows in the places of virtual tokens."""
  # A product with one-hot rows, so that their gradient is a product too, and
  # not a scatter; other ids give rows of zeros. In float32, since that
  # gradient is summed over all examples, and over devices.
  chosen = jax.nn.one_hot(ids - first_id, rows.shape[0], dtype=rows.dtype)
  virtual = layers.constrain(
    (chosen @ rows).astype(x.dtype), 'batch', 'length', 'embed'
  )
  return jnp.where((ids >= first_id)[..., None], virtual, x)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
  """What the soft prompt is; its arrays are {'table': [K, P, E]}.

  With a reparametrization they are what that makes the table of.

  Attributes:
    length: P, virtual tokens of one prompt.
    num_prompts: K, prompts in the table; an example chooses one by its ids.
    initializer: how the table starts; the paper's default is class labels.
    placement: where the virtual tokens stand: 'prefix' (before the text),
      'after_bos', 'suffix' (before EOS) or 'around' (half before, half after).
    reparametrization: what is trained in the table's place; None: the table.
  """

  collection: ClassVar[str] = 'prompt'
  acts_on_keys: ClassVar[bool] = False

  length: int = 100
  num_prompts: int = 1
  initializer: Initializer = dataclasses.field(
    default_factory=sampled_vocabulary
  )
  placement: Literal['prefix', 'after_bos', 'suffix', 'around'] = 'prefix'
  reparametrization: Reparametrization | None = None

  def init(
    self, rng: jax.Array, params: Any, text: TaskText
  ) -> dict[str, Float[Array, 'K *_']]:
    embedding = params['token_embedder']['embedding']
    shape = (self.num_prompts, self.length, embedding.shape[1])
    table = self.initializer(rng, shape, embedding, text)
    table = jnp.asarray(table, jnp.float32)
    if self.reparametrization is None:
      return {'table': table}
    key = jax.random.fold_in(rng, 1)
    return self.reparametrization.init(key, table, embedding)

  def axes(self, arrays: Any) -> dict[str, tuple[str | None, ...]]:
    return {
      name: ('prompts', *(None,) * (len(array.shape) - 1))
      for name, array in arrays.items()
    }

  def rate(self, path: str) -> float:
    if self.reparametrization is None:
      return self.learning_rate_scale
    return self.learning_rate_scale * self.reparametrization.rate(path)

  def virtual_tokens(self, config: T5Config) -> VirtualTokens:
    return VirtualTokens(
      config.vocab_size, self.length, self.num_prompts, self.placement
    )

  def intercept(self, batch: Mapping[str, jax.Array]) -> Interceptor:
    def look_up(next_fun, args, kwargs, context):
      if context.method_name != 'embed':
        return next_fun(*args, **kwargs)
      table = self._table(context.module.variables[self.collection])
      first_id = context.module.config.vocab_size
      rows = table.reshape(-1, table.shape[-1])  # [K * P, E]
      return embed_virtual(next_fun, *args, first_id, rows)

    return look_up

  def _table(self, arrays: Mapping[str, Any]) -> Float[Array, 'K P E']:
    if self.reparametrization is None:
      return arrays['table']
    return self.reparametrization.table(arrays)

  def plain(self, arrays: Mapping[str, Any]) -> tuple['Prompt', dict[str, Any]]:
    if self.reparametrization is None:
      return self, dict(arrays)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    table = jax.jit(self.reparametrization.table)(arrays)
    method = dataclasses.replace(self, reparametrization=None)
    return method, {'table': np.asarray(table)}

  def settings(self) -> dict[str, Any]:
    settings = super().settings()
    if self.reparametrization is not None:
      settings['reparametrization'] = self.reparametrization.settings()
    return settings

  @classmethod
  def with_settings(cls, settings: Mapping[str, Any]) -> 'Prompt':
    settings = dict(settings)
    if named := settings.get('reparametrization'):
      settings['reparametrization'] = Reparametrization.with_settings(named)
    return super().with_settings(settings)

  def to_file(self, arrays: Mapping[str, Any]) -> tuple[dict, dict[str, Any]]:
    """One prompt is [P, E] there, as public ones are."""
    table = np.asarray(arrays['table'], np.float32)
    names = ('num_prompts', 'prompt_length', 'embed')
    facts = {**dict(zip(names, table.shape)), 'placement': self.placement}
    return {'prompt': table[0] if len(table) == 1 else table}, facts

  @classmethod
  def from_file(
    cls,
    arrays: Mapping[str, Any],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
  ) -> tuple['Prompt', dict[str, Float[np.ndarray, 'K P E']]]:
    if len(arrays) != 1:
      raise ValueError(f'it holds {len(arrays)} arrays, a prompt is one')
    (array,) = (np.asarray(one) for one in arrays.values())
    # bfloat16 is no np.floating; its kind is 'V', as unknown types' is.
    is_float = array.dtype.kind == 'f' or array.dtype.name == 'bfloat16'
    if array.ndim not in (2, 3) or 0 in array.shape or not is_float:
      raise ValueError(
        f'shape {list(array.shape)} of {array.dtype}, a prompt needs floats of'
        ' [length, embed] or [prompts, length, embed]'
      )
    table = array.astype(np.float32).reshape(-1, *array.shape[-2:])
    placement = settings.get('placement') or facts.get('placement')
    method = cls(
      length=table.shape[1],
      num_prompts=table.shape[0],
      placement=placement or 'prefix',
    )
    return method, {'table': table}
