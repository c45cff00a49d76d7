"""From a decoded string to the value that a metric compares."""

from collections.abc import Mapping
import dataclasses

UNKNOWN_LABEL = -1


@dataclasses.dataclass(frozen=True)
class LabelToId:
  """A seqio postprocessor: the position of a label, -1 for any other text.

  Whoever needs a task's labels (the class-label initialiser, rank
  classification) finds them here.

  Attributes:
    labels: in the order of their ids.
  """

  labels: tuple[str, ...]

  def __call__(
    self,
    decoded: str,
    example: Mapping | None = None,
    is_target: bool = False,
  ) -> int:
    del example, is_target
    decoded = decoded.strip()
    if decoded in self.labels:
      return self.labels.index(decoded)
    return UNKNOWN_LABEL
