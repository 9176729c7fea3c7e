"""How fast this machine reads memory, measured in the run that it is compared with.

On CUDA two small kernels read and add up every word, in sequence or in chunks in random order. NVRTC compiles them
through PyTorch (``torch.cuda._compile_kernel``: private, so everything here works without it), and their sums are
checked. Otherwise, and beside them, the fastest of what plain PyTorch offers counts; a copy as read plus written.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure.harness import GB, Side, compare
from benchmarks.measure.machine import free_bytes

SIZES = {"cuda": 1 << 30, "cpu": 512 << 20}  # bytes that one measurement reads
THREADS = 256
BLOCKS_PER_SM = (4, 8, 16)

KERNELS = """
__device__ __forceinline__ unsigned int words(uint4 x) { return x.x + x.y + x.z + x.w; }

__device__ __forceinline__ void add_up(unsigned int sum, unsigned int* sums) {
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = sum;
}

extern "C" __global__ void read_sequence(const uint4* x, unsigned int* sums, int n) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned int sum = 0;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = x[i + j * stride];
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += words(v[j]);
  }
  for (; i < n; i += stride) sum += words(x[i]);
  add_up(sum, sums);
}

extern "C" __global__ void read_chunks(const uint4* x, const int* order, unsigned int* sums, int n, int per_chunk) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned int sum = 0;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const unsigned int k = (unsigned int)(i + j * stride);
      v[j] = x[(long long)order[k / per_chunk] * per_chunk + k % per_chunk];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += words(v[j]);
  }
  for (; i < n; i += stride) {
    const unsigned int k = (unsigned int)i;
    sum += words(x[(long long)order[k / per_chunk] * per_chunk + k % per_chunk]);
  }
  add_up(sum, sums);
}
"""


class Ceilings:
    """Bandwidth ceilings of one run, each measured when it is first asked for.

    Args:
        device: where.
        rounds: timed rounds of each way.
        size: bytes to read; a quarter of the free memory if that is less.
    """

    def __init__(self, device: torch.device, *, rounds: int = 15, size: int | None = None) -> None:
        self.device = device
        self.rounds = rounds
        self.size = min(size or SIZES[device.type], free_bytes(device) // 4) // 4096 * 4096
        self._sequential: dict[str, Any] | None = None
        self._chunks: dict[int, dict[str, Any]] = {}

    @property
    def sequential(self) -> dict[str, Any]:
        """GB/s of reading a large buffer from its beginning to its end: the yardstick of floors."""
        if self._sequential is None:
            self._sequential = self._measure(None)
        return self._sequential

    def chunks(self, size: int) -> dict[str, Any]:
        """GB/s of reading chunks of ``size`` bytes, a multiple of 16, in random order."""
        if size not in self._chunks:
            self._chunks[size] = self._measure(size)
        return self._chunks[size]

    def measured_chunks(self) -> dict[str, dict[str, Any]]:
        """Every chunk size asked for so far."""
        return {str(size): found for size, found in sorted(self._chunks.items())}

    def _measure(self, chunk: int | None) -> dict[str, Any]:
        generator = torch.Generator(self.device).manual_seed(0)
        source = torch.randint(
            1, 2**31 - 1, (self.size // 4,), dtype=torch.int32, device=self.device, generator=generator
        )
        sides = _sequential_ways(source) if chunk is None else _chunk_ways(source, chunk)
        found = compare(sides, self.device, rounds=self.rounds, seconds=0.05)
        for name, reason in found.failed.items():
            tqdm.write(f"bandwidth: left out {name}: {reason}", file=sys.stderr)
        rates = {name: sides[name].bytes / timing.median / GB for name, timing in found.timings.items()}
        best = max(rates, key=lambda name: rates[name])
        return {"gb_per_s": round(rates[best], 2), "way": best, "all": {name: round(r, 2) for name, r in rates.items()}}


def bandwidth(device: torch.device, *, rounds: int = 15, size: int | None = None) -> dict[str, Any]:
    """The sequential ceiling alone."""
    return Ceilings(device, rounds=rounds, size=size).sequential


def _sequential_ways(source: torch.Tensor) -> dict[str, Side]:
    size = source.numel() * source.itemsize
    floats = torch.empty(source.shape, device=source.device).copy_(source)
    target = torch.empty_like(floats)

    def copied(_: int, out: torch.Tensor) -> None:
        assert torch.equal(out, floats), "the copy differs"

    ways = {"copy": Side([lambda: target.copy_(floats)], 2 * size, copied), "sum": Side([lambda: floats.sum()], size)}
    if source.device.type == "cpu":  # one thread's sum may be bound by arithmetic
        ways["dot"] = Side([lambda: torch.dot(floats, target)], 2 * size)
        return ways
    return {**ways, **_kernel_ways("read_sequence", source, None, size)}


def _chunk_ways(source: torch.Tensor, chunk: int) -> dict[str, Side]:
    if chunk % 16 or not 0 < chunk <= source.numel() * source.itemsize:
        raise ValueError(f"chunk: expected a multiple of 16 bytes up to the size of the buffer, got {chunk}")
    chunks = source[: source.numel() * 4 // chunk * chunk // 4].view(-1, chunk // 4)
    generator = torch.Generator(source.device).manual_seed(0)
    order = torch.randperm(len(chunks), generator=generator, device=source.device).to(torch.int32)
    size = chunks.numel() * chunks.itemsize
    target = torch.empty_like(chunks)

    def gathered(_: int, out: torch.Tensor) -> None:
        some = torch.arange(0, len(chunks), max(1, len(chunks) // 64), device=source.device)
        assert torch.equal(out[some], chunks[order[some].long()]), "wrong chunks were read"

    ways = {"gather": Side([lambda: torch.index_select(chunks, 0, order, out=target)], 2 * size, gathered)}
    if source.device.type == "cpu":
        return ways
    return {**ways, **_kernel_ways("read_chunks", chunks, order, size)}


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    return torch.cuda._compile_kernel(KERNELS, name)


def _kernel_ways(name: str, source: torch.Tensor, order: torch.Tensor | None, size: int) -> dict[str, Side]:
    """Our kernels with several grid sizes; none where PyTorch cannot compile them."""
    try:
        kernel = _kernel(name)
    except Exception as error:  # whatever a private function of another version does
        tqdm.write(f"bandwidth: left out {name}: {str(error)[:300]}", file=sys.stderr)
        return {}
    device = source.device
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    expected = int(source.sum(dtype=torch.int64)) % 2**32
    vectors = source.numel() // 4

    def read(blocks: int, sums: torch.Tensor) -> torch.Tensor:
        inputs = [source, sums, vectors] if order is None else [source, order, sums, vectors, source.shape[1] // 4]
        kernel(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=inputs)
        return sums

    def check(_: int, sums: torch.Tensor) -> None:
        found = int(sums.sum(dtype=torch.int64)) % 2**32
        assert found == expected, f"{name} added up {found} instead of {expected}"

    ways: dict[str, Side] = {}
    for factor in BLOCKS_PER_SM:
        blocks = factor * multiprocessors
        sums = torch.zeros(blocks * THREADS // 32, dtype=torch.int32, device=device)  # one for each warp
        call: Callable[[], torch.Tensor] = partial(read, blocks, sums)
        ways[f"{name}_{factor}"] = Side([call], size, check)
    return ways
