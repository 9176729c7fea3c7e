"""``benchmarks model``: all sides compute the same model, what does not fit is left out, the JSON says what it is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cli
from benchmarks.cli import main
from benchmarks.measure import ceiling, harness, model_sides, peers
from benchmarks.report import tables
from benchmarks.suite import model
from unique_attn.hf.graphed import StaticPages
from unique_attn.hf.step import GraphedStep

CPU = torch.device("cpu")
FORMATS = ["exact", "compressed"]
TINY = {
    "layers": 3, "hidden": 64, "mlp": 96, "vocab": 97, "heads": "4/2", "head_dim": 16, "page_size": 8,
    "block_size": 32, "budget": 64, "rule": "directional",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


def shape(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**TINY, "batch": 2, "context": 256, "dtype": "fp32", **changed})


def flags(**changed: Any) -> list[str]:
    given = {**TINY, "batch": 2, "context": 256, "dtype": "fp32", "repeats": 2, **changed}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", *str(value).split())]


class FakeFlashInfer:
    """Looks like FlashInfer, and attends in plain PyTorch: one wrapper of it, planned as the real one is."""

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, **kwargs: Any) -> None:
            assert kwargs["use_cuda_graph"]
            self.layout, self.last = layout, kwargs["paged_kv_last_page_len_buffer"]
            self.indptr, self.indices = (kwargs[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices"))

        def plan(self, indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, *sizes: int, **kwargs: Any):
            for mine, given in ((self.indptr, indptr), (self.indices, indices), (self.last, last)):
                assert mine.data_ptr() != given.data_ptr()
                mine.copy_(given)
            self.q_heads, self.kv_heads, self.head_dim, self.block_size = sizes

        def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            out = []
            for b, row in enumerate(q):
                blocks = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
                length = (len(blocks) - 1) * self.block_size + int(self.last[b])
                k, v = (x[blocks] if self.layout == "NHD" else x[blocks].transpose(1, 2) for x in kv)
                k, v = (x.flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v))  # [1, H, length, D]
                one = row[None, :, None]
                out.append(torch.nn.functional.scaled_dot_product_attention(one, k, v, enable_gqa=True)[0, :, 0])
            return torch.stack(out)


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "flashinfer", lambda device: FakeFlashInfer)


# ---- The result. ----


def test_result(tmp_path: Path, device, capsys: pytest.CaptureFixture):
    path = tmp_path / "model.json"
    dtype = "bf16" if device.type == "cuda" else "fp32"
    argv = flags(batch="1 3", dtype=dtype, head_dim=64 if device.type == "cuda" else 16)
    argv += ["--sides", "unique", "sdpa", "--device", str(device), "--out", str(path)]
    assert main(["model", *argv]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    result = json.loads(path.read_text())
    assert result["bench"] == "model"
    assert str(Path.home()) not in path.read_text()
    assert {"flashinfer", "torch", "transformers"} == set(result["peers"])
    assert [case["options"]["batch"] for case in result["cases"]] == [1, 3]
    for case in result["cases"]:
        o = case["options"]
        size = {"fp32": 4, "bf16": 2}[dtype]
        head_dim, rows = o["head_dim"], o["layers"] * o["batch"] * 2
        assert case["kv_bytes"] == rows * o["context"] * 2 * head_dim * size
        assert case["weights_bytes"] == model_sides.weights_bytes(argparse.Namespace(**o))
        sides = case["sides"]
        assert {"unique_exact", "unique_compressed", "sdpa"} <= set(sides)
        exact = rows * (o["context"] // 8) * 2 * head_dim * size
        assert sides["unique_exact"]["own_bytes"] == exact
        assert sides["unique_exact"]["attention_bytes"] == exact + rows * 64 * 2 * head_dim * size
        assert sides["unique_compressed"]["own_bytes"] < exact
        assert sides["sdpa"]["attention_bytes"] == case["kv_bytes"]
        for side in sides.values():
            assert side["bytes"] == side["attention_bytes"] + case["weights_bytes"]
            assert side["tokens_per_s"] == pytest.approx(1e3 * o["batch"] / side["median_ms"], rel=0.01, abs=0.06)
            assert side["logits_error"] < model.TOLERANCE[dtype]
            assert (side["peak_bytes"] is None) == (device.type == "cpu")
        assert case["best"]["sdpa"] == "sdpa"
        for group in ("unique_exact", "unique_compressed"):
            wanted = sides["sdpa"]["median_ms"] / sides[group]["median_ms"]
            assert case["speedups"][group]["sdpa"] == pytest.approx(wanted, rel=0.01, abs=0.001)


def test_every_way_of_flashinfer_is_timed(fake_flashinfer: None):
    result = cli.run("model", **{**TINY, "context": 128, "dtype": "fp32", "device": "cpu", "repeats": 1})
    case = result["cases"][0]
    ways = [f"flashinfer_{layout}_{cores}_cores" for layout in ("hnd", "nhd16") for cores in ("tensor", "cuda")]
    assert set(case["sides"]) == {"unique_exact", "unique_compressed", "sdpa", *ways}
    best = case["best"]["flashinfer"]
    assert case["sides"][best]["median_ms"] == min(case["sides"][way]["median_ms"] for way in ways)
    assert set(case["speedups"]["unique_exact"]) == {"flashinfer", "sdpa"}
    assert case["peer"] in {"flashinfer", "sdpa"}


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    options = {**TINY, "context": 128, "dtype": "fp32", "device": "cpu", "repeats": 1}
    result = cli.run("model", **options, memory=0.01)
    assert result["cases"][0]["skipped"].startswith("needs ")
    assert "skipped: needs " in model.report(result)

    index = 3 * 2 * (128 // 8) * 2 * 16 * 4  # bytes of an exact one
    monkeypatch.setattr(model, "free_bytes", lambda device: index - 1)
    result = cli.run("model", **options)
    sides = result["cases"][0]["sides"]
    assert sides["unique_exact"]["skipped"].startswith(f"needs {index} bytes")
    assert "median_ms" in sides["unique_compressed"]
    assert set(result["cases"][0]["best"]) == {"unique_compressed", "sdpa"}
    said = capsys.readouterr()
    assert f"needs {index} bytes" in said.err
    assert f"needs {index} bytes" in model.report(result)


def test_sides_and_formats_can_be_chosen():
    options = {**TINY, "context": 128, "dtype": "fp32", "device": "cpu", "repeats": 1}
    result = cli.run("model", **options, sides="unique", index_format="exact")
    case = result["cases"][0]
    assert list(case["sides"]) == ["unique_exact"]
    assert case["peer"] is None
    assert case["speedups"] == {"unique_exact": {}}
    assert "unique_exact" in model.report(result)


def test_presets_have_the_shapes_of_the_goal():
    options = cli.parser().parse_args(["model", "--preset", "table"])
    found = [vars(o) for o in _sweep_shapes(options)]
    assert {(o["batch"], o["context"]) for o in found} == {
        (80, 8192), (80, 16384), (80, 32768), (32, 32768), (1, 32768), (1, 131072)
    }  # fmt: skip
    for o in found:
        assert (o["layers"], o["heads"], o["head_dim"], o["hidden"], o["mlp"]) == (16, "32/8", 64, 2048, 8192)
        assert (o["vocab"], o["page_size"], o["budget"], o["dtype"]) == (128256, 8, 512, "bf16")
    assert ["model", "--preset", "table"] in cli.committed("cuda")
    assert cli.file_name({"bench": "model", "environment": {"device": "NVIDIA H200"}}, options) == (
        "model-h200-table.json"
    )
    largest = argparse.Namespace(**next(o for o in found if (o["batch"], o["context"]) == (80, 32768)))
    assert model.kv_bytes(largest) == 16 * 80 * 8 * 32768 * 2 * 64 * 2


def _sweep_shapes(options: argparse.Namespace) -> list[argparse.Namespace]:
    from benchmarks.measure.sweep import shapes

    return shapes(options, model.FIELDS, model.PRESETS)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--layers", "0"], "--layers: expected at least 1, got 0"),
        (["--context", "100"], "--context: expected a multiple of the block size 64, got 100"),
    ],
)
def test_bad_options(argv: list[str], complaint: str):
    with pytest.raises(SystemExit, match=complaint):
        main(["model", *argv, "--device", "cpu"])


# ---- Sides. ----


def test_layouts_hold_the_same_tokens():
    o = shape()
    storage = model_sides.Storage(o, CPU)
    tokens = {}
    for layout in ("rows", "hnd", "nhd16"):
        storage.fill(layout)
        k, v = storage.view(layout)[1]
        if layout == "rows":
            tokens[layout] = (k.transpose(1, 2).clone(), v.transpose(1, 2).clone())
            continue
        table = storage.blocks(layout).long()
        rows = [x[table].transpose(2, 3) if layout == "hnd" else x[table] for x in (k, v)]
        tokens[layout] = tuple(x.flatten(1, 2).clone() for x in rows)
    for layout in ("hnd", "nhd16"):
        for found, wanted in zip(tokens[layout], tokens["rows"], strict=True):
            assert found.shape == (o.batch, o.context, 2, o.head_dim)
            assert torch.equal(found, wanted)
    assert not torch.equal(*tokens["rows"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_side_gives_the_logits_of_stock_transformers(fake_flashinfer: None, dtype: str):
    o = shape(dtype=dtype)
    reference = model.Reference(o, model_sides.new_model(o, CPU), CPU)
    assert (reference.o.context, reference.o.budget) == (64, 64)
    for name, side in model_sides.new_sides(reference.o, model.SIDES, FORMATS, CPU).items():
        assert reference.error(side) < {"fp32": 1e-5, "bf16": 0.03}[dtype], name


def test_wrong_sides_are_noticed(fake_flashinfer: None, monkeypatch: pytest.MonkeyPatch):
    o = shape()
    reference = model.Reference(o, model_sides.new_model(o, CPU), CPU)
    few = argparse.Namespace(**{**vars(reference.o), "budget": 32})
    with pytest.raises(AssertionError, match="logits differ by"):
        reference.error(model_sides.Unique(few, "exact"))
    wrapper = FakeFlashInfer.BatchDecodeWithPagedKVCacheWrapper
    run = wrapper.run
    monkeypatch.setattr(wrapper, "run", lambda self, q, kv: run(self, q, kv) * 1.2)
    with pytest.raises(AssertionError, match="logits differ by"):
        reference.error(model_sides.FlashInfer(reference.o, "hnd", True))
    monkeypatch.setattr(wrapper, "run", lambda self, q, kv: torch.full_like(q, torch.nan))
    with pytest.raises(AssertionError, match="logits differ by nan"):
        reference.error(model_sides.FlashInfer(reference.o, "hnd", True))
    options = {**TINY, "context": 128, "dtype": "fp32", "device": "cpu", "repeats": 1}
    side = cli.run("model", **options)["cases"][0]["sides"]["flashinfer_nhd16_cuda_cores"]
    assert side["failed"].startswith("AssertionError: logits differ by nan")


@pytest.mark.parametrize("name", ["unique_exact", "sdpa", "flashinfer_hnd_cuda_cores", "flashinfer_nhd16_cuda_cores"])
def test_steps_append_and_are_set_back(fake_flashinfer: None, name: str):
    o = shape(context=128)
    network, storage = model_sides.new_model(o, CPU), model_sides.Storage(o, CPU)
    side = model_sides.new_sides(o, model.SIDES, FORMATS, CPU)[name]
    before = [x.clone() for x in storage.flat[2]]
    step = model.graphed(side, network, storage, o.context - model.ROOM)
    timing = model.time_step(step, 2 * model.ROOM, 1.0)
    assert timing.rounds == 2 * model.ROOM
    counted = step.cache.counters()[0].max().item()
    assert 0 < counted <= o.context
    for old, new in zip(before, storage.flat[2], strict=True):  # keys and values of the last tokens of every row
        assert (old != new).sum() == o.batch * model.ROOM * 2 * o.head_dim


def test_a_model_can_be_compiled_in_parts(monkeypatch: pytest.MonkeyPatch):
    from transformers.models.llama import modeling_llama

    parts, eager = [], modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: parts.append(type(self).__name__))
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: (function, "compiled"))
    with model.compiled(model_sides.new_model(shape(), CPU)):
        assert modeling_llama.apply_rotary_pos_emb == (eager, "compiled")
    assert modeling_llama.apply_rotary_pos_emb is eager
    assert sorted(parts) == ["LlamaMLP"] * 3 + ["LlamaRMSNorm"] * 7


def test_pages_that_are_filled_already():
    o = shape(context=128)
    storage = model_sides.Storage(o, CPU)
    side = model_sides.Unique(o, "exact")
    pages = StaticPages(side.config, o.layers, o.batch, o.context, CPU)
    pages.adopt(storage.view("hnd"), storage.table, 100)
    layer = pages.static_layers[0].storage
    assert layer is not None
    assert layer.k.data_ptr() == storage.flat[0][0].data_ptr()
    assert pages.seq_lens.tolist() == [100, 100]
    assert pages.advance().tolist() == [[100], [100]]
    assert GraphedStep(model_sides.new_model(o, CPU), pages, o.batch).captured is False


# ---- The README. ----


def test_table_of_the_readme(fake_flashinfer: None):
    options = {**TINY, "batch": [1, 2], "context": 128, "dtype": "fp32", "device": "cpu", "repeats": 1}
    result = cli.run("model", **options)
    assert tables.model([result]) == ""  # of the CPU
    result["environment"] |= {"device": "NVIDIA H200", "driver": "580.1"}
    case = result["cases"][1]
    for side in case["sides"].values():
        side["peak_bytes"] = 3 << 30
    del case["best"]["sdpa"]
    text = tables.model([result])
    assert "on NVIDIA H200 (driver 580.1" in text
    assert "| batch | context | exact index | compressed index | FlashInfer | SDPA |" in text
    side = case["sides"]["unique_exact"]
    speedup = case["speedups"]["unique_exact"][case["peer"]]
    line = text.splitlines()[-1]
    cell = f"{tables.ms(side['median_ms'])}, {side['tokens_per_s']:.0f}/s, 3.0 GiB, **{speedup:.2f}x**"
    assert line.startswith(f"| 2 | 128 | {cell} |")
    assert line.endswith("| - |")
    assert tables.model([{**result, "cases": [{"options": case["options"], "skipped": "needs 9 GiB"}]}]) == ""
