"""Which adapter each token of a batch of packed sequences has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import fail


@dataclass(frozen=True)
class AdaptersByToken:
    """For ``adapter_names``, where a row of the batch holds several sequences (packing).

    ``model(input_ids, position_ids=..., adapter_names=AdaptersByToken(["law", "code"], segments))``
    runs the tokens where ``segments`` is 0 with adapter "law", those where it is 1 with "code".

    Args:
        names: of each sequence's adapter; a name may come again, "__base__" stands for none.
        segments: (B, S), any integer dtype: the number of each token's sequence in ``names``, or -1
            for a token without an adapter (padding). transformers' ``DataCollatorWithFlattening``
            makes it of its sequences (``return_seq_idx=True``).

    Raises:
        TypeError: names that are no list of strings. ValueError: segments of another kind or shape,
            or with a number out of range; on a GPU that is a device-side assertion, which does not
            wait for the GPU and is seen at a later synchronisation.
    """

    names: Sequence[str]
    segments: Tensor
    _found: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.names, list | tuple) or not all(
            isinstance(name, str) for name in self.names
        ):
            raise TypeError(f"names is {self.names!r}: it must be a list of adapters' names")
        segments = self.segments
        if (
            not isinstance(segments, Tensor)
            or segments.ndim != 2
            or segments.is_floating_point()
            or segments.dtype == torch.bool
        ):
            given = (
                f"{segments.dtype} {tuple(segments.shape)}"
                if isinstance(segments, Tensor)
                else type(segments).__name__
            )
            raise fail("segments", given, "an integer tensor (B, S)")
        allowed = f"in [-1, {len(self.names)}), numbers of names and -1 for none"
        inside = ((segments >= -1) & (segments < len(self.names))).all()
        if segments.is_cuda:
            torch._assert_async(inside, f"segments is not allowed: it must be {allowed}")
        elif not inside:
            raise fail("segments", [int(segments.min()), int(segments.max())], f"all {allowed}")

    def __iter__(self) -> Iterator[str]:
        """Of the names: PEFT looks through ``adapter_names`` itself."""
        return iter(self.names)

    def check_tokens(self, x: Tensor) -> None:
        """Raises ValueError unless x (B, S, K), or (B S, K), has these tokens."""
        shape = tuple(self.segments.shape)
        if tuple(x.shape[:-1]) not in (shape, (self.segments.numel(),)):
            raise ValueError(
                f"adapter_names are of tokens {shape}, and a layer got an input "
                f"{tuple(x.shape)}: a layer that sees other tokens (generate, a pooled head) takes "
                "a list with the name of each sample's adapter"
            )

    def ids(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """(B S,) int64: ``numbers[i]`` where a token's sequence is i; -1 for none. Kept, since
        every layer asks for the same."""
        key = numbers, device
        if key not in self._found:
            with torch.inference_mode(False):  # a later call may want gradients
                table = torch.tensor([*numbers, -1], device=device)  # at -1: the last
                self._found[key] = table[self.segments.to(device).flatten().long()]
        return self._found[key]

    def rows(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """The tokens whose number is not negative; this waits for the device, once a batch."""
        key = "rows", numbers, device
        if key not in self._found:
            with torch.inference_mode(False):
                self._found[key] = (self.ids(numbers, device) >= 0).nonzero().squeeze(1)
        return self._found[key]
