"""Every family of the installed transformers: enabled, it gives what stock attention gives, or refuses by name."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import families
from family_judge import WRONG, judge


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families())
def test_family(name):
    verdict = judge(name)
    assert verdict.verdict != WRONG, verdict.reason
