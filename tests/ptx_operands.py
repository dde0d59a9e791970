"""Operands of PTX instructions as C++, and the types that they have."""

import re

INTEGERS = {f"{kind}{bits}": (kind, bits) for kind in "usb" for bits in (8, 16, 32, 64)}
C_TYPES = {
    name: f"{'int' if kind == 's' else 'uint'}{bits}_t" for name, (kind, bits) in INTEGERS.items()
} | {"f32": "float", "f16": "uint16_t", "bf16": "uint16_t", "pred": "bool"}
BITS = {name: bits for name, (_, bits) in INTEGERS.items()} | {"f32": 32, "f16": 16, "bf16": 16}
REGISTERS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64", "f": "f32"}  # %rs7 has 16 bits
SPECIAL = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {
        "tid": "threadIdx",
        "ntid": "blockDim",
        "ctaid": "blockIdx",
        "nctaid": "gridDim",
    }.items()
    for axis in "xyz"
}
SHARED = "host::shared"


class Unknown(Exception):
    """An instruction, operand or directive that is not translated, with its line and text."""


class Operands:
    """Of one instruction, as C++."""

    def __init__(self, parts: list[str], symbols: dict[str, str]):
        self.parts, self.symbols = parts, symbols

    def __len__(self) -> int:
        return len(self.parts)

    def read(self, at: int, kind: str) -> str:
        return self._value(self.parts[at], kind)

    def write(self, at: int, kind: str, value: str) -> str:
        return self._assign(self.parts[at], kind, value)

    def elements(self, at: int) -> list[str]:
        part = self.parts[at]
        return re.findall(r"[^{},\s]+", part) if part[0] == "{" else [part]

    def read_all(self, at: int, kind: str) -> list[str]:
        return [self._value(part, kind) for part in self.elements(at)]

    def write_all(self, at: int, kind: str, values: str) -> str:
        parts = self.elements(at)
        return " ".join(self._assign(p, kind, f"{values}[{i}]") for i, p in enumerate(parts))

    def address(self, at: int, space: str) -> str:
        found = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", self.parts[at])
        if found is None:
            raise Unknown(f"with the address {self.parts[at]}")
        base, offset = found[1], found[2] or "0"
        if base[0] != "%":
            base = self._symbol(base)
        elif space == "shared":
            base = f"{SHARED} + {self._value(base, 'u32' if base[:3] != '%rd' else 'u64')}"
        else:
            base = f"reinterpret_cast<unsigned char*>({self._value(base, 'u64')})"
        return f"{base} + {offset}"

    def _symbol(self, name: str) -> str:
        if name not in self.symbols:
            raise Unknown(f"with the symbol {name}")
        return self.symbols[name]

    def _register(self, name: str) -> str:
        found = re.fullmatch(r"%(p|rs|r|rd|f)\d+", name)
        if found is None:
            raise Unknown(f"with the operand {name}")
        return REGISTERS[found[1]]

    def _value(self, part: str, kind: str) -> str:
        if part in SPECIAL:
            return f"static_cast<{C_TYPES[kind]}>({SPECIAL[part]})"
        if part[0] == "%":
            return self._converted(part[1:], self._register(part), kind)
        if constant := re.fullmatch(r"0f([0-9A-F]{8})", part):
            return self._converted(f"std::bit_cast<float>(0x{constant[1]}u)", "f32", kind)
        if re.fullmatch(r"-?\d+", part):
            return f"static_cast<{C_TYPES[kind]}>({part}LL)"
        # Shared memory has addresses of its own, from 0 on.
        symbol = self._symbol(part)
        return "0" if symbol == SHARED else f"reinterpret_cast<uint64_t>({symbol})"

    def _assign(self, part: str, kind: str, value: str) -> str:
        register = self._register(part)
        if register == kind:
            return f"{part[1:]} = {value};"
        if register in INTEGERS and kind in INTEGERS and BITS[kind] < BITS[register]:
            return f"{part[1:]} = static_cast<{C_TYPES[kind]}>({value});"  # extended by its sign
        value = f"static_cast<{C_TYPES[kind]}>({value})"
        return f"{part[1:]} = {self._converted(value, kind, register)};"

    @staticmethod
    def _converted(value: str, kind: str, to: str) -> str:
        """The low bits of a value as another type."""
        if C_TYPES[kind] == C_TYPES[to]:
            return value
        if "pred" not in (kind, to):
            if "f32" not in (kind, to) and BITS[to] <= BITS[kind]:
                return f"static_cast<{C_TYPES[to]}>({value})"
            if BITS[kind] == BITS[to]:
                return f"std::bit_cast<{C_TYPES[to]}>({value})"
        raise Unknown(f"with {to} from a register of {kind}")
