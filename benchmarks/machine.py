"""What a number depends on: processor, versions, commit. Goes into every row of every CSV file."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hisa


def environment(device: str) -> dict[str, str | int]:
    """Return the columns that say where and with what a number was measured."""
    return {
        "device": device,
        "cpu": cpu_name(),
        "cpu_isa": str(hisa.build_info()["cpu_isa"]),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "hisa": hisa.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def kernels(heads: int, dtype: torch.dtype, device: str) -> str:
    """Return the name of the kernels that score queries of 128 channels, in this build and here."""
    plan = hisa.plan(1, 1, heads, 128, dtype=dtype, device=device, op="flat_index")
    return plan.kernels["flat"]


def cpu_name() -> str:
    """Return the processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, or an empty string."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """Return the commit of the source tree, with a + if files under version control differ."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{name}+" if changed else name


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()
