"""What a checkpoint remembers of its run besides the state."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.training import identity
from prompt_tuning.training.best import Best

# How many differences of two runs are told one by one.
_SHOWN = 6


@dataclasses.dataclass
class RunRecord:
  """A run, as its checkpoints and the files of what it trained tell of it.

  Attributes:
    seed: of the run.
    base: what the user named.
    base_fingerprint: of its parameters.
    task: the data's name, where they have one.
    feature_lengths: of the data.
    methods: {collection: settings} of all that is trained.
    settings: all that decides the result (see `identity`).
    versions: of the packages that compute it.
    facts: what serving needs to know of the task.
    data_shards: parts that the data are read in.
    position: batches consumed.
    lengths: of a sample of the rows, by which their padding was chosen (see
      `stepping.sliced`); None: there was no choice.
    best: the best evaluation.
  """

  seed: int
  base: str
  base_fingerprint: str
  task: str | None
  feature_lengths: dict[str, int]
  methods: dict[str, dict[str, Any]]
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  data_shards: int = 1
  position: int = 0
  lengths: dict[str, Any] | None = None
  best: Best = dataclasses.field(default_factory=Best)

  def resumed(
    self, saved: Mapping[str, Any], model_dir: str | os.PathLike
  ) -> 'RunRecord':
    """This run, going on from the record of its checkpoint.

    Raises:
      UserError: that is the record of another run; all differences in a line.
    """
    same_code = saved.get('versions') == self.versions
    found = [
      *_of_all_versions(self, saved),
      *identity.differences(
        self.settings, saved.get('settings', {}), same_code
      ),
    ]
    # What stands in several functions is told once.
    told = list(
      dict.fromkeys(f'{n}: {old}, this one has {new}' for n, new, old in found)
    )
    if told:
      more = f'; and {len(told) - _SHOWN} more' if len(told) > _SHOWN else ''
      raise UserError(
        f'MODEL_DIR {model_dir} holds a run with another '
        + '; another '.join(told[:_SHOWN])
        + f'{more}; choose another MODEL_DIR, or give what it has'
      )
    return dataclasses.replace(
      self,
      data_shards=saved['data_shards'],
      position=saved['position'],
      lengths=saved.get('lengths'),
      best=Best(**saved['best']),
    )


def _of_all_versions(record: RunRecord, saved: Mapping[str, Any]):
  """(name, here, there) of what every version's checkpoints say."""
  for name, here, there in (
    ('seed', record.seed, saved['seed']),
    (
      'base (its fingerprint)',
      record.base_fingerprint,
      saved['base_fingerprint'],
    ),
    ('task', record.task, saved['task']),
    ('best_metric', record.best.metric, saved['best']['metric']),
    ('best_mode', record.best.mode, saved['best']['mode']),
    ('list of methods', list(record.methods), list(saved['methods'])),
  ):
    if here != there:
      yield name, here, there
