"""What a program does: products, collectives, memory traffic.

`compiled.cost_analysis()` counts the body of a loop once, and a scanned T5 is
a loop over layers; here a body counts as often as its loop runs. Products are
counted in JAX's program, all else in the text of `compiled.as_text()` (XLA's
HLO, as CPU, GPU and TPU compilers print it).
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re
from typing import Any

COLLECTIVES = (
  *('all-reduce', 'all-gather', 'reduce-scatter'),
  *('all-to-all', 'collective-permute'),
)
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*?)\)(?=,|$)(.*)'
)
_NAME = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of `COLLECTIVES`.
    bytes: of its result on one device; of a reduce-scatter, of what goes in.
    group: devices that take part in one of it.
    count: how often a run of the program does it.
    name: JAX's name of the operation it belongs to.
  """

  kind: str
  bytes: int
  group: int
  count: int
  name: str

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends in one of it, by the ring algorithms."""
    if self.kind == 'collective-permute':
      return self.bytes
    share = (self.group - 1) / self.group
    return self.bytes * share * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  computation: str  # that it belongs to

  def called(self, *attributes: str) -> list[str]:
    """Computations named by these attributes, one or several each."""
    pattern = rf'\b(?:{"|".join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)'
    found = re.findall(pattern, self.attributes)
    return [name for part in found for name in re.findall(r'[\w.\-]+', part)]


def count_flops(jaxpr: Any, loop_trips: int = 1) -> float:
  """Operations of all matrix products, two for each multiplication.

  Counted before the program is split over devices: what is computed again for
  rematerialisation counts, what XLA fuses or drops does too.

  Args:
    jaxpr: of the step.
    loop_trips: how often a loop runs whose length is not known beforehand
      (decoding: the longest it can take).
  """
  total = 0.0
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    kind, settings = equation.primitive.name, equation.params
    if kind == 'dot_general':
      (contracted, _), _ = settings['dimension_numbers']
      shape = equation.invars[0].aval.shape
      products = math.prod(shape[axis] for axis in contracted)
      total += 2.0 * equation.outvars[0].aval.size * products
      continue
    if kind == 'pallas_call' and settings['cost_estimate'] is not None:
      # A kernel's own word: its program is one cell of a grid.
      total += settings['cost_estimate'].flops
      continue
    runs = {'scan': settings.get('length'), 'while': loop_trips}.get(kind, 1)
    total += runs * sum(
      count_flops(inner, loop_trips) for inner in _programs(settings)
    )
  return total


def _programs(settings: Mapping[str, Any]) -> Iterator[Any]:
  """The programs that an equation with these settings runs."""
  for name, value in settings.items():
    if name.startswith(('jvp', 'fwd', 'bwd', 'vjp')):
      continue  # rules of derivatives, not run here
    for one in value if isinstance(value, tuple | list) else (value,):
      if hasattr(getattr(one, 'jaxpr', one), 'eqns'):
        yield one


def collectives(text: str) -> list[Collective]:
  """The collectives that one run of a compiled program does."""
  program = _Program(text)
  found: dict[object, Collective] = {}
  for computation, count in program.loops():
    for instruction in program.with_fused(computation):
      kind = instruction.opcode.removesuffix('-done')
      if kind not in COLLECTIVES:
        continue
      source = instruction
      if instruction.opcode.endswith('-done'):
        source = program.operand(instruction, 0) or instruction
      group = _group_size(source.attributes)
      size = _bytes(instruction.shape, everywhere=True)
      if kind == 'reduce-scatter':
        size *= group
      name = re.search(r'op_name="([^"]*)"', source.attributes)
      one = Collective(kind, size, group, count, name[1] if name else '')
      # A TPU may do one collective piecemeal, in several fusions and in the
      # rounds of an inner loop: all of them have its channel.
      channel = re.search(r'channel_id=(\d+)', source.attributes)
      key = (kind, channel[1] if channel else instruction.name)
      other = found.get(key, one)
      found[key] = one if one.count <= other.count else other
  return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int]]:
  """{kind: (how many, bytes of all of them)} of one run, on one device."""
  return {
    kind: (
      sum(one.count for one in found if one.kind == kind),
      sum(one.count * one.bytes for one in found if one.kind == kind),
    )
    for kind in COLLECTIVES
    if any(one.kind == kind for one in found)
  }


def bytes_accessed(text: str) -> int:
  """Bytes that one run moves between a device's main memory and its cores.

  Every instruction reads its operands and writes its result; a fusion is one
  instruction, of a slice or an update only the part counts, and what a TPU
  keeps in its on-chip memory does not.
  """
  program = _Program(text)
  return sum(
    count * program.traffic(instruction)
    for computation, count in program.loops()
    for instruction in program.computations[computation].values()
  )


_CALLED = (
  *('to_apply', 'calls'),
  *('true_computation', 'false_computation', 'branch_computations'),
)
# No data moves for these, or it is counted where it is used.
_FREE = frozenset(
  'parameter constant tuple get-tuple-element bitcast while conditional call'
  ' after-all partition-id replica-id iota opt-barrier copy-done slice-done'
  ' async-done async-update all-reduce-done all-gather-done'
  ' collective-permute-done'.split()
)


class _Program:
  """A module's computations, and how often each of them runs."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, _Instruction]] = {}
    self._entry = computation = ''
    for line in text.splitlines():
      if instruction := _parse(line, computation):
        self.computations[computation][instruction.name] = instruction
      elif header := _HEADER.match(line):
        computation = header[2]
        self.computations[computation] = {}
        if header[1]:
          self._entry = computation

  def operand(
    self, instruction: _Instruction, position: int
  ) -> _Instruction | None:
    """What an instruction takes at a position; None for a literal."""
    siblings = self.computations[instruction.computation]
    return siblings.get(instruction.operands[position])

  def loops(self) -> Iterator[tuple[str, int]]:
    """(computation, runs) of the entry and of all that is not fused.

    All branches of a conditional count, though one of them runs.
    """
    waiting = [(self._entry, 1)]
    while waiting:
      name, count = waiting.pop()
      yield name, count
      for instruction in self.computations.get(name, {}).values():
        if instruction.opcode == 'while':
          runs = count * self._trips(instruction)
          waiting += [(body, runs) for body in instruction.called('body')]
        elif instruction.opcode in ('call', 'conditional', 'async-start'):
          waiting += [(one, count) for one in instruction.called(*_CALLED)]

  def with_fused(self, computation: str) -> Iterator[_Instruction]:
    """A computation's instructions, those inside of its fusions too."""
    for instruction in self.computations.get(computation, {}).values():
      yield instruction
      if instruction.opcode == 'fusion':
        for callee in instruction.called('calls'):
          yield from self.with_fused(callee)

  def _trips(self, loop: _Instruction) -> int:
    """How often a loop runs: as XLA says, else the bound it is held to."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    bounds = [
      int(one.operands[0])
      for condition in loop.called('condition')
      for one in self.with_fused(condition)
      if one.opcode == 'constant'
      and re.match(r'[su](32|64)\[\]', one.shape)
      and one.operands[0].isdigit()
    ]
    return max(bounds, default=1)

  def traffic(self, instruction: _Instruction) -> int:
    """Bytes read and written by one run of one instruction."""
    if instruction.opcode in _FREE:
      return 0
    if instruction.opcode in ('copy-start', 'slice-start'):
      # (result, operand, ...): one of both is in main memory, most often.
      both = 'S(1)' not in instruction.shape
      return _bytes(instruction.shape) // (2 if both else 1)
    body, names = self._inside(instruction)
    total = self._written(instruction, body[-1])
    for position in range(len(instruction.operands)):
      if operand := self.operand(instruction, position):
        part = self._part_read(body, names[position])
        whole = _bytes(operand.shape)
        total += whole if part is None else min(whole, part)
    return total

  def _inside(self, instruction):
    """(what it runs, {position of an operand: its name there})."""
    if instruction.opcode != 'fusion':
      return [instruction], dict(enumerate(instruction.operands))
    body = list(self.computations[instruction.called('calls')[0]].values())
    given = [one for one in body if one.opcode == 'parameter']
    return body, {int(one.operands[0]): one.name for one in given}

  def _written(self, instruction, last) -> int:
    while last.opcode in ('bitcast', 'convert') and last.operands:
      last = self.operand(last, 0) or instruction
    if last.opcode == 'dynamic-update-slice':
      update = self.operand(last, 1)
      return _bytes(update.shape, everywhere=True) if update else 0
    return _bytes(instruction.shape)

  def _part_read(self, body, name: str) -> int | None:
    """Bytes that instructions read of what has this name; None: all of it."""
    names, total = {name}, 0
    for one in body:
      places = [i for i, name in enumerate(one.operands) if name in names]
      if not places:
        continue
      if self._lays_out(one):
        names.add(one.name)
      elif one.opcode in ('dynamic-slice', 'slice', 'gather'):
        total += _bytes(one.shape, everywhere=True)
      elif one.opcode == 'fusion':
        inner, inside = self._inside(one)
        parts = [self._part_read(inner, inside[place]) for place in places]
        if None in parts:
          return None
        total += sum(parts)
      elif one.opcode != 'dynamic-update-slice' or places != [0]:
        return None
    return None if body[-1].name in names else total

  def _lays_out(self, one: _Instruction) -> bool:
    """Whether it is its operand in another layout, fused or not."""
    if one.opcode != 'fusion':
      return one.opcode in ('bitcast', 'copy')
    body, _ = self._inside(one)
    return all(part.opcode in ('parameter', 'bitcast', 'copy') for part in body)


def _parse(line: str, computation: str) -> _Instruction | None:
  """`%name = shape opcode(operands), attributes`."""
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  name, shape, opcode, inner, attributes = match.groups()
  operands = tuple(_NAME.findall(inner)) or ((inner,) if inner else ())
  return _Instruction(name, shape, opcode, operands, attributes, computation)


def _bytes(shape: str, everywhere: bool = False) -> int:
  """Bytes of a shape, or tuple of shapes, in main memory or anywhere."""
  total = 0
  for dtype, dimensions, layout in _ARRAY.findall(shape):
    if 'S(' in layout and not everywhere:
      continue
    width = re.search(r'\d+', dtype)
    bits = _BITS.get(dtype, int(width[0]) if width else 8)
    size = math.prod(int(d) for d in dimensions.split(',') if d)
    total += size * bits // 8
  return total


def _group_size(attributes: str) -> int:
  """Devices of one group, from any of the ways XLA writes groups."""
  groups = re.search(r'replica_groups=(.*)', attributes)
  if not groups:
    return 1
  text = groups[1]
  if listed := re.match(r'\{\{([\d,]*)\}', text):
    return listed[1].count(',') + 1
  if iota := re.match(r'\[\d+,(\d+)\]<=', text):
    return int(iota[1])
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", text.partition(']')[0]))
  chosen = re.search(r"\{('[^}]*)\}", text)
  names = re.findall(r"'(\w+)'", chosen[1]) if chosen else list(sizes)
  return math.prod(int(sizes[name]) for name in names)
