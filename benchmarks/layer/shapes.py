"""What is measured: linear layers of known models by name, tokens, ranks, dtypes."""

from dataclasses import asdict, dataclass

import torch

# (out_features, in_features); layers of one shape stand once, under the first name.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "llama-3.1-8b": {
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "gate_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    },
    # One of 8 GPUs' slices: projections in by rows, out by columns.
    "llama-3-70b-tp8": {
        "q_proj": (1024, 8192),
        "k_proj": (128, 8192),
        "o_proj": (8192, 1024),
        "gate_proj": (3584, 8192),
        "down_proj": (8192, 3584),
    },
    "qwen2-1.5b": {
        "q_proj": (1536, 1536),
        "k_proj": (256, 1536),
        "gate_proj": (8960, 1536),
        "down_proj": (1536, 8960),
    },
    "qwen2-7b": {
        "q_proj": (3584, 3584),
        "k_proj": (512, 3584),
        "gate_proj": (18944, 3584),
        "down_proj": (3584, 18944),
    },
    "gemma-2-2b": {
        "q_proj": (2048, 2304),
        "k_proj": (1024, 2304),
        "o_proj": (2304, 2048),
        "gate_proj": (9216, 2304),
        "down_proj": (2304, 9216),
    },
    "gpt2-large": {
        "c_attn": (3840, 1280),
        "attn.c_proj": (1280, 1280),
        "c_fc": (5120, 1280),
        "mlp.c_proj": (1280, 5120),
    },
    # The bars' own sizes.
    "square": {"4096": (4096, 4096), "8192": (8192, 8192), "1536": (1536, 1536)},
}
TOKENS = (1, 16, 64, 512, 2048, 8192, 16384)
RANKS = (8, 16, 64, 150, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One layer of a model at a number of tokens M, a rank and a dtype."""

    model: str
    layer: str
    M: int
    r: int
    dtype: str

    @property
    def N(self) -> int:
        return LAYERS[self.model][self.layer][0]

    @property
    def K(self) -> int:
        return LAYERS[self.model][self.layer][1]

    @property
    def flops(self) -> int:
        """Of the base product forward and its input gradient."""
        return 4 * self.M * self.N * self.K

    def to_dict(self) -> dict:
        return asdict(self) | dict(N=self.N, K=self.K)


def select(
    models: list[str],
    layers: list[str] | None,
    tokens: list[int],
    ranks: list[int],
    dtypes: list[str],
) -> list[Case]:
    """Every combination; a rank above min(N, K) is left out, as no layer can have it.

    Raises:
        ValueError: no such layer in any of the models.
    """
    unknown = set(layers or ()) - {name for model in models for name in LAYERS[model]}
    if unknown:
        have = {model: sorted(LAYERS[model]) for model in models}
        raise ValueError(f"layers={sorted(unknown)} is not allowed: the models have {have}")
    return [
        Case(model, layer, M, r, dtype)
        for model in models
        for layer in LAYERS[model]
        if not layers or layer in layers
        for M in tokens
        for dtype in dtypes
        for r in ranks
        if r <= min(LAYERS[model][layer])
    ]
