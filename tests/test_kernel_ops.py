"""The kernels behind the registered ops: schema, tracing, determinism, every tile, tuning."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import triton
import triton.language as tl
from devices import DEVICE, GPU, KERNELS, MARKS
from layer_cases import case, relative_error
from torch.library import opcheck

from secura_kernels import SMagNorm, cur_linear
from secura_kernels.backends.triton import chips, plan, tiles, tune_cache
from secura_kernels.backends.triton.launch import instead_of_launching
from secura_kernels.backends.triton.passes import factors
from secura_kernels.backends.triton.passes.down import down
from secura_kernels.backends.triton.passes.exact import _dot_exact
from secura_kernels.backends.triton.passes.gate_backward import gate_backward
from secura_kernels.backends.triton.passes.tile_ops import _at_row
from secura_kernels.ops import pack_norm
from secura_kernels.ops.linear import cur_linear_bwd, cur_linear_fwd
from secura_kernels.ops.weight import cur_weight_linear_bwd, cur_weight_linear_fwd
from secura_kernels.tools import tune
from secura_kernels.tools.cases import RUNS, Inputs, run

pytestmark = MARKS

FORMS = {
    "no gate": None,
    "output": SMagNorm(),
    "output, max": SMagNorm(ref="max"),
    "weight": SMagNorm(domain="weight"),
}


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_opcheck(norm, dtype, impl):
    c = case(9, 12, 10, 4, dtype, task_gate=True, device=DEVICE)
    parameters = (c.core.detach(), c.cols, c.rows, None, None, c.adapter_bias.detach(), c.decay)
    settings = (c.alpha, pack_norm(norm), norm is None or norm.detach_gate)
    edge = 0.0 if norm is None else 1.2
    if norm is not None and norm.domain == "weight":
        opcheck(
            cur_weight_linear_fwd, (c.x.detach(), c.W, c.bias, *parameters, *settings, edge, impl)
        )
        opcheck(
            cur_weight_linear_bwd,
            (
                torch.randn(9, 12, device=DEVICE).to(dtype),
                c.x.detach(),
                c.W,
                *parameters,
                *settings,
                [True, True, True],
                impl,
            ),
        )
        return
    for gate in (None, c.task_gate) if norm is None else (None,):
        arguments = (c.x.detach(), c.W, c.bias, *parameters, gate, *settings, edge, True, impl)
        opcheck(cur_linear_fwd, arguments)
        y, t, saved, _ = cur_linear_fwd(*arguments)
        needs, dy = [True, True, True], torch.randn_like(y)
        opcheck(cur_linear_bwd, (dy, c.W, *parameters, gate, t, saved, *settings, needs, impl))


@KERNELS
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_compiles_as_one_graph(norm, impl):
    torch.compiler.reset()  # each form is a compilation of one function, which may have eight
    c = case(9, 12, 10, 4, torch.float32, device=DEVICE)

    def step(x, core):
        y = cur_linear(x, c.W, core, cols=c.cols, rows=c.rows, bias=c.bias, norm=norm, impl=impl)
        return (y * y).sum()

    leaves = [c.x, c.core]
    plain = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_traces_for_a_gpu_without_one():
    """Shapes and dtypes of a CUDA layer, from fake tensors, whatever is here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        x, W = (torch.empty(n, 32, dtype=torch.bfloat16, device="cuda") for n in (8, 48))
        core, index = (
            torch.empty(4, 4, device="cuda"),
            torch.empty(4, dtype=torch.int64, device="cuda"),
        )
        assert cur_linear(x, W, core, cols=index, rows=index, impl="triton").shape == (8, 48)
        parameters = (core, index, index, None, None, None, None, None)
        settings = (1.0, pack_norm(SMagNorm()), True)
        y, t, saved, _ = cur_linear_fwd(x, W, None, *parameters, *settings, 0.0, True, "triton")
        dx, dcore, _ = cur_linear_bwd(
            y, W, *parameters, t, saved, *settings, [True, True, False], "triton"
        )
    assert (y.shape, y.dtype, y.device.type) == ((8, 48), torch.bfloat16, "cuda")
    assert (saved.dtype, dx.shape, dcore.dtype) == (torch.uint8, x.shape, torch.float32)


@KERNELS
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_two_runs_are_bitwise_equal(norm, impl, monkeypatch):
    """Without a GPU the second run takes the programs in reverse order, on the simulated GPU the
    threads of a block too."""

    def results():
        torch.manual_seed(1)
        c = case(200, 150, 80, 8, torch.float32, device=DEVICE)
        y = c.ours(norm, impl=impl)
        return y, *torch.autograd.grad(y, c.trained(), torch.randn_like(y))

    first = results()
    if not GPU and impl == "cuda":
        monkeypatch.setenv("SECURA_HOST_SCHEDULE", "reversed")
    if not GPU:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        forward = builder.set_grid_idx
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z: forward(builder.grid_dim[0] - 1 - x, y, z)
        )
    for a, b in zip(first, results(), strict=True):
        assert torch.equal(a, b)


# In the interpreter the rows of every chip; on a GPU its own.
TABLES = [tiles.TABLES[chips.chip_of(torch.device(DEVICE))]] if GPU else tiles.TABLES.values()
PRODUCTS = sorted(
    {
        (name, tile)
        for table in TABLES
        for name in ("product", "product_gate")
        for tile in table[name]
    },
    key=str,
)


@pytest.mark.parametrize(("name", "tile"), PRODUCTS, ids=str)
def test_every_product_tile(name, tile):
    """Bulk copies, persistent programs and parted epilogues compute the same, ragged sizes too."""
    for M, N, K in ((300, 520, 136), (130, 264, 72)):
        inputs = Inputs(M, N, K, 24, torch.bfloat16, DEVICE)
        inputs.y.fill_(torch.nan)
        with torch.no_grad():
            inputs.h[:, 24:] = 0
            inputs.C.matrix[:, 24:] = 0
        run(name, inputs, tile, RUNS[name][0])
        b = inputs.x.double() @ inputs.W.double().T
        d = inputs.h.double() @ inputs.C.matrix.double().T
        if name == "product":
            expected = b + d
        else:
            from secura_kernels.backends.reference import smagnorm

            expected = smagnorm(b, d, SMagNorm())
        assert relative_error(inputs.y, expected) < 2**-8  # one rounding to bfloat16


@pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (9, 0), reason="no bulk copies")
@pytest.mark.parametrize("r", [24, 12], ids=["rows on 16 bytes", "rows off 16 bytes"])
@pytest.mark.parametrize("form", ["tied", "stored", "columns first"])
def test_bulk_copies_find_every_factor(form, r):
    """*down* and *gate backward* by bulk copies and without, to the same bits or nearly."""
    M, N, K = 70, 136, 72
    inputs = Inputs(M, N, K, r, torch.bfloat16, DEVICE)
    layer, core = inputs.layer, inputs.core
    if form == "stored":
        C, R = inputs.W[:, :r].contiguous(), inputs.W[:r].contiguous()
        layer = layer._replace(cols=None, rows=None, C=C, R=R)
    elif form == "columns first":
        layer = layer._replace(weight=inputs.W.T.contiguous().T)
        inputs.x = inputs.x.T.contiguous().T  # which *down* then reads without them

    def results(tile, bias):
        with tiles.use(tile):
            t, h = down(inputs.x, factors.rows(layer), core, 1.0, p_dtype=torch.float32)
            g, v, sums = gate_backward(
                inputs.dy,
                inputs.code,
                factors.columns(layer),
                r,
                inputs.gate,
                decay=None,
                needs=(True, True, bias),
            )
        return t, h, g, v.sum(0), *([sums] if bias else [])

    expected = inputs.x.double() @ inputs.W[:r].double().T
    for bias in (False, True):
        plain = results(tiles.Tile(16, 64, 64, stages=1), bias)
        found = results(tiles.Tile(64, 64, 64, stages=2, tma=True), bias)
        assert relative_error(found[0], expected) < 1e-5
        for a, b in zip(found, plain, strict=True):
            assert relative_error(a, b.double()) < 1e-2


def test_a_pass_finds_what_was_tuned(monkeypatch):
    """Every pass looks its tuned choice up under the key that tuning stores it under."""
    asked = []
    monkeypatch.setattr(
        tune_cache, "choice", lambda device, *rest: asked.append(tune_cache.key(*rest))
    )
    tune_cache.forget()
    for job in tune.jobs([(192, 128)], [256], [8], torch.bfloat16):
        asked.clear()
        if job.name == "product_of_input_gradient":
            plan(
                job.M,
                job.K,
                job.N,
                job.r,
                job.dtype,
                torch.device(DEVICE),
                None,
                input_gradient=True,
            )
        elif job.name in tune.PRODUCTS:
            plan(
                job.M,
                job.N,
                job.K,
                job.r,
                job.dtype,
                torch.device(DEVICE),
                SMagNorm() if job.name.startswith("product_gate") else None,
                needs_down=job.name.endswith("after_down"),
            )
        else:
            inputs = Inputs(job.M, job.N, job.K, job.r, job.dtype, "meta")
            with instead_of_launching(lambda *_: None):
                RUNS[job.name][0](inputs)
        assert job.key in asked, job


def test_tuning_picks_the_fastest_and_resumes(tmp_path):
    file = tmp_path / "cache" / "tiles.json"
    work = tune.jobs([(128, 64)], [64], [8], torch.bfloat16)
    timed = []

    def time(function):
        timed.append(function)
        return float(len(timed) % 2)  # every other candidate takes no time

    device = torch.device(DEVICE)
    entries = tune.tune(work, device, file, time=time)
    assert set(entries) == {job.key for job in work} and timed
    assert json.loads(file.read_text())["entries"] == entries
    timed.clear()
    assert tune.tune(work, device, file, time=time) == entries and not timed
    tune.tune(work, device, file, time=time, again=True)
    assert timed


def test_what_cannot_be_measured_is_left_out(tmp_path, monkeypatch):
    """A tile, the library or all of a choice: with its reason, and at no cost to the others."""
    a, b = tiles.Tile(16, 16, 16), tiles.Tile(32, 16, 16)
    monkeypatch.setattr(tune, "rows_of", lambda *_: (a, b))
    monkeypatch.setattr(tune, "run", lambda name, inputs, tile, function: tile)
    products = {"product": ("product", None, lambda _: "down", lambda _: tune_cache.LIBRARY)}
    monkeypatch.setattr(tune, "PRODUCTS", products)
    product, epilogue = (
        tune.Job(name, 64, 32, 32, 8, torch.bfloat16) for name in ("product", "epilogue")
    )
    device, file = torch.device(DEVICE), tmp_path / "tiles.json"

    def tuned(job, *broken, error=RuntimeError, **times):
        def time(function):
            what = function()
            if what in broken:
                raise error(f"no {what}\nmore")
            return times.get(what, 5.0) if isinstance(what, str) else float(what.m)

        return tune.tune([job], device, file, again=True, time=time).get(job.key)

    def reasons(job):
        return json.loads(file.read_text())["left_out"].get(job.key, {})

    assert tuned(epilogue) == asdict(a) and reasons(epilogue) == {}
    assert tuned(epilogue, a, error=triton.TritonError) == asdict(b)
    assert reasons(epilogue) == {str(a): f"no {a}"}
    assert tuned(product, library=30.0) == asdict(a)  # 16 and 5 for what comes before
    assert tuned(product, library=20.0) == tune_cache.LIBRARY
    assert tuned(product, a, b, library=99.0) == tune_cache.LIBRARY
    assert tuned(product, tune_cache.LIBRARY, library=1.0) == asdict(a)
    assert reasons(epilogue) and set(reasons(product)) == {"the library's product"}
    assert tuned(product, "down", library=99.0) == tune_cache.LIBRARY
    file.unlink()
    assert tuned(product, "down", tune_cache.LIBRARY) is None  # and is measured next time
    assert set(reasons(product)) == {"what comes before it", "the library's product"}


def test_a_tuned_choice_is_used_while_the_table_has_it(monkeypatch):
    def choose(choice):
        monkeypatch.setattr(tune_cache, "choice", lambda *_: choice)
        tune_cache.forget()  # as saving does

    device, like = torch.device(DEVICE), torch.empty(0, dtype=torch.bfloat16, device="meta")
    with chips.pretend(90):
        *_, last = tiles.rows_of("down", 90, torch.bfloat16, 64)
        choose(asdict(last))
        assert tiles.tile_for("down", like, 2**20, 64, 64) == last
        *_, last = tiles.rows_of("product", 90, torch.bfloat16, 64)
        choose(asdict(last))
        found = plan(8192, 4096, 4096, 64, torch.bfloat16, device, None)
        assert found.tile == last and "when tuned" in found.reason
        choose(tune_cache.LIBRARY)
        assert not plan(8192, 4096, 4096, 64, torch.bfloat16, device, None).one_pass
        choose({"m": 7})  # of another version
        assert "predicted" in plan(8192, 4096, 4096, 64, torch.bfloat16, device, None).reason
    tune_cache.forget()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 99, "entries": {}}', '{"format": 1, "entries": {"a": "os.system"}}'],
)
def test_a_broken_cache_is_reported_and_not_used(tmp_path, content):
    file = tmp_path / "tiles.json"
    file.write_text(content)
    with pytest.warns(UserWarning, match="are not used"):
        assert tune_cache.load(file) == {}
    assert file.read_text() == content


def test_the_tile_of_a_shape():
    """The largest tile that fills the chip; never one whose rank is too small."""
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    for chip in (80, 89, 90, 100, 120):
        with chips.pretend(chip):
            large = tiles.tile_for("gate_backward", like, 2**20, 4096, 64)
            small = tiles.tile_for("gate_backward", like, 16, 4096, 64)
            assert large.m >= small.m
            for r in (1, 16, 17, 64, 65, 150, 256):
                for name in tiles.TABLES[chip]:
                    rank = chips.rank_block(r)
                    assert tiles.rows_of(name, chip, torch.bfloat16, rank)
                    assert tiles.tile_for(name, like, 8192, 4096, r).max_rank >= rank


@triton.jit
def _load_at_row(ptr, out_ptr, row, stride):
    tl.store(out_ptr, tl.load(_at_row(ptr, row, stride)))


def test_an_address_beyond_32_bits():
    """Rows are reached through 64-bit offsets: the last byte of 4 GiB that is never filled."""
    row, stride = 2**20 - 1, 4096 + 1
    far = torch.empty(row * stride + 1, dtype=torch.uint8, device=DEVICE)
    far[-1] = 77
    out = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    _load_at_row[(1,)](far, out, row, stride)
    assert out.item() == 77


@triton.jit
def _wide_times_exact(wide_ptr, exact_ptr, out_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    wide, exact = tl.load(wide_ptr + i * SIZE + j), tl.load(exact_ptr + i * SIZE + j)
    out = _dot_exact(wide, exact, tl.zeros((SIZE, SIZE), tl.float32), "ieee")
    tl.store(out_ptr + i * SIZE + j, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float32_times_the_layers_dtype(dtype):
    """As exact as in float32; what is infinite, or NaN, is so in its own row alone."""
    size = 16
    wide = (
        torch.randn(size, size, device=DEVICE) * torch.logspace(-6, 6, size, device=DEVICE)[:, None]
    )
    exact = torch.rand(size, size, device=DEVICE).add(0.5).to(dtype)
    wide[3, 4], wide[5, 6] = torch.inf, torch.nan
    out = torch.empty(size, size, device=DEVICE)
    _wide_times_exact[(1,)](wide, exact, out, size)
    expected = wide.double() @ exact.double()
    assert out[3].isinf().all() and out[5].isnan().all()
    rows = [row for row in range(size) if row not in (3, 5)]
    off = (out.double() - expected)[rows].norm(dim=1) / expected[rows].norm(dim=1)
    assert off.max() < 2**-19


def test_without_the_interpreter_a_cpu_layer_is_refused():
    program = (
        "import torch, secura_kernels as s\n"
        "layer = s.CURLoRALinear.from_linear(torch.nn.Linear(8, 8), 2)\n"
        "x = torch.randn(2, 8)\n"
        "try: s.CURLoRALinear.from_linear(torch.nn.Linear(8, 8), 2, impl='triton')\n"
        "except RuntimeError as e: print(e)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean
    )
    assert "impl='triton' cannot run here: the tensors are on the CPU" in done.stdout, done.stderr
