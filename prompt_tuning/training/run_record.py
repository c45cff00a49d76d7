"""What a checkpoint remembers of its run besides the state."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

from prompt_tuning.errors import UserError
from prompt_tuning.training.best import Best


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
    data_shards: parts that the data are read in.
    position: batches consumed.
    best: the best evaluation.
  """

  seed: int
  base: str
  base_fingerprint: str
  task: str | None
  feature_lengths: dict[str, int]
  methods: dict[str, dict[str, Any]]
  data_shards: int = 1
  position: int = 0
  best: Best = dataclasses.field(default_factory=Best)

  def resumed(
    self, saved: Mapping[str, Any], model_dir: str | os.PathLike
  ) -> 'RunRecord':
    """This run, going on from the record of its checkpoint.

    Raises:
      UserError: that is the record of another run.
    """
    for name, here, there in (
      ('seed', self.seed, saved['seed']),
      (
        'base (its fingerprint)',
        self.base_fingerprint,
        saved['base_fingerprint'],
      ),
      ('task', self.task, saved['task']),
      *_differing_settings(self.methods, saved['methods']),
      ('best_metric', self.best.metric, saved['best']['metric']),
      ('best_mode', self.best.mode, saved['best']['mode']),
    ):
      if here != there:
        raise UserError(
          f'MODEL_DIR {model_dir} holds a run with another {name}: {there},'
          f' this one has {here}; choose another MODEL_DIR'
        )
    return dataclasses.replace(
      self,
      data_shards=saved['data_shards'],
      position=saved['position'],
      best=Best(**saved['best']),
    )


def _differing_settings(here, there):
  """(name, here, there) of the first difference of two runs' methods."""
  if set(here) != set(there):
    yield 'set of methods', sorted(here), sorted(there)
    return
  for collection, settings in here.items():
    for name, value in settings.items():
      # JSON has lists for tuples.
      value = list(value) if isinstance(value, tuple) else value
      saved = there[collection].get(name)
      yield f'{collection} {name}', value, saved
