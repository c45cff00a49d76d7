"""T5X as the engine: what its mains are given to run our methods.

T5X's train, eval and infer bring partitioner, checkpoints, trainer and gin.
What they lack is here, a function for each gap that T5X leaves open to gin
(`configs/t5x` binds them), and in `t5x_network` the module that T5X's
`EncoderDecoderModel` calls. T5X is installed by scripts/install_t5x.sh, and
known to this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib
import os
import re
import typing
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np

from prompt_tuning import files
from prompt_tuning.data.task import Task
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.interop import t5x
from prompt_tuning.interop import t5x_network
from prompt_tuning.interop.t5x_network import Network as Network
from prompt_tuning.methods.method import Method
from prompt_tuning.methods.prompt import Prompt
from prompt_tuning.models import network
from prompt_tuning.models import parameters
from prompt_tuning.training import setup
from prompt_tuning.training import trained as trained_lib
from prompt_tuning.training.base import fingerprint

if typing.TYPE_CHECKING:
  import seqio

# Where the public prompt tuning puts its numpy files, in MODEL_DIR.
NUMPY_FOLDER = 'numpy_checkpoints'


def is_trained(methods: Sequence[Method]) -> Callable[[str, Any], bool]:
  """Tells which parameters are trained, for T5X's MultiOptimizer.

  A function for `ModelParamTraversal.filter_fn`: those of methods whose rate is
  not 0, and T5's own if ModelTuning is one of them.

  Raises:
    UserError: a method needs more of a train step than T5X's does.
  """
  for method in methods:
    needed = [
      name
      for name in ('penalty', 'refreshed')
      if getattr(type(method), name) is not getattr(Method, name)
    ]
    if method.token_penalty() is not None:
      needed.append('token_penalty')
    if needed:
      raise UserError(
        f'{method.collection} needs a train step with its {needed[0]}, which'
        " T5X's has not; train it with prompt-tuning train"
      )

  def select(path: str, value: Any) -> bool:
    del value
    method, within = t5x_network.owner(methods, path.strip('/'))
    if method is None:
      return t5x_network.trains_t5(methods)
    return method.rate(within) != 0

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
  return tuple(
    (name, None)
    for name in (*t5x_network.PROMPT_AXES, 'prompts', *t5x_network.WHOLE)
  )


def logical_factor_rules() -> Mapping[str, Any]:
  """T5X's rules of Adafactor, and those of methods' axes.

  Prompts of one table, and layers of a scanned stack, are trained as each of
  them alone. These rules hold for arrays of three axes and more: T5X factors a
  matrix by its size, a prompt of 128 tokens included, whatever its rule says.
  """
  from t5x import adafactor

  unfactored = dict.fromkeys(
    (*t5x_network.PROMPT_AXES, *t5x_network.WHOLE), 'none'
  )
  rules = adafactor.standard_logical_factor_rules()
  return {**rules, **unfactored, 'prompts': 'batch'}


def assignment_map(methods: Sequence[Method]) -> tuple[tuple[str, None], ...]:
  """What T5X takes from no base checkpoint: it starts as its method says.

  For `RestoreCheckpointConfig.assignment_map`, with fallback_to_scratch. A run
  that is resumed takes everything from its checkpoint.
  """
  return tuple(
    (f'.*/{re.escape(t5x_network.place(method, ""))}.*', None)
    for method in t5x_network.beside_t5(methods)
  )


def feature_converter(
  methods: Sequence[Method], config: network.T5Config
) -> 'Callable[..., seqio.FeatureConverter]':
  """T5X's `feature_converter_cls`, which places the virtual tokens.

  TASK_FEATURE_LENGTHS stay those of the text, as in T5X: the encoder's rows
  are longer by the prompt. Packing works too.
  """
  from prompt_tuning.data.feature_converter import VirtualTokensFeatureConverter

  tokens = setup.virtual_tokens_of(methods, config)
  return functools.partial(VirtualTokensFeatureConverter, tokens)


def vocabulary(path: str) -> 'seqio.Vocabulary':
  """seqio's vocabulary of a file, a folder or a bundled name."""
  return load_vocabulary(path).seqio()


def registered(
  name: str,
  vocabulary: 'seqio.Vocabulary | None' = None,
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
  import seqio

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
    of_t5 = {
      k: v for k, v in flat.items() if t5x_network.owner(methods, k)[0] is None
    }
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
      beside = list(t5x_network.beside_t5(methods))
      for number, method in enumerate(beside):
        place = {trained_lib.ORDER: number} if len(beside) > 1 else {}
        _write(folder, method, flat, facts | place)
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
    owner, within = t5x_network.owner([method], path)
    if owner is None:
      continue
    arrays[within] = _local(array).astype(np.float32)
    if path == t5x.PROMPT:
      arrays[within] = arrays[within].reshape(-1, *array.shape[-2:])
  arrays = parameters.unrolled(arrays, trained_lib.layers_axis(method))
  trained = trained_lib.Trained(*method.plain(arrays), facts)
  prompt = trained.as_prompt() or trained
  if isinstance(prompt.method, Prompt):
    ((_, table),) = prompt.method.to_file(prompt.arrays)[0].items()
    with files.replacing(folder / t5x.PROMPT.replace('/', '.'), 'wb') as file:
      np.save(file, table, allow_pickle=False)
  trained_lib.save_trained(folder, trained)


def _local(array: Any) -> np.ndarray:
  """A whole copy on this host of what every device holds whole."""
  if isinstance(array, jax.Array):
    array = array.addressable_data(0)
  return np.asarray(array)
