"""Build a checkout in place: ``python -m build_tools [all|ops|runtime|cuda]``.

``cuda`` compiles every CUDA source for the configured architectures and links nothing.
"""

from __future__ import annotations

import argparse
import sys

from build_tools import native
from build_tools.environment import BuildError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools", description=__doc__)
    parser.add_argument("target", nargs="?", default="all", choices=["all", *native.TARGETS, "cuda"])
    target = parser.parse_args().target
    try:
        if target == "cuda":
            objects = native.compile_cuda()
            print(
                f"unique_attn: {len(objects)} CUDA sources compile" if objects else "unique_attn: no CUDA sources built"
            )
        else:
            native.build(native.ROOT / "unique_attn", native.TARGETS if target == "all" else (target,))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
