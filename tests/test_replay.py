"""What is timed in a CUDA graph, on a GPU that is played; ``test_gpu.py`` has a real one."""

import gc
from contextlib import contextmanager

import pytest
import torch

from secura_kernels.tools import replay


class PlayedGPU:
    """Streams and one capture at a time. ``log``: what was done on which stream."""

    def __init__(self) -> None:
        self.current, self.capturing, self.log = "default", None, []
        self.handles, self.pools, self.spoilt = 0, set(), set()

    def current_stream(self):
        return PlayedStream(self, "default")

    def Stream(self):
        return PlayedStream(self, "side")

    def CUDAGraph(self):
        return PlayedGraph(self)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self):
        self.handles += 1
        return f"pool {self.handles}"

    @contextmanager
    def graph(self, graph, pool, stream):
        if pool in self.spoilt:
            raise RuntimeError("already recording to mempool_id")
        self.pools.add(pool)
        self.current, self.capturing = stream.name, graph
        yield  # as PyTorch's, which leaves its stream only where the capture ends well
        self.capturing = None
        if graph.invalid:
            self.spoilt.add(pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = stream.name

    def work(self, name: str) -> None:
        """A launch."""
        if self.capturing is not None:
            self.capturing.work.append(name)
        self.log.append((self.current, "captured" if self.capturing else "run", name))

    def synchronise(self) -> None:
        if self.capturing is not None:
            self.capturing.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing\nand more")


class PlayedStream:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def wait_stream(self, other):
        self.gpu.log.append((self.name, "waits for", other.name))

    def synchronize(self):
        pass


class PlayedGraph:
    def __init__(self, gpu):
        self.gpu, self.work, self.invalid = gpu, [], False

    def replay(self):
        self.gpu.log += [(self.gpu.current, "replayed", name) for name in self.work]


@pytest.fixture
def gpu(monkeypatch):
    played = PlayedGPU()
    for name in (
        "graph_pool_handle",
        "current_stream",
        "Stream",
        "CUDAGraph",
        "stream",
        "graph",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(played, name))
    return played


def test_a_call_is_captured_once_warm_and_replayed_without_it(gpu):
    collected = []

    def function():
        collected.append(gc.isenabled())
        gpu.work("pass")
        return len(collected)

    run, result = replay.Recorder().capture(function)
    assert gpu.log == [
        ("side", "waits for", "default"),
        *[("side", "run", "pass")] * replay.WARM_UP,
        ("side", "captured", "pass"),
        ("default", "waits for", "side"),
    ]
    # Nothing may be finalised during the capture; before and afterwards it is as it was.
    assert collected == [True] * replay.WARM_UP + [False] and gc.isenabled()
    assert result == replay.WARM_UP + 1
    gpu.log.clear()
    run()
    assert gpu.log == [("default", "replayed", "pass")] and len(collected) == result


def test_graphs_of_a_recorder_share_their_memory(gpu):
    recorder = replay.Recorder()
    for _ in range(2):
        recorder.capture(lambda: gpu.work("pass"))
    assert gpu.pools == {"pool 1"} and len(recorder.graphs) == 2


def test_what_cannot_be_captured_says_why_and_leaves_the_stream(gpu):
    recorder = replay.Recorder()
    with pytest.raises(replay.NotCaptured, match=r"^not captured: operation not permitted.*ing$"):
        recorder.capture(gpu.synchronise)
    assert gpu.current == "default" and gc.isenabled()
    recorder.capture(lambda: gpu.work("pass"))[0]()  # PyTorch refuses the first one's pool
    assert gpu.log[-1] == ("default", "replayed", "pass")


def test_what_fails_by_itself_is_no_fault_of_the_capture(gpu):
    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory") as raised:
        replay.Recorder().capture(broken)
    assert not isinstance(raised.value, replay.NotCaptured) and gpu.current == "default"


def test_the_replay_is_what_is_timed(gpu, monkeypatch):
    def do_bench(function, warmup, rep, return_mode):
        gpu.log.clear()
        function()
        assert (warmup, rep, return_mode) == (10, 50, "median")
        return 1.5

    monkeypatch.setattr(replay.triton.testing, "do_bench", do_bench)
    assert replay.replayed_ms(lambda: gpu.work("pass"), rep=50) == 1.5
    assert gpu.log == [("default", "replayed", "pass")]
