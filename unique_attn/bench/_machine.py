"""Facts about the machine that a reader needs to judge a number, and what fits into its memory."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from unique_attn._version import __version__

MEMORY_SHARE = 0.92  # of what is free: a benchmark leaves the rest to workspaces and fragmentation


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, threads, versions, commit, date. No paths, no host names."""
    build = json.loads(torch.ops.unique_attn.build_info())
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu": _cpu_model(),
        "cpu_isa": build.get("cpu_isa"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "unique_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["cuda_archs"] = build.get("cuda_archs")
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        facts["l2_bytes"] = cache_bytes(device)
    return facts


def slug(name: str) -> str:
    """A device's short name for files: ``cpu``, ``h100``."""
    words = re.findall(r"\b[A-Z]{1,3}\d+\w*", name)
    return words[0].lower() if words else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
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


def _output(*command: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the source tree, with ``+changes`` if code or tests differ from it; None outside a repository.

    ``UNIQUE_ATTN_COMMIT`` names it where the tree was copied without its history.
    """
    named = os.environ.get("UNIQUE_ATTN_COMMIT")
    if named:
        return named
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "..", "../../csrc")
    return f"{commit}+changes" if changed else commit


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
