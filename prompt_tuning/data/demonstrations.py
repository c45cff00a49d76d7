"""Prompt design: examples in front of the input (Brown et al. 2020, section 2).

What Lester et al. 2021 (figure 1) compare prompt tuning with: a frozen model
that is shown a few training examples as text, and is trained on none.
"""

import collections
from collections.abc import Sequence
import dataclasses
import random
import typing

from prompt_tuning.data.templates import Template
from prompt_tuning.errors import UserError

if typing.TYPE_CHECKING:
  import seqio

# Training examples that demonstrations are drawn from, at most.
_READ = 20_000
# In place of an input, for calibration (Zhao et al. 2021, section 5).
CONTENT_FREE = ('N/A', '', '[MASK]')


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """Which examples stand in front of every input, and how.

  Attributes:
    count: k, in all; of each target in turn, as far as they go.
    template: of one, with the fields {inputs} and {targets}.
    separator: between them, and before the input.
    instruction: a text before them.
    max_words: of a demonstration's inputs; None: all.
    seed: of the draw.
  """

  count: int = 4
  template: str = '{inputs} {targets}'
  separator: str = ' '
  instruction: str = ''
  max_words: int | None = None
  seed: int = 0

  def __post_init__(self):
    fields = Template(self.template).fields
    if set(fields) != {'inputs', 'targets'}:
      raise UserError(
        "Demonstrations.template must have '{inputs}' and '{targets}', got"
        f' {self.template!r}'
      )
    if self.count < 0:
      raise UserError(
        f'Demonstrations.count must be 0 or more, got {self.count}'
      )

  def prefix(self, pairs: Sequence[tuple[str, str]]) -> str:
    """What stands in front of every input.

    Args:
      pairs: inputs and targets to draw from.
    """
    by_target = collections.defaultdict(list)
    for source, target in sorted(set(pairs)):
      by_target[target].append(source)
    draw = random.Random(self.seed)
    drawn = []
    for target, sources in sorted(by_target.items()):
      draw.shuffle(sources)
      drawn += [(i, target, source) for i, source in enumerate(sources)]
    # The first of each target, then the second of each, and so on.
    drawn = sorted(drawn, key=lambda one: one[0])[: self.count]
    draw.shuffle(drawn)
    template = Template(self.template)
    texts = [
      template.fill({'inputs': self._cut(source), 'targets': target}, target)
      for _, target, source in drawn
    ]
    first = [self.instruction] if self.instruction else []
    return ''.join(text + self.separator for text in first + texts)

  def _cut(self, text: str) -> str:
    return ' '.join(text.split()[: self.max_words]) if self.max_words else text


def texts(task: 'seqio.Task', split: str = 'train') -> list[tuple[str, str]]:
  """Inputs and targets of a task as they are before they become ids.

  Raises:
    UserError: it has no such split.
  """
  if split not in task.splits:
    raise UserError(
      f'demonstrations are drawn from the split {split!r}, which task'
      f' {task.name} lacks'
    )
  # Lengths long enough that no filter drops an example.
  lengths = dict.fromkeys(task.output_features, 2**16)
  dataset = task.get_dataset(lengths, split=split, shuffle=False, num_epochs=1)
  found = []
  for example in dataset.take(_READ).as_numpy_iterator():
    found.append(
      tuple(
        example[f'{feature}_pretokenized'].decode('utf-8')
        for feature in ('inputs', 'targets')
      )
    )
  return found
