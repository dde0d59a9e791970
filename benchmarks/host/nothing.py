"""Triton with a driver that compiles for a chip and launches nothing, so that CPU tensors will do.

What is left of a launch is what the host does: binding arguments, looking up the compiled kernel,
and the call of the launcher itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from secura_kernels.backends.triton import chips


class NothingDriver:
    """As much of Triton's driver as ``JITFunction.run`` asks for."""

    def __init__(self, chip: int) -> None:
        self.target, self.launches = GPUTarget("cuda", chip, 32), 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 0, 0, 1024),
            get_device_properties=lambda _: dict(max_shared_mem=chips.CHIPS[chip].shared_memory),
        )

    def launcher_cls(self, src, metadata):
        def run(*_):
            self.launches += 1

        return run

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


@contextmanager
def launching_nothing(chip: int) -> Iterator[NothingDriver]:
    """``impl="triton"`` runs on CPU tensors with ``chip``'s tiles; outputs stay uninitialised."""
    found, before = NothingDriver(chip), driver._active
    driver.set_active(found)
    try:
        with chips.pretend(chip), mock.patch("secura_kernels.backends.triton.INTERPRETED", True):
            yield found
    finally:
        driver._active = before
