"""Capturing work for a CUDA device in a graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class CannotCaptureError(RuntimeError):
    """The work waits for the device or copies from the host."""


@contextmanager
def beside(device: torch.device) -> Iterator[Any]:
    """Work on a stream of its own, after all work so far and before all that follows; yields the stream."""
    with torch.cuda.device(device), _autocast_without_cache():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream().wait_stream(stream)


def record(run: Callable[[], T], pool: Any = None) -> tuple[Any, T]:
    """A graph of what ``run`` does on the current stream, and what it returned: places that a replay writes to.

    Other threads may go on to use the device meanwhile.

    Args:
        run: has run before, so that libraries have set up what they do in their first calls.
        pool: of memory, shared with other graphs of which no two run at once.

    Raises:
        CannotCaptureError: a graph cannot hold it.
    """
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # what it frees may need calls that are not allowed meanwhile
    try:
        graph.capture_begin(torch.cuda.graph_pool_handle() if pool is None else pool, "thread_local")
        try:
            made = run()
        except BaseException:
            with suppress(RuntimeError):  # which says again that the capture failed
                graph.capture_end()
            raise
        graph.capture_end()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CannotCaptureError(str(_first(error)).splitlines()[0]) from error
    finally:
        if collecting:
            gc.enable()
    return graph, made


def _first(error: BaseException) -> BaseException:
    while error.__context__ is not None:  # the end of a failed capture raises too
        error = error.__context__
    return error


def _autocast_without_cache() -> AbstractContextManager[Any]:
    """Autocast as it is, but for its cache of cast weights, which would be gone when a captured step is replayed."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False)
