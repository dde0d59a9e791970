"""PTX as C++ for the simulated GPU: each kernel a function, each instruction a statement.

nvcc has put the strings of csrc/instructions.cuh into the PTX, so they are what is executed.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ptx_instructions import instruction
from ptx_operands import C_TYPES, REGISTERS, SHARED, Operands, Unknown

FIRST = {"pred": "true", "b16": "-1", "b32": "-1", "b64": "-1", "f32": "NAN"}  # until written


class Kernel(NamedTuple):
    name: str  # mangled
    code: str  # the C++ function `void <function>(const unsigned char* parameters)`
    function: str


def translate(text: str, file: str) -> list[Kernel]:
    """The kernels of a PTX file.

    Args:
        file: its name, for the places in messages.
    Raises:
        Unknown: something in it is not known; nothing is skipped.
    """
    text = re.sub(r"//.*", "", text)
    shared = re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", text)
    bounds = r"(?:\.(?:maxntid|minnctapersm).*\n)*"
    entry = rf"\.entry (\w+)\(\s*\.param [^,]*?(\w+)\[\d+\]\s*\)\n{bounds}\{{\n"
    kernels, last = [], 0
    for found in re.finditer(entry, text):
        _only_known(text[last : found.start()], file)
        end = text.index("\n}\n", found.end())
        line = text[: found.end()].count("\n") + 1
        function = re.sub(r"\W", "_", f"{file}_{len(kernels)}")
        symbols = {name: SHARED for name in shared} | {found[2]: "parameters"}
        body = "\n".join(_body(text[found.end() : end], line, file, symbols))
        # Thousands of variables, which g++ would look at for long.
        head = f'[[gnu::optimize("O0")]] void {function}(const unsigned char* parameters)'
        kernels.append(Kernel(found[1], f"{head} {{\n{body}\n}}\n", function))
        last = end + 3
    _only_known(text[last:], file)
    return kernels


def _only_known(between: str, file: str) -> None:
    """Outside of kernels."""
    for line in filter(None, map(str.strip, between.split("\n"))):
        if not re.match(r"\.(version|target|address_size|extern \.shared|visible$|weak$)", line):
            raise Unknown(f"{file}: {line}")


def _body(text: str, first: int, file: str, symbols: dict[str, str]) -> Iterator[str]:
    for prefix, kind in REGISTERS.items():
        names = sorted(set(re.findall(rf"%({prefix}\d+)", text)))
        if names:
            yield f"{C_TYPES[kind]} " + ", ".join(f"{n} = {FIRST[kind]}" for n in names) + ";"
    yield f'#line {first} "{file}"'
    for number, line in enumerate(text.split("\n"), first):
        try:
            # One line each: where a thread waits is known by its line.
            yield _line(line.strip(), symbols)
        except Unknown as error:
            raise Unknown(f"{file}:{number}: {line.strip()} {error}") from None


def _line(line: str, symbols: dict[str, str]) -> str:
    hint = r'\.pragma "(nounroll|used_bytes_mask \d+)";'  # which bytes of the next load are used
    if re.fullmatch(rf"|{hint}|\.reg \.\w+\s+%\w+<\d+>;|[{{}}]", line):
        return line if line in ("{", "}") else ""
    if label := re.fullmatch(r"\$(\w+):", line):
        return f"{label[1]}:;"
    line = re.sub(r"^\{\s*(.*;)\s*\}$", r"\1", line)  # an inline assembly's own scope
    found = re.fullmatch(r"(?:@(!?)%(p\d+)\s+)?([a-z]\S*?)(?:\s+(.*?))?\s*;", line)
    if found is None:
        raise Unknown("is not known")
    negated, predicate, opcode, operands = found.groups()
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands or "")
    statement = instruction(opcode, Operands(parts, symbols))
    return f"if ({negated}{predicate}) {{ {statement} }}" if predicate else statement
