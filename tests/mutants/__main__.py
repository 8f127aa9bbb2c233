"""Build each mutant in a copy of the tree and run the suite on it.

    python -m tests.mutants [--cuda] [part of a name ...]

Prints one line per mutant: killed by which test, or SURVIVED. The exit status is 1 if one survived.
Each build takes a minute or so; only the files that changed are compiled. The mutants of CUDA
kernels are built and tested several at a time, for the GPU of this machine unless
TORCH_CUDA_ARCH_LIST names others; --jobs says how many are compiled, --runs how many tested.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.catalogue_cuda import CUDA_MUTANTS
from tests.mutants.catalogue_hopper import HOPPER_MUTANTS
from tests.mutants.mutant import Mutant, mutated
from tests.mutants.parallel import run_all
from tests.test_build import copy_tree

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 900  # seconds per mutant
# The fast tests on CUDA, those first that take little time and find much.
CUDA_TESTS = ["cuda_dispatch", "t03*", "t09*", "t01*", "t16*", "t05*", "t02*", "t06*", "t14*"]


def build(tree: Path, **settings: str) -> None:
    """Build the extension in place; torch's build recompiles what changed."""
    environment = {**os.environ, "HISA_CUDA": "0", **settings}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(run.stdout[-3000:] + run.stderr[-3000:])


def killer(tree: Path, tests: list[str]) -> str | None:
    """Run the suite until its first failure and return that test's name, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "time limit"
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"crash (exit status {run.returncode})"


def run_cuda(tree: Path, chosen: list[Mutant], jobs: int, runs: int) -> int:
    """Build for this machine's GPU, then all mutants from that; return how many survived."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}"
    build(tree, HISA_CUDA="1", TORCH_CUDA_ARCH_LIST=names, MAX_JOBS=str(jobs))
    tests = [
        str(path.relative_to(ROOT))
        for part in CUDA_TESTS
        for path in sorted(ROOT.glob(f"tests/test_{part}.py"))
    ]
    return run_all(
        tree, chosen, ["-m", "gpu and not long", "--families", "cuda,cuda-many", *tests], jobs, runs
    )


def main() -> int:
    """Run the chosen mutants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of mutants' names; all by default")
    families = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/test_t*.py"))]
    families.remove("tests/test_t15_mutants.py")  # of the unmutated sources
    parser.add_argument("--tests", nargs="*", default=families, help="what to run")
    parser.add_argument("--tree", type=Path, help="folder to work in, kept between runs")
    parser.add_argument("--cuda", action="store_true", help="the mutants of csrc/cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--runs", type=int, default=12, help="mutants tested at a time")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in ([*CUDA_MUTANTS, *HOPPER_MUTANTS] if options.cuda else MUTANTS)
        if not options.names or any(name in mutant.name for name in options.names)
    ]
    tree = options.tree or Path(tempfile.mkdtemp(prefix="hisa-mutants-"), "tree")
    if not (tree / "csrc").exists():
        copy_tree(tree)
    survivors = 0
    print(f"building in {tree}", flush=True)
    if options.cuda:
        return int(run_cuda(tree, chosen, options.jobs, options.runs) > 0)
    build(tree)
    if (by := killer(tree, options.tests)) is not None:
        print(f"the suite fails without any mutant: {by}")
        return 1
    for mutant in chosen:
        start = time.monotonic()
        path = tree / "csrc" / mutant.file
        saved = path.read_text()
        path.write_text(mutated(mutant, saved))
        try:
            build(tree)
            by = killer(tree, [*mutant.tests] or options.tests)
        finally:
            path.write_text(saved)
        survivors += by is None
        verdict = "SURVIVED" if by is None else f"killed by {by}"
        print(f"{mutant.name:<36} {time.monotonic() - start:5.0f} s  {verdict}", flush=True)
    build(tree)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
