"""A model ready for use: a base, and what methods trained on it."""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import ByteVocabulary
from prompt_tuning.data.vocabularies import Vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import ANY_TEXT
from prompt_tuning.models import attention
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import mesh_choice
from prompt_tuning.training import partitioning
from prompt_tuning.training import setup
from prompt_tuning.training.base import FROZEN_DTYPES
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import check_vocabulary
from prompt_tuning.training.base import storage_dtype
from prompt_tuning.training.trained import Trained
from prompt_tuning.training.trained import layers_axis

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model and its variables on a mesh.

  Attributes:
    model: its methods act on it.
    variables: of `model`.
    virtual_tokens: that its inputs need; None: none.
    layout: of the mesh.
    reason: why this mesh.
  """

  model: EncoderDecoderModel
  variables: Mapping[str, Any]
  virtual_tokens: VirtualTokens | None
  layout: partitioning.Layout
  reason: str = ''


def load(
  model: EncoderDecoderModel,
  base: BaseCheckpoint,
  trained: Sequence[Trained] = (),
  *,
  dtype: str | None = None,
  check_fingerprint: bool = True,
  layout: partitioning.Layout | None = None,
  vocabulary: Vocabulary | ByteVocabulary | None = None,
) -> Loaded:
  """The model's variables from a base checkpoint and what was trained on it.

  Args:
    model: what the variables are for; its methods are replaced.
    base: T5's parameters; those that `trained` has count in place of them.
    trained: of methods; none for the base alone.
    dtype: of T5's parameters, as in training: None is bfloat16 on accelerators,
      float32 on CPU; 'int8' rounds kernels. Other methods' arrays stay float32.
    check_fingerprint: refuse what was trained on another base or vocabulary.
    layout: where they are put; None: this process's first device.
    vocabulary: that texts will be read with; None: nobody says.

  Raises:
    UserError: base and trained arrays do not fit the model, or each other.
  """
  layout = layout or partitioning.single_device()
  config = model.config
  for one in trained:
    if one.is_base:
      base = one.as_base()
  if vocabulary is not None:
    digests = {
      f'the {one.method.collection}': one.facts['vocabulary_digest']
      for one in trained
      if one.facts.get('vocabulary_digest')
    }
    check_vocabulary(vocabulary, base, digests, strict=check_fingerprint)
  added = [one for one in trained if not one.is_base]
  methods = tuple(one.method for one in added)
  virtual_tokens = setup.virtual_tokens_of(methods, config)
  for one in added:
    if check_fingerprint:
      _check_fingerprint(one, base)
  shapes = network.parameter_shapes(config)
  collections = {
    one.method.collection: _in_form(one, config, shapes) for one in added
  }
  variables = {parameters.PARAMS: base.load(config, layout, dtype=dtype)}
  for name, arrays in collections.items():
    variables[name] = layout.replicate(arrays)
  if not attention.runs_on(config.attention, layout.platform):
    logger.warning(
      'T5Config.attention=%s does not run on %s: formula, which computes the'
      ' same, takes its place',
      config.attention,
      layout.platform,
    )
    config = dataclasses.replace(config, attention='formula')
  return Loaded(
    dataclasses.replace(model, config=config, methods=methods),
    variables,
    virtual_tokens,
    layout,
  )


# What a method's files tell of their training that predictions need.
_REMEMBERED = (
  *('inputs_length', 'targets_length'),
  *('template', 'labels', 'target_sentinel'),
)


def remembered(trained: Sequence[Trained]) -> dict[str, Any]:
  """Attributes of a `Predictor` as the training had them, if it says so."""
  facts = trained[0].facts if trained else {}
  found = {name: facts[name] for name in _REMEMBERED if facts.get(name)}
  # Several tasks of one table: which is for the caller to say.
  indices = set((facts.get('prompt_indices') or {}).values())
  if indices:
    found['prompt_index'] = indices.pop() if len(indices) == 1 else None
  return found


def load_for_job(
  model: EncoderDecoderModel,
  base: BaseCheckpoint,
  trained: Sequence[Trained],
  partitioner: mesh_choice.Partitioner | None,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  *,
  dtype: str | None,
  check_fingerprint: bool,
  vocabulary: Vocabulary | ByteVocabulary | None = None,
) -> Loaded:
  """`load` on a job's devices, shared out for inference of this size."""
  methods = [one.method for one in trained]
  layout, reason = (partitioner or mesh_choice.Partitioner()).layout(
    mesh_choice.Workload.of(
      model.config,
      methods,
      feature_lengths,
      param_dtype=storage_dtype(dtype, FROZEN_DTYPES),
      trains=False,
      batch_size=batch_size,
      num_decodes=model.num_decodes,
    )
  )
  loaded = load(
    model,
    base,
    trained,
    dtype=dtype,
    check_fingerprint=check_fingerprint,
    layout=layout,
    vocabulary=vocabulary,
  )
  return dataclasses.replace(loaded, reason=reason)


def _check_fingerprint(one: Trained, base: BaseCheckpoint) -> None:
  wanted = one.facts.get('base_fingerprint')
  if not base.has_fingerprint(wanted):
    found = base.fingerprint()
    raise UserError(
      f'the {one.method.collection} was trained on'
      f' {one.facts.get("base", "another base")} (fingerprint {wanted}), got'
      f' {base.path} (fingerprint {found}): give that base, or bind'
      ' check_fingerprint = False'
    )


def _in_form(
  one: Trained, config: network.T5Config, params: Any
) -> dict[str, Any]:
  """A method's arrays as the network wants them, its layers scanned or not."""
  name = one.method.collection
  shapes = jax.eval_shape(
    lambda key, params: one.method.init(key, params, ANY_TEXT),
    jax.random.key(0),
    params,
  )
  wanted = parameters.flatten(shapes)
  axis = layers_axis(one.method)
  found = parameters.in_form_of(wanted, one.arrays, axis)
  for path, spec in wanted.items():
    got = tuple(found[path].shape) if path in found else None
    if got == spec.shape:
      continue
    if got is None:
      raise UserError(
        f'the {name} has no {path}: it is of another model, or acts on some'
        ' layers alone, which a method here does not (merge it into its model)'
      )
    if len(got) != len(spec.shape):
      fault = f'{path} of shape {got}, the model needs {list(spec.shape)}'
    else:
      axis = next(i for i, (a, b) in enumerate(zip(got, spec.shape)) if a != b)
      embed = spec.shape[axis] == config.emb_dim
      word = 'embed' if embed else f'{path} axis {axis} of size'
      fault = f'{word} {got[axis]}, the model needs {spec.shape[axis]}'
    raise UserError(f'the {name} has {fault}: give the model it was trained on')
  if set(found) != set(wanted):
    spare = sorted(set(found) - set(wanted))
    raise UserError(
      f'the {name} has {spare[0]}, which this model has no place for: give the'
      ' model it was trained on'
    )
  arrays = {k: np.asarray(v, np.float32) for k, v in found.items()}
  return parameters.nest(arrays)
