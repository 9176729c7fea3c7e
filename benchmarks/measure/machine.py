"""What a benchmark asks of the machine: its short name, its caches, what fits into its memory."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch

from examples.support.results import cuda_cache_bytes

MEMORY_SHARE = 0.92  # of what is free: a benchmark leaves the rest to workspaces and fragmentation


def slug(name: str) -> str:
    """A device's short name for files: ``cpu``, ``h100``."""
    words = re.findall(r"\b[A-Z]{1,3}\d+\w*", name)
    return words[0].lower() if words else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return cuda_cache_bytes(device)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated, as far as the system says."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    return int(MEMORY_SHARE * sizes[0]) if sizes else 1 << 62


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
