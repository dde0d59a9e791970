"""Times of short GPU work. It is replayed from a CUDA graph, since a launch takes the host longer
than many a pass takes the GPU."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
import triton

Result = TypeVar("Result")

# What running something may raise that says nothing about what is measured beside it.
FAILURES = (RuntimeError, triton.TritonError)
WARM_UP = 2


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class NotCaptured(RuntimeError):
    """A function that runs, but not while it is captured."""


class Recorder:
    """Captures functions into CUDA graphs of the current device, one after the other.

    The graphs share their memory, so one may be replayed at a time, and what a function returned
    holds its values until the next replay or capture.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []  # while one lives the memory is theirs

    def capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """The replay of ``function()``, and what it returned while it was captured.

        It runs WARM_UP times before, on the stream that captures: what it compiles, or allocates
        once, is there then.

        Raises:
            NotCaptured: it synchronises, say. FAILURES: what it raises by itself.
        """
        graph, failed = torch.cuda.CUDAGraph(), None
        self.graphs.append(graph)
        self.stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        # The outer context leaves the stream even where the end of a capture raises.
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                function()
            self.stream.synchronize()
            gc.disable()  # a kernel that it finds unused unloads its code, which ends a capture
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    try:
                        result = function()
                    except FAILURES as error:
                        failed = error
            except FAILURES as error:  # the end of a capture that failed, which says no more
                failed = failed or error
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream().wait_stream(self.stream)
        if failed is not None:
            # PyTorch takes the pool for one that is still recorded to.
            self.pool = torch.cuda.graph_pool_handle()
            raise NotCaptured(f"not captured: {first_line(failed)}") from failed
        return graph.replay, result


def replayed_ms(function: Callable[[], object], warmup: int = 10, rep: int = 40) -> float:
    """Median milliseconds of a replay; the L2 is flushed before each.

    Args:
        warmup, rep: milliseconds, as of ``triton.testing.do_bench``.

    Raises:
        As ``Recorder.capture``.
    """
    replay, _ = Recorder().capture(function)
    return triton.testing.do_bench(replay, warmup=warmup, rep=rep, return_mode="median")
