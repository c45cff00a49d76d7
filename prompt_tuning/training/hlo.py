"""What a compiled program moves: collectives and memory traffic, from its text.

`compiled.cost_analysis()` counts the body of a loop once, and a scanned T5 is
a loop over layers; here a body counts as often as its loop runs. Reads the
text of `compiled.as_text()` (XLA's HLO, as CPU, GPU and TPU compilers print
it).
"""

from collections.abc import Iterator
import dataclasses
import math
import re

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
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
    for instruction in program.computations[computation]
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
    self.computations: dict[str, list[_Instruction]] = {}
    self._by_name: dict[tuple[str, str], _Instruction] = {}
    self._entry = computation = ''
    for line in text.splitlines():
      if line.startswith((' ', '\t')):
        if instruction := _parse(line, computation):
          self.computations[computation].append(instruction)
          self._by_name[computation, instruction.name] = instruction
      elif header := _HEADER.match(line):
        computation = header[2]
        self.computations[computation] = []
        if header[1]:
          self._entry = computation

  def operand(
    self, instruction: _Instruction, position: int
  ) -> _Instruction | None:
    """What an instruction takes at a position; None for a literal."""
    name = instruction.operands[position]
    return self._by_name.get((instruction.computation, name))

  def loops(self) -> Iterator[tuple[str, int]]:
    """(computation, runs) of the entry and of all that is not fused.

    All branches of a conditional count, though one of them runs.
    """
    waiting = [(self._entry, 1)]
    while waiting:
      name, count = waiting.pop()
      yield name, count
      for instruction in self.computations.get(name, ()):
        if instruction.opcode == 'while':
          trips = self._trips(instruction)
          for body in instruction.called('body'):
            waiting.append((body, count * trips))
        elif instruction.opcode in ('call', 'conditional', 'async-start'):
          for callee in instruction.called(
            'to_apply',
            'calls',
            'true_computation',
            'false_computation',
            'branch_computations',
          ):
            waiting.append((callee, count))

  def with_fused(self, computation: str) -> Iterator[_Instruction]:
    """A computation's instructions, those inside of its fusions too."""
    for instruction in self.computations.get(computation, ()):
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
      int(instruction.operands[0])
      for condition in loop.called('condition')
      for instruction in self.with_fused(condition)
      if instruction.opcode == 'constant'
      and instruction.shape.startswith(('s32[]', 's64[]', 'u32[]'))
      and instruction.operands[:1]
      and instruction.operands[0].isdigit()
    ]
    return max(bounds, default=1)

  def traffic(self, instruction: _Instruction) -> int:
    """Bytes read and written by one run of one instruction."""
    if instruction.opcode in _FREE:
      return 0
    if instruction.opcode in ('copy-start', 'slice-start'):
      # (result, operand, ...): one of both is in main memory, most often.
      return _bytes(instruction.shape) // (
        1 if 'S(1)' in instruction.shape else 2
      )
    fused = None
    if instruction.opcode == 'fusion':
      fused = self.computations.get(instruction.called('calls')[0])
    total = self._written(instruction, fused)
    for position in range(len(instruction.operands)):
      if operand := self.operand(instruction, position):
        total += self._read(instruction, position, operand, fused)
    return total

  def _written(self, instruction, fused) -> int:
    last = fused[-1] if fused else instruction
    while last.opcode in ('bitcast', 'convert') and last.operands:
      last = self.operand(last, 0) or instruction
    if last.opcode == 'dynamic-update-slice':
      update = self.operand(last, 1)
      return _bytes(update.shape, everywhere=True) if update else 0
    return _bytes(instruction.shape)

  def _read(self, instruction, position, operand, fused) -> int:
    whole = _bytes(operand.shape)
    if fused is None:
      if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
        return min(whole, _bytes(instruction.shape))
      if instruction.opcode == 'dynamic-update-slice' and position == 0:
        return 0
      return whole
    part = self._part_read(fused, position)
    return whole if part is None else min(whole, part)

  def _part_read(self, fused, position: int) -> int | None:
    """Bytes that a fusion reads of an operand; None for all of it."""
    parameter = next(
      one
      for one in fused
      if one.opcode == 'parameter' and one.operands == (str(position),)
    )
    names, total = {parameter.name}, 0
    for one in fused:
      places = [i for i, name in enumerate(one.operands) if name in names]
      if not places:
        continue
      if one.opcode == 'bitcast':
        names.add(one.name)
      elif one.opcode in ('dynamic-slice', 'slice', 'gather'):
        total += _bytes(one.shape, everywhere=True)
      elif one.opcode == 'fusion':
        inner = self.computations[one.called('calls')[0]]
        for place in places:
          part = self._part_read(inner, place)
          if part is None:
            return None
          total += part
      elif one.opcode != 'dynamic-update-slice' or places != [0]:
        return None
    return total


def _parse(line: str, computation: str) -> _Instruction | None:
  """`%name = shape opcode(operands), attributes`."""
  left, equals, right = line.strip().partition(' = ')
  if not equals:
    return None
  name = left.removeprefix('ROOT ').removeprefix('%')
  end = _closing(right, 0) + 1 if right.startswith('(') else right.find(' ')
  shape, rest = right[:end], right[end:].lstrip()
  opcode, parenthesis, _ = rest.partition('(')
  if not parenthesis:
    return None
  close = _closing(rest, len(opcode))
  inner = rest[len(opcode) + 1 : close]
  operands = tuple(_NAME.findall(inner)) or ((inner,) if inner else ())
  return _Instruction(
    name, shape, opcode, operands, rest[close + 1 :], computation
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text) - 1


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
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return pairs[1].count('{')
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
