"""What a run leaves: facts about the machine, a JSON file, a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unique_attn._version import __version__

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("csrc", "unique_attn", "examples", "benchmarks", ":(exclude)benchmarks/results")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- The machine. ----


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
        facts["l2_bytes"] = cuda_cache_bytes(device)
    return facts


def cuda_cache_bytes(device: torch.device) -> int:
    """Size of a GPU's last-level cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the source tree, with ``+changes`` if its code differs from it; None outside a repository.

    ``UNIQUE_ATTN_COMMIT`` names it where the tree was copied without its history.
    """
    named = os.environ.get("UNIQUE_ATTN_COMMIT")
    if named:
        return named
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return f"{commit}+changes" if changed else commit


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ---- Files and tables. ----


def write_json(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write a result, one indented JSON file, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table, without its index and without padding: cells may be long."""
    from tabulate import DataRow, TableFormat

    row = DataRow("|", "|", "|")
    form = TableFormat(
        lineabove=None, linebelowheader=lambda widths, _: f"|{' --- |' * len(widths)}", linebetweenrows=None,
        linebelow=None, headerrow=row, datarow=row, padding=1, with_header_hide=None,
    )  # fmt: skip
    text = frame.to_markdown(index=False, tablefmt=form, stralign=None, numalign=None, disable_numparse=True)
    return f"{text}\n"
