"""The search for overwritten operands, on small listings."""

from __future__ import annotations

import pytest

from build_tools.wgmma_hazards import hazards, parse


def kernel(*lines: str) -> str:
    """A listing of one kernel; lines that end with a colon are labels."""
    body = [line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)]
    return "\n".join(['\t.section\t.text.k,"ax"', *body])


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8].tnspB, R24, gsb0"
OTHER = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        ([PRODUCT, "IMAD.MOV.U32 R153, RZ, RZ, RZ", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"], ["0010"]),
        ([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "IMAD.MOV.U32 R153, RZ, RZ, RZ", "EXIT"], []),
        # A wait that may leave it in flight, and one that does not.
        ([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R155, R1, R2", "EXIT"], ["0020"]),
        ([PRODUCT, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R155, R1, R2", "EXIT"], []),
        ([OTHER, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R155, R1, R2", "EXIT"], ["0030"]),
        # Wide results, stores, and registers that are only read.
        ([PRODUCT, "LDS.128 R152, [R3]", "EXIT"], ["0010"]),
        ([PRODUCT, "LDS.64 R150, [R3]", "EXIT"], []),
        ([PRODUCT, "STS [R152], R153", "FADD R1, R152, R153", "EXIT"], []),
        ([PRODUCT, "@!P0 MOV R154, R3", "EXIT"], ["0010"]),
        # Around a loop, and past a jump over the wait.
        ([".L_x_1:", "MOV R152, R3", PRODUCT, "@P0 BRA `(.L_x_1)", "EXIT"], ["0010"]),
        ([PRODUCT, "@P0 BRA `(.L_x_2)", "WARPGROUP.DEPBAR.LE gsb0, 0x0", ".L_x_2:", "MOV R152, R3", "EXIT"], ["0040"]),
        ([PRODUCT, "BRA `(.L_x_3)", "MOV R152, R3", ".L_x_3:", "EXIT"], []),
    ],
)
def test_finds_overwritten_operands(lines: list[str], bad: list[str]) -> None:
    (parsed,) = parse(kernel(*lines))
    assert list(hazards(parsed)) == bad
