"""``SecuraConfig``: every setting of a SECURA or CURLoRA adapter in PEFT, as JSON values."""

import os
import re
from dataclasses import dataclass, field, fields

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from ..bases import BASES
from ..checks import check_choice, check_int, check_number, fail
from ..nn.cores import A_INITS
from ..ops import IMPLS
from ..selection import RULES
from ..settings import ImportanceDecay, SMagNorm

VARIANTS = ("secura", "curlora")


def check_whole(path: str | os.PathLike) -> None:
    """Raises ValueError for a safetensors file that is empty or truncated: its head says how long
    it is. A file that is not there passes."""
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


@dataclass
class SecuraConfig(PeftConfig):
    """Settings for ``get_peft_model(model, SecuraConfig(...))``.

    Args:
        variant: ``"curlora"`` (core = U; arXiv 2408.14572) or ``"secura"`` (core = A^T B^T, a bias;
            arXiv 2502.18168, whose gate is ``norm="published"``).
        r: columns and rows of W chosen in each layer; at most min(N, K).
        m: inner size of SECURA's A (m, r), B (r, m), r < m <= K; None: a third more than r.
        alpha: scale of the change.
        target_modules: ``"all-linear"``, which forgets least, names, or a regular expression; None:
            the model type's usual ones. exclude_modules, layers_to_transform (with names in a
            list), layers_pattern, modules_to_save: as in PEFT's ``LoraConfig``.
        target_parameters: stacked weights of experts, (E, N, K), by name, as
            ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``: each expert gets a core and
            columns and rows of its own. Beside ``target_modules``, which may be ``[]``.
        rank_pattern: r of single layers, by a layer's name or a regular expression.
        selection: ``"lowest"`` (SECURA's default), ``"inverted"`` (CURLoRA's) or ``"highest"``;
            None with the svd basis, which takes no columns and rows.
        seed: of ``"inverted"``, together with the layer's name: two adapters of one seed, rule and
            r share their indices.
        basis: ``"orthonormal"``: the core lives between orthonormal bases of the chosen columns and
            rows; ``"whitened"``: measured by what general text needs of them, after
            ``secura_kernels.calibrate(model)``; ``"natural"``: between directions of their own, in
            which a task is learned most for what general text needs, after
            ``calibrate(model, task=batches)``; ``"svd"``: between W's leading singular directions,
            as LoRA-XS (arXiv 2405.17604); or ``"raw"`` as published, which is far worse
            conditioned.
        norm: None for no gate, which forgets less than one; a preset's name, or a dict of
            ``SMagNorm``'s fields.
        norm_domain: ``"output"`` or ``"weight"``; None: the one of ``norm``.
        a_init: start of SECURA's A, ``"published"`` or ``"truncated_svd"``.
        adapter_bias: train a bias that is part of the change; None: SECURA's only, as published.
        importance_decay: True, a dict of ``ImportanceDecay``'s fields, or None for none.
        impl: the backend, ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
        save_projection: write C and R into the adapter's file, so that it can be loaded on a base
            that has been quantised since; False: the indices only, but for bases that are of no
            columns and rows (natural, svd). A fingerprint of the base is
            written in both forms, and checked when loading: to the bit without C and R, with them
            as nearly as quantising to 4 bits leaves it.
        optional_tensors: written when saving, not by hand: which tensors the file has beyond those
            of a new adapter. transformers loads only what it finds a place for.

    ``force`` is no field, and never saved: ``PeftModel.from_pretrained(model, path, force=True)``
    or ``SecuraConfig.from_pretrained(path, force=True)`` says that a file may be loaded on a base
    of other values.

    Raises:
        ValueError: a value outside these.
    """

    force = False
    from_file = False

    variant: str = "curlora"
    r: int = 64
    m: int | None = None
    alpha: float = 1.0
    target_modules: set[str] | list[str] | str | None = "all-linear"
    exclude_modules: set[str] | list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    selection: str | None = None
    seed: int = 0
    basis: str = "orthonormal"
    norm: SMagNorm | str | dict | None = None
    norm_domain: str | None = None
    a_init: str = "published"
    adapter_bias: bool | None = None
    importance_decay: dict | bool | None = None
    impl: str = "auto"
    save_projection: bool = True
    optional_tensors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SECURA
        secura = check_choice("variant", self.variant, VARIANTS) == "secura"
        check_int("r", self.r, 1, 2**31)
        if self.rank_pattern is None:
            self.rank_pattern = {}
        if not isinstance(self.rank_pattern, dict):
            raise fail("rank_pattern", self.rank_pattern, "a dict of r by layer name")
        for name, r in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", r, 1, 2**31)
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise fail(
                    "rank_pattern", name, f"a layer's name or a regular expression: {error}"
                ) from None
        if self.m is not None:
            if not secura:
                raise fail("m", self.m, "None with variant='curlora', which has no A and B")
            check_int("m", self.m, self.r + 1, 2**31, f", above r={self.r}")
        check_number("alpha", self.alpha, "a finite number", -float("inf"))
        check_int("seed", self.seed, 0, 2**63 - 1)
        if check_choice("basis", self.basis, BASES) == "svd":
            if self.selection is not None:
                raise fail(
                    "selection",
                    self.selection,
                    "None with basis='svd', which takes no columns and rows of W",
                )
        elif self.selection is None:
            self.selection = "lowest" if secura else "inverted"
        check_choice("selection", self.selection, (None, *RULES))
        check_choice("a_init", self.a_init, A_INITS)
        check_choice("impl", self.impl, IMPLS)
        check_choice("save_projection", self.save_projection, (True, False))
        if self.adapter_bias is None:
            self.adapter_bias = secura
        check_choice("adapter_bias", self.adapter_bias, (None, True, False))
        if self.adapter_bias and not secura:
            raise fail("adapter_bias", self.adapter_bias, "False with variant='curlora'")
        if isinstance(self.norm, SMagNorm):
            self.norm = self.norm.to_dict()
        self.norm_settings()
        if self.importance_decay is True:
            self.importance_decay = {}
        if self.importance_decay is False:
            self.importance_decay = None
        self.decay_settings()
        if self.target_parameters is not None:
            self._check_target_parameters(self.target_parameters)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise fail("layers_pattern", self.layers_pattern, "None without layers_to_transform")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise fail(
                "layers_to_transform",
                self.layers_to_transform,
                "None with target_modules as a string, as 'all-linear' by default, which "
                "PEFT matches alone: name the modules in a list",
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        *,
        force: bool = False,
        **kwargs,
    ) -> "SecuraConfig":
        """The settings in an adapter's folder, as PEFT reads them.

        Args:
            force: let the adapter's tensors be loaded on a base of other values too.

        Raises:
            ValueError: no such folder; settings outside those of the class; an adapter's file in
                the folder that is empty or truncated, with its path.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        check_whole(
            os.path.join(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        )
        config.force = check_choice("force", force, (True, False))
        config.from_file = True
        return config

    def _check_target_parameters(self, names: list[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise fail("target_parameters", names, "None or a list of names of parameters")
        if names and self.impl not in ("auto", "reference"):
            raise fail(
                "impl",
                self.impl,
                "'auto' or 'reference' with target_parameters, whose products are torch's own",
            )
        self.target_parameters = sorted(names)

    def norm_settings(self) -> SMagNorm | None:
        """The gate's settings, or None."""
        norm = SMagNorm.of(self.norm)
        check_choice("norm_domain", self.norm_domain, (None, "output", "weight"))
        if self.norm_domain is None:
            return norm
        if norm is None:
            raise fail("norm_domain", self.norm_domain, "None without a norm")
        return SMagNorm.of(norm.to_dict() | dict(domain=self.norm_domain))

    def decay_settings(self) -> ImportanceDecay | None:
        """The importance decay's settings, or None."""
        if self.importance_decay is None:
            return None
        names = [f.name for f in fields(ImportanceDecay)]
        if not isinstance(self.importance_decay, dict) or set(self.importance_decay) - set(names):
            raise fail(
                "importance_decay",
                self.importance_decay,
                f"True, None or a dict with keys among {names}",
            )
        if self.norm is None:
            raise fail(
                "importance_decay",
                self.importance_decay,
                "None without a norm, whose gate it counts",
            )
        return ImportanceDecay(**self.importance_decay)

    def adapter_settings(self) -> dict:
        """Keyword arguments of ``CURLoRAAdapter`` or ``SECURAAdapter``."""
        settings = dict(
            alpha=self.alpha,
            basis=self.basis,
            norm=self.norm_settings(),
            importance_decay=self.decay_settings(),
        )
        if self.variant == "secura":
            settings |= dict(m=self.m, a_init=self.a_init, adapter_bias=self.adapter_bias)
        return settings
