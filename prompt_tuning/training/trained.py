"""What methods trained: taken out of a run, and as files that say what it is.

A file of a method is `<collection>.safetensors` (of ModelTuning
`model.safetensors`): arrays by path, layers unrolled, and the facts to use
them by, such as the base's fingerprint and the method's settings. Where a
method has one array, a .npy file beside it holds the numbers alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
from typing import Any

from etils import epath
import jax
import numpy as np

import prompt_tuning
from prompt_tuning import files
from prompt_tuning import methods as methods_lib
from prompt_tuning.data.vocabularies import load_vocabulary
from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import Method
from prompt_tuning.models import parameters
from prompt_tuning.training import tensor_files
from prompt_tuning.training.base import STATED
from prompt_tuning.training.base import BaseCheckpoint
from prompt_tuning.training.base import fingerprint
from prompt_tuning.training.base import read_stated
from prompt_tuning.training.base import storage_dtype
from prompt_tuning.training.checkpoints import MANIFEST
from prompt_tuning.training.checkpoints import Checkpoints

# Facts that are not text; safetensors stores text alone.
_KINDS = {
  'num_prompts': int,
  'prompt_length': int,
  'embed': int,
  'step': int,
  'inputs_length': int,
  'targets_length': int,
  'metric_value': float,
  'labels': json.loads,
  'prompt_indices': json.loads,
  'target_sentinel': lambda text: text == 'True',
  'order': int,
}
# A fact of methods that act together: the first one, 0, is the outermost.
ORDER = 'order'
# A fact of a plain prompt's file: the method whose file stands beside it.
PLAIN_OF = 'plain_of'
# What a checkpoint remembers of its run that a file repeats.
_OF_RUN = ('base', 'base_fingerprint', 'task', 'seed')


@dataclasses.dataclass(frozen=True)
class Trained:
  """What one method trained.

  Attributes:
    method: with the settings that its arrays need.
    arrays: by path, layers unrolled; they may still be on disk.
    facts: base, base_fingerprint, task, step, metric, ... as far as known.
  """

  method: Method
  arrays: Mapping[str, Any]
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def is_base(self) -> bool:
    """Whether it takes the place of T5's own parameters."""
    return self.method.collection == parameters.PARAMS

  def as_prompt(self) -> 'Trained | None':
    """The plain prompt that acts alike, of one that is computed."""
    found = self.method.as_prompt(self.arrays)
    if found is None:
      return None
    facts = {**self.facts, PLAIN_OF: self.method.collection}
    return Trained(*found, facts)

  def as_base(self) -> BaseCheckpoint:
    """It, as the parameters of T5."""
    path = str(self.facts.get('source', self.facts.get('base', '')))
    stated = read_stated(self.facts.get(STATED))
    step = int(self.facts['step'])
    return BaseCheckpoint(path, step, self.arrays, stated=stated)


def stem(method: Method | type[Method]) -> str:
  """The name of a method's files, without their endings."""
  return (
    'model' if method.collection == parameters.PARAMS else method.collection
  )


def layers_axis(method: Method | type[Method]) -> int:
  """The axis that scanned arrays of a method have their layers on."""
  of_base = method.collection == parameters.PARAMS
  return parameters.LAYERS_AXIS if of_base else 0


def save_trained(
  folder: str | os.PathLike, trained: Trained, dtype: str | None = None
) -> list[epath.Path]:
  """Writes the files of a method.

  Args:
    folder: created if need be.
    trained: what to write.
    dtype: of T5's own parameters; other methods' arrays stay float32.

  Returns:
    The paths of the files, those of `Method.as_prompt` included.

  Raises:
    UserError: they cannot be written.
  """
  folder = files.place(folder)
  arrays = parameters.unrolled(trained.arrays, layers_axis(trained.method))
  method, arrays = trained.method.plain(arrays)
  trained = dataclasses.replace(trained, method=method, arrays=arrays)
  arrays, facts = method.to_file(arrays)
  if trained.is_base:
    if '://' in os.fspath(folder):
      raise UserError(
        f'a model is written to a folder of this machine, got {folder}; copy'
        ' it there afterwards'
      )
    facts = {'fingerprint': fingerprint(arrays), 'format': 'prompt_tuning'}
  else:
    facts = {
      'method': method.collection,
      'settings': json.dumps(method.settings()),
      'digest': _digest(arrays),
      **_in_words(trained),
      **facts,
    }
  facts = {
    **trained.facts,
    **facts,
    'prompt_tuning_version': prompt_tuning.__version__,
    'jax_version': jax.__version__,
  }
  facts.pop('source', None)
  for name in ('labels', 'prompt_indices'):
    if fact := facts.get(name):
      facts[name] = json.dumps(fact, ensure_ascii=False)
  file = folder / f'{stem(method)}{tensor_files.ENDING}'
  written = [
    tensor_files.write(file, arrays, facts, dtype if trained.is_base else None)
  ]
  if len(arrays) == 1:
    (array,) = arrays.values()
    try:
      with files.replacing(folder / f'{stem(method)}.npy', 'wb') as numbers:
        np.save(numbers, np.asarray(array), allow_pickle=False)
    except OSError as error:
      raise UserError(
        f'cannot write {stem(method)}.npy to {folder}: {files.reason(error)};'
        ' free the disk or choose another folder'
      ) from error
    written.insert(0, folder / f'{stem(method)}.npy')
  if prompt := trained.as_prompt():
    facts = {**prompt.facts, **_in_words(trained)}
    written += save_trained(folder, dataclasses.replace(prompt, facts=facts))
  return written


def _in_words(trained: Trained) -> dict[str, str]:
  """What its arrays say to people, if its vocabulary is known and at hand."""
  name = trained.facts.get('vocabulary')
  if not isinstance(name, str):
    return {}
  try:
    vocabulary = load_vocabulary(name)
  except UserError:
    return {}
  return trained.method.in_words(trained.arrays, vocabulary)


def _digest(arrays: Mapping[str, Any]) -> str:
  """Of all values of a method's arrays."""
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(arrays[name]).tobytes())
  return digest.hexdigest()[:16]


def load_file(file: str | os.PathLike) -> Trained:
  """Reads what `save_trained` wrote, and prompts of earlier versions.

  Raises:
    UserError: the file is damaged, or of no method that there is.
  """
  arrays, texts = tensor_files.read(file)
  name = texts.get('method') or epath.Path(file).stem
  kind = methods_lib.of_collection(name)
  if kind is None or kind.collection == parameters.PARAMS:
    raise UserError(
      f'{file} is of method {name!r}, which this version does not have:'
      ' import the module that has it'
    )
  try:
    facts = {k: _KINDS.get(k, str)(v) for k, v in texts.items()}
    settings = json.loads(facts.pop('settings', '{}'))
    facts.pop('method', None)
    if facts.pop('digest', None) not in (None, _digest(arrays)):
      raise ValueError('its values have changed since it was written')
    method, arrays = kind.from_file(arrays, settings, facts)
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'cannot read {file} ({files.reason(error)}); the file is damaged or of'
      ' another kind, export it again'
    ) from error
  for path, array in arrays.items():
    if not np.isfinite(np.asarray(array, np.float32)).all():
      raise UserError(
        f'{file} has values in {path} that are not finite; export the'
        ' checkpoint of an earlier step'
      )
  return Trained(method, arrays, facts)


def of_run(
  model_dir: str | os.PathLike, step: int | None = None
) -> list[Trained]:
  """What a run trained, of all its methods; read when asked for.

  Args:
    model_dir: of a run, which may still be running; or its `checkpoints`, or
      one of them.
    step: the checkpoint to take, base steps included; None takes the best one
      by the run's metric, else the newest.

  Returns:
    One for each method; nothing where no run is.

  Raises:
    UserError: it has no such checkpoint.
  """
  folder = files.place(model_dir).absolute()
  if (folder / MANIFEST).is_file():
    folder, step = folder.parent, int(folder.name)
  if (folder / 'checkpoints').is_dir():
    folder = folder / 'checkpoints'
  checkpoints = Checkpoints(folder, read_only=True)
  best = checkpoints.best_step()
  if best is None:
    return []
  step = best if step is None else step
  extra = checkpoints.extra(step)
  lengths = extra.get('feature_lengths') or {}
  facts = {name: extra.get(name) for name in _OF_RUN}
  facts |= {f'{name}_length': length for name, length in lengths.items()}
  facts |= extra.get('facts', {})
  facts |= _metric(checkpoints.metrics(step), extra)
  facts |= {'step': step, 'source': str(model_dir)}
  arrays_of = checkpoints.trained(step)
  # The first method is the outermost: another order is another network.
  known = extra.get('methods', {})
  order = [name for name in known if name in arrays_of]
  order += [name for name in arrays_of if name not in known]
  found = []
  for number, collection in enumerate(order):
    arrays = arrays_of[collection]
    kind = methods_lib.of_collection(collection)
    settings = known.get(collection, {})
    if kind is None:
      raise UserError(
        f'{model_dir} trained {collection}, of which this version has no'
        ' method: import the module that has it'
      )
    arrays = parameters.unrolled(arrays, layers_axis(kind))
    method, arrays = kind.with_settings(settings).plain(arrays)
    made = kind.from_file(arrays, method.settings(), extra)
    place = {ORDER: number} if len(order) > 1 else {}
    found.append(Trained(*made, facts | place))
  return _naming_their_base(found)


def _naming_their_base(found: Sequence[Trained]) -> list[Trained]:
  """Beside a tuned model, others belong to that and not to its start."""
  models = [one for one in found if one.is_base]
  if not models:
    return list(found)
  base = {
    'base': models[0].facts['source'],
    'base_fingerprint': fingerprint(models[0].arrays),
  }
  return [
    dataclasses.replace(one, facts={**one.facts, **base}) for one in found
  ]


def export(
  model_dir: str | os.PathLike,
  output_dir: str | os.PathLike,
  step: int | None = None,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes what a run trained: the files of each of its methods.

  Args:
    model_dir: of a run; it may still be running.
    output_dir: gets the files.
    step: see `of_run`.
    dtype: of a model's file, 'float32' or 'bfloat16'. Others are float32.
    overwrite: files that are there may be replaced; those of other methods
      are removed, since who reads the folder takes all of them.

  Returns:
    {'step', 'files', 'shapes': {array: shape}}; of a model no shapes.

  Raises:
    UserError: no such run or checkpoint, or the folder holds files.
  """
  if dtype is not None:
    storage_dtype(dtype)
  files.check_output(
    output_dir,
    [model_dir],
    overwrite=overwrite,
    what='EXPORT_DIR',
    consent='export.overwrite=True',
  )
  found = of_run(model_dir, step)
  if not found:
    raise UserError(
      f'MODEL_DIR {model_dir} holds no complete checkpoint; give the MODEL_DIR '
      'of a run that has saved one'
    )
  written: dict[str, Any] = {'step': found[0].facts['step'], 'files': []}
  for one in found:
    if one.is_base:
      facts = {**one.facts, 'source': str(output_dir)}
      one = dataclasses.replace(one, facts=facts)
    written['files'] += [str(f) for f in save_trained(output_dir, one, dtype)]
    if not one.is_base:
      shapes = {path: list(array.shape) for path, array in one.arrays.items()}
      written.setdefault('shapes', {}).update(shapes)
  _remove_others(files.place(output_dir), written['files'])
  return written


def _remove_others(folder: epath.Path, written: Sequence[str]) -> None:
  """Removes files of methods that an earlier export left in a folder."""
  for name in methods_lib.by_collection():
    for ending in (tensor_files.ENDING, '.npy'):
      file = folder / f'{name}{ending}'
      if str(file) not in written and file.is_file():
        file.unlink()


def _metric(metrics: Mapping[str, float], extra: Mapping[str, Any]) -> dict:
  """The metric that chose the checkpoint, else the first one."""
  name = (extra.get('best') or {}).get('metric')
  name = name or next(iter(sorted(metrics)), None)
  if name not in metrics:
    return {}
  return {'metric': name, 'metric_value': metrics[name]}
