"""The counts of docs/cost.md and how they are made; nothing here needs a GPU."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which brings cuobjdump, is not installed")

import sass
import static
import without_gpu

COST = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
BACKENDS = [
    "triton",
    pytest.param(
        "cupy",
        marks=pytest.mark.skipif(not without_gpu.known("cupy"), reason="CuPy, which brings NVRTC, is not installed"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_bound_kernels_have_enough_in_flight_and_the_documented_counts(backend):
    rows = list(static.rows(backend, 90))
    for row in rows:
        assert row.count.spilled_bytes == 0, row
        assert row.count.bytes_in_flight >= static.IN_FLIGHT or not row.memory_bound, row
    assert sum(row.memory_bound for row in rows) == 32
    documented = re.findall(rf"^\| {backend} \|.*$", COST, re.MULTILINE)
    assert len(documented) == len(rows)
    if static.compiler(backend) in re.search(r"^Counted with (.+)\.$", COST, re.MULTILINE)[1].split(" and "):
        assert [static.line(row.cells()) for row in rows] == documented
        return
    # Another compiler: the kernels are the same ones, their counts others.
    assert [row.cells()[:5] for row in rows] == [cells.split(" | ")[:5] for cells in (d[2:] for d in documented)]


def body(text: str) -> list[sass.Instruction]:
    """Instructions at addresses 0, 16, 32, … as cuobjdump prints them."""
    lines = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(text.strip().splitlines())]
    return sass.parse("\n".join(lines))


def test_instructions_are_parsed():
    load, store, constant = body("""
        @!P1 LDG.E.128.CONSTANT R24, desc[UR12][R2.64+0x10]
        STG.E.64 desc[UR4][R6.64], R8
        LDCU.128 UR8, c[0x0][0x380]
    """)
    assert (load.bytes, load.written, load.read) == (16, ["R24", "R25", "R26", "R27"], ["R2"])
    assert (store.bytes, store.written, store.read) == (8, [], ["R6", "R8"])
    assert constant.written == ["UR8", "UR9", "UR10", "UR11"]


POINTERS = """
    ULDC.64 UR4, c[0x0][0x210]
    IADD3 R2, P0, R0, UR4, RZ
    IADD3.X R3, R1, UR5, RZ, P0, !PT
    IMAD.WIDE R6, R0, 0x4, c[0x0][0x218]
"""


@pytest.mark.parametrize(
    ("code", "in_flight", "trips"),
    [
        ("LDG.E.128 R8, [R2.64]\nLDG.E.128 R12, [R2.64]\nFADD R4, R8, R12", 32, 1),
        ("LDG.E.128 R8, [R2.64]\nFADD R4, R8, R8\nLDG.E.128 R12, [R2.64]\nFADD R4, R4, R12", 16, 2),
        ("LDG.E.128 R8, [R2.64]\nLDG.E.128 R12, [R2.64]\nFADD R4, R8, R8\nFADD R4, R4, R12", 32, 1),
        # The load by another pointer is not one of the stream.
        ("LDG.E.64 R8, [R2.64]\nLDG.E.128 R12, [R6.64]\nFADD R4, R8, R12", 8, 1),
    ],
    ids=["together", "one after the other", "in order", "another pointer"],
)
def test_waits_are_counted(code, in_flight, trips):
    instructions = body(POINTERS.strip() + "\n" + code)
    wanted = sass.loads_through(instructions, {0x210})
    assert sass.waits(instructions, wanted, loop=False) == (in_flight, trips)


def test_copies_to_shared_memory_are_in_flight_from_one_pass_to_the_next():
    loop = body("""
        DEPBAR.LE SB0, 0x1
        LDS.128 R8, [R20]
        LDGSTS.E.BYPASS.128 [R21], [R2.64]
        LDGSTS.E.BYPASS.128 [R22], [R2.64]
        LDGDEPBAR
    """)
    copies = {each.address for each in loop if each.opcode.startswith("LDGSTS")}
    assert sass.waits(loop, copies, loop=True) == (64, 0)  # two passes of two; what is waited for is a pass old
    assert sass.waits(loop[:-1], copies, loop=True)[0] == 0  # without a group nothing is waited for


def test_the_main_loop_is_the_longest_that_loads_a_stream():
    instructions = body("""
        MOV R1, R2
        LDG.E R4, [R2.64]
        FADD R4, R4, R4
        @P0 BRA 0x10
        MOV R1, R2
        MOV R1, R2
        MOV R1, R2
        @P0 BRA 0x40
    """)
    assert [each.address for each in sass.main_loop(instructions, {0x10})] == [0x10, 0x20, 0x30]
    assert sass.main_loop(instructions, set()) == instructions


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "warps"),
    [
        (32, 128, 0, 64),
        (128, 128, 0, 16),
        (129, 128, 0, 12),  # 8 registers more a thread: 3 warps in each of the 4 partitions
        (255, 128, 0, 8),
        (32, 128, 113 << 10, 8),  # 228 KB for two blocks, of each of which 1 KB is reserved
        (32, 32, 0, 32),  # blocks
    ],
)
def test_resident_warps(registers, threads, shared, warps):
    assert sass.resident_warps(sass.LIMITS[90], registers, threads, shared) == warps
