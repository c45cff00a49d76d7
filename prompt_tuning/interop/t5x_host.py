"""T5X as the engine: our network and methods under T5X's own mains.

T5X's train, eval and infer bring partitioner, checkpoints, trainer and gin;
what they lack is here, one function or class for each gap that T5X leaves open
to gin (`configs/t5x` binds them): the module that `EncoderDecoderModel` calls,
the feature converter, who is trained, what comes from a base checkpoint, and
the files of what was trained.

T5X knows one tree of parameters. T5's stand there by their own paths, a
prompt [P, E] where the public code has it ('encoder/prompt/prompt/prompt'),
and any other method's arrays below its name ('lora/encoder/layers_0/...').
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib
import os
import re
from typing import Any

from etils import epath
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
import numpy as np
import seqio

from prompt_tuning import files
from prompt_tuning.data.feature_converter import VirtualTokensFeatureConverter
from prompt_tuning.data.task import Task
from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.interop import base_checkpoints
from prompt_tuning.interop import t5x
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.method import TaskText
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.models.model import EncoderDecoderModel
from prompt_tuning.training import setup
from prompt_tuning.training import trained as trained_lib
from prompt_tuning.training.base import fingerprint

# Axes of methods' arrays: the public code's names for a prompt's, and names for
# those that every device holds whole, which no array may have twice.
_PROMPT_AXES = ('prompt', 'prompt_embed')
_WHOLE = tuple(f'whole_{axis}' for axis in range(4))

# Where the public prompt tuning puts its numpy files, in MODEL_DIR.
NUMPY_FOLDER = 'numpy_checkpoints'


# The module that T5X's EncoderDecoderModel calls.


@dataclasses.dataclass(frozen=True)
class _Call:
  """A call of our network that stands for one of T5X's."""

  method: Callable[..., Any]
  encoder_input_tokens: jax.Array
  args: tuple[Any, ...]
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
  """Our Transformer and its methods as the `module` of a T5X model.

  It answers the calls that `t5x.models.EncoderDecoderModel` makes of a Flax
  module: `init`, and `apply` with `encode`, `decode` or itself.

  Attributes:
    config: of the network.
    methods: what acts on it; the first is the innermost.
    base: whose embeddings [V, E] the initialisers of prompts read, a base
      checkpoint or a numpy file; None: those that `init` draws, which is for
      initialisers that do not look at them.
    vocabulary: seqio's, for initialisers that encode words.
    labels: the words of `class_labels`, where it is not given its own.
  """

  config: network.T5Config
  methods: Sequence[Method] = ()
  base: str | None = None
  vocabulary: seqio.Vocabulary | None = None
  labels: Sequence[str] = ()

  def __post_init__(self):
    setup.virtual_tokens_of(self.methods, self.config)  # its checks

  @property
  def scan_layers(self) -> bool:
    """T5X's decoding asks, for the axis of the cache's batch."""
    return self.config.scan_layers

  def init(self, rng: jax.Array, *args: Any, **settings: Any) -> dict[str, Any]:
    """{'params', 'params_axes'} of T5 and methods; inputs do not matter."""
    del args, settings
    params_key, methods_key = jax.random.split(rng)
    params = EncoderDecoderModel(self.config).init_params(params_key)
    arrays = parameters.flatten(params)
    axes = {path: parameters.logical_axes(path) for path in arrays}
    if self.base is not None:
      embedding = jnp.asarray(_embedding(os.fspath(self.base)))
      params = {**params, 'token_embedder': {'embedding': embedding}}
    encode = None if self.vocabulary is None else self.vocabulary.encode
    text = TaskText(encode, self.labels)
    for number, method in enumerate(_beside_t5(self.methods)):
      key = jax.random.fold_in(methods_key, number)
      found = method.init(key, params, text)
      names = parameters.flatten(method.axes(found))
      for path, array in parameters.flatten(found).items():
        place, named = _place(method, path), names[path]
        if place == t5x.PROMPT:
          named = (named[0], *_PROMPT_AXES)
          if len(array) == 1:  # a single prompt is [P, E], as the public one
            array, named = array[0], named[1:]
        arrays[place] = array
        axes[place] = tuple(a or b for a, b in zip(named, _WHOLE))
    return {
      'params': parameters.nest(arrays),
      'params_axes': parameters.nest(
        {
          f'{path}_axes': flax_partitioning.AxisMetadata(names)
          for path, names in axes.items()
        }
      ),
    }

  def variables(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of our network, of T5X's parameters.

    T5's own carry no gradient unless they are trained, so that T5X, which
    asks for the gradient of all, computes none of theirs.
    """
    collections: dict[str, dict[str, Any]] = {parameters.PARAMS: {}}
    for path, array in parameters.flatten(params).items():
      method, within = _owner(self.methods, path)
      if path == t5x.PROMPT and array.ndim == 2:
        array = array[None]  # [K, P, E]
      name = parameters.PARAMS if method is None else method.collection
      collections.setdefault(name, {})[within] = array
    if not _trains_t5(self.methods):
      frozen = jax.lax.stop_gradient(collections[parameters.PARAMS])
      collections[parameters.PARAMS] = frozen
    return {name: parameters.nest(flat) for name, flat in collections.items()}

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    method: Callable[..., _Call] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Any = False,
    **settings: Any,
  ) -> Any:
    """As Flax's `apply`; `method` is `self.encode` or `self.decode`."""
    call = (method or self.__call__)(*args, **settings)
    others = {k: v for k, v in variables.items() if k != parameters.PARAMS}
    variables = self.variables(variables[parameters.PARAMS]) | others
    batch = {'encoder_input_tokens': call.encoder_input_tokens}
    with contextlib.ExitStack() as stack:
      for one in self.methods:
        if (interceptor := one.intercept(batch)) is not None:
          stack.enter_context(nn.intercept_methods(interceptor))
      result = network.Transformer(self.config).apply(
        variables,
        *call.args,
        **call.settings,
        method=call.method,
        rngs=rngs,
        mutable=mutable,
      )
    if mutable is False:
      return result
    value, updated = result
    return value, {**updated, **_without_cross(updated)}

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    **positions: Any,
  ) -> _Call:
    """Logits of all targets; with `decode`, the cache and nothing of use.

    Positions [B, T] of packed rows are not needed: T5's are relative, and
    segments keep examples apart.
    """
    del positions
    if decode:
      shape = (*encoder_input_tokens.shape, self.config.emb_dim)
      return self.decode(
        jnp.zeros(shape, self.config.dtype),
        encoder_input_tokens,
        decoder_input_tokens,
        decode=True,
        max_decode_length=decoder_input_tokens.shape[1],
      )
    return _Call(
      network.Transformer.__call__,
      encoder_input_tokens,
      (
        encoder_input_tokens,
        decoder_input_tokens,
        decoder_target_tokens,
        encoder_segment_ids,
        decoder_segment_ids,
      ),
      {'enable_dropout': enable_dropout},
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
  ) -> _Call:
    """Encoder outputs [B, T, E]."""
    return _Call(
      network.Transformer.encode,
      encoder_input_tokens,
      (encoder_input_tokens, encoder_segment_ids),
      {'enable_dropout': enable_dropout},
    )

  def decode(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array | None = None,
    *,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> _Call:
    """Logits [B, L, V]; with `decode`, of the one token of this step."""
    # T5X gives a step's token as its target too, and its 0 is no padding.
    targets = None if decode else decoder_target_tokens
    return _Call(
      network.Transformer.decode,
      encoder_input_tokens,
      (encoded, encoder_input_tokens, decoder_input_tokens, targets),
      {
        'enable_dropout': enable_dropout,
        'cache_length': max_decode_length if decode else None,
      },
    )


def _without_cross(updated: Mapping[str, Any]) -> dict[str, Any]:
  """The cache as T5X wants it: self-attention's alone.

  T5X makes the cache before it has shown us the encoder's outputs, so their
  projections, which our network would keep there, are computed at each step,
  as they are in T5X's own network.
  """
  if 'cache' not in updated:
    return {}
  kept = {
    path: array
    for path, array in parameters.flatten(updated['cache']).items()
    if 'encoder_decoder_attention' not in path
  }
  return {'cache': parameters.nest(kept)}


@functools.lru_cache(maxsize=1)
def _embedding(path: str) -> np.ndarray:
  """The embeddings [V, E] of a base, float32; of a numpy file, what it has."""
  if path.endswith('.npy'):
    with epath.Path(path).open('rb') as file:
      return np.asarray(np.load(file, allow_pickle=False), np.float32)
  arrays = base_checkpoints.open_checkpoint(path).arrays
  return np.asarray(arrays['token_embedder/embedding'][...], np.float32)


# Whose a parameter is.


def _beside_t5(methods: Sequence[Method]) -> list[Method]:
  return [one for one in methods if one.collection != parameters.PARAMS]


def _trains_t5(methods: Sequence[Method]) -> bool:
  return len(_beside_t5(methods)) < len(methods)


def _place(method: Method, path: str) -> str:
  """Where T5X has a method's array."""
  if isinstance(method, Prompt):
    return t5x.PROMPT
  return f'{method.collection}/{path}'


def _owner(methods: Sequence[Method], path: str) -> tuple[Method | None, str]:
  """Whose array stands at a path of T5X's, None for T5's own, and its path."""
  for method in _beside_t5(methods):
    if isinstance(method, Prompt):
      if path == t5x.PROMPT:
        return method, 'table'
    elif path.startswith(f'{method.collection}/'):
      return method, path.removeprefix(f'{method.collection}/')
  return None, path


# What gin binds: optimiser, rules, checkpoints, data.


def is_trained(methods: Sequence[Method]) -> Callable[[str, Any], bool]:
  """Tells which parameters are trained, for T5X's MultiOptimizer.

  A function for `ModelParamTraversal.filter_fn`: those of methods, and T5's
  own if ModelTuning is one of them.
  """

  def select(path: str, value: Any) -> bool:
    del value
    method, _ = _owner(methods, path.strip('/'))
    return method is not None or _trains_t5(methods)

  return select


def optimizer(methods: Sequence[Method], optimizer: Any) -> Any:
  """An optimiser of T5X (an `OptimizerDef`) for what is trained alone.

  It is T5X's MultiOptimizer, whose state holds None for each frozen parameter;
  orbax writes that and T5X cannot read it again, so a run could not go on.
  Here the state as T5X saves it has no entry for what is frozen.

  Args:
    methods: as the network's.
    optimizer: Adafactor of T5X, which goes on at the base checkpoint's step.
  """
  from t5x import optimizers

  selects = is_trained(methods)

  def split(target: Any) -> tuple[list[str], list[str]]:
    paths = list(parameters.flatten(target))
    trained = [path for path in paths if selects(path, None)]
    return trained, [path for path in paths if not selects(path, None)]

  class OfTrained(optimizers.MultiOptimizer):
    def state_dict(self, target, state):
      found = super().state_dict(target, state)
      states = parameters.flatten(found['state']['param_states'])
      begins = tuple(f'{path}/' for path in split(target)[0])
      found['state']['param_states'] = parameters.nest(
        {k: v for k, v in states.items() if f'{k}/'.startswith(begins)}
      )
      return found

    def restore_state(self, opt_target, opt_state, state_dict):
      states = parameters.flatten(state_dict['state']['param_states'])
      states |= dict.fromkeys(split(opt_target)[1])
      state = {**state_dict['state'], 'param_states': parameters.nest(states)}
      return super().restore_state(
        opt_target, opt_state, {**state_dict, 'state': state}
      )

  traversal = traverse_util.ModelParamTraversal(selects)
  return OfTrained([(traversal, optimizer)])


def logical_axis_rules() -> tuple[tuple[str, None], ...]:
  """T5X's `additional_rules`: no axis of a method's array is split."""
  return tuple((name, None) for name in (*_PROMPT_AXES, 'prompts', *_WHOLE))


def logical_factor_rules() -> Mapping[str, Any]:
  """T5X's rules of Adafactor, and those of methods' axes.

  Prompts of one table, and layers of a scanned stack, are trained as each of
  them alone. These rules hold for arrays of three axes and more: T5X factors a
  matrix by its size, a prompt of 128 tokens included, whatever its rule says.
  """
  from t5x import adafactor

  unfactored = dict.fromkeys((*_PROMPT_AXES, *_WHOLE), 'none')
  rules = adafactor.standard_logical_factor_rules()
  return {**rules, **unfactored, 'prompts': 'batch'}


def assignment_map(methods: Sequence[Method]) -> tuple[tuple[str, None], ...]:
  """What T5X takes from no base checkpoint: it starts as its method says.

  For `RestoreCheckpointConfig.assignment_map`, with fallback_to_scratch. A run
  that is resumed takes everything from its checkpoint.
  """
  return tuple(
    (f'.*/{re.escape(_place(method, ""))}.*', None)
    for method in _beside_t5(methods)
  )


def feature_converter(
  methods: Sequence[Method], config: network.T5Config
) -> Callable[..., seqio.FeatureConverter]:
  """T5X's `feature_converter_cls`, which places the virtual tokens.

  TASK_FEATURE_LENGTHS stay those of the text, as in T5X: the encoder's rows
  are longer by the prompt. Packing works too.
  """
  tokens: VirtualTokens | None = setup.virtual_tokens_of(methods, config)
  return functools.partial(VirtualTokensFeatureConverter, tokens)


def vocabulary(path: str) -> seqio.Vocabulary:
  """seqio's vocabulary of a file, a folder or a bundled name."""
  return load_vocabulary(path).seqio()


def registered(
  name: str,
  vocabulary: seqio.Vocabulary | None = None,
  module: str | None = None,
  local_data_dir: str | None = None,
) -> str:
  """Gives a registered task the model's vocabulary; returns its name.

  T5X asks for tasks by name and wants their vocabulary to be the model's.
  Whoever asks for the name in this process gets the task, and each task of a
  mixture, with that vocabulary.

  Args:
    name: MIXTURE_OR_TASK_NAME.
    vocabulary: of the model.
    module: MIXTURE_OR_TASK_MODULE, which registers it; None: it is ours.
    local_data_dir: raw files to read in place of TFDS's; see `Task`.

  Raises:
    UserError: as `Task.seqio` does.
  """
  if module is not None:
    importlib.import_module(module)
  lengths = {'inputs': 1, 'targets': 1}  # T5X has its own
  task = Task(name, lengths, vocabulary, local_data_dir=local_data_dir).seqio()
  for part in seqio.get_subtasks(task):
    seqio.TaskRegistry.remove(part.name)
    seqio.TaskRegistry.add_provider(part.name, part)
  if isinstance(task, seqio.Mixture):
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add_provider(name, task)
  return name


def save_trained(
  methods: Sequence[Method],
  model_dir: str | os.PathLike,
  base: str | None = None,
  task: str | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Writes what is trained beside each of T5X's checkpoints.

  For `SaveCheckpointConfig.state_transformation_fns`, which both of T5X's
  checkpointers (use_orbax or not) call at each save. MODEL_DIR gets
  numpy_checkpoints/checkpoint_<step>/ with each method's files of this package
  (`prompt.npy`, `prompt.safetensors`, `lora.safetensors`), which PROMPT_FILE
  takes, and a prompt by its public name, `encoder.prompt.prompt.prompt`. T5X's
  `keep` does not remove them. The state itself is left as it is.

  Args:
    methods: as the network's; of T5's own parameters T5X's checkpoint is the
      file.
    model_dir: MODEL_DIR.
    base: INITIAL_CHECKPOINT_PATH, for the files' facts.
    task: MIXTURE_OR_TASK_NAME, likewise.
  """

  def save(state: Any, infos: Any) -> tuple[Any, Any]:
    flat = parameters.flatten(state['target'])
    step = int(_local(state['state']['step']))
    of_t5 = {k: v for k, v in flat.items() if _owner(methods, k)[0] is None}
    facts = {
      'base': base,
      'base_fingerprint': fingerprint(of_t5),  # on all processes: it gathers
      'task': task,
      'step': step,
    }
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    if jax.process_index() == 0:
      folder = epath.Path(model_dir) / NUMPY_FOLDER / f'checkpoint_{step}'
      folder.mkdir(parents=True, exist_ok=True)
      for method in _beside_t5(methods):
        _write(folder, method, flat, facts)
    return state, infos

  return save


def _write(
  folder: epath.Path,
  method: Method,
  flat: Mapping[str, Any],
  facts: Mapping[str, Any],
) -> None:
  arrays = {}
  for path, array in flat.items():
    owner, within = _owner([method], path)
    if owner is None:
      continue
    arrays[within] = _local(array).astype(np.float32)
    if path == t5x.PROMPT:
      with files.replacing(folder / path.replace('/', '.'), 'wb') as file:
        np.save(file, arrays[within], allow_pickle=False)
      arrays[within] = arrays[within].reshape(-1, *array.shape[-2:])
  trained_lib.save_trained(folder, trained_lib.Trained(method, arrays, facts))


def _local(array: Any) -> np.ndarray:
  """A whole copy on this host of what every device holds whole."""
  if isinstance(array, jax.Array):
    array = array.addressable_data(0)
  return np.asarray(array)
