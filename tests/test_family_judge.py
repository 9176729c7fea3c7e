"""The sweep's judge: what it says of an ``enable`` that keeps, changes, breaks or refuses a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("transformers")

import family_judge
import torch
from families import families
from family_judge import DENSE, NOT_BUILT, REFUSED, SPARSE, WRONG, judge

import unique_attn as ua

LAYERS = 2  # of the tiny Llama


@pytest.fixture
def enable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts another ``enable`` in place of the package's, and says which layers its decode steps select pages in."""

    def replace(function: Callable[[Any], None], layers: tuple[int, ...] = ()) -> None:
        @contextmanager
        def records(_model: Any) -> Any:
            yield [ua.SelectionRecord(layer, torch.zeros(1), torch.zeros(1)) for layer in layers]

        monkeypatch.setattr(ua, "enable", lambda model, _config: function(model))
        monkeypatch.setattr(ua, "disable", lambda model: model.lm_head._forward_hooks.clear())
        monkeypatch.setattr(ua, "record_selection", records)

    return replace


def fail_with(error: Exception) -> Callable[..., Any]:
    def function(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return function


def test_an_unchanged_model_is_dense_or_sparse(enable):
    enable(lambda _model: None)
    assert judge("llama").verdict == DENSE
    enable(lambda _model: None, layers=(0, 1))
    verdict = judge("llama")
    assert verdict.verdict == SPARSE
    assert verdict.layers == list(range(LAYERS))


def test_other_logits_are_wrong(enable):
    def change(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[-1].self_attn.q_proj.weight.mul_(1.1)

    enable(change, layers=(0, 1))
    verdict = judge("llama")
    assert verdict.verdict == WRONG
    assert "logits differ" in verdict.reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("no"), REFUSED), (NotImplementedError("no"), REFUSED), (TypeError("no"), WRONG)],
)
def test_errors_of_enable(enable, error, expected):
    enable(fail_with(error))
    verdict = judge("llama")
    assert verdict.verdict == expected
    assert "no" in verdict.reason


@pytest.mark.parametrize(("error", "expected"), [(NotImplementedError("no"), REFUSED), (ValueError("no"), WRONG)])
def test_errors_of_a_call(enable, error, expected):
    enable(lambda model: model.lm_head.register_forward_hook(fail_with(error)))
    assert judge("llama").verdict == expected


def test_a_family_that_stock_does_not_run_is_named_with_its_error(monkeypatch):
    monkeypatch.setattr(family_judge, "build", fail_with(ImportError("no such library")))
    verdict = judge("llama")
    assert verdict.verdict == NOT_BUILT
    assert "no such library" in verdict.reason


def test_families_of_every_kind():
    assert len(families()) > 180
    assert families()["t5"].class_name == "T5ForConditionalGeneration"
    assert families()["llama"].class_name == "LlamaForCausalLM"
    assert "whisper" in families()
