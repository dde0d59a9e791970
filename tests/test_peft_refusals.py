"""What PEFT's injection refuses leaves the model what it was; what each refusal says."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import (
    CURLORA,
    GATED,
    QV,
    assert_same_state,
    layers,
    llama,
    logits,
    mlp,
    peft,
    state,
    tokens,
)
from torch import nn

from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.peft import SecuraConfig, layer

# q_proj has 32 rows and is met first, v_proj has 16.
TOO_LARGE = GATED | dict(r=20, m=None, target_modules=QV)


def everything(model):
    """The very modules, what they hold, and what trains."""

    def described(value):
        if isinstance(value, dict):
            return [(k, described(v)) for k, v in value.items()]
        return list(value) if isinstance(value, list | set) else id(value)

    return (
        [(name, id(m), described(vars(m))) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    )


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (TOO_LARGE, ValueError, "layer 'model.layers.0.self_attn.v_proj': r=20 is not allowed"),
        (GATED | dict(target_modules=["q_proj", "embed_tokens"]), TypeError, "matches a Embedding"),
        (GATED | dict(target_modules=[*QV, "norm"]), TypeError, "matches a LlamaRMSNorm"),
        (GATED | dict(target_modules=["nowhere"]), ValueError, "not found in the base model"),
        (
            GATED | dict(target_modules=QV, rank_pattern=dict(nowhere=2)),
            ValueError,
            r"rank_pattern=\['nowhere'\] is not allowed.*'model.layers.0.self_attn.q_proj'",
        ),
        (GATED | dict(target_modules=QV, m=40), ValueError, "m=40 is not allowed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["get_peft_model", "transformers"])
def test_a_refusal_leaves_the_model_as_it_was(settings, error, message, how):
    model = llama()
    model.lm_head.requires_grad_(False)
    before, expected = everything(model), logits(model, tokens())
    config = SecuraConfig(**settings)
    chosen = copy.deepcopy(vars(config))
    for _ in range(2):  # a second try says the same
        with pytest.raises(error, match=message), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", ".*rank_pattern.*")  # PEFT's own, before ours
            if how == "transformers":
                model.add_adapter(config, "task")
            else:
                get_peft_model(model, config)
        assert everything(model) == before
        assert {k: v for k, v in vars(config).items() if k != "base_model_name_or_path"} == {
            k: v for k, v in chosen.items() if k != "base_model_name_or_path"
        }
    assert torch.equal(logits(model, tokens()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(model, LoraConfig(r=4, target_modules=QV))


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = llama()
    before, built = everything(model), []
    select = layer.select

    def interrupted(*args, **kwargs):
        built.append(args)
        if len(built) == 3:
            raise Interrupted
        return select(*args, **kwargs)

    monkeypatch.setattr(layer, "select", interrupted)
    with pytest.raises(Interrupted):
        peft(model, **GATED)
    assert everything(model) == before


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_refused_further_adapter_leaves_the_others(low_cpu_mem_usage):
    model = peft(llama(), **GATED)
    before, values = everything(model), state(model)
    with pytest.raises(ValueError, match="v_proj': r=20 is not allowed"):
        model.add_adapter("second", SecuraConfig(**TOO_LARGE), low_cpu_mem_usage=low_cpu_mem_usage)
    assert everything(model) == before and list(model.peft_config) == ["default"]
    assert_same_state(model, values)
    model.add_adapter("second", SecuraConfig(target_modules=QV, **CURLORA))
    assert list(layers(model).popitem()[1].secura_adapter) == ["default", "second"]


def test_transformers_further_adapter():
    model = llama()
    model.add_adapter(SecuraConfig(target_modules=QV, **GATED), "first")
    before = everything(model)
    with pytest.raises(ValueError, match="r=20 is not allowed"):
        model.add_adapter(SecuraConfig(**TOO_LARGE), "second")
    assert everything(model) == before and list(model.peft_config) == ["first"]


def test_all_linear_is_looked_up_again_after_a_refusal():
    """PEFT writes the names it found into the configuration; those of a refused model are not
    another's."""
    config = SecuraConfig(target_modules="all-linear", **GATED | dict(r=10, m=11))
    with pytest.raises(ValueError, match="r=10 is not allowed"):
        get_peft_model(mlp(), config)  # its last layer has 5 rows
    assert config.target_modules == "all-linear"
    names = [n.rsplit(".")[-1] for n in layers(get_peft_model(llama(), config))]
    assert {"q_proj", "gate_proj", "down_proj"} <= set(names)


@pytest.mark.parametrize(
    "key, message",
    [
        ("[", r"rank_pattern='\[' is not allowed: .* a regular expression: unterminated"),
        (7, "rank_pattern=7 is not allowed"),
    ],
)
def test_a_malformed_rank_pattern(key, message):
    with pytest.raises(ValueError, match=message):
        SecuraConfig(rank_pattern={key: 2})


def test_r_is_named_where_no_m_is_possible():
    message = r"r=8 is not allowed: it must be less than K=8: SECURA's m is above r"
    linear = nn.Linear(8, 12)
    with pytest.raises(ValueError, match=message):
        SECURALinear.from_linear(linear, 8)
    with pytest.raises(ValueError, match="layer '0': " + message):
        peft(nn.Sequential(linear), target_modules=["0"], **GATED | dict(r=8, m=None))
    assert CURLoRALinear.from_linear(linear, 8).r == 8


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_a_layer_that_never_runs_is_refused():
    with pytest.raises(TypeError, match=r"nn.MultiheadAttention never runs.*exclude_modules"):
        peft(Attends(), target_modules="all-linear", **GATED)
    model = peft(Attends(), target_modules="all-linear", exclude_modules=["out_proj"], **GATED)
    assert list(layers(model)) == ["base_model.model.out"]
    for kind in (CURLoRALinear, SECURALinear):
        with pytest.raises(TypeError, match=r"linear cannot be replaced: .*never runs"):
            kind.from_linear(Attends().attention.out_proj, 4)


def test_the_encoder_layer_whose_fast_path_leaves_adapters_out():
    """In inference it takes linear1's weight alone, unless the fast path is off."""
    base = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    with pytest.raises(TypeError, match=r"set_fastpath_enabled\(False\) first"):
        peft(copy.deepcopy(base), target_modules=["linear1", "linear2"], **GATED)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = peft(base, target_modules=["linear1", "linear2"], **CURLORA)
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            plain = model(x)
            for each in layers(model).values():
                each.secura_adapter["default"].U.normal_()
            assert not torch.allclose(model(x), plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# autocast_adapter_dtype, and low precision after injection.


@pytest.mark.parametrize(
    "settings",
    [
        GATED,
        CURLORA,
        GATED | dict(importance_decay=True),
        CURLORA | dict(basis="raw"),
        GATED | dict(norm_domain="weight"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_adapter_dtype(settings, dtype):
    """True (the default): float32 or wider. False: the base's dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    for autocast, expected in ((True, wide), (False, dtype)):
        config = SecuraConfig(target_modules=QV, **settings)
        model = get_peft_model(llama(dtype=dtype), config, autocast_adapter_dtype=autocast)
        model.add_adapter(
            "second", SecuraConfig(target_modules=QV, **settings), autocast_adapter_dtype=autocast
        )
        found = {
            p.dtype
            for m in layers(model).values()
            for a in m.secura_adapter.values()
            for p in a.parameters()
        }
        assert found == {expected}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], eps=1e-4)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            losses.append(model(tokens(), labels=tokens()).loss)
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]


def test_autocast_adapter_dtype_of_a_loaded_adapter(tmp_path):
    model = peft(llama(dtype=torch.bfloat16), **GATED)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
            model.load_adapter(
                tmp_path,
                f"{low} {autocast}".replace(".", ""),
                autocast_adapter_dtype=autocast,
                low_cpu_mem_usage=low,
            )
            loaded = layers(model).popitem()[1].secura_adapter[f"{low} {autocast}"]
            assert {p.dtype for p in loaded.parameters()} == {expected}


@pytest.mark.parametrize("settings", [GATED, CURLORA], ids=str)
def test_half_after_injection_takes_a_larger_epsilon(settings):
    """float16 holds neither the square of a small gradient nor AdamW's eps of 1e-8: 0 / 0."""
    finite = {}
    for eps in (1e-8, 1e-4):
        model = peft(llama(), **settings).half().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float16}
        optimizer = torch.optim.AdamW(trained, eps=eps)
        for _ in range(3):
            optimizer.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
        finite[eps] = all(p.isfinite().all() for p in trained)
    assert finite == {1e-8: False, 1e-4: True}
