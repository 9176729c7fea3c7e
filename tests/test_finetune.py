"""``examples/finetune.py`` on a tiny model, its data, what it measures, and the numbers in docs/quality.md."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from pictures import numbers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import unique_attn
from benchmarks.report import finetune as report
from benchmarks.report import load
from examples import finetune, finetuning
from examples.finetuning import CITIES, HELD_OUT_CITIES, PLACES, Evaluation
from examples.support import DOCUMENT as TEXT
from examples.support import evaluate
from examples.support.models import load_model
from unique_attn import UniqueConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "quality.md").read_text("utf-8")
LENGTH, CONFIG = 384, UniqueConfig(budget=64)


class Tiny(NamedTuple):
    folder: Path
    model: Any
    tokenizer: Any
    sentences: list[list[int]]
    held_out: list[list[int]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Llama and a tokenizer that knows the words of the text and of the facts, saved in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = TEXT.read_text("utf-8")
    facts = [f" The code of the {city} {place} is Question: Answer: What" for city in CITIES for place in PLACES]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text, *facts],
        trainers.BpeTrainer(vocab_size=1500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder, quiet=True)
    return Tiny(folder, model, tokenizer, *finetuning.tokenize(tokenizer, [text]))


def arguments(tiny: Tiny, out: Path, *more: str) -> list[str]:
    fixed = f"--model {tiny.folder} --text {TEXT} --retrieval-share 0.5 --length {LENGTH} --budget {CONFIG.budget}"
    fixed += f" --steps 8 --batch 2 --lr 3e-3 --eval-windows 2 --eval-prompts 3 --device cpu --quiet --out {out}"
    return [*fixed.split(), *more]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_trains_and_measures(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, method: str):
    if method == "lora":
        pytest.importorskip("peft")
    saved = tmp_path / "saved"
    more = ["--method", method, "--tau", "2", "8", "--seeds", "0", "1", "--save", str(saved)]
    assert finetune.main(arguments(tiny, tmp_path, *(more if method == "full" else more[:2]))) == 0
    result = json.loads((tmp_path / "finetune.json").read_text())
    assert result["bench"] == "finetune"
    assert result["settings"] == CONFIG.to_dict()
    assert result["options"]["method"] == method
    assert {"commit", "date", "torch", "transformers", "device"} <= result["environment"].keys()
    expected = {"as it came", "trained densely", "trained soft, tau 2", "trained soft, tau 8"}
    if method == "lora":
        expected = {"as it came", "trained densely", "trained soft, tau 4"}
    assert result["summary"].keys() == expected
    assert len(result["runs"]) == (6 if method == "full" else 2)
    for run in result["runs"]:
        losses = [each["loss"] for each in run["log"]]
        assert losses[-1] < losses[0]
        assert run["dense"]["perplexity"] < result["before"]["dense"]["perplexity"]
        assert run["sparse"]["perplexity"] < result["before"]["sparse"]["perplexity"]
        assert run["sparse"]["perplexity"] != run["dense"]["perplexity"]  # something was left out
        assert ("sparsity_mass_kept" in run["log"][0]) == (run["train"] is not None)
    shown = finetuning.table(result)
    assert shown in capsys.readouterr().out
    assert shown.count("\n") == 2 + 2 * len(expected)
    if importlib.util.find_spec("matplotlib"):
        assert numbers(tmp_path / "finetune.png")["summary"] == result["summary"]
    if method == "full":
        assert result["summary"]["trained densely"]["sparse"]["perplexity"]["spread"] > 0
        # What was saved is the last model that was measured.
        model, _ = load_model(saved, quiet=True)
        evaluation = Evaluation.of(
            tiny.tokenizer, tiny.held_out, length=LENGTH, windows=2, prompts=3, skipped=CONFIG.budget, batch=2
        )
        assert evaluation.measure(model, CONFIG) == pytest.approx(result["runs"][-1]["sparse"], rel=1e-4)


# ---- Measurements. ----


def test_perplexity_is_that_of_decoding_token_by_token(tiny: Tiny):
    evaluation = Evaluation.of(
        tiny.tokenizer, tiny.held_out, length=160, windows=1, prompts=1, skipped=CONFIG.budget, batch=1
    )
    found = evaluation.measure(tiny.model, CONFIG)
    unique_attn.enable(tiny.model, CONFIG)
    try:
        evaluate.prefill(tiny.model, evaluation.windows[:, :8])  # a layer's first call is dense
        cache = transformers.DynamicCache(config=tiny.model.config)
        decoded, _ = evaluate.teacher_forced(tiny.model, evaluation.windows, cache)
    finally:
        unique_attn.disable(tiny.model)
    assert decoded.nll is not None
    assert found["perplexity"] == pytest.approx(decoded.nll[CONFIG.budget :].mean().exp().item(), rel=1e-4)
    assert found["perplexity"] != evaluation.measure(tiny.model, None)["perplexity"]


@pytest.mark.parametrize("config", [None, CONFIG])
def test_answers_are_counted(tiny: Tiny, config: UniqueConfig | None):
    """Asked for what the model says anyway, it is always right; asked for something else, never."""
    evaluation = Evaluation.of(
        tiny.tokenizer, tiny.held_out, length=LENGTH, windows=1, prompts=5, skipped=CONFIG.budget, batch=2
    )
    assert evaluation.measure(tiny.model, config)["retrieval"] == 0
    for i, each in enumerate(evaluation.samples):
        prompt = torch.tensor([each.ids[: each.answer]])
        if config is not None:
            unique_attn.enable(tiny.model, config)
        evaluate.prefill(tiny.model, prompt[:, :8])
        cache = evaluate.prefill(tiny.model, prompt[:, : each.question])
        said = tiny.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False, pad_token_id=0,
            max_new_tokens=len(each.ids) - each.answer, min_new_tokens=len(each.ids) - each.answer,
        )  # fmt: skip
        unique_attn.disable(tiny.model)
        evaluation.samples[i] = finetuning.Sample(said[0].tolist(), each.weights, each.question, each.answer)
    found = evaluation.measure(tiny.model, config)
    assert found["retrieval"] == 1
    if config is None:
        assert found["retrieval_decoded"] == 1


# ---- Data. ----


def test_samples(tiny: Tiny):
    rng = random.Random(0)
    each = finetuning.sample(
        tiny.tokenizer, tiny.sentences, rng, LENGTH, cities=CITIES[:5], facts=4, questions=2, answer_weight=7.0
    )
    assert len(each.ids) == len(each.weights) == LENGTH
    text = tiny.tokenizer.decode(each.ids)
    asked = tiny.tokenizer.decode(each.ids[each.question : each.answer])
    answer = tiny.tokenizer.decode(each.ids[each.answer :])
    fact = asked.split("Answer:")[1]
    assert text.count(f"{fact}{answer}") == 2  # told, and asked at the end
    assert text.endswith(f"{asked}{answer}")
    hidden = [token for token, weight in zip(each.ids, each.weights) if weight == 0]
    heavy = [token for token, weight in zip(each.ids, each.weights) if weight == 7]
    assert len(tiny.tokenizer.decode(hidden).split()) == 4
    assert all(len(number) == 5 for number in tiny.tokenizer.decode(hidden).split())
    assert len(tiny.tokenizer.decode(heavy).split()) == 2
    with pytest.raises(ValueError, match=r"9 facts and 2 questions take \d+ tokens, more than 60"):
        finetuning.sample(tiny.tokenizer, tiny.sentences, rng, 60, cities=CITIES, facts=9, questions=2)


def test_long_sequences_have_as_many_facts_as_there_are_places(tiny: Tiny):
    places = len(HELD_OUT_CITIES) * len(PLACES)
    long = 64 * places + 2000
    made = Evaluation.of(
        tiny.tokenizer, tiny.held_out * 40, length=long, windows=1, prompts=1, skipped=8, batch=1
    ).samples[0]
    assert len(made.ids) == long
    assert sum(weight == 0 for weight in made.weights) >= places
    assert finetuning.fact_count(640, CITIES) == 10


def test_training_never_sees_what_is_measured(tiny: Tiny):
    together = [*tiny.sentences, *tiny.held_out]
    whole = tiny.tokenizer(TEXT.read_text("utf-8").strip()).input_ids
    assert tiny.tokenizer.decode([t for s in together for t in s]).strip() == tiny.tokenizer.decode(whole)
    assert 0.05 < sum(map(len, tiny.held_out)) / len(whole) < 0.15
    data = finetuning.training_data(
        tiny.tokenizer, tiny.sentences, count=20, length=LENGTH, seed=0, share=1.0, weight=10.0
    )
    text = tiny.tokenizer.decode(torch.cat([each["input_ids"] for each in data]))
    assert " code of the " in text
    assert not any(f" the {city} {place}" in text for city in HELD_OUT_CITIES for place in PLACES)
    ends = [" ".join(tiny.tokenizer.decode(each).split()) for each in tiny.held_out]
    assert not any(end in " ".join(text.split()) for end in ends if len(end) > 40)


def test_offline_documents_have_no_paragraph_twice():
    paragraphs = [part for text in finetuning.offline_documents() for part in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(map(len, paragraphs)) > 200_000


# ---- Bad input. ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "nowhere.txt"], "error: --text: cannot read 'nowhere.txt': No such file or directory"),
        (["--text", "EMPTY"], "error: --text: expected text, got the empty file"),
        (["--text", "BINARY"], "not UTF-8 text"),
        (["--text", "SHORT"], "error: --text: too short: 10% of it are"),
        (["--budget", "256"], "error: --length: expected at least twice the budget of 256 tokens"),
        (["--budget", "60"], "error: UniqueConfig.budget"),
        (["--length", "2048"], "error: --length: expected at most 1024, what the model can read, got 2048"),
        (["--tau", "0"], "error: TrainConfig.tau: expected a finite number above 0, got 0"),
        (["--schedule", "linear"], "error: TrainConfig.tau_end: expected a positive number"),
        (["--steps", "0"], "error: --steps: expected at least 1, got 0"),
        (["--retrieval-share", "2"], "error: --retrieval-share: expected a share from 0 to 1, got 2"),
        (["--model", "/nowhere/at/all"], "error: cannot load"),
    ],
)
def test_bad_input(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str):
    files = {"EMPTY": b" \n", "BINARY": b"\xff\xfe\x00", "SHORT": b"A short text. It ends here. " * 9}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    more = [str(tmp_path / word) if word in files else word for word in more]
    assert finetune.main(arguments(tiny, tmp_path, *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "finetune.json").exists()


# ---- What the documentation says. ----


def test_numbers_come_from_the_committed_result():
    """That the page shows what the report makes of it, the picture included, is compared in test_docs.py."""
    results = report.repeated(load(ROOT / "benchmarks" / "results"))
    (page,) = re.findall(r"^<!-- finetune results -->$.*?^<!-- /finetune results -->$", PAGE, re.MULTILINE | re.DOTALL)
    for result in results:
        assert finetuning.summarize(result) == result["summary"]
        assert finetuning.table(result) in page
    assert "`python examples/finetune.py --seeds 0 1 2` on" in page
    assert "--length 8192 --seeds 0 1 2 --budget 256 --schedule exponential --tau-end 2 --tau 16`" in page
    result = results[0]
    assert report.block([]) == report.block([result | {"options": result["options"] | {"seeds": [0]}}]) == ""
