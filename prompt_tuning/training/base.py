"""The base: T5's parameters on disk, and how they are loaded."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import logging
import math
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from prompt_tuning.data import vocabularies
from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models import quantization
from prompt_tuning.training import partitioning

logger = logging.getLogger(__name__)

STORAGE_DTYPES = ('float32', 'bfloat16')
FROZEN_DTYPES = (*STORAGE_DTYPES, 'int8')


def storage_dtype(
  dtype: str | None = None, known: Sequence[str] = STORAGE_DTYPES
) -> str:
  """How weights are stored: as asked, else as the backend likes it.

  bfloat16 on accelerators, float32 on CPU, where bfloat16 is slow.

  Args:
    dtype: asked for.
    known: files have `STORAGE_DTYPES`; frozen weights in memory may be any of
      `FROZEN_DTYPES` (int8 is that of `quantization`).

  Raises:
    UserError: it is none of `known`.
  """
  if dtype is not None:
    if dtype not in known:
      raise UserError(
        f'weights are stored as {", ".join(known[:-1])} or {known[-1]}, got'
        f' {dtype!r}'
      )
    return dtype
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def dtype_beside_kernels(dtype: str) -> str:
  """How what is no kernel is stored, where those are of this frozen type."""
  return storage_dtype(None if dtype == 'int8' else dtype)


class UnknownStepError(UserError):
  """A checkpoint does not say to which step it was trained."""

  def __init__(
    self, path: str, hint: str = '', fix: str = 'bind load_checkpoint.step'
  ):
    super().__init__(
      f'{path} does not say to which step it was trained; {fix}{hint}'
    )
    self.path, self.hint = path, hint


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """T5's weights on disk, and the step they were trained to.

  Attributes:
    path: what the user named.
    step: from which the count of a run on it goes on.
    arrays: by T5X path, such as 'encoder/layers_0/mlp/wo/kernel'.
    metadata: what the file says about itself.
    stated: attributes of `T5Config` as the checkpoint's own configuration has
      them, where it has one; what shapes cannot tell is looked for here.
  """

  path: str
  step: int
  arrays: Mapping[str, Any]
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def fingerprint(self) -> str:
    """As `fingerprint` of the loaded parameters, reading a few rows only."""
    return fingerprint(self.arrays)

  def has_fingerprint(self, wanted: str | None) -> bool:
    """Whether something may be of this base; None: it does not say."""
    return wanted in (None, '', self.fingerprint()) or wanted == fingerprint(
      self.arrays, of_each_kind=False
    )

  def config(self) -> network.T5Config:
    """The network that these are parameters of, by their names and shapes.

    What shapes do not tell is as `stated`, else as everywhere in T5:
    max_distance 128, and gelu for gates, relu for what has none.

    Raises:
      UserError: they are no T5's.
    """
    arrays = parameters.unrolled(self.arrays)

    def layers(stack):
      names = {
        path.split('/')[1] for path in arrays if path.startswith(f'{stack}/')
      }
      return sum(name.startswith('layers_') for name in names)

    def shape(path):
      return tuple(arrays[path].shape)

    try:
      vocab_size, emb_dim = shape('token_embedder/embedding')
      num_heads, num_buckets = shape('encoder/relpos_bias/rel_embedding')
      _, joined = shape('encoder/layers_0/attention/query/kernel')
      mlp_dim, _ = shape('encoder/layers_0/mlp/wo/kernel')
    except (KeyError, ValueError) as error:
      raise UserError(f'{self.path} is no T5: it lacks {error}') from None
    gated = 'encoder/layers_0/mlp/wi_0/kernel' in arrays
    config = network.T5Config(
      vocab_size=vocab_size,
      emb_dim=emb_dim,
      num_heads=num_heads,
      head_dim=joined // num_heads,
      mlp_dim=mlp_dim,
      num_encoder_layers=layers('encoder'),
      num_decoder_layers=layers('decoder'),
      mlp_activations=('gelu', 'linear') if gated else ('relu',),
      logits_via_embedding='decoder/logits_dense/kernel' not in arrays,
      num_buckets=num_buckets,
    )
    self._require_stated(config, _TOLD_BY_SHAPES)
    return dataclasses.replace(
      config,
      **{k: self.stated[k] for k in NOT_TOLD if k in self.stated},
    )

  def _require_stated(
    self, config: network.T5Config, names: Iterable[str]
  ) -> None:
    """Raises UserError where its own configuration says otherwise."""
    faults = [
      f'{name} {self.stated[name]}, the model has {getattr(config, name)}'
      for name in names
      if name in self.stated and self.stated[name] != getattr(config, name)
    ]
    if faults:
      raise UserError(
        f'{self.path} states {shorten(faults)}: give the model of this'
        ' checkpoint'
      )

  def load(
    self,
    config: network.T5Config,
    layout: partitioning.Layout | None = None,
    *,
    dtype: str | None = None,
    trained: bool = False,
  ) -> dict[str, Any]:
    """The network's parameters on the mesh; see `load_params`.

    Args:
      config: of the network.
      layout: of the mesh; None: this process's first device.
      dtype: how they are stored (see `storage_dtype`).
      trained: they are to change, and are float32.
    """
    layout = layout or partitioning.single_device()
    # How much is dropped out is the run's to say.
    self._require_stated(config, self.stated.keys() - {'dropout_rate'})
    shapes = network.parameter_shapes(config)
    place = layout.params if trained else layout.frozen
    dtype = 'float32' if trained else storage_dtype(dtype, FROZEN_DTYPES)
    return load_params(self, shapes, dtype=dtype, shardings=place(shapes))


# What an array's shape or presence says of a network.
_TOLD_BY_SHAPES = (
  'vocab_size',
  'emb_dim',
  'num_heads',
  'head_dim',
  'mlp_dim',
  'num_encoder_layers',
  'num_decoder_layers',
  'num_buckets',
)
NOT_TOLD = ('mlp_activations', 'max_distance')


# The fact, JSON, that has what is `untold` of a model in a file's metadata.
STATED = 'stated'


def read_stated(text: str | None) -> dict[str, Any]:
  """`BaseCheckpoint.stated` out of the fact of that name."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in json.loads(text or '{}').items()
  }


def untold(config: network.T5Config) -> dict[str, Any]:
  """What of a network neither its arrays tell nor every T5 has."""
  gated = len(config.mlp_activations) > 1
  usual = {
    'mlp_activations': ('gelu', 'linear') if gated else ('relu',),
    'max_distance': 128,
  }
  return {k: v for k in NOT_TOLD if (v := getattr(config, k)) != usual[k]}


def fingerprint(params: Any, *, of_each_kind: bool = True) -> str:
  """Tells one set of weights from another, from a few of its values.

  A digest of all parameter paths and shapes and of the first values of eight
  matrices and of the first array of each kind: what is folded into queries, or
  trained of the norms, is seen. Values are rounded to bfloat16 first and the
  stored type is left out, so a float32 checkpoint and its bfloat16 copy have
  one fingerprint; likewise the scanned and the unrolled form of one model.

  Args:
    params: nested dict, or a mapping of paths to arrays (lazy ones too).
    of_each_kind: False: of the eight matrices alone, as files of earlier
      versions have it.

  Returns:
    16 hexadecimal digits.
  """
  flat = parameters.unrolled(parameters.flatten(params))
  digest = hashlib.sha256()
  for path in sorted(flat):
    digest.update(f'{path} {list(flat[path].shape)}\n'.encode())
  matrices = [path for path in sorted(flat) if len(flat[path].shape) > 1]
  chosen = matrices[:: max(1, len(matrices) // 8)][:8]
  if of_each_kind:
    kinds = {
      re.sub(r'layers_\d+', '', path): path for path in sorted(flat)[::-1]
    }
    chosen += sorted({*kinds.values()} - {*chosen})
  for path in chosen:
    digest.update(_first_values(flat[path]).tobytes())
  return digest.hexdigest()[:16]


def _first_values(array: Any, count: int = 1024) -> np.ndarray:
  """Up to `count` leading values, rounded to bfloat16."""
  rows = math.ceil(count / max(1, math.prod(array.shape[1:])))
  head = array[:rows] if array.shape else array[...]
  with jax.transfer_guard('allow'):
    if isinstance(head, jax.Array) and not head.is_fully_addressable:
      head = multihost_utils.process_allgather(head, tiled=True)
    head = np.asarray(head).reshape(-1)[:count]
  return head.astype(np.float32).astype(ml_dtypes.bfloat16)


def load_params(
  base: BaseCheckpoint,
  like: Any,
  *,
  dtype: Any = None,
  shardings: Any = None,
) -> dict[str, Any]:
  """The model's parameters from a base checkpoint, one array at a time.

  A scanned model loads an unrolled checkpoint, and the other way round.

  Args:
    base: where from.
    like: nested dict of ShapeDtypeStructs: what the model needs.
    dtype: of the result; None: as `like` says. This is where frozen weights
      become bfloat16, if they do; 'int8' makes `quantization.Quantized` of
      kernels, and leaves the others as the backend likes them.
    shardings: tree of shardings like `like`; None: the default device.

  Returns:
    Nested dict of jax.Arrays.

  Raises:
    UserError: arrays are missing, unexpected or of another shape; all faults
      in one line.
  """
  wanted = parameters.flatten(like)
  found = parameters.in_form_of(wanted, base.arrays)
  _check_params(base.path, wanted, found)
  flat_shardings = {}
  if shardings is not None:
    flat_shardings = parameters.flatten(shardings)
  loaded = {}
  for path, spec in wanted.items():
    rounds = quantization.applies(dtype, path)
    stored = spec.dtype
    if dtype is not None:
      stored = 'float32' if rounds else dtype_beside_kernels(dtype)
    # One host copy at a time: each array is on its device before the next.
    array = _placed(
      found.pop(path), jnp.dtype(stored), flat_shardings.get(path)
    )
    loaded[path] = quantization.stored(array) if rounds else array
  _require_finite(base.path, loaded)
  return parameters.nest(loaded)


def frozen_shapes(shapes: Any, places: Any, dtype: str) -> dict[str, Any]:
  """What `load_params` would give, as ShapeDtypeStructs on their devices.

  Args:
    shapes: nested dict of the network's parameters.
    places: as `shapes`, of their shardings.
    dtype: of `FROZEN_DTYPES`.
  """
  places = parameters.flatten(places)
  beside = jnp.dtype(dtype_beside_kernels(dtype))
  found = {}
  for path, like in parameters.flatten(shapes).items():
    if quantization.applies(dtype, path):
      found[path] = jax.tree.map(
        lambda one, place: jax.ShapeDtypeStruct(
          one.shape, one.dtype, sharding=place
        ),
        jax.eval_shape(quantization.quantize, like),
        quantization.of_place(places[path], len(like.shape)),
      )
    else:
      found[path] = jax.ShapeDtypeStruct(
        like.shape, beside, sharding=places[path]
      )
  return parameters.nest(found)


@jax.jit  # in one kernel: no array of truth values beside the weights
def _is_finite(array: Any) -> jax.Array:
  if isinstance(array, quantization.Quantized):
    array = array.scale  # is made of all of the kernel
  return jnp.isfinite(array).all()


def _require_finite(source: str, loaded: Mapping[str, jax.Array]) -> None:
  """Raises UserError for weights that are no numbers; looked at on devices."""
  finite = {path: _is_finite(array) for path, array in loaded.items()}
  faults = [path for path, is_so in jax.device_get(finite).items() if not is_so]
  if faults:
    raise UserError(
      f'{source} has weights that are not finite in {shorten(faults)}; get it'
      ' again'
    )


def _placed(array: Any, dtype: np.dtype, sharding: Any) -> jax.Array:
  """An array on its devices, of which a host reads its own slices alone."""
  if sharding is None:
    return jax.device_put(np.asarray(array).astype(dtype))
  parts = {}

  def part(index):
    key = str(index)
    if key not in parts:  # devices that hold the same slice share one read
      parts[key] = np.asarray(array[index]).astype(dtype)
    return parts[key]

  return jax.make_array_from_callback(tuple(array.shape), sharding, part)


# Tables are rounded up to a multiple of 128 rows, and prompts may be in them.
_SPARE_ROWS = 512


def check_vocabulary(
  vocabulary: Vocabulary | ByteVocabulary,
  base: BaseCheckpoint,
  said: Mapping[str, str] | None = None,
  *,
  strict: bool = True,
) -> None:
  """Looks whether a vocabulary is the model's own.

  A model may have its vocabulary beside it. Where nobody knows, one that has
  far fewer pieces than the model has rows is told of.

  Args:
    vocabulary: to be used.
    base: the model.
    said: {who: digest} of those who know with which they were trained.
    strict: False makes the fault a warning.

  Raises:
    UserError: it is another one.
  """
  beside = vocabularies.digest_beside(base.path)
  known = {
    **(said or {}),
    **({f'the model {base.path}': beside} if beside else {}),
  }
  for who, digest in known.items():
    if digest != vocabulary.digest:
      fault = (
        f'{who} was trained with another vocabulary than {vocabulary.path}'
        f' (digest {digest[:16]}, got {vocabulary.digest[:16]})'
      )
      if strict:
        raise UserError(f'{fault}: give the vocabulary of the model')
      logger.warning(fault)
  rows = base.arrays['token_embedder/embedding'].shape[0]
  if not known and rows >= vocabulary.size + _SPARE_ROWS:
    logger.warning(
      "the vocabulary %s has %d pieces, the model %d rows: is it the model's"
      ' own?',
      *(vocabulary.path, vocabulary.size, rows),
    )


# Faults.

_WORDS = {
  'vocab': 'vocabulary rows',
  'joined_kv': 'heads x head_dim',
  'relpos_buckets': 'buckets',
}


def shape_fault(
  path: str, got: Sequence[int], needed: Sequence[int], who: str = 'the model'
) -> str | None:
  """'path has embed 512, the model needs 768', or None."""
  got, needed = tuple(got), tuple(needed)
  if got == needed:
    return None
  axes = parameters.logical_axes(path) or ()
  if len(axes) == len(got) == len(needed):
    faults = [
      f'{_WORDS.get(axis, axis)} {a}, {who} needs {b}'
      for axis, a, b in zip(axes, got, needed)
      if a != b
    ]
    return f'{path} has ' + ' and '.join(faults)
  return f'{path} has shape {list(got)}, {who} needs {list(needed)}'


def shorten(items: list[str], shown: int = 3) -> str:
  """The first of many faults, and how many more there are."""
  more = len(items) - shown
  return ', '.join(items[:shown]) + (f' and {more} more' if more > 0 else '')


def path_faults(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
  """'missing …' and 'unexpected …', where there are such paths."""
  faults = {
    'missing': sorted(set(wanted) - set(found)),
    'unexpected': sorted(set(found) - set(wanted)),
  }
  return [f'{name} {shorten(paths)}' for name, paths in faults.items() if paths]


def _check_params(
  source: str, wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
  shapes = [
    fault
    for path in sorted(wanted, key=lambda p: ('embedding' not in p, p))
    if path in found
    and (fault := shape_fault(path, found[path].shape, wanted[path].shape))
  ]
  faults = [shorten(shapes)] if shapes else []
  faults += path_faults(wanted, found)
  if faults:
    raise UserError(
      f'{source} does not fit the model: {"; ".join(faults)}; give the '
      "checkpoint of this model, or the checkpoint's model"
    )
