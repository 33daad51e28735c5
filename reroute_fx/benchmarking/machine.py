"""Versions, machine, and the memory that a call takes."""

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from .._compat import package_version

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine; None for what is not there."""
    return {
        "reroute_fx": version("reroute-fx"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "triton": package_version("triton"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which one call raises the memory in use at its peak, above what was in use before.

    On CUDA those of torch's allocator; on a Linux CPU those of the resident set; None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _resident_rise(run)


def _resident_rise(run: Callable[[], Any]) -> int | None:
    try:
        _release_free_memory()
        _RESET.write_text("5")  # resets the peak
        before = resident_bytes("VmRSS")
    except OSError:  # no Linux, or a sandbox
        return None
    run()
    return max(0, resident_bytes("VmHWM") - before)


def _release_free_memory() -> None:
    """What malloc has kept of freed memory would be taken again unseen."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def resident_bytes(field: str = "VmRSS") -> int:
    """Bytes of this process that lie in memory, on Linux."""
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _commit() -> str | None:
    """Commit of this file's checkout, with "-dirty" if it was changed since.

    An installed package often lies inside a checkout of another project, which doesn't track it.
    """
    folder = Path(__file__).parents[1]
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
