"""Tiny models of every family that transformers can generate with, and what ``unique_attn`` makes of each.

``python -m tests.families`` judges all of them: one line each, and a JSON file with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

import transformers
from family_configs import tiny_config
from family_images import inputs
from family_names import families

from examples.support.results import environment

__all__ = ["build", "families", "inputs"]
LIMIT = 60  # seconds for each family


def build(name: str) -> Any:
    """A random model of a family, the same at every call: eval, fp32, on the CPU, with sharp attention.

    Every weight matrix is normal with a standard deviation of 0.15: enough for hidden sizes of 64 that attention is
    far from uniform and logits are of order 1. Attention sinks and what the family leaves uninitialized are normal.
    """
    family = families()[name]
    config = tiny_config(name, family.config_class())
    model_class = family.model_class()
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, wanted) else config
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15, generator=generator)
            elif parameter_name.endswith("sinks") or not parameter.isfinite().all():
                parameter.normal_(0, 1, generator=generator)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.eos_token_id, settings.pad_token_id = None, 0
        if getattr(settings, "decoder_start_token_id", 1) is None:
            settings.decoder_start_token_id = 1
    return model


def main(arguments: list[str] | None = None) -> int:
    """Judge families; the exit status says whether any is wrong."""
    from family_judge import WRONG, judge

    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="some families; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the verdicts")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - set(families())
    if unknown:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, verdicts = time.perf_counter(), {}
    for name in options.only or families():
        verdict = verdicts[name] = judge(name, LIMIT)
        kinds = f" [{', '.join(verdict.kinds)}; layers {verdict.layers}]" if verdict.kinds else ""
        print(f"{name}: {verdict.verdict}{kinds} {verdict.reason}".rstrip(), flush=True)
    counts = Counter(verdict.verdict for verdict in verdicts.values())
    print(f"{', '.join(f'{n} {kind}' for kind, n in counts.most_common())}; {time.perf_counter() - start:.0f} s")
    if options.json:
        result = {
            "bench": "families",
            "transformers": transformers.__version__,
            "environment": environment(torch.device("cpu")),
        }
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each.as_dict())}" for name, each in verdicts.items())
        head = json.dumps(result, indent=1).removesuffix("\n}")
        options.json.write_text(f'{head},\n "families": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return int(counts[WRONG] > 0)


if __name__ == "__main__":
    sys.exit(main())
