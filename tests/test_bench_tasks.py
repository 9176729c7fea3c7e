"""``benchmarks tasks``: prompts hold what they ask for, answers come from pages, the report says what was scored."""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_prefill_cases import CPU, MODEL, written
from pictures import numbers

import unique_attn
from benchmarks.cli import main
from benchmarks.measure import texts
from benchmarks.measure.tasks import TASKS, Sample, Writer, answers, samples
from benchmarks.measure.tasks.paragraphs import PARAGRAPHS
from benchmarks.report import tasks as tasks_report
from benchmarks.suite import tasks

LENGTH = 2048
FILLER = texts.technical()[:30_000]


class Characters:
    """A tokenizer of ASCII characters."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> argparse.Namespace:
        return argparse.Namespace(input_ids=[min(ord(c), 127) for c in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [self.decode(row) for row in rows.tolist()]


class Chat(Characters):
    chat_template = "there is one"

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        ((message),) = messages
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"<user>{message['content']}<model>"


# ---- Prompts. ----


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(Characters(), FILLER)


def text_of(sample: Sample) -> str:
    return Characters().decode(sample.ids)


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts(name: str, writer: Writer):
    made = samples(name, writer, LENGTH, seed=0, count=3)
    assert made == samples(name, writer, LENGTH, seed=0, count=3)
    assert made != samples(name, writer, LENGTH, seed=1, count=3)
    assert len({text_of(sample) for sample in made}) == 3
    for sample in made:
        text = text_of(sample)
        assert len(text) == LENGTH - TASKS[name].new_tokens
        question = text[-sample.question :]
        assert question.startswith("\n\nQuestion: ")
        assert question.count("\nAnswer:") == 1
        assert not question.endswith(" ")
        for answer in sample.answers:
            assert answer in text[: -sample.question]
            assert answer not in question
            assert len(answer) + 1 <= TASKS[name].new_tokens


def test_what_is_asked_for(writer: Writer):
    for sample in samples("multi_key", writer, LENGTH, 0, 5):
        text = text_of(sample)
        codes = dict(re.findall(r"special code of the (\w+ \w+) is (\d+)\.", text))
        (asked,) = re.findall(r"What is the special code of the (\w+ \w+)\?", text)
        assert len(codes) == 4
        assert sample.answers == (codes[asked],)
    for sample in samples("multi_query", writer, LENGTH, 0, 5):
        text = text_of(sample)
        codes = dict(re.findall(r"special code of the (\w+ \w+) is (\d+)\.", text))
        asked = re.findall(r"the (\w+ \w+)(?:,| and|\?)", text[-sample.question :])
        assert [codes[name] for name in asked] == list(sample.answers)
    for sample in samples("multi_value", writer, LENGTH, 0, 5):
        found = re.findall(r"special code of the (\w+ \w+) is (\d+)\.", text_of(sample))
        assert len({name for name, _ in found}) == 1
        assert {code for _, code in found} == set(sample.answers)
        assert len(found) == 4
    for sample in samples("tracking", writer, LENGTH, 0, 5):
        body = text_of(sample).partition("\n")[2]  # the head has an example
        values: dict[str, str] = {}
        for name, other, value in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", body):
            values[name] = value or values[other]
        (asked,) = re.findall(r"have the value (\d+)\?", body)
        assert {name for name, value in values.items() if value == asked} == set(sample.answers)
        assert len(sample.answers) == 5


def test_words_that_come_often(writer: Writer):
    for length in (LENGTH, 8192):
        for sample in samples("common", writer, length, 0, 2):
            listed = Counter(re.findall(r"\n\d+\. (\w+)", text_of(sample)))
            best = listed.most_common()
            assert {word for word, _ in best[:10]} == set(sample.answers)
            assert best[9][1] > best[10][1]
            assert len(best) > 20
        for sample in samples("frequent", writer, length, 0, 2):
            spoken = Counter(re.findall(r" ((?:[a-z][aeiou]){3})(?= |\n)", text_of(sample)[: -sample.question]))
            best = spoken.most_common()
            assert [word for word, _ in best[:3]] == list(sample.answers)
            assert best[2][1] > best[3][1]


def test_paragraphs():
    """Answers are in their own paragraph alone, and questions do not give them away."""
    for text, asked in PARAGRAPHS:
        for question, answer in asked:
            assert [other for other, _ in PARAGRAPHS if answer.lower() in other.lower()] == [text]
            assert answer.lower() not in question.lower()
    assert len({question for _, asked in PARAGRAPHS for question, _ in asked}) >= 60


def test_a_chat(writer: Writer):
    (made,) = samples("single", Writer(Chat(), FILLER, chat=True), LENGTH, 0, 1)
    text = text_of(made)
    assert text.startswith("<user>A special code")
    assert re.search(r"\n\nQuestion: What is the special code of the (.+)\?<model>The special code of the \1 is$", text)
    assert len(text) == LENGTH - TASKS["single"].new_tokens
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template, got Characters without one"):
        Writer(Characters(), FILLER, chat=True)


def test_scores():
    sample = Sample([], 0, ("123", "Ab c", "9"))
    assert sample.score("ab C and 0123.") == pytest.approx(2 / 3)
    assert sample.score("") == 0
    assert tasks.summary([1, 0, 1, 1], 2) == {"mean": 0.75, "std": pytest.approx(0.3536), "seeds": [0.5, 1]}
    assert tasks.summary([1, 0], 1)["std"] == 0


def test_no_room(writer: Writer):
    with pytest.raises(ValueError, match=r"tokens: expected at least \d+ for this task, got 184"):
        samples("single", writer, 200, 0, 1)
    with pytest.raises(ValueError, match=r"filler: expected at least \d+ tokens, got"):
        samples("single", writer, 40_000, 0, 1)


# ---- Answers. ----


def tiny_model() -> Any:
    """Random weights that are sharp enough to have uneven attention."""
    pytest.importorskip("transformers")
    from benchmarks.measure.model_sides import new_model

    model = new_model(argparse.Namespace(**{**MODEL, "vocab": 128}, context=LENGTH), CPU)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 12
        layer.self_attn.k_proj.weight *= 12
    return model


def windowed_model() -> Any:
    """The same kind of weights, with a window in one of two layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=LENGTH, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight += 3
    return model


@pytest.mark.parametrize("make", [tiny_model, windowed_model])
def test_answers(make: Any, monkeypatch: pytest.MonkeyPatch):
    """Read in parts or at once, and on pages that hold everything, answers are those of stock generate()."""
    model = make()
    ids = torch.randint(0, 128, (3, 300), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[:, 300:]
    for tokens, chunk in ((32768, 2048), (500, 100), (150, 100)):
        monkeypatch.setattr(answers, "PREFILL_TOKENS", tokens)
        monkeypatch.setattr(answers, "CHUNK", chunk)
        cache = answers.read(model, ids[:, :-40])
        assert cache.get_seq_length() == 260
        assert torch.equal(answers.answer(model, ids, cache, None, 12), wanted)
        whole = unique_attn.UniqueConfig(budget=512, dense_below=0, max_decode_tokens=40)
        assert torch.equal(answers.answer(model, ids, cache, whole, 12), wanted)
        assert cache.get_seq_length() == 260
    small = unique_attn.UniqueConfig(budget=16, dense_below=0, max_decode_tokens=40)
    assert not torch.equal(answers.answer(model, ids, cache, small, 12), wanted)
    assert torch.equal(answers.answer(model, ids, cache, None, 12), wanted)  # the model is as it was
    with pytest.raises(RuntimeError, match=f"no layer of {type(model).__name__} was sparse"):
        answers.answer(model, ids, cache, unique_attn.UniqueConfig(dense_layers=(0, 1), dense_below=0), 12)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", lambda *args: (model, Characters()))
        argv = ["tasks", "--model", "gemma3", "--length", "1024", "--tasks", "single", "tracking", "--seeds", "2"]
        argv += ["--samples", "2", "--batch", "3", "--rules", "directional", "minmax", "--budgets", "64"]
        argv += ["--index-format", "exact", "compressed", "--device", "cpu"]
        return written(tmp_path_factory.mktemp("tasks"), *argv)


def test_run(result: dict[str, Any]):
    assert result["options"]["form"] == "plain"
    (case,) = result["cases"]
    assert [row["setting"] for row in case["rows"]] == [
        "dense",
        "directional, 64",
        "directional, 64, compressed",
        "minmax, 64",
    ]
    for row in case["rows"]:
        assert set(row["tasks"]) == {"single", "tracking"}
        seeds = [task["seeds"] for task in row["tasks"].values()]
        assert row["average"]["seeds"] == [pytest.approx(sum(pair) / 2) for pair in zip(*seeds)]
        assert all(0 <= score <= 1 for each in seeds for score in each)
    for name, shown in case["examples"].items():
        assert set(shown["answers"]) == {row["setting"] for row in case["rows"]}
        assert all(len(text) == TASKS[name].new_tokens for text in shown["answers"].values())
        assert "Question: " in shown["question"]
    assert result["filler"]["technical"] == texts.facts(texts.technical())


def test_bad_arguments(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "load", lambda *args: (tiny_model(), Characters()))
    for argv, complaint in (
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--budgets", "130"], "--budgets: expected multiples of --page-size 8 from 16 on, got 130"),
        (["--length", "4096"], "--length: expected at most the 2048 tokens of the model, got 4096"),
        (["--length", "128"], "--length 128, task single: tokens: expected at least"),
        (["--length", "1024", "--form", "chat"], "--form: chat: expected a tokenizer with a chat template"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["tasks", *argv, "--device", "cpu"])
        assert complaint in str(raised.value)
    assert capsys.readouterr().out == ""


# ---- The report. ----


def test_report(result: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    scored = json.loads(json.dumps(result))
    rows = scored["cases"][0]["rows"]
    rows[1:] = [{**copy.deepcopy(row), "budget": budget} for row in rows[1:] for budget in (64, 512)]
    for i, row in enumerate(scored["cases"][0]["rows"]):
        row["tasks"]["single"] = {"mean": 0.9 - i / 10, "std": 0.125, "seeds": []}
        row["average"] = {"mean": 0.8 - i / 10, "std": 0.0525, "seeds": []}
    assert re.search(r"directional, 64, compressed +60\.0 ± 12\.5 ", tasks.report(scored))
    block = tasks_report.block([scored])
    assert "| rule, budget | needle | variables | average |" in block
    assert "| `directional`, 64 | 80 ± 12 | 0 ± 0 | 70.0 ± 5.2 |" in block
    assert "| `directional`, compressed, 512 | 50 ± 12 |" in block
    assert "| `directional`, 64 | 70.0 ± 5.2 |" in block  # the table of averages
    longer = {**scored, "cases": [{**scored["cases"][0], "length": 4096}]}
    assert "| rule, budget | 1K tokens | 4K tokens |" in tasks_report.block([longer, scored])
    lost = tasks_report.failures_block([longer, scored])
    assert "4K tokens, `directional`" in lost
    assert "1K tokens" not in lost
    assert re.search(r"\| needle \| 90 ± 12 \| 80 ± 12 \| 64 \| `.+` \| `.+` \| `.+` \| `.+` \|", lost)
    (path,) = tasks_report.draw([scored, {**scored, "model": "Other"}], tmp_path)
    shown = numbers(path)
    name = f"{scored['model']}, 1K tokens"
    assert list(shown["panels"]) == [name, "Other, 1K tokens"]
    assert shown["levels"][name] == 80
    assert shown["panels"][name]["directional"] == {"64": 70, "512": 60}
    assert list(shown["panels"][name]) == ["directional", "directional, compressed", "minmax"]
    assert f"](docs/{path.name})" in block
    assert tasks_report.block([]) == ""
    assert tasks_report.draw([], tmp_path) == []
