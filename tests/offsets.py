"""Finds offsets of 32 bits that can overflow, in the code of kernels: from bounds of every integer that it computes."""

import re

from fedmoe.kernels.launch import Launch

MOST = 2**31 - 1
ROWS = 2**30
"""Rows, tokens or images that a call may have: what 32 bits hold, with room for a last block."""
GRID_ROWS = 65535
SIZES = {"B": ROWS, "R": ROWS, "N": ROWS, "P": MOST, "PARTS": 2**16, "FIRST": 2**16}
"""Run-time sizes at the largest that 32 bits hold; where a launch has more, and others, are as in the launch."""
NARROW = ("header_kernel", "bias_kernel")
"""Kernels whose programs go over features and classes, which are few."""

OPERATION = re.compile(r'^\s*(%[\w#]+)(?::\d+)? = "?([\w.]+)"? ?(.*)')
NAMES = re.compile(r"%[\w#]+")
LOOP = re.compile(r"scf\.for (%[\w#]+) = %[\w#]+ to (%[\w#]+)")
ALIKE = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "arith.extsi", "arith.extui", "ttg.convert_layout"}

Bound = tuple[int | None, bool]
"""The largest value, if it is known, and whether computing it may have overflowed."""


def overflowing(ttir: str, call: Launch) -> list[str]:
    """The lines that add an offset to a pointer that, at the largest number of rows, may have overflowed."""
    bounds: dict[str, Bound] = {f"%{name}": (max(size, SIZES.get(name, 0)), False) for name, size in call.sizes.items()}
    kernel = call.kernel.fn.__name__
    programs = [ROWS // call.constants.get("BLOCK_B", 1), GRID_ROWS]
    if kernel in NARROW:
        programs = [*call.grid, 1]
    found = []
    for line in ttir.splitlines():
        text = line.partition(" loc(")[0]
        if loop := LOOP.search(text):
            bounds[loop[1]] = bounds.get(loop[2], (None, False))
            continue
        if not (match := OPERATION.match(text)):
            continue
        result, operation, rest = match.groups()
        given = [bounds.get(name, (None, False)) for name in NAMES.findall(rest)]
        if operation == "tt.addptr" and given[1][1]:
            found.append(text.strip())
        bounds[result] = _bound(operation, rest, given, programs)
    return found


def _bound(operation: str, rest: str, given: list[Bound], programs: list[int]) -> Bound:
    values = [value for value, _ in given]
    lost = any(overflowed for _, overflowed in given)
    if operation == "arith.constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
        return (abs(int(number[1])), False) if number else (None, False)
    if operation == "tt.get_program_id":
        return programs["xyz".index(rest[0])] - 1, False
    if operation == "tt.make_range":
        return int(re.findall(r"end = (\d+)", rest)[0]) - 1, False
    if operation in ALIKE:
        return values[0], lost
    known = [value for value in values if value is not None]
    narrow = re.search(r"[ x]i32>?$", rest) is not None
    if operation == "arith.muli":
        product = values[0] * values[1] if len(known) == 2 else None  # type: ignore[operator]
        return product, lost or (narrow and (product is None or product > MOST))
    if operation == "arith.subi":  # of what is not negative
        return max(known) if len(known) == 2 else None, lost
    if operation == "arith.addi":
        total = sum(known) if len(known) == 2 else None
        return total, lost or (narrow and total is not None and total > MOST)
    if operation in ("arith.divsi", "arith.remsi") and values[1]:
        if operation == "arith.remsi":
            return values[1] - 1, lost
        return None if values[0] is None else values[0] // values[1], lost
    return None, lost and operation in ("arith.select", "arith.minsi", "arith.maxsi")
