"""``python -m unique_attn calibrate``: which budget can a model take? Measures it on texts and recommends a setting.

Each text is read densely up to its last tokens, which are then decoded densely and with every setting; the table says
how far the next tokens are from those of dense attention (KL, share of equal likeliest tokens, perplexity), how much of
the attention the selected pages hold, what share of the bytes a step reads, and how many facts hidden in the texts are
found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unique_attn._command import Parser
from unique_attn.config import UniqueConfig
from unique_attn.rules import INDEX_FORMATS, PAGE_SIZES, RULES

DTYPES = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a Hugging Face id or a local folder")
    made.add_argument("--gguf-file", help="the file of --model that holds the weights, if they are GGUF")
    made.add_argument("--file", nargs="+", required=True, type=Path, help="texts, UTF-8, like those you will decode")
    made.add_argument("--rule", nargs="+", default=["directional", "mean"], choices=list(RULES), help="scoring rules")
    made.add_argument("--page-size", nargs="+", type=int, default=[8, 16], choices=PAGE_SIZES, help="tokens per page")
    made.add_argument("--budget", nargs="+", type=int, help="tokens that a step may read (64 to 2048)")
    made.add_argument("--index-format", default="exact", choices=list(INDEX_FORMATS), help="storage of the index")
    made.add_argument("--max-tokens", type=int, default=4096, help="most tokens of a text")
    made.add_argument("--tail", type=int, default=128, help="last tokens whose next tokens are compared")
    made.add_argument("--needles", type=int, default=8, help="texts with a fact that is asked for; 0 for none")
    made.add_argument("--tolerance", type=float, default=0.02, help="largest KL of a recommended setting, nats")
    made.add_argument("--device", help="cuda if there is one, else cpu")
    made.add_argument("--dtype", choices=DTYPES, help="bfloat16; float32 on the CPU")
    made.add_argument("--out", type=Path, help="a JSON file for the result; a picture goes beside it")
    return made


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    if options.out is not None:
        if options.out.suffix == ".png":
            raise ValueError(f"--out: expected a JSON file, beside which the picture goes, got {str(options.out)!r}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        there = options.out.exists()
        options.out.open("a").close()  # or that it cannot be written is found after the measurement
        if not there:
            options.out.unlink()
    texts = [_read(file) for file in options.file]
    model, tokenizer = _load(options)
    from unique_attn.calibration.run import calibrate

    result = calibrate(
        model,
        texts,
        tokenizer,
        rules=options.rule,
        page_sizes=options.page_size,
        budgets=options.budget,
        config=UniqueConfig(index_format=options.index_format),
        max_tokens=options.max_tokens,
        tail=options.tail,
        needles=options.needles,
        tolerance=options.tolerance,
    )
    print(result.table())
    print()
    best = result.recommended
    if best is None:
        print(
            f"No setting is within a KL of {options.tolerance:g} and finds as much as dense attention: try larger "
            "budgets, or a larger --tolerance."
        )
    else:
        plain = UniqueConfig().to_dict()
        changed = {name: value for name, value in best.to_dict().items() if value != plain[name]}
        fields = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        print(f"Recommended (*), reads least within a KL of {options.tolerance:g}: UniqueConfig({fields})")
    if options.out is not None:
        result.save(options.out)
        print(f"Wrote {options.out}{_picture(result, options.out.with_suffix('.png'))}")
    return 0


def _picture(result: Any, path: Path) -> str:
    try:
        result.plot(path)
    except ImportError:
        return "; no picture: pip install matplotlib"
    return f" and {path}"


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file: expected UTF-8 text, got {str(file)!r} ({error.reason} at {error.start})") from None


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from unique_attn.hf import compat  # noqa: F401  says what to do where transformers is missing

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"--device: expected one that torch has, got {device!r} ({str(error).splitlines()[0]})"
        ) from None
    dtype = getattr(torch, options.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **more)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **more)
    return model.to(device).eval(), tokenizer
