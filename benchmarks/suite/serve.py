"""Decoding under vLLM: milliseconds per step with vLLM's own attention and with the backend of this package.

A Llama with dummy weights, one engine per side in a process of its own, with the graphs, the prefix caching and the
scheduling beside the steps that vLLM has by default. The prompts are random; those of a shape are read before it is
timed and found in the prefix cache from then on, so the difference between a long and a short answer is that of decode
steps alone. ``first_ms`` is the time to the first token of a single prompt that no cache has. With ``--load``, so many
requests with prompts and answers of mixed lengths are served together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure.harness import reason
from benchmarks.measure.sweep import FORMATS, Grid, Shape, add_shape_flags, heads, shapes
from benchmarks.measure.text_table import NOTE, text_table
from benchmarks.suite.ttft import MODELS
from examples.support.results import environment

FIELDS = ("layers", "heads", "head_dim", "hidden", "mlp", "vocab", "batch", "context")
PRESETS: dict[str, Sequence[Grid]] = {
    "16_layers": [
        {**MODELS["16 layers"], "batch": [1, 32], "context": [8192, 32768]},
        {**MODELS["16 layers"], "batch": [8], "context": [32768]},
        {**MODELS["16 layers"], "batch": [64], "context": [16384]},
        {**MODELS["16 layers"], "batch": [1], "context": [131072]},
    ],
    "32_layers": [{**MODELS["32 layers"], "batch": [1, 8, 32], "context": [8192, 16384, 32768]}],
    "quick": [{**MODELS["16 layers"], "batch": [1, 8, 32], "context": [16384]}],
}
COMMITTED: dict[str, list[list[str]]] = {}  # needs vLLM, which has an environment of its own
STOCK = "vllm"
SHORT = 2  # tokens of the short answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_flags(parser, FIELDS, PRESETS)
    parser.set_defaults(head_dim=[64], repeats=3)
    parser.add_argument("--new-tokens", type=int, default=128, help="steps that are timed")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a KV head reads")
    parser.add_argument("--load", type=int, default=0, help="requests of mixed lengths to serve at once, 0 for none")
    parser.add_argument("--utilization", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument(
        "--index-format", nargs="+", dest="index_formats", default=FORMATS, choices=FORMATS, help="storage of the index"
    )


# ---- One engine. ----


def llama(o: Shape, longest: int) -> dict[str, Any]:
    """The config of a Llama as Hugging Face writes it."""
    q_heads, kv_heads = heads(o.heads)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": o.vocab,
        "hidden_size": o.hidden,
        "intermediate_size": o.mlp,
        "num_hidden_layers": o.layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": o.head_dim,
        "max_position_embeddings": longest,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _prompts(vocab: int, rows: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocab, (length,), generator=generator).tolist() for _ in range(rows)]


class _Engine:
    def __init__(self, options: dict[str, Any], wanted: Sequence[Shape], settings: dict[str, Any] | None) -> None:
        from vllm import LLM, SamplingParams

        more: dict[str, Any] = {}
        if settings is not None:
            from unique_attn.vllm import plugin

            plugin.register()
            more = {"attention_config": {"backend": "CUSTOM"}, "additional_config": {"unique_attn": settings}}
        self.params = SamplingParams
        self.vocab = wanted[0].vocab
        longest = max(o.context for o in wanted)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(llama(wanted[0], longest)))
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=max(o.batch for o in wanted),
            gpu_memory_utilization=options["utilization"],
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            **more,
        )

    def seconds(self, prompts: list[list[int]], tokens: int | list[int]) -> float:
        each = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        params = [self.params(max_tokens=n, ignore_eos=True, temperature=0, detokenize=False) for n in each]
        begin = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        took = time.perf_counter() - begin
        assert [len(out.outputs[0].token_ids) for out in outputs] == each, "not all tokens came"
        return took

    def measure(self, o: Shape, tokens: int, repeats: int) -> dict[str, Any]:
        prompts = [row[: o.context - tokens - SHORT] for row in _prompts(self.vocab, o.batch, o.context, 0)]
        self.seconds(prompts, SHORT + tokens)
        differences = []
        for _ in range(repeats):
            short = self.seconds(prompts, SHORT)
            differences.append((self.seconds(prompts, SHORT + tokens) - short) / tokens)
        step = statistics.median(differences)
        found = {
            "median_ms": round(1e3 * step, 4),
            "spread_ms": [round(1e3 * each, 4) for each in (min(differences), max(differences))],
            "tokens_per_s": round(o.batch / step, 1),
        }
        if o.batch == 1:
            fresh = _prompts(self.vocab, repeats + 1, o.context - 1, o.context)
            first = [self.seconds([prompt], 1) for prompt in fresh][1:]
            found["first_ms"] = round(1e3 * statistics.median(first), 2)
        return found

    def load(self, requests: int, longest: int) -> dict[str, Any]:
        """Prompts of 512 tokens up to three quarters of ``longest``, every fourth with the first half of another's."""
        generator = torch.Generator().manual_seed(7)
        draw = torch.rand(requests, generator=generator)
        lengths = (512 * (0.75 * longest / 512) ** draw).int().tolist()
        answers = torch.randint(64, 257, (requests,), generator=generator).tolist()
        answers = [min(tokens, longest - length) for tokens, length in zip(answers, lengths)]
        prompts = [_prompts(self.vocab, 1, length, 1000 + i)[0] for i, length in enumerate(lengths)]
        for i in range(3, requests, 4):
            shared = prompts[i - 1][: len(prompts[i - 1]) // 2]
            prompts[i] = (shared + prompts[i])[: len(prompts[i])]
        took = self.seconds(prompts, answers)
        return {
            "requests": requests,
            "prompt_tokens": sum(lengths),
            "answer_tokens": sum(answers),
            "seconds": round(took, 3),
            "answer_tokens_per_s": round(sum(answers) / took, 1),
        }


def _serve(options: dict[str, Any], wanted: Sequence[Shape], settings: dict[str, Any] | None, pipe: Any) -> None:
    """In a process of its own: what every shape took, one message each; then the load and the engine's facts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as by default: what is around the steps overlaps with them
    engine = None
    try:
        engine = _Engine(options, wanted, settings)
        for o in wanted:
            try:
                pipe.send(engine.measure(o, options["new_tokens"], options["repeats"]))
            except Exception as error:
                pipe.send({"failed": reason(error)})
        import vllm

        cache = engine.llm.llm_engine.vllm_config.cache_config
        facts: dict[str, Any] = {"vllm": vllm.__version__, "block_size": cache.block_size}
        facts["kv_tokens"] = (cache.num_gpu_blocks or 0) * cache.block_size
        if options["load"]:
            facts["load"] = engine.load(options["load"], max(o.context for o in wanted))
        pipe.send(facts)
    except Exception as error:
        pipe.send({"failed": reason(error)})
    finally:
        pipe.close()
        if engine is not None:
            engine.llm.llm_engine.engine_core.shutdown()  # or its process is waited for at the end of this one


# ---- All sides. ----


def sides_of(options: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """Settings of the backend by side; None for vLLM's own attention."""
    sides: dict[str, dict[str, Any] | None] = {STOCK: None}
    for each in options.index_formats:
        sides[f"unique_{each}"] = {"budget": options.budget, "index_format": each}
    return sides


def run(options: argparse.Namespace) -> dict[str, Any]:
    if not _has_vllm():
        raise SystemExit("error: serve needs vLLM: see docs/vllm.md")
    models: dict[tuple[Any, ...], list[Shape]] = {}
    for o in shapes(options, FIELDS, PRESETS):
        if o.context <= options.new_tokens + SHORT:
            raise SystemExit(f"error: --context: expected more than {options.new_tokens + SHORT}, got {o.context}")
        models.setdefault(tuple(getattr(o, name) for name in FIELDS[:-2]), []).append(o)
    cases: list[dict[str, Any]] = []
    engines = []
    bar = tqdm(total=sum(len(each) for each in models.values()) * len(sides_of(options)), desc="serve")
    for wanted in models.values():
        found: list[dict[str, Any]] = [{"options": vars(o), "sides": {}} for o in wanted]
        for side, settings in sides_of(options).items():
            bar.set_postfix_str(side)
            results, facts = _in_own_process(options, wanted, settings, bar)
            for case, result in zip(found, results, strict=True):
                case["sides"][side] = result
            engines.append({"side": side, "layers": wanted[0].layers, **facts})
        for case in found:
            case["speedups"] = _speedups(case["sides"])
        cases += found
    return {
        "bench": "serve",
        "preset": options.preset,
        "environment": environment(torch.device(options.device)),
        "budget": options.budget,
        "new_tokens": options.new_tokens,
        "peers": {"torch": torch.__version__, "vllm": next((e["vllm"] for e in engines if "vllm" in e), None)},
        "engines": engines,
        "cases": cases,
    }


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _in_own_process(
    options: argparse.Namespace, wanted: Sequence[Shape], settings: dict[str, Any] | None, bar: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    given = {name: getattr(options, name) for name in ("new_tokens", "repeats", "load", "utilization")}
    process = context.Process(target=_serve, args=(given, wanted, settings, theirs))
    process.start()
    theirs.close()
    messages: list[dict[str, Any]] = []
    try:
        while len(messages) <= len(wanted):
            messages.append(ours.recv())
            bar.update(len(messages) <= len(wanted))
            tqdm.write(f"  {messages[-1]}")
    except EOFError:
        messages.append({"failed": "the engine's process ended"})
    process.join()
    results, facts = messages[:-1], messages[-1]
    results += [{"failed": facts.get("failed", "not measured")}] * (len(wanted) - len(results))
    return results, facts


def _speedups(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    stock = sides[STOCK].get("median_ms")
    return {
        name: round(stock / side["median_ms"], 3)
        for name, side in sides.items()
        if name != STOCK and stock and "median_ms" in side
    }


def report(result: dict[str, Any]) -> str:
    env = result["environment"]
    lines = [f"{env['device']}, vLLM {result['peers']['vllm']}, budget {result['budget']}", ""]
    for case in result["cases"]:
        o = case["options"]
        lines.append(
            f"batch {o['batch']}, {o['context']} tokens, {o['layers']} layers, {o['heads']} heads, D={o['head_dim']}"
        )
        rows = []
        for name, side in case["sides"].items():
            if "failed" in side:
                rows.append({"side": name, NOTE: side["failed"]})
                continue
            factor = case["speedups"].get(name)
            rows.append(
                {
                    "side": name,
                    "ms per step": f"{side['median_ms']:.3f}",
                    "tokens/s": f"{side['tokens_per_s']:.0f}",
                    "first token": f"{side['first_ms']:.1f} ms" if "first_ms" in side else "",
                    f"x {STOCK}": f"{factor:.2f}x" if factor else "",
                }
            )
        lines += [*text_table(rows, left=["side"]), ""]
    lines += [json.dumps(each) for each in result["engines"]]
    return "\n".join(lines)
