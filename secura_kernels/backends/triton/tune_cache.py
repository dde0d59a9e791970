"""Tile choices measured on the user's GPU (``python -m secura_kernels tune``), in their cache."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton

FORMAT = 1
LIBRARY = "library"  # instead of a tile: the library's product was faster


def key(name: str, dtype: torch.dtype, rows: int, columns: int, rank: int) -> str:
    """One tuned entry; rows (tokens) in buckets of powers of two, as batches vary."""
    rows = 1 << max(0, rows - 1).bit_length()
    return f"{name} {str(dtype).removeprefix('torch.')} {rows}x{columns} r{rank}"


def path(device: torch.device) -> Path:
    """The file of a GPU model and Triton version, under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    model = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return root / "secura_kernels" / f"{model}-triton-{triton.__version__}.json"


_forgetting: list[Callable[[], None]] = []


def remember(forget: Callable[[], None]) -> None:
    """``forget`` empties a cache of what follows from the tuned choices."""
    _forgetting.append(forget)


def remembered(function):
    """A cache of what follows from the tuned choices, for a function of hashable arguments."""
    cached = functools.lru_cache(maxsize=4096)(function)
    remember(cached.cache_clear)
    return cached


def forget() -> None:
    """Looks every choice up anew."""
    for empty in _forgetting:
        empty()


@remembered
def load(file: Path) -> dict[str, dict | str]:
    """Entries of a file, {} where there is none; one that is not ours is reported and left."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"tuned tiles {file} cannot be read and are not used: {error}", stacklevel=2)
        return {}
    entries = content.get("entries") if isinstance(content, dict) else None
    good = (
        isinstance(entries, dict)
        and content.get("format") == FORMAT
        and all(isinstance(v, dict) or v == LIBRARY for v in entries.values())
    )
    if not good:
        warnings.warn(f"tuned tiles {file} have another format and are not used", stacklevel=2)
        return {}
    return entries


def left_out(file: Path) -> dict[str, dict[str, str]]:
    """By entry: the candidates that could not be measured, and why."""
    return dict(json.loads(file.read_text()).get("left_out", {})) if load(file) else {}


def save(
    file: Path,
    entries: dict[str, dict | str],
    about: dict,
    left_out: dict[str, dict[str, str]],
) -> None:
    """Writes whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    content = dict(format=FORMAT, about=about, entries=entries, left_out=left_out)
    part.write_text(json.dumps(content, indent=1))
    part.replace(file)
    forget()


def choice(
    device: torch.device, name: str, dtype: torch.dtype, rows: int, columns: int, rank: int
) -> dict | str | None:
    """Fields of the tuned tile, or LIBRARY, or None where this was not tuned."""
    if device.type != "cuda":
        return None
    return load(_path(device)).get(key(name, dtype, rows, columns, rank))


@functools.cache
def _path(device: torch.device) -> Path:
    return path(device)
