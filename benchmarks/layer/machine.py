"""What figures were measured on: written into every results file."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def describe(device: torch.device) -> dict:
    """Chip, driver, clocks, versions, commit and date."""
    about = dict(
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version("triton"),
        peft=version("peft"),
        processor=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= dict(
            gpu=properties.name,
            gpu_memory=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            **nvidia_smi(),
        )
    return about


def chip(device: torch.device) -> str:
    """The results folder: the GPU's name, or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


def commit() -> str:
    """Of the working tree; "+" where it is changed; "unknown" outside a checkout."""
    try:
        name = _run("git", "rev-parse", "--short", "HEAD")
        return name + "+" * bool(_run("git", "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def nvidia_smi() -> dict:
    """Driver and clocks (MHz), {} where the tool is missing."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        values = _run(
            "nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"
        ).split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    names = ("driver", "sm_clock", "largest_sm_clock", "memory_clock", "power_limit")
    return dict(zip(names, values, strict=True))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _run(*command: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
