"""The before-and-after table, and the file with every figure behind it."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .settings import BASE, METHODS, write_json

Results = dict[str, dict[str, Any]]


def print_table(results: Results, console: Console) -> None:
    """One row a method: what it learned, what it forgot, and what that cost."""
    base = results[BASE]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("method")
    for heading in (
        "trained",
        "task\nppl",
        "general\nppl",
        "agreement",
        "train\ntokens/s",
        "peak\nmemory",
    ):
        table.add_column(heading, justify="right")
    table.add_row(
        "before",
        "0",
        f"{base['task_perplexity']:.2f}",
        f"{base['general_perplexity']:.2f}",
        "1.000",
        "",
        "",
        style="dim",
    )
    for name, result in trained(results).items():
        table.add_row(
            name,
            f"{result['trained_parameters']:,}",
            f"{result['task_perplexity']:.2f}",
            f"{result['general_perplexity']:.2f}",
            f"{result['agreement']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            megabytes(result["peak_memory_bytes"]),
        )
    console.print(table)


def trained(results: Results) -> Results:
    """The methods that were trained, in the order of METHODS."""
    return {name: results[name] for name in METHODS if name in results}


def megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.0f} MB"


def write_results(path: Path, results: Results) -> None:
    """Everything: the base model's perplexities and each method's whole result."""
    write_json(path, {"before": results[BASE], "methods": trained(results)})
