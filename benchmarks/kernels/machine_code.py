"""What the machine code of the loss kernel's ways through wide heads predicts, counted without a GPU. Half a minute.

    python -m benchmarks.kernels.machine_code [--json FILE] [--record]

For `streamed` and each of `repcon_kernels.kl_div.tiling.VARIANTS`, a head of 21,841 classes in bf16, tail `uniform`:

NAME_exponentials     per logit
NAME_instructions     per logit, at most: of a row's code every instruction once, and those of its loops over tiles as
                      often as they run; branches that few rows take are counted too
NAME_registers, NAME_spilled_bytes   per thread
NAME_slowest, NAME_fastest   floor/time, as in `benchmarks.kernels`, where the arithmetic hides none of the time that
                      the memory takes, and where it hides all of it
kept_up_instructions, kept_up_exponentials   per logit that take as long as the memory does
"""

import re
from typing import Any

import torch
from repcon_kernels import TAILS
from repcon_kernels.kl_div import tiling

from benchmarks.harness import script
from benchmarks.harness.records import number
from benchmarks.harness.tables import Grid
from benchmarks.kernels import compiled
from repcon.runtime.system import environment

CLASSES, K = 21841, 16
PROCESSORS, CLOCK = 132, 1.98e9
"""Multiprocessors of an H200, and Hz under load."""
ISSUED, EXPONENTIALS = 128, 16
"""Per multiprocessor and cycle: instructions times threads, and exponentials."""
MEMORY = 4.3e12
"""Bytes read and written per second by a copy on an H200."""
COLUMNS = {
    "exponentials": "exponentials per logit",
    "instructions": "instructions per logit, at most",
    "registers": "registers",
    "spilled_bytes": "spilled bytes",
    "slowest": "floor/time, nothing hidden",
    "fastest": "all hidden",
}


def main() -> None:
    arguments = script.parser("Instructions per logit of the loss kernel's variants.").parse_args()
    compiled.pretend()
    logits = MEMORY / (2 * torch.bfloat16.itemsize)
    rate = PROCESSORS * CLOCK / logits
    figures: dict[str, Any] = {"kept_up_instructions": rate * ISSUED, "kept_up_exponentials": rate * EXPONENTIALS}
    names = ("streamed", *tiling.VARIANTS)
    for name in names:
        found = count(name)
        figures |= {f"{name}_{what}": value for what, value in (found | predicted(found, figures)).items()}
    figures["environment"] = environment() | {"device": "cpu"}
    rows = [(name, *(number(figures[f"{name}_{what}"]) for what in COLUMNS)) for name in names]
    grid = Grid(title="Machine code for sm_90", titles=("variant", *COLUMNS.values()), rows=rows)
    script.finish("kernels-machine-code", figures, [grid], arguments)


def count(name: str) -> dict[str, float]:
    """A variant's figures but for the predicted ones."""
    shape = ((CLASSES, K),)
    kernel = compiled.loss(shape, torch.bfloat16, TAILS.index("uniform"), wide_rows=name, vector=8)
    layout = compiled.layout_of(shape, name, 8)
    code = row_code(compiled.instructions(kernel), tiles=-(-CLASSES // layout.groups[0][3]))
    per_thread = CLASSES / (32 * layout.warps)
    registers, spilled = compiled.registers(kernel)
    return {
        "exponentials": sum(times for text, times in code if "MUFU.EX2" in text) / per_thread,
        "instructions": sum(times for _, times in code) / per_thread,
        "registers": registers,
        "spilled_bytes": spilled,
    }


def row_code(code: list[tuple[int, str]], tiles: int) -> list[tuple[str, int]]:
    """(instruction, how often) of one row: those of the loop over rows, or all where each row has its program.

    Loops with exponentials are over rows if another loop is in them, else over tiles, of which the first is outside.
    """
    code = [(address, text) for address, text in code if not text.startswith("NOP")]
    loops, computing = _loops(code), [address for address, text in code if "MUFU.EX2" in text]
    outer = {loop for loop in loops if any(_inside(other, loop) for other in loops)}
    loops = [(low, high) for low, high in loops if any(low <= address <= high for address in computing)]
    low, high = next((loop for loop in loops if loop in outer), (0, code[-1][0]))
    over_tiles = [loop for loop in loops if loop not in outer]
    return [
        (text, tiles - 1 if any(first <= address <= last for first, last in over_tiles) else 1)
        for address, text in code
        if low <= address <= high
    ]


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last address) of what branches go back over; the endless one after the code's end is none."""
    jumps = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"\bBRA\b.*(0x[0-9a-f]+)$", text))]
    return [(target, at) for target, at in jumps if target < at]


def _inside(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]


def predicted(found: dict[str, float], figures: dict[str, Any]) -> dict[str, float]:
    """Bounds of floor/time, which is the memory's time over all time."""
    arithmetic = max(
        found["instructions"] / figures["kept_up_instructions"], found["exponentials"] / figures["kept_up_exponentials"]
    )
    return {"slowest": 1 / (1 + arithmetic), "fastest": min(1.0, 1 / arithmetic)}


if __name__ == "__main__":
    script.run(main)
