"""What becomes of a family under :func:`unique_attn.enable`: stock attention is the oracle, on the same weights."""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from families import build
from family_cases import CASES, NotApplicable
from family_images import inputs
from family_inputs import Inputs
from family_names import families
from torch import Tensor, nn

import unique_attn as ua

# More tokens than any context here, so that page-sparse decoding must give dense attention's result.
FULL = ua.UniqueConfig(budget=256, page_size=4, block_size=16, dense_below=0)
TOLERANCE = 2e-3  # of logits, in their standard deviations

SPARSE, DENSE, REFUSED, WRONG, NOT_BUILT = "sparse", "dense", "refused", "wrong", "not built"


@dataclass
class Verdict:
    """The result of one family.

    Attributes:
        verdict: ``sparse``: decode steps of some layers ran on pages, and all results are those of stock attention.
            ``dense``: the results are, but nothing ran on pages. ``refused``: ``enable`` or a call raised an error
            that names what is not supported. ``wrong``: results differ, or a call fails that stock attention does.
            ``not built``: stock attention itself does not run.
        model_class: name of the model's class.
        reason: why it is not sparse; of a sparse family, why some layers are not.
        layers: that ran on pages, of all that have a number.
        kinds: of the layers that ran on pages.
        dense_kinds: of the layers that did not.
        images: whether images were among the text.
        cases: by name, ``same``, or what else happened there.
        seconds: it took.
    """

    verdict: str
    model_class: str
    reason: str = ""
    layers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    dense_kinds: list[str] = field(default_factory=list)
    images: bool = False
    cases: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """What is worth keeping: cases only where they are not the same."""
        values = {**asdict(self), "cases": {name: said for name, said in self.cases.items() if said != "same"}}
        return {name: value for name, value in values.items() if value not in ([], {}, "", False) and name != "seconds"}


class TimeIsUpError(BaseException):
    """Not an Exception: what a case catches must not swallow it."""


def judge(name: str, limit: int | None = None) -> Verdict:
    """Run a family with stock attention and enabled, in every way of :data:`CASES`, and compare.

    Args:
        name: one of :func:`families`.
        limit: seconds that it may take; in the main thread only. None for no limit.
    """
    start = time.perf_counter()
    verdict = Verdict(NOT_BUILT, families()[name].class_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _forget_warnings()
        try:
            with _at_most(limit):
                _judge(name, verdict)
        except TimeIsUpError:
            verdict.reason = f"took more than {limit} s"
        except Exception as error:
            verdict.verdict, verdict.reason = WRONG, f"could not be judged: {_say(error)}"
    said = dict.fromkeys(str(each.message) for each in caught if str(each.message).startswith("unique_attn: "))
    if verdict.verdict in (SPARSE, DENSE):
        verdict.reason = "; ".join(text.removeprefix("unique_attn: ") for text in said)
    verdict.seconds = round(time.perf_counter() - start, 2)
    return verdict


@contextmanager
def _at_most(seconds: int | None) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop) if seconds else None
    if seconds:
        signal.alarm(seconds)
    try:
        yield
    finally:
        if seconds:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def _judge(name: str, result: Verdict) -> None:
    try:
        model = build(name)
        given = inputs(model)
    except Exception as error:
        result.reason = _say(error)
        return
    stock = {case: _attempt(case, model, copy.deepcopy(given)) for case in CASES}
    result.cases = {case: f"stock: {_say(o)}" for case, o in stock.items() if isinstance(o, Exception)}
    ran = {case: outcome for case, outcome in stock.items() if not isinstance(outcome, Exception)}
    if not ran:
        result.reason = result.cases["forward"].removeprefix("stock: ")
        return
    result.verdict = WRONG  # until shown otherwise
    result.images = given.images
    model = build(name)  # some keep things from call to call
    try:
        ua.enable(model, FULL)
    except (ValueError, NotImplementedError) as error:
        result.verdict, result.reason = REFUSED, _say(error)
        return
    except Exception as error:
        result.reason = f"enable: {_say(error)}"
        return
    with ua.record_selection(model) as records:
        enabled = {case: _attempt(case, model, copy.deepcopy(given)) for case in ran}
    refusals = {}
    for case, outcome in enabled.items():
        if isinstance(outcome, NotImplementedError):
            refusals[case] = result.cases[case] = _say(outcome)
        else:
            result.cases[case] = _difference(ran[case], outcome) or "same"
    ua.disable(model)
    after = _attempt(next(iter(ran)), model, given)
    result.cases["after disable"] = _difference(next(iter(ran.values())), after) or "same"
    bad = [
        f"{case}: {said}"
        for case, said in result.cases.items()
        if said != "same" and case not in refusals and not said.startswith("stock: ")
    ]
    _describe_layers(result, model, {record.layer_idx for record in records})
    if bad:
        result.reason = "; ".join(bad)
    elif refusals:
        result.verdict, result.reason = REFUSED, "; ".join(dict.fromkeys(refusals.values()))
    else:
        result.verdict = SPARSE if records else DENSE


def _attempt(case: str, model: Any, given: Inputs) -> dict[str, Tensor] | Exception:
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "rope_deltas"):  # of the batch before
            module.rope_deltas = None
    try:
        with torch.no_grad():
            return CASES[case](model, given)
    except Exception as error:
        return error


def _say(error: Exception) -> str:
    if isinstance(error, NotApplicable):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _forget_warnings() -> None:
    """Warnings that are given once per process must be given again for the next family."""
    from unique_attn.hf import compat

    getattr(compat, "_warned", set()).clear()


def _difference(expected: dict[str, Tensor], outcome: dict[str, Tensor] | Exception) -> str | None:
    """What differs, None if nothing does."""
    if isinstance(outcome, Exception):
        return _say(outcome)
    for name, tensor in expected.items():
        if outcome[name].shape != tensor.shape and name != "sequences":
            return f"{name} {list(outcome[name].shape)} for {list(tensor.shape)}"
    if "sequences" not in expected:
        return _logits_differ(expected["logits"], outcome["logits"])
    if "logits" in expected:
        return _greedy_differs(expected, outcome)
    if "values" in expected:  # speech models that generate no tokens
        return _logits_differ(expected["values"], outcome["values"])
    if torch.equal(expected["sequences"], outcome["sequences"]):
        return None
    if "scores" in expected and torch.allclose(expected["scores"], outcome["scores"], rtol=1e-4, atol=1e-4):
        return None  # beams of equal scores
    return "other tokens"


def _logits_differ(expected: Tensor, actual: Tensor) -> str | None:
    real = _real(expected)
    if not torch.equal(real, _real(actual)):
        return "infinite or NaN at other places"
    error = (expected[real] - actual[real]).abs().max().item() / _spread(expected) if real.any() else 0.0
    return None if error <= TOLERANCE else f"logits differ by {error:.2g} of their standard deviation"


def _real(logits: Tensor) -> Tensor:
    """Where logits are none that rule a token out: those are infinite, or the least number of their type."""
    return logits.isfinite() & (logits.abs() < 1e30)


def _spread(logits: Tensor) -> float:
    return max(logits[_real(logits)].float().std().item(), 1e-6)


def _greedy_differs(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> str | None:
    """Compares ``[rows, steps, vocabulary]`` up to the first step at which rounding decides on the likeliest token."""
    other = (expected["logits"].argmax(-1) != actual["logits"].argmax(-1)).any(0)
    steps = int(other.int().argmax()) + 1 if other.any() else len(other)
    differs = _logits_differ(expected["logits"][:, :steps], actual["logits"][:, :steps])
    if differs is None and not other.any() and not torch.equal(expected["sequences"], actual["sequences"]):
        return "other tokens"
    return differs


def _describe_layers(result: Verdict, model: nn.Module, sparse: set[int]) -> None:
    """Which layers were sparse, and the kinds of all."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    numbered = sorted({i for m in model.modules() if isinstance(i := getattr(m, "layer_idx", None), int)})

    def kind(index: int) -> str:
        return types[index] if types is not None and index < len(types) else "attention"

    result.layers = sorted(sparse)
    result.kinds = sorted({kind(i) for i in sparse})
    result.dense_kinds = sorted({kind(i) for i in numbered if i not in sparse})
