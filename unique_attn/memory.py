"""Tensors that grow in place: address space is reserved once, memory comes behind it piece by piece."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SPACE = 2**46  # bytes of addresses that all tensors share: half of what a process has
_unfinished: list[_Addresses] = []  # to be given back as soon as that is possible
# Bytes of addresses by the first one. No lock: ranges may end wherever garbage is collected.
_reserved: dict[int, int] = {}


class _Addresses:
    """A range of addresses of a CUDA device, the first ``backed`` bytes of which have memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        while _unfinished:
            _unfinished.pop().close()
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.backed = 0
        with torch.cuda.device(self.device):
            torch.cuda.current_stream()  # there is a context now
            found = torch.ops.unique_attn._reserve_addresses(index, num_bytes)
            if found[0] == 0:  # caches that nobody uses any more may wait for the garbage collector
                gc.collect()
                found = torch.ops.unique_attn._reserve_addresses(index, num_bytes)
            if found[0] == 0:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: no {num_bytes / 2**30:.1f} GiB of addresses left on {self.device}, where the "
                    "pages of a cache could grow"
                )
        self.address, self.num_bytes, self.granularity = found
        _reserved[self.address] = self.num_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def back(self, num_bytes: int) -> None:
        """Have memory behind the first ``num_bytes``, at least."""
        missing = -(-num_bytes // self.granularity) * self.granularity - self.backed
        if missing <= 0:
            return
        place = (self.device.index, self.address + self.backed, missing)
        with torch.cuda.device(self.device):
            if not torch.ops.unique_attn._back_addresses(*place):
                gc.collect()  # caches that nobody uses any more
                torch.cuda.empty_cache()  # memory that torch keeps for tensors to come
                if not torch.ops.unique_attn._back_addresses(*place):
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory: pages of a cache need {missing / 2**20:.0f} MiB more on {self.device}"
                    )
        self.backed += missing

    def unback(self) -> None:
        """Give the memory back, once the device is done with it."""
        if self.backed:
            torch.cuda.synchronize(self.device)
            torch.ops.unique_attn._unback_addresses(self.address, self.backed)
            self.backed = 0

    def close(self) -> None:
        self.unback()
        _reserved.pop(self.address, None)
        torch.ops.unique_attn._free_addresses(self.address, self.num_bytes)

    def __del__(self) -> None:
        if not hasattr(self, "address") or sys.is_finalizing():
            return
        if torch.cuda.is_current_stream_capturing():
            _unfinished.append(self)
        else:
            self.close()


class GrowingTensor:
    """A tensor ``[capacity, *shape]`` of which only the first :attr:`rows` rows may be used.

    On CUDA the others are addresses without memory, which :meth:`grow` maps: nothing moves or is copied, whatever is
    captured in a graph stays valid, and no other stream has to be waited for. Such memory is not that of torch's
    allocator (``torch.cuda.memory_allocated`` does not count it). Elsewhere it is a tensor like any other, whose pages
    the operating system provides as they are written to.

    Args:
        rows: to begin with, at least 1.
        capacity: most rows that there can be.
        shape: of a row.
        dtype: of the elements.
        device: where.

    Raises:
        torch.OutOfMemoryError: no memory for ``rows``.
    """

    def __init__(
        self, rows: int, capacity: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = 0
        self.capacity = capacity
        self._row_bytes = math.prod(shape) * dtype.itemsize
        self._addresses: _Addresses | None = None
        with torch.inference_mode(False):  # the tensor may outlive the inference mode it began in
            if device.type == "cuda":
                num_bytes = capacity * self._row_bytes
                self._addresses = _Addresses(num_bytes, device)
                self.grow(rows)
                flat = torch.as_tensor(self._addresses, device=self._addresses.device)[:num_bytes]
                self.tensor = flat.view(dtype).view(capacity, *shape)
            else:
                self.tensor = torch.empty((capacity, *shape), dtype=dtype, device=device)
                self.rows = rows

    @classmethod
    def around(cls, tensor: Tensor) -> GrowingTensor:
        """A tensor that is there already, all of it."""
        made = cls.__new__(cls)
        made.rows = made.capacity = tensor.shape[0]
        made._row_bytes, made._addresses, made.tensor = 0, None, tensor
        return made

    def grow(self, rows: int) -> None:
        """Have at least ``rows`` rows; what was in the first ones stays.

        Raises:
            ValueError: more than the capacity.
            torch.OutOfMemoryError: no memory for them.
        """
        if rows > self.capacity:
            raise ValueError(f"rows: expected at most {self.capacity}, got {rows}")
        if self._addresses is not None:
            self._addresses.back(rows * self._row_bytes)
        self.rows = max(self.rows, rows)

    def trim(self) -> None:
        """Give the memory of all rows back; the addresses stay."""
        if self._addresses is not None:
            self._addresses.unback()
        self.rows = 0


def capacity_for(rows: int, row_bytes: int, device: torch.device) -> int:
    """Rows for which a :class:`GrowingTensor` that begins with ``rows`` should have room.

    On CUDA, what fills an eighth of the device: a layer's keys are less than that, and addresses cost little. They are
    not without end: with dozens of large caches at once, a tensor gets a part of what is left. One that outgrows its
    capacity is copied.
    """
    if device.type != "cuda":
        return 2 * rows
    total = torch.cuda.get_device_properties(device).total_memory
    return max(2 * rows, room(total, sum([*_reserved.values()])) // row_bytes)


def room(total_memory: int, reserved: int) -> int:
    """Bytes of addresses for one more tensor on a device of so much memory, where so many are reserved."""
    return min(total_memory // 8, max(0, SPACE - reserved) // 2048)
