"""Places for what a file says of its base and of itself: its fingerprint and its checksum.

transformers' own loading copies a file's tensors to where it finds a place for them, and asks no
PEFT method. An adapter that waits for a file therefore has places for the two, and its layer looks
at what lies there before the first use.
"""

import torch
from torch import Tensor

from ..nn.adapter import Adapter
from ..nn.state import CHECKSUM, FINGERPRINT, check_sum, checksum, same_base, similar_base
from .config import SecuraConfig

NAMES = (FINGERPRINT, CHECKSUM)


def reserve(adapter: Adapter, config: SecuraConfig, base: Tensor) -> None:
    """Makes the places that ``config.optional_tensors`` names; zeros mean that nothing was loaded.

    Args:
        base: the base's fingerprint. With ``config.force`` none is asked for.
    """
    if FINGERPRINT in config.optional_tensors and not config.force:
        adapter.register_buffer(FINGERPRINT, torch.zeros_like(base))
    if CHECKSUM in config.optional_tensors:
        adapter.register_buffer(CHECKSUM, torch.zeros_like(checksum({})))


def present(adapter: Adapter) -> dict[str, Tensor]:
    """The places that an adapter has, by name."""
    return {name: adapter._buffers[name] for name in NAMES if name in adapter._buffers}


def settle(adapter: Adapter, base: Tensor) -> None:
    """Checks what transformers loaded into the places, and gives them up.

    Raises:
        ValueError: another base, or indices and cores that were not saved together; the places
            stay, so that the next use raises too.
    """
    found = present(adapter)
    loaded = CHECKSUM in found and bool(found[CHECKSUM].any())
    if loaded and all(p.numel() for p in adapter.parameters()):  # not partitioned by ZeRO-3
        own = {k: v for k, v in adapter.state_dict().items() if k not in NAMES}
        check_sum(own | {CHECKSUM: found[CHECKSUM]})
        if FINGERPRINT in found:
            check_base(found[FINGERPRINT], base, stored=adapter.C is not None)
    give_up(adapter)


def give_up(adapter: Adapter) -> None:
    for name in present(adapter):
        del adapter._buffers[name]


def check_base(saved: Tensor, here: Tensor, stored: bool) -> None:
    """Raises ValueError where a file was made for another base.

    Args:
        saved, here: fingerprints. stored: whether the file brings C and R: then the base may have
            been quantised since, or before.
    """
    if not (similar_base if stored else same_base)(saved, here):
        raise ValueError(
            "it was trained on another base: the layer's weight has other values; to load it all "
            "the same pass force=True to PeftModel.from_pretrained, or set it in the adapter's "
            "SecuraConfig before loading"
        )
