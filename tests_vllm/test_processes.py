"""Engines in several processes: two ranks, blocks that go through a disk, and the server with a real client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests_vllm.support import answers, counted, dropped_in, engine, prompts, sampling, sparse

ROOT = Path(__file__).parent.parent
LENGTHS = (50, 333, 1200, 700)
NEW = 16


def test_two_ranks(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensor parallelism with gloo: each rank has one KV head. Contexts below 400 tokens are dense, others sparse."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"budget": 64, "dense_below": 400}
    expected = dropped_in(llama, prompts(*LENGTHS), NEW, **settings)
    with engine(llama, own_process=True, tensor_parallel_size=2, **sparse(**settings)) as llm:
        assert [each.tokens for each in answers(llm, prompts(*LENGTHS), sampling(NEW))] == expected


def test_blocks_go_through_a_disk_with_their_index(llama: Path, tmp_path: Path):
    """A connector of vLLM stores the blocks of prompts; another engine, in another process, loads and decodes them."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    options = {"kv_transfer_config": transfer, "enable_prefix_caching": False, **sparse(budget=64)}
    asked = prompts(700, 1200)
    with engine(llama, own_process=True, max_num_batched_tokens=2048, **options) as llm:
        answers(llm, asked, sampling(1))
    assert any(tmp_path.iterdir())
    with engine(llama, max_num_batched_tokens=2048, **options) as llm:
        found = answers(llm, asked, sampling(NEW))
        assert counted(llm, "external_prefix_cache_hits") == 5 * 128 + 9 * 128
    assert [each.tokens for each in found] == dropped_in(llama, asked, NEW, budget=64)


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the backend."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = sparse(budget=64)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama), "--port", str(port)),
        *("--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "2048", "--attention-config", json.dumps(options["attention_config"])),
        *("--additional-config", json.dumps(options["additional_config"])),
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as out:
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_streams_to_a_real_client(llama: Path, server: str):
    """Also after a client that goes away in the middle."""
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    asked = prompts(900, 333)
    expected = dropped_in(llama, asked, NEW, budget=64)
    greedy = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
    with client.completions.create(prompt=asked[0], max_tokens=400, **greedy) as stream:
        next(iter(stream))
    for prompt, tokens in zip(asked, expected):
        pieces = [piece.choices[0].text for piece in client.completions.create(prompt=prompt, max_tokens=NEW, **greedy)]
        assert len(pieces) >= NEW
        assert "".join(pieces).split() == [f"w{token}" for token in tokens]
