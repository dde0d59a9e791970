"""PTX instructions as C++ statements [host/ptx.h], those that the kernels of csrc/ have."""

import functools
import re
from collections.abc import Callable

from ptx_operands import BITS, C_TYPES, INTEGERS, Operands, Unknown


def _formula(text: str, count: int, result: str | None = None) -> Callable[..., str]:
    """d = a formula of `count` operands {0}, {1}... of the instruction's type, its last group."""

    def emit(operands: Operands, *groups: str) -> str:
        kind = groups[-1]
        if len(operands) != count + 1:
            raise Unknown(f"with {len(operands)} operands")
        values = [operands.read(i + 1, kind) for i in range(count)]
        return operands.write(0, result or kind, text.format(*values))

    return emit


def _unsigned(kind: str) -> str:
    return f"u{BITS[kind]}"


def _modular(text: str, count: int = 2) -> Callable[..., str]:
    """The same without a sign: no sum overflows."""
    formula = _formula(text, count)
    return lambda operands, kind: formula(operands, _unsigned(kind))


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITE = {"equ": "!=", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # or unordered


def _compare(operands: Operands, how: str, kind: str) -> str:
    a, b = operands.read(1, kind), operands.read(2, kind)
    if how in OPPOSITE and kind == "f32":
        other = f"{a} < {b} || {a} > {b}" if how == "equ" else f"{a} {OPPOSITE[how]} {b}"
        return operands.write(0, "pred", f"!({other})")
    if how not in ORDERED or (how, kind) == ("ne", "f32"):
        raise Unknown("is not known")
    return operands.write(0, "pred", f"{a} {ORDERED[how]} {b}")


def _select(operands: Operands, kind: str) -> str:
    a, b, p = operands.read(1, kind), operands.read(2, kind), operands.read(3, "pred")
    return operands.write(0, kind, f"{p} ? {a} : {b}")


def _move(operands: Operands, kind: str) -> str:
    parts, into = operands.elements(1), operands.elements(0)
    if len(parts) == len(into) == 1:
        return operands.write(0, kind, operands.read(1, kind))
    part = f"b{BITS[kind] // max(len(parts), len(into))}"
    if len(into) == 1:
        whole = operands.read_all(1, part)
        wide = (f"static_cast<uint64_t>({v}) << {i * BITS[part]}" for i, v in enumerate(whole))
        return operands.write(0, kind, " | ".join(wide))
    value, last = operands.read(1, kind), len(into) - 1
    shifted = ", ".join(f"{C_TYPES[part]}({value} >> {i * BITS[part]})" for i in range(last + 1))
    return f"{{ const {C_TYPES[part]} v[] = {{{shifted}}}; {operands.write_all(0, part, 'v')} }}"


def _wide(operands: Operands, kind: str) -> str:
    wide = f"{kind[0]}{2 * BITS[kind]}"
    a, b = operands.read(1, kind), operands.read(2, kind)
    return operands.write(0, wide, f"static_cast<{C_TYPES[wide]}>({a}) * {b}")


def _convert(operands: Operands, rounding: str | None, to: str, kind: str) -> str:
    value = operands.read(1, kind)
    if to in INTEGERS and kind in INTEGERS and not rounding:
        return operands.write(0, to, f"static_cast<{C_TYPES[to]}>({value})")
    if to == "f32" and kind in INTEGERS and rounding == "rn":
        return operands.write(0, to, f"static_cast<float>({value})")
    if (to, rounding) in (("f16", "rn"), ("bf16", "rn")) and kind == "f32":
        return operands.write(0, to, f"ptx::to_{to}({value})")
    if to == "f32" and kind in ("f16", "bf16") and not rounding:
        return operands.write(0, to, f"ptx::from_{kind}({value})")
    raise Unknown("is not known")


def _load(operands: Operands, space: str, vector: str | None, kind: str) -> str:
    count, address = int(vector or 1), operands.address(1, space)
    value = f"ptx::load_{space}<{C_TYPES[kind]}, {count}>({address})"
    return f"{{ const auto v = {value}; {operands.write_all(0, kind, 'v.at')} }}"


def _store(operands: Operands, space: str, vector: str | None, kind: str) -> str:
    values, address = ", ".join(operands.read_all(1, kind)), operands.address(0, space)
    return f"ptx::store_{space}<{C_TYPES[kind]}, {int(vector or 1)}>({address}, {{{{{values}}}}});"


def _atomic(operands: Operands, what: str, kind: str) -> str:
    types = {"u64": "unsigned long long", "s32": "int"}
    if kind not in types:
        raise Unknown("is not known")
    address = f"reinterpret_cast<{types[kind]}*>({operands.address(1, 'global')})"
    value = f"atomic{what.title()}({address}, {operands.read(2, kind)})"
    return operands.write(0, kind, value)


def _shuffle(operands: Operands) -> str:
    into, _, inside = operands.parts[0].partition("|")
    value, mask, clamp, lanes = (operands.read(i, "b32") for i in range(1, 5))
    operands.parts[0] = into
    found = operands.write(0, "b32", f"ptx::shuffle_xor({value}, {mask}, {clamp}, {lanes})")
    return f"{found} {inside[1:]} = true;"


def _copy(operands: Operands) -> str:
    if len(operands) != 4 or operands.parts[2] != "16":
        raise Unknown("is not known")
    shared, source = operands.address(0, "shared"), operands.address(1, "global")
    return f"secura::copy_async({shared}, {source}, {operands.read(3, 's32')});"


def _load_matrices(operands: Operands, transposed: str | None) -> str:
    name = "load_matrices_transposed" if transposed else "load_matrices"
    address = operands.address(1, "shared")
    return f"{{ uint32_t v[4]; secura::{name}(v, {address}); {operands.write_all(0, 'b32', 'v')} }}"


def _multiply_add(operands: Operands, kind: str, _: str) -> str:
    a, b = ", ".join(operands.read_all(1, "b32")), ", ".join(operands.read_all(2, "b32"))
    c, of = ", ".join(operands.read_all(3, "f32")), {"f16": "float16", "bf16": "bfloat16"}[kind]
    return (
        f"{{ float v[4] = {{{c}}}; secura::multiply_add<secura::{of}>(v, {{{a}}}, {b}); "
        f"{operands.write_all(0, 'f32', 'v')} }}"
    )


def _shift_left(operands: Operands, kind: str) -> str:
    value, by = operands.read(1, _unsigned(kind)), operands.read(2, "u32")
    return operands.write(0, kind, f"ptx::shift_left({value}, {by})")


def _shift_right(operands: Operands, kind: str) -> str:
    value, by = operands.read(1, kind), operands.read(2, "u32")
    return operands.write(0, kind, f"ptx::shift_right({value}, {by})")


INT, WORD = r"([usb](?:16|32|64))", r"([usbf](?:8|16|32|64))"
INSTRUCTIONS: list[tuple[str, Callable[..., str]]] = [
    (rf"add\.{INT}", _modular("{0} + {1}")),
    (rf"sub\.{INT}", _modular("{0} - {1}")),
    (rf"mul\.lo\.{INT}", _modular("1u * {0} * {1}")),
    (rf"mad\.lo\.{INT}", _modular("1u * {0} * {1} + {2}", 3)),
    (rf"and\.{INT}", _modular("{0} & {1}")),
    (rf"or\.{INT}", _modular("{0} | {1}")),
    (rf"xor\.{INT}", _modular("{0} ^ {1}")),
    (rf"not\.{INT}", _modular("~{0}", 1)),
    (r"and\.(pred)", _formula("{0} && {1}", 2)),
    (r"or\.(pred)", _formula("{0} || {1}", 2)),
    (r"xor\.(pred)", _formula("{0} != {1}", 2)),
    (r"not\.(pred)", _formula("!{0}", 1)),
    (r"mul\.wide\.([us](?:16|32))", _wide),
    (r"div\.([us](?:16|32|64))", _formula("{0} / {1}", 2)),
    (r"rem\.([us](?:16|32|64))", _formula("{0} % {1}", 2)),
    (r"min\.([us](?:16|32|64))", _formula("std::min({0}, {1})", 2)),
    (r"max\.([us](?:16|32|64))", _formula("std::max({0}, {1})", 2)),
    (r"prmt\.(b32)", _formula("ptx::permute({0}, {1}, {2})", 3)),
    (r"bfi\.(b32)", _formula("ptx::insert({0}, {1}, {2}, {3})", 4)),
    (rf"shl\.{INT}", _shift_left),
    (rf"shr\.{INT}", _shift_right),
    (r"(?:add|add\.rn)\.(f32)", _formula("{0} + {1}", 2)),
    (r"sub\.(f32)", _formula("{0} - {1}", 2)),
    (r"mul\.(f32)", _formula("{0} * {1}", 2)),
    (r"div\.rn\.(f32)", _formula("{0} / {1}", 2)),
    (r"fma\.rn\.(f32)", _formula("std::fma({0}, {1}, {2})", 3)),
    (r"abs\.(f32)", _formula("std::fabs({0})", 1)),
    (r"neg\.(f32)", _formula("-{0}", 1)),
    (r"min\.(f32)", _formula("std::fmin({0}, {1})", 2)),  # of a number and NaN the number
    (r"max\.(f32)", _formula("std::fmax({0}, {1})", 2)),
    (r"rcp\.approx\.ftz\.(f32)", _formula("secura::reciprocal({0})", 1)),
    (r"ex2\.approx\.ftz\.(f32)", _formula("secura::power_of_2({0})", 1)),
    (rf"setp\.(\w+)\.{WORD}", _compare),
    (rf"selp\.{WORD}", _select),
    (r"mov\.(pred|[usbf](?:16|32|64))", _move),
    (r"cvt\.(?:(rn)\.)?(\w+)\.(\w+)", _convert),
    (r"cvta\.to\.global\.(u64)", _formula("{0}", 1)),  # one address space
    (rf"ld\.(param|shared|global)(?:\.v([24]))?\.{WORD}", _load),
    (rf"st\.(shared|global)(?:\.v([24]))?\.{WORD}", _store),
    (r"atom\.global\.(add|max)\.(\w+)", _atomic),
    (r"shfl\.sync\.bfly\.b32", _shuffle),
    (r"bar\.sync", lambda o: f"ptx::barrier({o.read(0, 'u32')});"),
    (r"cp\.async\.cg\.shared\.global", _copy),
    (r"cp\.async\.commit_group", lambda _: "secura::commit_copies();"),
    (r"cp\.async\.wait_group", lambda o: f"secura::wait_copies<{int(o.parts[0])}>();"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16", _load_matrices),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.(\1)\.f32", _multiply_add),
    (r"bra(?:\.uni)?", lambda o: f"goto {o.parts[0][1:]};"),
    (r"ret", lambda _: "return;"),
]


def instruction(opcode: str, operands: Operands) -> str:
    """The C++ statement of an instruction.

    Raises:
        Unknown: it is not known; nothing is skipped.
    """
    emit, groups = _known(opcode)
    return emit(operands, *groups)


@functools.cache
def _known(opcode: str) -> tuple[Callable[..., str], tuple]:
    for pattern, emit in INSTRUCTIONS:
        if found := re.fullmatch(pattern, opcode):
            return emit, found.groups()
    raise Unknown("is not known")
