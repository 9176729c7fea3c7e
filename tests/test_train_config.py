"""Settings of training: schedules, dictionaries and bad values."""

from __future__ import annotations

import dataclasses
import json

import pytest

import unique_attn as ua


def test_schedules():
    for schedule, middle in (("linear", 2.5), ("cosine", 2.5), ("exponential", 2.0)):
        config = ua.TrainConfig(tau=4.0, tau_end=1.0, schedule=schedule)
        assert [config.tau_at(p) for p in (0, 0.5, 1.0)] == pytest.approx([4.0, middle, 1.0])
        half = dataclasses.replace(config, hard_after=0.5)
        assert [half.tau_at(p) for p in (0.25, 0.5, 1.0)] == pytest.approx([middle, 1.0, 1.0])
        assert [half.mode_at(p) for p in (0.49, 0.5, 1)] == ["soft", "hard", "hard"]
    assert ua.TrainConfig(tau=3).tau_at(0.7) == 3
    assert ua.TrainConfig(tau=100, tau_end=1e-15, schedule="cosine").tau_at(1.0) == 1e-15
    every = ua.TrainConfig(tau=4.0, tau_end=1.0, schedule="linear", hard_after=0.5, log_every=3)
    assert ua.TrainConfig.from_dict(json.loads(json.dumps(every.to_dict()))) == every


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"mode": "sparse"}, ValueError, "TrainConfig.mode: expected one of soft, hard, dense, got 'sparse'"),
        ({"tau": 0}, ValueError, "TrainConfig.tau: expected a finite number above 0, got 0"),
        ({"tau": 1e-39}, ValueError, "TrainConfig.tau: expected 1e-20 to 1e.20, got 1e-39"),
        ({"tau": 1, "tau_end": 1e300, "schedule": "linear"}, ValueError, "TrainConfig.tau_end: expected 1e-20 to"),
        ({"tau": "1"}, TypeError, "TrainConfig.tau: expected a number, got '1'"),
        ({"schedule": "step"}, ValueError, "TrainConfig.schedule: expected one of constant"),
        ({"schedule": "linear"}, ValueError, "TrainConfig.tau_end: expected a positive number with schedule 'linear'"),
        ({"tau_end": 0.1}, ValueError, "TrainConfig.tau_end: expected None with schedule 'constant', got 0.1"),
        ({"hard_after": 1.5}, ValueError, "TrainConfig.hard_after: expected a share of the training from 0 to 1"),
        ({"log_every": -1}, ValueError, "TrainConfig.log_every: expected at least 0, got -1"),
        ({"log_every": 1.5}, TypeError, "TrainConfig.log_every: expected an integer or None, got 1.5"),
        ({"taus": 1}, ValueError, "TrainConfig.from_dict: expected fields among .*, got taus"),
    ],
)
def test_bad_settings(values, error, message):
    with pytest.raises(error, match=message):
        ua.TrainConfig.from_dict(values)


def test_bad_mapping():
    with pytest.raises(TypeError, match=r"TrainConfig.from_dict: expected a mapping, got int"):
        ua.TrainConfig.from_dict(3)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ua.TrainConfig().tau = 2.0  # type: ignore[misc]
