"""Table and picture of fine-tuning for a small budget, from results of ``examples/finetune.py`` over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import plots
from benchmarks.report.summary import machine

FIGURE = "finetune.png"
SEEDS = 3  # at least: of fewer, a standard deviation says little


def repeated(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of enough seeds; others are explored settings, which a page may quote."""
    return [r for r in results if r["bench"] == "finetune" and len(r["options"]["seeds"]) >= SEEDS]


def block(results: Sequence[dict[str, Any]]) -> str:
    """The block ``finetune results``; empty without a result of several seeds."""
    parts = []
    for number, result in enumerate(repeated(results)):
        from examples import finetuning  # needs transformers

        o, settings = result["options"], result["settings"]
        weights = "all weights" if o["method"] == "full" else "a LoRA"
        seconds = [
            round(statistics.fmean(run["seconds"] for run in result["runs"] if (run["train"] is None) == dense))
            for dense in (True, False)
        ]
        parts.append(
            f"`python examples/finetune.py {_flags(result)}` on {machine(result['environment'])}"
            f": {result['model']}, {weights}, {o['steps']} steps of {o['batch']} sequences of {o['length']:,} tokens; "
            f"training takes {seconds[0]} s densely and {seconds[1]} s with the mask. Measured densely and with "
            f"{settings['budget']} tokens in pages of {settings['page_size']}, `{settings['rule']}`; mean ± standard "
            f"deviation of {len(o['seeds'])} seeds, {result['data']['prompts']} questions each.\n\n"
            + finetuning.table(result)
        )
        parts.append(plots.image("Perplexity and right answers before and after fine-tuning", figure_file(number)))
    return "\n".join(parts)


def _flags(result: dict[str, Any]) -> str:
    """The flags of a run that are not as by default."""
    from examples import finetune

    usual = vars(finetune.parser().parse_args([]))
    trained = [run["train"] for run in result["runs"] if run["train"] is not None]
    found = {**result["options"], **{name: result["settings"][name] for name in ("budget", "page_size", "rule")}}
    found |= {name: trained[0][name] for name in ("mode", "schedule", "tau_end", "hard_after")} if trained else {}
    found["tau"] = list(dict.fromkeys(each["tau"] for each in trained))
    parts = []
    for name, value in found.items():
        if name in ("lr", "retrieval_share", "dtype") or value is None or value == usual[name]:
            continue  # those depend on others by default
        values = [
            f"{each:g}" if isinstance(each, float) else str(each)
            for each in (value if isinstance(value, list) else [value])
        ]
        parts.append(f"--{name.replace('_', '-')} {' '.join(values)}")
    return " ".join(parts)


def figure_file(number: int) -> str:
    return FIGURE if number == 0 else f"finetune_{number + 1}.png"


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every result of several seeds.

    Raises:
        ImportError: there is something to draw, but no matplotlib.
    """
    drawn = []
    for number, result in enumerate(repeated(results)):
        from examples import finetuning

        drawn.append(finetuning.plot(result, folder / figure_file(number)))
    return drawn
