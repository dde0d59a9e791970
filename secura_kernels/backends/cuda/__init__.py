"""The hand-written CUDA kernels (csrc/): the next choice of ``impl="auto"`` after Triton.

``linear``, ``weight`` and ``epilogue`` have the functions of the modules of those names in
``reference``. The kernels are compiled by ``build()`` on a machine with a GPU and the CUDA
toolkit, or when the package is installed with SECURA_BUILD_CUDA=1; nothing is compiled unasked.
"""

from ..schedule import Epilogue, Linear, Weight
from . import passes
from .library import build, load, why_unavailable

__all__ = ["build", "load", "why_unavailable"]

linear, epilogue, weight = Linear(passes), Epilogue(passes), Weight(passes)
