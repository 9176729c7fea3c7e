"""``examples/transcribe.py`` with a saved model and a WAV file, and what it says of bad arguments."""

from __future__ import annotations

import re
import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from examples import transcribe
from examples.support.audio import RATE, read_wav, tiny_qwen2_audio, tone


def write(path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1, dtype: str = "<i2") -> str:
    with wave.open(str(path), "wb") as file:
        file.setframerate(rate)
        file.setnchannels(channels)
        file.setsampwidth(np.dtype(dtype).itemsize)
        file.writeframes((samples * 100).astype(dtype).tobytes())
    return str(path)


def test_a_saved_model_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for part in tiny_qwen2_audio():
        part.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "tone.wav", tone(35.5))
    transcribe.main(["--model", str(tmp_path / "model"), "--audio", path, "--new-tokens", "8", "--budget", "64"])
    out = capsys.readouterr().out
    seconds, windows, tokens = re.search(r"audio: ([\d.]+) s, windows: (\d+); prompt: (\d+) tokens", out).groups()
    assert (seconds, windows) == ("35.5", "2")
    assert int(tokens) > 35.5 * 25
    speeds = re.findall(r"^(dense|64 of \d+ tokens a step): [\d.]+ tokens/s, (\d) of (\d) layers on pages", out, re.M)
    assert [(int(sparse), int(layers)) for _, sparse, layers in speeds] == [(0, 4), (4, 4)]
    assert "random" not in out  # it cannot know


def test_the_tone_is_said_to_mean_nothing(capsys: pytest.CaptureFixture[str]):
    transcribe.main(["--seconds", "10", "--window", "0", "--new-tokens", "4", "--budget", "64"])
    out = capsys.readouterr().out
    assert "windows: 1;" in out
    assert "The weights are random: the words mean nothing" in out


def test_wav_samples(tmp_path: Path):
    samples = read_wav(write(tmp_path / "a.wav", np.array([0.0, 1.0, -1.0])))
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, np.array([0, 100, -100]) / 2**15)


@pytest.mark.parametrize(
    ("how", "got"),
    [
        ({"rate": 44_100}, "44100 Hz, 1 channels, 16 bits and 4 samples"),
        ({"channels": 2}, "16000 Hz, 2 channels, 16 bits and 2 samples"),
        ({"dtype": "<i4"}, "16000 Hz, 1 channels, 32 bits and 4 samples"),
        ({"samples": np.zeros(0)}, "and 0 samples"),
    ],
)
def test_other_files_are_refused(how: dict, got: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "a.wav", **{"samples": np.ones(4), **how})
    with pytest.raises(SystemExit):
        transcribe.main(["--audio", path])
    said = " ".join(capsys.readouterr().err.split())
    assert "--audio: expected a WAV file of 16000 Hz, 1 channel, 16 bits and at least 1 sample, got" in said
    assert got in said


def test_no_wav_file(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"RIFFnothing of the kind")
    for path in (tmp_path / "a.wav", tmp_path / "missing.wav"):
        with pytest.raises(ValueError, match=r"--audio: expected a WAV file.*a\.wav|missing\.wav"):
            read_wav(str(path))


@pytest.mark.parametrize(("name", "least"), [("--seconds", 1), ("--window", 0), ("--new-tokens", 3)])
def test_bad_numbers(name: str, least: int, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        transcribe.main([name, str(least - 1)])
    assert f"{name}: expected at least {least}, got {least - 1}" in capsys.readouterr().err
