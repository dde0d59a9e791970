"""The functions under the layers: ``cur_linear``, and its parts for a base output of your own."""

from .epilogue import cur_batched, cur_epilogue
from .linear import cur_linear

__all__ = ["cur_batched", "cur_epilogue", "cur_linear"]
