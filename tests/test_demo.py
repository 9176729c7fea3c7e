"""The main job, on a tiny random model with a tokenizer made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from pictures import numbers

from examples import demo
from unique_attn import UniqueConfig

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 16
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant\n"
DOCUMENT = " ".join(f"Stone {n} lies {7 * n % 31} paces from the well." for n in range(60)) + " The key is 4711."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, and a byte-level tokenizer trained on the document."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([DOCUMENT], vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HEADS * DIM, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "document.txt").write_text(DOCUMENT)
    return path


def run(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    argv = ["--model", str(folder), "--file", str(folder / "document.txt"), "--question", "Where is the key?"]
    argv += ["--answer", "4711", "--max-new-tokens", "6", "--tail", "10", "--out", str(out), "--quiet", *more]
    assert demo.main(argv) == 0
    return json.loads((out / "demo.json").read_text())


def test_small_budget(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, device):
    result = run(folder, tmp_path, "--budget", "64", "--device", str(device), "--dtype", "fp32")
    printed = capsys.readouterr().out
    for part in ("Question: Where is the key?", "Dense:", "Page-sparse:", "perplexity", "tokens/s", "cache read per"):
        assert part in printed
    length = result["prompt_tokens"]
    assert length > 500
    token, pages = 2 * DIM * 4, -(-length // 8)
    rows = LAYERS * KV_HEADS
    assert result["dense"]["cache_bytes_per_step"] == {
        "index": 0, "keys_and_values": rows * length * token, "total": rows * length * token
    }  # fmt: skip
    index, read = rows * pages * 2 * DIM * 4, rows * 64 * token
    assert result["unique"]["cache_bytes_per_step"] == {"index": index, "keys_and_values": read, "total": index + read}
    for side in ("dense", "unique"):
        assert len(result[side]["answer_tokens"]) == 6
        assert result[side]["tail_perplexity"] > 1
        assert result[side]["tail_tokens_per_second"] > 0
        assert result[side]["answer_tokens_per_second"] > 0
    assert result["tail_mean_kl_divergence"] > 0  # something was left out
    first = result["first_difference"]
    a, b = result["dense"]["answer_tokens"], result["unique"]["answer_tokens"]
    assert result["tokens_agree"] is (a == b)
    assert first is None or (a[:first] == b[:first] and a[first] != b[first])
    assert result["pictures"] == [str(tmp_path / "selection.png"), str(tmp_path / "selection_layers.png")]
    for picture in map(numbers, result["pictures"]):
        assert picture["layers"] == list(range(LAYERS))
        assert picture["seq_lens"] == list(range(length, length + 6))
        assert picture["pages_read"] == [[[64 // 8] * KV_HEADS] * LAYERS] * 6
        assert picture["marks"].keys() == {"the answer"}


@pytest.mark.parametrize("rule", ["mean", "unique", "directional", "minmax"])
def test_reading_everything_is_dense(folder: Path, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch):
    """With a budget that covers the context and no dense fallback, both sides are the same."""
    config = UniqueConfig
    monkeypatch.setattr(demo, "UniqueConfig", lambda **settings: config(**settings, dense_below=0))
    result = run(folder, tmp_path, "--budget", "2048", "--rule", rule, "--dtype", "fp32")
    assert result["pictures"]  # steps were sparse
    assert result["tokens_agree"]
    assert result["unique"]["answer"] == result["dense"]["answer"]
    assert result["tail_mean_kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert result["unique"]["tail_perplexity"] == pytest.approx(result["dense"]["tail_perplexity"], rel=1e-4)


def test_short_context_is_dense(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    result = run(folder, tmp_path, "--budget", "2048")
    assert "every step was dense" in capsys.readouterr().out
    assert result["tokens_agree"]
    assert result["pictures"] == []
    assert result["unique"]["cache_bytes_per_step"] == result["dense"]["cache_bytes_per_step"]


def test_prompt_positions(folder: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = demo.build_prompt(tokenizer, DOCUMENT, "Where?", "4711", 2000)
    ids = prompt.ids[0]
    assert tokenizer.decode(ids[: prompt.document_end]).endswith("The key is 4711.")
    assert tokenizer.decode(ids[prompt.document_end :]).startswith("\n\nQuestion about the text above: Where?")
    assert tokenizer.decode(ids).endswith("<s>assistant")
    assert tokenizer.decode(ids[prompt.answer_at :]).lstrip().startswith("4711.")
    assert demo.build_prompt(tokenizer, DOCUMENT, "Where?", "absent", 2000).answer_at is None
    assert demo.build_prompt(tokenizer, DOCUMENT, "Where?", None, 2000).answer_at is None

    short = demo.build_prompt(tokenizer, DOCUMENT, "Where?", "4711", 300)  # the document's end is dropped
    assert short.ids.shape[1] <= 300
    assert short.answer_at is None
    assert DOCUMENT.startswith(tokenizer.decode(short.ids[0, : short.document_end]).split("user\n")[1])
    with pytest.raises(ValueError, match="the question takes"):
        demo.build_prompt(tokenizer, DOCUMENT, "Where?", None, 10)

    tokenizer.chat_template = None
    plain = demo.build_prompt(tokenizer, DOCUMENT, "Where?", "4711", 2000)
    assert tokenizer.decode(plain.ids[0]).startswith("Stone 0 lies")
    assert tokenizer.decode(plain.ids[0]).endswith("\nAnswer:")


def test_bytes_with_dense_layers():
    text = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    config = SimpleNamespace(get_text_config=lambda: text)
    moved = demo.bytes_per_step(config, UniqueConfig(rule="mean", dense_layers=(1,)), 4000, torch.bfloat16)
    token = 2 * 16 * 2
    assert moved["index"] == 3 * 2 * 500 * 32
    assert moved["keys_and_values"] == 3 * 2 * 512 * token + 1 * 2 * 4000 * token


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--budget", "100"], "UniqueConfig.budget: expected a multiple of page_size = 8, got 100"),
        (["--page-size", "7"], "UniqueConfig.page_size: expected one of 4, 8, 16, 32, 64, got 7"),
        (["--file", "no/such/file"], "no/such/file"),
        (["--tail", "1"], "--tail: expected at least 2, got 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 2, got 0"),
        (["--model", "no/such/folder/at/all"], "cannot load 'no/such/folder/at/all'"),
    ],
)
def test_bad_options(argv: list[str], complaint: str, capsys: pytest.CaptureFixture):
    assert demo.main([*argv, "--quiet"]) == 1
    assert complaint in capsys.readouterr().err


def test_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty.txt").write_text(" \n")
    assert demo.main(["--file", str(tmp_path / "empty.txt")]) == 1
    assert "expected a document" in capsys.readouterr().err
