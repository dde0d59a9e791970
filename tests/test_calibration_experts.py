"""``calibrate`` of stacked experts: each expert's bases from its own tokens."""

import pytest
import torch
from expert_models import BOTH, adapted, moe
from peft import PeftModel
from peft_models import layers, logits, move, tokens

from secura_kernels import calibrate
from secura_kernels.bases import inverse_root, orthonormal_basis
from secura_kernels.peft import SecuraConfig
from secura_kernels.train.calibration.measuring import own_loss
from secura_kernels.train.drift import drift
from secura_kernels.train.retention import core_size

QUIET = dict(progress=False)


def general(batches=3):
    """Some padding among it."""
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 10:] = 0
    return [dict(input_ids=tokens(4, 16, seed=i), attention_mask=mask) for i in range(batches)]


def whitened(kind="gpt-oss", never=None, dtype=torch.float64, **settings):
    """``never``: an expert that no token is sent to."""
    model = moe(kind, dtype)
    for layer in model.model.layers:
        if never is not None:
            layer.mlp.router.bias.data[never] = -1e4
    return adapted(model, basis="whitened", **settings)


def seen(model, batches):
    """Inputs, gradients and experts of every row that is no padding, by the stack's name."""
    found = {name: [] for name in layers(model)}
    mask = [None]

    def watch(name):
        def hook(_, args, y):
            x, routing = args
            counts = mask[0].bool().flatten()[routing.tokens]
            entry = [x.detach()[counts], None, routing.experts[counts]]
            found[name].append(entry)
            y.register_hook(lambda g: entry.__setitem__(1, g[counts]))

        return hook

    handles = [stack.register_forward_hook(watch(n)) for n, stack in layers(model).items()]
    loss = own_loss(model, 0, torch.device("cpu"))
    for batch in batches:
        mask[0] = batch["attention_mask"]
        loss(batch, mask[0].bool()).backward()
    for handle in handles:
        handle.remove()
    return {n: [torch.cat(p) for p in zip(*e, strict=True)] for n, e in found.items()}


def test_each_expert_is_measured_by_its_own_tokens():
    model = whitened()
    rows = seen(model, general())
    found = calibrate(model, general(), **QUIET)
    total = int(sum(batch["attention_mask"].sum() for batch in general()))
    assert set(found.tokens.values()) == {total} and not found.left_out
    products = []
    for name, stack in layers(model).items():
        made, (x, g, experts) = stack.secura_adapter["default"], rows[name]
        assert len(x) == 2 * total
        for e in range(6):
            mine = experts == e
            C, R = (side[e] for side in made.C_and_R(stack.base_matrix()))
            t, v = x[mine] @ R.T, g[mine] @ C
            fold_r = inverse_root(t.T @ t / mine.sum(), 0.01)
            fold_c = inverse_root(v.T @ v / total, 0.01)
            size = made.r / float((C @ fold_c).norm() * (fold_r @ R).norm())
            products.append(torch.tensor(size).log())
            root = made.unit[e] ** 0.5
            torch.testing.assert_close(made.fold_c[e], root * fold_c, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(made.fold_r[e], root * fold_r, rtol=1e-6, atol=1e-9)
    unit = float(torch.stack(products).mean().exp())
    assert found.unit == pytest.approx(unit, rel=1e-6)


def test_an_expert_without_tokens_is_orthonormal_with_a_warning():
    model = whitened(never=4)
    with pytest.warns(UserWarning, match=r"4 experts saw fewer tokens.*layers.0.*\[4\]"):
        found = calibrate(model, general(), **QUIET)
    assert len(found.left_out) == 4 and all(name.endswith("[4]") for name in found.left_out)
    for stack in layers(model).values():
        made = stack.secura_adapter["default"]
        assert made.unit.isnan().tolist() == [False] * 4 + [True, False]
        C, R = (side[4] for side in made.C_and_R(stack.base_matrix()))
        Q_c, _, Q_r, _ = orthonormal_basis(C, R)
        torch.testing.assert_close(C @ made.fold_c[4], Q_c)
        torch.testing.assert_close(made.fold_r[4] @ R, Q_r.T)
    move(model)
    sizes = [s.secura_adapter["default"].core_size() for s in layers(model).values()]
    assert core_size(model) == pytest.approx(float(sum(sizes))) and core_size(model) > 0


def test_no_expert_with_enough_tokens():
    batch = [dict(input_ids=tokens(1, 2))]
    with pytest.raises(ValueError, match=r"gate_up_proj' saw 2 tokens of general text, fewer"):
        calibrate(whitened(), batch, **QUIET)


def test_training_waits_for_it_and_a_file_keeps_it(tmp_path):
    model = whitened("qwen3", dtype=torch.float32).train()
    with pytest.raises(RuntimeError, match=r"knows nothing yet.*calibrate\(model"):
        model(tokens())
    calibrate(model, general(), **QUIET)
    before = logits(model, tokens())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    after = logits(model, tokens())
    assert not torch.equal(after, before)
    for settings in (dict(), dict(low_cpu_mem_usage=True)):
        again = PeftModel.from_pretrained(moe("qwen3"), tmp_path, **settings)
        assert torch.equal(logits(again, tokens()), after)
    plain = moe("qwen3")
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain, tokens()), after)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), after, rtol=1e-4, atol=1e-4)


def test_statistics_are_kept_and_joined():
    model = whitened(never=4)
    with pytest.warns(UserWarning):
        first = calibrate(model, general(), **QUIET)
    folds = [s.secura_adapter["default"].fold_c.clone() for s in layers(model).values()]
    with pytest.warns(UserWarning):
        again = calibrate(model, keep=first, **QUIET)
    assert again.left_out == first.left_out
    for stack, fold in zip(layers(model).values(), folds, strict=True):
        torch.testing.assert_close(stack.secura_adapter["default"].fold_c, fold)
    with pytest.warns(UserWarning):
        calibrate(model, general(), keep=first, **QUIET)  # the same text twice
    for stack, fold in zip(layers(model).values(), folds, strict=True):
        torch.testing.assert_close(stack.secura_adapter["default"].fold_c, fold)


def test_linear_layers_beside_experts():
    model = whitened("qwen3", target_modules=["q_proj"], dtype=torch.float32)
    found = calibrate(model, general(), **QUIET)
    assert len(found.tokens) == 6
    assert all(s.secura_adapter["default"].calibrated for s in layers(model).values())


def test_quiet_rows_are_not_for_stacks():
    with pytest.raises(ValueError, match=r"selection='quiet' is not allowed.*stacked experts"):
        calibrate(whitened(), general(), selection="quiet", **QUIET)


def test_drift_of_a_stack_is_that_of_its_change():
    model = move(adapted(moe(dtype=torch.float64)))
    model.add_adapter("second", SecuraConfig(r=3, target_modules=[], target_parameters=BOTH))
    move(model, "second", seed=1)
    for names in (["default"], ["default", "second"]):
        model.base_model.set_adapter(names)
        for name, moved in drift(model).items():
            stack = layers(model)[name]
            change = sum(stack.get_delta_weight(n) for n in names)
            values = torch.linalg.svdvals(change)
            assert moved.relative == pytest.approx(float(change.norm() / stack.weight.norm()))
            assert moved.spectral == pytest.approx(float(values.max()))
            assert moved.nuclear == pytest.approx(float(values.sum()))
