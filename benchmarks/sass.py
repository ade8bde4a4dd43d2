"""What a compiled kernel asks of a GPU, read from its machine code (SASS) without running it.

The model: a thread issues its instructions in order, loads return in the order in which they were issued, and a thread
waits at the first instruction that reads what is not there yet. By Little's law a memory-bound kernel reaches the
bandwidth of a GPU only if bandwidth times latency are in flight: on an H200 (4.3 TB/s in practice, about 0.68 µs, 132
multiprocessors) 22 KiB for each multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from triton.backends import nvidia

TOOLS = Path(nvidia.__file__).parent / "bin"  # Triton carries cuobjdump


class Limits(NamedTuple):
    """Of a multiprocessor, from the tables of compute capabilities in the CUDA C++ programming guide."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    partitions: int = 4  # each with a quarter of the registers
    register_unit: int = 256  # in which a warp gets registers
    shared_bytes: int = 228 << 10
    reserved_bytes: int = 1 << 10  # of shared memory, for each block


LIMITS = {80: Limits(shared_bytes=164 << 10), 90: Limits(), 100: Limits()}
# Where kernel arguments begin in constant bank 0.
_ARGUMENTS = {80: 0x160, 90: 0x210, 100: 0x380}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LOAD = re.compile(r"U?LD")  # of memory or, for LDC, LDCU and ULDC, of constants and arguments
_NO_DESTINATION = ("ST", "LDGSTS", "RED", "BRA", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR")


class Instruction(NamedTuple):
    """One instruction: LDG.E.128 R4, [R2.64] has opcode LDG.E.128 and operands R4 and [R2.64]."""

    address: int
    opcode: str
    operands: list[str]

    @property
    def bytes(self) -> int:
        """What a thread's access moves."""
        return next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)

    @property
    def written(self) -> list[str]:
        """Registers of the result: two for an address, as many as it takes for a load."""
        if self.opcode.startswith(_NO_DESTINATION) or not self.operands:
            return []
        first = _registers(self.operands[0])
        if not first:
            return []
        kind, number = re.match(r"(U?R)(\d+)", first[0]).groups()
        count = max(self.bytes // 4, 1) if _LOAD.match(self.opcode) else 2 if ".WIDE" in self.opcode else 1
        return [f"{kind}{int(number) + i}" for i in range(count)]

    @property
    def read(self) -> list[str]:
        """Registers of the other operands, without the descriptors of memory."""
        sources = self.operands if self.opcode.startswith(_NO_DESTINATION) else self.operands[1:]
        return [register for operand in sources for register in _registers(re.sub(r"desc\[.*?\]", "", operand))]


@dataclass(frozen=True)
class Count:
    """What was counted of a kernel. A pass is its main loop's body, or all of it where there is no loop."""

    registers: int
    spilled_bytes: int
    shared_bytes: int  # of a block
    warps: int  # resident on a multiprocessor
    loads: tuple[int, ...]  # bytes of a thread's loads of the streams in a pass, in the order of the code
    stores: tuple[int, ...]  # bytes of a thread's stores in a pass
    in_flight: int  # bytes of the streams that a thread has asked for, at most, when it waits
    trips: int  # how often in a pass a thread waits for the streams with nothing of it asked for before the last wait
    instructions: int  # of a pass

    @property
    def bytes_in_flight(self) -> int:
        """Per multiprocessor."""
        return self.in_flight * 32 * self.warps


def count(cubin: bytes, capability: int, threads: int, dynamic_shared: int, streams: Iterable[int]) -> Count:
    """Read a kernel.

    Args:
        cubin: The only kernel in it is counted.
        capability: Compute capability it is compiled for: 90 for sm_90.
        threads: Of a block.
        dynamic_shared: Bytes of shared memory that a launch adds to those the kernel declares.
        streams: Which arguments are the tensors that it goes through, by position; all before the last of them must
            be pointers. Loads of other arguments, such as numbers by channel, are not counted as in flight.
    """
    usage = dumped(cubin, "--dump-resource-usage")
    registers, stack, shared, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
    )
    limits = LIMITS[capability]
    # From compute capability 9.0 on, what is reserved is in what a kernel with shared memory declares.
    shared = max(shared - limits.reserved_bytes * (capability >= 90), 0) + dynamic_shared
    instructions = parse(dumped(cubin, "-sass"))
    pointers = {_ARGUMENTS[capability] + 8 * position for position in streams}
    wanted = loads_through(instructions, pointers)
    body = main_loop(instructions, wanted)
    loads = [load.bytes for load in body if load.address in wanted]
    in_flight, trips = waits(body, wanted, loop=len(body) < len(instructions))
    return Count(
        registers,
        stack + local,
        shared,
        resident_warps(limits, registers, threads, shared),
        tuple(loads),
        tuple(store.bytes for store in body if store.opcode.startswith("STG")),
        in_flight,
        trips,
        len(body),
    )


def dumped(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def resident_warps(limits: Limits, registers: int, threads: int, shared_bytes: int) -> int:
    """How many warps of blocks of such a kernel a multiprocessor holds."""
    of_block = -(-threads // 32)
    of_warp = -(-32 * registers // limits.register_unit) * limits.register_unit
    by_registers = limits.registers // limits.partitions // of_warp * limits.partitions // of_block
    by_shared = limits.shared_bytes // (shared_bytes + limits.reserved_bytes)
    return min(limits.warps // of_block, limits.blocks, by_registers, by_shared) * of_block


def parse(sass: str) -> list[Instruction]:
    """The instructions of a dump by cuobjdump, without what fills up the end."""
    found = []
    for line in sass.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;", line)
        if match is not None and match[2] != "NOP":
            operands = [operand.strip() for operand in (match[3] or "").split(",")]
            found.append(Instruction(int(match[1], 16), match[2], operands))
    return found


def main_loop(instructions: list[Instruction], wanted: set[int]) -> list[Instruction]:
    """The longest loop with one of the wanted loads; all instructions where there is none."""
    loops = []
    for instruction in instructions:
        target = re.search(r"0x([0-9a-f]+)", ",".join(instruction.operands))
        if instruction.opcode.startswith("BRA") and target and int(target[1], 16) < instruction.address:
            body = [each for each in instructions if int(target[1], 16) <= each.address <= instruction.address]
            if any(each.address in wanted for each in body):
                loops.append(body)
    return max(loops, key=len, default=instructions)


def loads_through(instructions: list[Instruction], pointers: set[int]) -> set[int]:
    """Addresses of the loads whose pointers are made of one of these arguments, given by their places in the bank."""
    made_of: dict[str, set[int]] = {}
    loads = set()
    for instruction in instructions:
        text = ",".join(instruction.operands)
        sources = {int(place, 16) for place in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text)}
        for register in instruction.read:
            sources |= made_of.get(register, set())
        if instruction.opcode.startswith("LDG") and sources & pointers:
            loads.add(instruction.address)
        step = 8 if _LOAD.match(instruction.opcode) else 0  # one load may fetch two arguments
        for i, register in enumerate(instruction.written):
            loaded = instruction.opcode.startswith("LDG")
            made_of[register] = set() if loaded else {place + i // 2 * step for place in sources}
    return loads


def waits(body: list[Instruction], wanted: set[int], *, loop: bool) -> tuple[int, int]:
    """Most bytes of the wanted loads that are asked for when the thread waits; and how often in a pass it waits anew.

    Copies to shared memory (LDGSTS) are waited for in groups: DEPBAR.LE SB0, n waits for all but the last n of them.
    """
    pending: list[_Load] = []
    most = trips = group = 0
    waited = -1
    for turn in range(8 if loop else 1):  # the later ones go on with what the first have left in flight
        trips = 0
        for i, instruction in enumerate(body):
            now, opcode = turn * len(body) + i, instruction.opcode
            if opcode == "LDGDEPBAR":
                group += 1
            if opcode.startswith("DEPBAR") and instruction.operands[0] == "SB0":
                left = int(instruction.operands[1], 16)
                needed = [load.issued for load in pending if load.group is not None and load.group < group - left]
            else:
                read = set(instruction.read)
                needed = [load.issued for load in pending if load.registers & read]
            if needed:
                if max(needed) > waited:
                    most = max(most, sum(load.size for load in pending))
                    trips, waited = trips + 1, now
                pending = [load for load in pending if load.issued > max(needed)]
            if instruction.address in wanted:
                copy = opcode.startswith("LDGSTS")
                registers = set() if copy else set(instruction.written)
                pending.append(_Load(now, instruction.bytes, registers, group if copy else None))
    return most, trips


class _Load(NamedTuple):
    """One on its way."""

    issued: int
    size: int
    registers: set[str]
    group: int | None  # of a copy to shared memory


def _registers(operand: str) -> list[str]:
    return re.findall(r"\bU?R\d+\b", operand)
