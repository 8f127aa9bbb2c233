"""Build and test mutants several at a time: each is compiled from the commands of one whole build.

A whole build goes to `base`. For a mutant, only the files that include what it changes are compiled
again, into a folder of its own, by the compilers' commands as ninja has them for `base`; then it is
linked with all other objects of `base`. The tests of several mutants share the GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.mutant import Mutant, mutated

TIMEOUT = 300  # seconds for the tests of one mutant


class Command(NamedTuple):
    """How one file of the whole build was compiled."""

    command: str
    output: Path
    includes: frozenset[Path]


class WholeBuild:
    """A finished build in `base`, from which mutants are made."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.objects = base / "build" / "temp"
        include: dict[Path, set[Path]] = {}
        output = Path()
        for line in ninja(self.objects, "deps").splitlines():
            if line.startswith(" "):
                include[output].add(Path(line.strip()))
            elif line:
                output = Path(line.split(": #deps")[0])
                include[output] = set()
        self.commands = []
        for entry in json.loads(ninja(self.objects, "compdb")):
            made = Path(entry["directory"], entry["output"])
            known = include.get(made, include.get(Path(entry["output"]), set()))
            files = frozenset({Path(entry["directory"], entry["file"]), *known})
            self.commands.append(Command(entry["command"], made, files))

    def affected(self, file: str) -> list[Command]:
        """Return the commands of what has to be compiled again if a file of csrc/ changes."""
        path = self.base / "csrc" / file
        found = [c for c in self.commands if path in c.includes]
        if not found:
            raise RuntimeError(f"nothing that is compiled includes {file}")
        return found

    def prepare(self, mutant: Mutant, tree: Path) -> list[str]:
        """Copy the sources with the bug in them; return what to run to compile it."""
        built = shutil.ignore_patterns("build", "__pycache__", "*.so")
        shutil.copytree(self.base, tree, ignore=built)
        path = tree / "csrc" / mutant.file
        path.write_text(mutated(mutant, path.read_text()))
        commands = []
        for one in self.affected(mutant.file):
            (tree / one.output.relative_to(self.base)).parent.mkdir(parents=True, exist_ok=True)
            commands.append(one.command.replace(str(self.base), str(tree)))
        return commands

    def link(self, tree: Path) -> None:
        """Link a mutant's objects and those that it shares with the whole build."""
        (extension,) = self.base.glob("hisa/_C*.so")
        objects = [path.relative_to(self.base) for path in sorted(self.objects.rglob("*.o"))]
        own = [tree / path if (tree / path).exists() else self.base / path for path in objects]
        described = extension_of(self.base)
        flags = [f"-L{folder}" for folder in described.library_dirs]
        flags += [f"-l{name}" for name in described.libraries] + described.extra_link_args
        target = tree / "hisa" / extension.name
        shell(f"c++ -shared -o {target} {' '.join(map(str, own))} {' '.join(flags)}", tree)


def ninja(folder: Path, tool: str) -> str:
    """Ask ninja about a build."""
    command = ["ninja", "-t", tool]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def extension_of(base: Path) -> Any:
    """Return setuptools' description of the extension that was built."""
    spec = importlib.util.spec_from_file_location("hisa_setup", base / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_extension(use_cuda=(base / "build/temp/csrc/cuda/pool.o").exists())


def shell(command: str, folder: Path) -> None:
    """Run a compiler."""
    run = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{command[:200]} ...\n{run.stdout[-1500:]}{run.stderr[-1500:]}")


def verdict_of(tree: Path, tests: list[str]) -> str | None:
    """Run tests until the first failure and return its name; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    # Another tree's hisa must not be found first.
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        run = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return "time limit"
    if run.returncode == 0:
        return None
    if run.returncode == 5:
        raise RuntimeError(f"no test was run\n{run.stdout[-1500:]}")
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"crash (exit status {run.returncode})"


def run_all(base: Path, mutants: list[Mutant], tests: list[str], compilers: int, runs: int) -> int:
    """Build and test all mutants, and the unchanged build; return how many were not killed.

    A mutant that does not compile, or no longer applies, counts as not killed.
    """
    whole = WholeBuild(base)
    compiling, testing = ThreadPoolExecutor(compilers), ThreadPoolExecutor(runs)
    printing = threading.Lock()
    start = time.monotonic()

    def report(name: str, verdict: str) -> None:
        with printing:
            print(f"{name:<40} {time.monotonic() - start:5.0f} s  {verdict}", flush=True)

    def test(mutant: Mutant, tree: Path, parts: list[Future[None]]) -> bool:
        try:
            for part in parts:
                part.result()
            whole.link(tree)
            by = verdict_of(tree, [*mutant.tests] or tests)
        except Exception as error:
            report(mutant.name, f"NOT TESTED: {error}")
            return False
        report(mutant.name, "SURVIVED" if by is None else f"killed by {by}")
        shutil.rmtree(tree)
        return by is not None

    def control() -> bool:
        by = verdict_of(base, tests)
        report("(no mutant)", "passes" if by is None else f"FAILS: {by}")
        return by is None

    results = [testing.submit(control)]
    for number, mutant in enumerate(mutants):
        tree = base.parent / f"mutant{number}"
        try:
            commands = whole.prepare(mutant, tree)
        except (ValueError, RuntimeError) as error:
            report(mutant.name, f"NOT TESTED: {error}")
            results.append(testing.submit(lambda: False))
            continue
        parts = [compiling.submit(shell, command, whole.objects) for command in commands]
        results.append(testing.submit(test, mutant, tree, parts))
    return sum(not result.result() for result in results)
