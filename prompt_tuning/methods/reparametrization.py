"""Reparametrised prompts: other arrays are trained, of which the table is made.

They are a setting of `Prompt`. Checkpoints hold the arrays that are trained;
whatever is a file of the prompt holds the table they make, a prompt like any
other. All start from the table of the prompt's initialiser, as near to it as
they can come.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_tuning.errors import UserError

# Their products are small, and made again where the table becomes a file:
# there and on every accelerator they are to be the same.
_EXACT = jax.lax.Precision.HIGHEST


class Reparametrization:
  """What the table [K, P, E] is made of; subclasses are frozen dataclasses.

  Axis 0 of all its arrays is K: prompts of one table share nothing.
  """

  def init(
    self,
    rng: jax.Array,
    table: Float[Array, 'K P E'],
    embedding: Float[Array, 'V E'],
  ) -> dict[str, Float[Array, 'K *_']]:
    """Its arrays at the start, float32.

    Args:
      rng: a key.
      table: how the prompt should start.
      embedding: the base model's own embeddings.
    """
    raise NotImplementedError

  def table(
    self, arrays: Mapping[str, Float[Array, 'K *_']]
  ) -> Float[Array, 'K P E']:
    """What they make."""
    raise NotImplementedError

  def rate(self, name: str) -> float:
    """What an array's learning rate is of the prompt's; 0: it is frozen."""
    del name
    return 1.0

  def settings(self) -> dict[str, Any]:
    """All settings and its own name, as plain values."""
    return {'is': type(self).__name__, **dataclasses.asdict(self)}

  @staticmethod
  def with_settings(settings: Mapping[str, Any]) -> 'Reparametrization':
    """The one that `settings` told of."""
    settings = dict(settings)
    name = settings.pop('is')
    found = {kind.__name__: kind for kind in Reparametrization.__subclasses__()}
    if name not in found:
      raise UserError(
        f'the prompt was trained by way of {name}, which this version does not'
        ' have: import the module that has it'
      )
    return found[name](**settings)


@dataclasses.dataclass(frozen=True)
class Residual(Reparametrization):
  """A small network on every row, beside a skip connection.

  row + norm(relu(row D + d) U + u), with a layer norm (Razdaibiedina et al.
  2023, section 3; the reference's MLP1 without dropout). The network's output
  has unit scale from the start on, so that the prompt does not start as its
  initialiser says, but as that and noise.

  Attributes:
    width: of the hidden layer; 800 is the reference's.
    separate: a network for each row; False: one for all rows of a prompt.
    layer_norm: of the network's output.
    skip: False leaves the skip connection out.
    learning_rate_scale: of the network; its learning rate is the prompt's
      times this.
  """

  width: int = 800
  separate: bool = False
  layer_norm: bool = True
  skip: bool = True
  learning_rate_scale: float = 1.0

  def init(
    self,
    rng: jax.Array,
    table: Float[Array, 'K P E'],
    embedding: Float[Array, 'V E'],
  ) -> dict[str, Float[Array, 'K *_']]:
    del embedding
    if self.width < 1:
      raise UserError(f'Residual.width must be 1 or more, got {self.width}')
    prompts, length, embed = table.shape
    networks = (prompts, length if self.separate else 1)
    arrays = {'table': table}
    # The reference's start: torch's own for linear layers.
    for number, (name, inputs, outputs) in enumerate(
      [('down', embed, self.width), ('up', self.width, embed)]
    ):
      keys = jax.random.split(jax.random.fold_in(rng, number))
      for key, path, shape in zip(
        keys, (name, f'{name}_bias'), ((inputs, outputs), (outputs,))
      ):
        arrays[path] = jax.random.uniform(
          key, networks + shape, jnp.float32, -(inputs**-0.5), inputs**-0.5
        )
    if self.layer_norm:
      arrays['scale'] = jnp.ones((*networks, embed), jnp.float32)
      arrays['bias'] = jnp.zeros((*networks, embed), jnp.float32)
    return arrays

  def table(
    self, arrays: Mapping[str, Float[Array, 'K *_']]
  ) -> Float[Array, 'K P E']:
    table = arrays['table']
    networks = arrays['down'].shape[:2]
    rows = table.reshape(*networks, -1, table.shape[-1])  # of each network
    matmul = lambda x, kernel: jnp.matmul(x, kernel, precision=_EXACT)
    x = matmul(rows, arrays['down']) + arrays['down_bias'][:, :, None]
    x = matmul(jax.nn.relu(x), arrays['up']) + arrays['up_bias'][:, :, None]
    if self.layer_norm:
      x -= jnp.mean(x, axis=-1, keepdims=True)
      x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
      x = x * arrays['scale'][:, :, None] + arrays['bias'][:, :, None]
    if self.skip:
      x += rows
    return x.reshape(table.shape)

  def rate(self, name: str) -> float:
    return 1.0 if name == 'table' else self.learning_rate_scale


@dataclasses.dataclass(frozen=True)
class LowRank(Reparametrization):
  """The table is a product of two matrices, [P, rank] and [rank, E].

  (DPT, Xiao et al. 2023; LoPT, Guo et al. 2024.) Both start random in DPT; here
  their product starts as the nearest one to the initialiser's table.

  Attributes:
    rank: of the table; 10 is DPT's for 100 tokens.
  """

  rank: int = 10

  def init(
    self,
    rng: jax.Array,
    table: Float[Array, 'K P E'],
    embedding: Float[Array, 'V E'],
  ) -> dict[str, Float[Array, 'K *_']]:
    del rng, embedding
    if not 1 <= self.rank <= min(table.shape[1:]):
      raise UserError(
        f'LowRank.rank must be from 1 to {min(table.shape[1:])}, the smaller of'
        f' PROMPT_LENGTH and embed, got {self.rank}'
      )
    left, size, right = jnp.linalg.svd(table, full_matrices=False)
    root = jnp.sqrt(size)[:, : self.rank]
    return {
      'left': left[..., : self.rank] * root[:, None],
      'right': root[..., None] * right[:, : self.rank],
    }

  def table(
    self, arrays: Mapping[str, Float[Array, 'K *_']]
  ) -> Float[Array, 'K P E']:
    return jnp.matmul(arrays['left'], arrays['right'], precision=_EXACT)


@dataclasses.dataclass(frozen=True)
class Superposition(Reparametrization):
  """Every row of the table is a weighted sum of frozen rows of the vocabulary.

  The weights [P, m] are trained, the m rows [m, E] are not, and stand in the
  checkpoints beside them (SuperPos-Prompt, Sadraei Javaheri et al. 2024). The
  weights start with the smallest that come nearest to the initialiser's table.

  Attributes:
    rows: m, drawn without replacement; 128 is the source's. 0 takes all.
    first: among how many of the vocabulary's first, most common rows they are
      drawn; 0: among all.
  """

  rows: int = 128
  first: int = 5000

  def init(
    self,
    rng: jax.Array,
    table: Float[Array, 'K P E'],
    embedding: Float[Array, 'V E'],
  ) -> dict[str, Float[Array, 'K *_']]:
    among = min(self.first, len(embedding)) or len(embedding)
    if not 0 <= self.rows <= among:
      raise UserError(
        f'Superposition.rows is {self.rows}, to be drawn without replacement'
        f' among {among}; give from 0 to that, or a higher Superposition.first'
      )
    drawn = [
      jax.random.choice(key, among, (self.rows,), replace=False)
      if self.rows
      else jnp.arange(len(embedding))
      for key in jax.random.split(rng, len(table))
    ]
    rows = jnp.take(embedding, jnp.stack(drawn), axis=0).astype(jnp.float32)
    # An accelerator's own products are too coarse to solve with.
    with jax.default_matmul_precision('highest'):
      return {'weights': table @ jnp.linalg.pinv(rows), 'rows': rows}

  def table(
    self, arrays: Mapping[str, Float[Array, 'K *_']]
  ) -> Float[Array, 'K P E']:
    rows = jax.lax.stop_gradient(arrays['rows'])
    return jnp.matmul(arrays['weights'], rows, precision=_EXACT)

  def rate(self, name: str) -> float:
    return 0.0 if name == 'rows' else 1.0
