"""The saved tensors that an adapter has only once bases are stored or a stage has been taken."""

import torch
from torch import Tensor

GATES = ("gate", "gate_past")  # wide in every dtype


class OptionalTensors:
    """The part of ``Adapter`` that makes room for them when a state is loaded, and notices that
    what derives from the indices is out of date (``stale``)."""

    def optional_groups(self) -> list[dict[str, tuple[int | None, ...]]]:
        """Names and shapes of saved tensors that exist only once bases are stored or calibrated or
        a stage has been taken; those of a group exist together. A size of None is any."""
        stack, r, N, K = self.stack, self.r, self.out_features, self.in_features
        square = (*stack, r, r)
        calibrated = {
            "whitened": [{"fold_c": square, "fold_r": square, "unit": stack}],
            "natural": [
                {"unit": ()},
                {"C_past": (N, None), "R_past": (None, K)},
                {"gate": (r, 2)},
                {"gate_past": (None, 2)},
            ],
        }
        return [{"C": (*stack, N, r), "R": (*stack, r, K)}, *calibrated.get(self.basis, [])]

    def optional_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {name: shape for group in self.optional_groups() for name, shape in group.items()}

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("cols", "rows") and "shared_key" in self.__dict__:
            self.stale = True  # transformers sets a file's tensors one by one
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self._absent_last()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._absent_last()

    def _absent_last(self) -> None:
        """Keeps the buffers that are None behind the others: torch.export numbers those of a root
        module as if none were None (torch 2.13)."""
        buffers = self._buffers
        absent = [name for name, value in buffers.items() if value is None]
        if list(buffers)[len(buffers) - len(absent) :] != absent:
            buffers |= {name: buffers.pop(name) for name in absent}

    def _apply(self, fn, recurse: bool = True) -> "OptionalTensors":
        before = self.cols.device, self.core_parameter().dtype
        names = ("fold_c", "fold_r") if self.basis == "whitened" else GATES
        wide = {name: value for name in names if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, value in wide.items():
            if not value.is_meta:  # wide in every dtype: nothing could derive them again
                setattr(self, name, value.to(getattr(self, name).device))
        if before != (self.cols.device, self.core_parameter().dtype):
            self.stale = True  # what is derived has been rounded too
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if "cols" in found:  # a whole state; a few trained tensors alone leave the others
            self._make_room(found)
            self.stale = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def reserve(self, names: list[str], weight: Tensor) -> None:
        """Gives optional tensors values that change nothing, to be replaced by those of a file:
        C and R of W, or zeros where they would cost an SVD.

        Args:
            names: of ``optional_shapes``, as ``optional_name`` writes them; others are left out.
        """
        sizes = dict(name.split("*") for name in names if "*" in name)
        names = {name.split("*")[0] for name in names}
        for name, shape in self.optional_shapes().items():
            if name in ("C", "R") and name in names and not self.awaits_C_and_R():
                self.untie(weight)
            elif name in names:
                shape = [int(sizes.get(name, 1)) * self.r if n is None else n for n in shape]
                dtype = weight.dtype if name in ("C", "R") else self.core_parameter().dtype
                dtype = torch.float32 if name in GATES else dtype
                setattr(self, name, torch.zeros(shape, dtype=dtype, device=self.cols.device))
            self.stale = self.stale or name in names

    def optional_name(self, name: str) -> str:
        """``name``, and how many times r the size is that its shape leaves open."""
        shape = self.optional_shapes().get(name, ())
        if None not in shape:
            return name
        return f"{name}*{getattr(self, name).shape[shape.index(None)] // self.r}"

    def _make_room(self, found: dict[str, Tensor]) -> None:
        """For the tensors that only stored bases and stages bring."""
        trained = self.core_parameter()
        for name, shape in self.optional_shapes().items():
            if name not in found:
                setattr(self, name, None)
                continue
            # C and R are cast to the weight's dtype by ``derive``.
            as_found = name[0] in "CR" or name in GATES
            dtype = found[name].dtype if as_found else trained.dtype
            shape = [
                own if n is None else n for n, own in zip(shape, found[name].shape, strict=True)
            ]
            setattr(self, name, torch.empty(shape, dtype=dtype, device=trained.device))
