"""Look in the machine code of the Hopper kernels for registers that are written while a wgmma in flight reads them.

``python -m build_tools.wgmma_hazards`` after a build with CUDA, or with a built library as its argument. ptxas (13.0)
has been seen to give an operand's registers to other values while the product still read them; results were wrong only
sometimes, so a test may not notice. Needs cuobjdump and nvdisasm, from a CUDA toolkit or from PyPI
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from build_tools import native
from build_tools.environment import BuildError

Groups = tuple[frozenset[int], ...]
MOST_GROUPS = 8  # told apart; a loop without a wait would have no end of them

_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
# Opcodes whose first register is read, or that write no general register.
_NO_RESULT = (
    "ST", "RED", "BAR", "SYNCS", "BRA", "EXIT", "WARP", "UTMA", "CCTL", "MEMBAR", "FENCE", "DEPBAR", "NOP", "ISETP",
    "FSETP", "HSETP2", "PLOP3", "ELECT", "VOTEU", "R2UR", "LDGSTS", "LDGDEPBAR", "ARRIVES", "U",
)  # fmt: skip


@dataclass
class Kernel:
    """One kernel's instructions in order, and where its labels point."""

    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)  # address, text
    labels: dict[str, int] = field(default_factory=dict)


def parse(disassembly: str) -> list[Kernel]:
    """The kernels in what ``nvdisasm -c`` prints."""
    kernels: list[Kernel] = []
    for line in disassembly.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            kernels.append(Kernel(match[1]))
        elif kernels and (match := _LABEL.match(line)):
            kernels[-1].labels[match[1]] = len(kernels[-1].instructions)
        elif kernels and (match := _INSTRUCTION.search(line)):
            kernels[-1].instructions.append((match[1], match[2]))
    return kernels


def hazards(kernel: Kernel) -> dict[str, str]:
    """Instructions, by address, that write registers which a product in flight reads, on any path through ``kernel``.

    A group of products is in flight from its first instruction until a wait that leaves fewer groups behind it.
    """
    found: dict[str, str] = {}
    seen: set[tuple[int, Groups, frozenset[int]]] = set()
    paths: list[tuple[int, Groups, frozenset[int]]] = [(0, (), frozenset())]
    while paths:
        position, groups, group = paths.pop()  # `group` has no end yet
        while position < len(kernel.instructions) and (position, groups, group) not in seen:
            seen.add((position, groups, group))
            address, text = kernel.instructions[position]
            body = _PREDICATE.sub("", text)
            if body.startswith("HGMMA"):
                group |= _operand(body)
                if "gsb0" in body:
                    groups, group = (*groups, group), frozenset()
                    if len(groups) > MOST_GROUPS:
                        groups = (groups[0] | groups[1], *groups[2:])
            elif "DEPBAR.LE gsb0" in body:
                left = int(body.rsplit(",", 1)[1], 16)
                groups = groups[len(groups) - left :] if left else ()
            elif _results(body) & group.union(*groups):
                found[address] = text
            if body.startswith("EXIT") and body == text:
                break
            jump = re.search(r"`\((\.L_x_\d+)\)", body)
            if body.startswith("BRA") and jump and jump[1] in kernel.labels:
                paths.append((kernel.labels[jump[1]], groups, group))
                if body == text:
                    break
            position += 1
    return found


def _operand(product: str) -> frozenset[int]:
    """Registers of operand A; none if it comes from shared memory."""
    match = re.match(r"HGMMA\S*\s+R\d+,\s*R(\d+)", product)
    return frozenset(range(int(match[1]), int(match[1]) + 4)) if match else frozenset()


def _results(body: str) -> frozenset[int]:
    opcode, _, rest = body.partition(" ")
    match = re.match(r"\s*R(\d+)\b", rest)
    if match is None or opcode.startswith(_NO_RESULT):
        return frozenset()
    width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode or opcode.startswith("CS2R") else 1
    return frozenset(range(int(match[1]), int(match[1]) + width))


def _tool(name: str) -> str:
    folders = [Path(sysconfig.get_path("purelib")) / "nvidia" / toolkit / "bin" for toolkit in ("cu13", "cu12")]
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        raise BuildError(f"{name} was not found: install a CUDA toolkit or `pip install nvidia-cuda-{name}`")
    return found


def disassemble(objects: list[str]) -> list[Kernel]:
    """The sm_90a kernels of these object files."""
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        for file in objects:
            subprocess.run([cuobjdump, "-xelf", "sm_90a", file], cwd=folder, check=True, capture_output=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
            kernels += parse(text)
    return kernels


def main(libraries: list[str]) -> int:
    objects = [str(Path(file).resolve(strict=True)) for file in libraries]
    if not libraries:
        objects = [str(native.ROOT / file) for file in native.compile_cuda() if "/sm90/" in file]
    kernels = [kernel for kernel in disassemble(objects) if any("HGMMA" in text for _, text in kernel.instructions)]
    bad = 0
    for kernel in kernels:
        for address, text in hazards(kernel).items():
            print(f"{kernel.name}: {address}: {text} writes a register that a product in flight reads", file=sys.stderr)
            bad += 1
    print(f"unique_attn: {len(kernels)} kernels with wgmma, {bad} hazards")
    return 1 if bad or (objects and not kernels) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"error: {error}")
