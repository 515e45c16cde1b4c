"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: as in HLO: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
        size: bytes of its result on each device.
        group: devices that take part together.
    """

    kind: str
    size: int
    group: int

    def sent(self, group: int | None = None) -> float:
        """Bytes that each device sends with the usual ring algorithms.

        Args:
            group: number of devices to reckon with; None: that of the program.
        """
        n = group or self.group
        if n < 2:
            return 0.0
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.size * factor.get(self.kind, (n - 1) / n)


def read_collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    One inside a loop counts once: the training step has none there.

    Args:
        program: `compiled.as_text()`.
    """
    found = []
    for line in program.splitlines():
        if match := _LINE.search(line):
            result, kind, start, rest = match.groups()
            sizes = [
                _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in _ARRAY.findall(result)
            ]
            if start and kind == "collective-permute":
                sizes = sizes[:1]  # operand, result, two counters
            elif start and kind == "all-gather":
                sizes = sizes[len(sizes) // 2 :]  # operands, results
            found.append(Collective(kind, sum(sizes), _group(rest)))
    return found


def _group(text: str) -> int:
    """Devices of a group, which HLO writes in one of three ways."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # An axis as a whole, or 'axis':(first)size, a part of it.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 2  # pairs of a collective-permute
