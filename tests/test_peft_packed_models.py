"""Models whose linear layers have no weight (GPTQ, AWQ, HQQ): training, calibrating, files."""

import copy
import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import packed_layers
from layer_cases import relative_error
from packed_layers import PACKED, replace_linears
from peft import PeftModel, prepare_model_for_kbit_training
from peft_models import GATE_FREE, GATED, layers, logits, move, peft, runs_of_each, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from secura_kernels import calibrate, fuse_projections
from secura_kernels.peft import save_as_lora
from secura_kernels.train.drift import drift


@pytest.fixture(autouse=True)
def gptqmodel_as_if_installed(monkeypatch):
    packed_layers.as_if_installed(monkeypatch)


def plain(dtype=torch.float32):
    """With biases in the attention."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attention_bias=True,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def quantised(kind, dtype=torch.float32):
    return replace_linears(plain(dtype), kind, dtype)


def everything(model):
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("form", [GATED, GATE_FREE | dict(basis="svd")], ids=["gated", "svd"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", PACKED)
def test_training_moves_the_cores_alone(kind, reentrant, form):
    model = quantised(kind)
    model.quantization_method = "hqq" if kind == "hqq" else "gptq"
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant)
    )
    model = peft(model, target_modules=LINEARS, **form)
    assert len(layers(model)) == 14
    ids = tokens(4, 12)
    base, before = logits(model, ids), everything(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-2)
    losses = []
    for _ in range(4):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    after = everything(model)
    moved = {n for n, value in after.items() if not torch.equal(value, before[n])}
    assert moved == set(trained)
    model.eval()
    assert not torch.equal(logits(model, ids), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("kind", PACKED)
def test_checkpointing_changes_no_gradient(kind):
    ids, found = tokens(3, 8), []
    for checkpointing in (False, True):
        model = move(peft(quantised(kind), **GATED)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][n], g) for n, g in found[1].items()) and found[1]


def dequantised(model):
    """The plain model of what an adapted one's layers multiply by, every linear one adapted."""
    other = plain()
    with torch.no_grad():
        for name, layer in layers(model).items():
            linear = other.get_submodule(name.removeprefix("base_model.model."))
            linear.weight.copy_(layer.base_matrix())
            if linear.bias is not None:
                linear.bias.copy_(layer.get_base_layer().bias)
    return other


@pytest.mark.parametrize("kind", PACKED)
def test_under_autocast_as_over_plain_layers(kind):
    """All gradients as one vector; HQQ's backward pass takes its own dtype alone, which is then the
    autocast's."""

    def gradients(model, autocast):
        model = move(model).train().float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    settings, ids = dict(target_modules=LINEARS, **GATED), tokens(3, 8)
    model = peft(quantised(kind, torch.bfloat16 if kind == "hqq" else torch.float32), **settings)
    others = [peft(dequantised(model), **settings) for _ in range(2)]
    under, eager, exact = (
        gradients(one, autocast)
        for one, autocast in zip((model, *others), (True, True, False), strict=True)
    )
    assert relative_error(under, exact) <= relative_error(eager, exact)


@pytest.mark.parametrize("basis", ["whitened", "natural"])
@pytest.mark.parametrize("kind", PACKED)
def test_calibrated_bases(kind, basis, tmp_path):
    model = peft(quantised(kind), target_modules=LINEARS, r=4, variant="curlora", basis=basis)
    ids = tokens(4, 16)
    base, before = logits(model, ids), everything(model)
    general = [tokens(4, 16, seed=seed) for seed in range(4)]
    batches = [dict(input_ids=ids, labels=ids)]
    task = batches * 2 if basis == "natural" else None
    calibrate(model, general, task, progress=False)
    assert torch.equal(logits(model, ids), base)
    bases = {n for n in before if ".base_layer." in n}
    after = everything(model)
    assert bases and all(torch.equal(after[n], before[n]) for n in bases)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    assert all(d.relative > 0 for d in drift(model).values())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(("save_projection", "low_cpu_mem_usage"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", PACKED)
def test_file_on_the_same_base(kind, save_projection, low_cpu_mem_usage, tmp_path):
    model = move(peft(quantised(kind), save_projection=save_projection, **GATED))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        quantised(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert all(layer.secura_adapter["default"].C is not None for layer in layers(again).values())


@pytest.mark.parametrize("way", ["from the quantised", "to the quantised"])
@pytest.mark.parametrize("kind", PACKED)
def test_file_on_another_base(kind, way, tmp_path):
    """With its C and R an adapter changes the other base by the same delta_W; without, none."""
    first, second = (lambda: quantised(kind)), plain
    if way == "to the quantised":
        first, second = second, first
    model = move(peft(first(), **GATE_FREE))
    model.save_pretrained(tmp_path / "with")
    again = PeftModel.from_pretrained(second(), tmp_path / "with").eval()
    for name, layer in layers(again).items():
        change = layers(model)[name].get_delta_weight("default")
        assert relative_error(layer.get_delta_weight("default"), change) < 5e-3
    if way == "from the quantised":  # what the refused merge advises
        expected = logits(again, tokens())
        assert relative_error(logits(again.merge_and_unload(), tokens()), expected) < 1e-5
    model = peft(first(), save_projection=False, **GATE_FREE)
    model.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(second(), tmp_path / "without")


@pytest.mark.parametrize("kind", PACKED)
def test_as_a_lora(kind, tmp_path):
    """Over the same base where PEFT's LoRA knows it; else over the plain one."""
    form = GATE_FREE | dict(adapter_bias=kind != "hqq")  # PEFT's LoRA over HQQ has no bias
    model = move(peft(quantised(kind), target_modules=LINEARS, **form))
    save_as_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    ids, minimal = tokens(), kind.startswith("minimal")
    with model.disable_adapter():
        y0 = logits(model, ids)
    if minimal:
        other = PeftModel.from_pretrained(plain(), tmp_path).eval()
        for name, layer in layers(model).items():
            change = other.get_submodule(name).get_delta_weight("default")
            assert relative_error(change, layer.get_delta_weight("default")) < 1e-5
        return
    other = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    assert relative_error(logits(other, ids), logits(model, ids)) < 1e-3
    assert relative_error(logits(model, ids), y0) > 0.1


@pytest.mark.parametrize("form", [GATED, GATE_FREE], ids=["gated", "free"])
@pytest.mark.parametrize("kind", PACKED)
def test_each_sample_with_its_own_adapter(kind, form):
    model = move(peft(quantised(kind), **form))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    move(model, "other", seed=5)
    ids, names = tokens(3), ["default", "__base__", "other"]
    mixed = logits(model, ids, adapter_names=names)
    single = runs_of_each(model, ids, names)
    allowed = 2e-3 if kind.endswith("awq") else 1e-5  # AWQ computes in float16
    for i, name in enumerate(names):
        assert relative_error(mixed[i], single[i][i]) < allowed, name
    assert relative_error(mixed[0], single[-1][0]) > 2e-2


@pytest.mark.parametrize("kind", PACKED)
def test_projections_are_not_fused(kind):
    model = peft(quantised(kind), target_modules=LINEARS, **GATE_FREE)
    with pytest.raises(ValueError, match="no layers to fuse"):
        fuse_projections(model)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_as_transformers_loads_it(kind, tmp_path):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AwqConfig, GPTQConfig

    # The tensors of a checkpoint are those of the minimal layers.
    packed = quantised(f"minimal {kind}").half()
    packed.save_pretrained(tmp_path)
    settings = dict(quant_method=kind, bits=4, group_size=32)
    if kind == "gptq":
        settings |= dict(desc_act=False, sym=False, checkpoint_format="gptq_v2")
        config = GPTQConfig(bits=4, backend="torch")
    else:
        settings |= dict(zero_point=True, version="gemm")
        config = AwqConfig(bits=4, group_size=32, backend="torch_awq")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=settings)))

    def load():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float16, device_map="cpu"
        )
        return prepare_model_for_kbit_training(model).eval()

    ids = tokens()
    assert relative_error(logits(load(), ids), logits(packed, ids)) < 5e-3
    model = peft(load(), target_modules=LINEARS, **GATED)
    for layer in layers(model).values():
        assert layer.quantization_backend.backend_name == kind
        assert layer.secura_adapter["default"].C is not None
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    move(model).eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
