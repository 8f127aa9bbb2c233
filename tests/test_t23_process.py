"""T23: processes. What an import does and does not do, fork, spawn, DataLoader workers.

Most tests start a fresh interpreter, so that what this process has done already plays no part.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import hisa

PACKAGE = Path(hisa.__file__).resolve().parent
PROCESSES = 8
# Says how to get the extension: what a user is told wherever it is missing.
WHAT_TO_RUN = r"pip install|setup\.py build_ext|make build"
# An editable install would find hisa._C in the source tree, whatever `path` holds.
FORGET_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f.__module__]
"""


def run_python(
    code: str, *, cwd: Path, path: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds hisa in `path`."""
    return subprocess.run(
        [sys.executable, "-c", FORGET_EDITABLE + textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_command(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that finds this tree's hisa from another folder."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_succeeds(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a process printed; fail with all of its output if it failed."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- what an import does ---------------------------------------------------------------------


def test_import_makes_no_cuda_context(tmp_path: Path) -> None:
    code = """
        import hisa, torch
        assert not torch.cuda.is_initialized()
        hisa.build_info()
        hisa.plan(16, 512, 4, 64)
        assert not torch.cuda.is_initialized()
    """
    assert_succeeds(run_python(code, cwd=tmp_path))


def test_import_with_no_visible_gpu(tmp_path: Path) -> None:
    assert_succeeds(run_python("import hisa", cwd=tmp_path, CUDA_VISIBLE_DEVICES=""))


def test_import_touches_no_network_and_starts_nothing(tmp_path: Path) -> None:
    code = """
        import sys, torch
        def refuse(event, arguments):
            if event.startswith(("socket.", "urllib.", "subprocess.", "os.exec", "os.fork",
                                 "os.posix_spawn", "os.system", "pickle.", "webbrowser.")):
                raise SystemExit(f"import hisa: {event} {arguments}")
        sys.addaudithook(refuse)
        import hisa, hisa.reference
        q = torch.ones(2, 2, 16)
        hisa.index(q, torch.ones(40, 16), torch.ones(2, 2), block_size=8, block_topk=2, topk=4)
    """
    assert_succeeds(run_python(code, cwd=tmp_path))


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs network namespaces (unshare -rn)",
)
def test_works_without_any_network_interface(tmp_path: Path) -> None:
    done = run_command(tmp_path, ["unshare", "-rn", sys.executable, "-m", "hisa"])
    assert_succeeds(done)


def test_import_writes_no_file(tmp_path: Path) -> None:
    """Neither in the working directory, nor in the home directory, nor anywhere else."""
    code = """
        import os, sys, torch
        def refuse(event, arguments):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            opened = event == "open" and arguments[2] & writes and arguments[0] != os.devnull
            if opened or event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
                raise SystemExit(f"import hisa: {event} {arguments}")
        sys.addaudithook(refuse)
        import hisa, hisa.reference
        hisa.pool_keys(torch.ones(16, 16), block_size=8)
    """
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    assert_succeeds(run_python(code, cwd=work, HOME=str(home), TMPDIR=str(work)))
    assert not list(home.iterdir()) + list(work.iterdir())


def test_import_is_light(tmp_path: Path) -> None:
    """`import hisa` pulls in neither transformers nor what only tools need."""
    code = """
        import sys, torch
        before = set(sys.modules)
        import hisa
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy = new & {"transformers", "pandas", "matplotlib", "setuptools", "IPython", "triton"}
        assert not heavy, heavy
    """
    assert_succeeds(run_python(code, cwd=tmp_path))


# ---- what is missing -------------------------------------------------------------------------


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A folder that holds the package without its extension."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "bare" / "hisa",
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
    )
    return tmp_path / "bare"


def test_import_without_the_extension(tmp_path: Path, without_extension: Path) -> None:
    code = """
        import torch, hisa, hisa.reference
        print(hisa.__file__, hisa.__version__)
        q, k, w = torch.ones(1, 1, 16), torch.ones(9, 16), torch.ones(1, 1)
        print(hisa.reference.flat_index(q, k, w, topk=2).tolist())
        ks, ke = hisa.causal_windows(torch.tensor([0, 3], dtype=torch.int32),
                                     torch.tensor([0, 9], dtype=torch.int32))
        print(ke.tolist())
    """
    printed = assert_succeeds(run_python(code, cwd=tmp_path, path=without_extension))
    assert str(without_extension) in printed
    assert "[[0, 1]]" in printed
    assert "[7, 8, 9]" in printed


def test_calls_without_the_extension_say_what_to_run(
    tmp_path: Path, without_extension: Path
) -> None:
    code = """
        import torch, hisa
        q, k, w = torch.ones(1, 1, 16), torch.ones(9, 16), torch.ones(1, 1)
        for call in (
            lambda: hisa.index(q, k, w, block_topk=2, topk=2),
            lambda: hisa.flat_index(q, k, w, topk=2),
            lambda: hisa.pool_keys(k),
            lambda: hisa.plan(4, 64, 1, 16),
            lambda: hisa.build_info(),
        ):
            try:
                print("no error:", call())
            except (ImportError, RuntimeError) as error:
                print(error)
    """
    printed = assert_succeeds(run_python(code, cwd=tmp_path, path=without_extension))
    assert len(re.findall(WHAT_TO_RUN, printed)) == 5, printed


def test_report_without_the_extension_says_what_to_run(
    tmp_path: Path, without_extension: Path
) -> None:
    code = "import runpy; runpy.run_module('hisa', run_name='__main__')"
    done = run_python(code, cwd=tmp_path, path=without_extension)
    assert done.returncode == 1
    assert re.search(WHAT_TO_RUN, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


WITHOUT_TRANSFORMERS = """
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "transformers":
                raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    sys.meta_path.insert(0, Block())
    import torch, hisa
"""


def test_import_without_transformers(tmp_path: Path) -> None:
    code = WITHOUT_TRANSFORMERS + """
    q, k, w = torch.ones(1, 1, 16), torch.ones(9, 16), torch.ones(1, 1)
    print(hisa.index(q, k, w, block_size=8, block_topk=2, topk=2).tolist())
    """  # fmt: skip
    assert "[[0, 1]]" in assert_succeeds(run_python(code, cwd=tmp_path))


def test_patch_without_transformers(tmp_path: Path) -> None:
    """Indexers are recognised on the model that is given, so there is simply none to patch."""
    code = WITHOUT_TRANSFORMERS + """
    hisa.patch(torch.nn.Linear(2, 2)).remove()
    """  # fmt: skip
    assert_succeeds(run_python(code, cwd=tmp_path))


def test_report(tmp_path: Path) -> None:
    """`python -m hisa` from an unrelated folder."""
    done = run_command(tmp_path, [sys.executable, "-m", "hisa"])
    printed = assert_succeeds(done)
    assert printed.startswith(f"hisa {hisa.__version__}\n")
    for word in ("torch", "python", "transformers", "compiler", "baseline", "self-check"):
        assert word in printed
    assert printed.count("ok") >= 4
    assert "WRONG" not in printed


def test_report_fails_on_a_wrong_result(tmp_path: Path) -> None:
    """The control for `test_report`: the self-check can fail."""
    code = """
        import runpy, hisa
        right = hisa.flat_index
        def wrong(*tensors, **keywords):
            indices, scores = right(*tensors, **keywords)
            return indices.roll(1), scores
        hisa.flat_index = wrong
        runpy.run_module("hisa", run_name="__main__")
    """
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "WRONG: flat_index" in done.stdout


# ---- other processes -------------------------------------------------------------------------


def digest(seed: int, threads: int = 1) -> str:
    """Hash the bytes that `hisa.index` returns for random inputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    indices, scores = hisa.index(
        draw(64, 4, 32), draw(600, 32), draw(64, 4),
        block_size=16, block_topk=8, topk=64, return_scores=True,
    )  # fmt: skip
    torch.set_num_threads(before)
    return hashlib.sha256(indices.numpy().tobytes() + scores.numpy().tobytes()).hexdigest()


class Digests(Dataset[str]):
    """A data set whose items are computed by `hisa.index` in the worker."""

    def __len__(self) -> int:
        return PROCESSES

    def __getitem__(self, seed: int) -> str:
        return digest(seed)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What this process computes, on two threads: its thread pool exists from here on."""
    return [digest(seed, threads=2) for seed in range(PROCESSES)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_compute_the_same(expected: list[str]) -> None:
    """Children on one thread, as torch asks for after a fork (its thread pool does not survive)."""
    children = []
    for seed in range(PROCESSES):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                os.write(write, digest(seed).encode())
            finally:
                os._exit(0)
        os.close(write)
        children.append((pid, read))
    got = []
    for pid, read in children:
        with os.fdopen(read) as answer:
            got.append(answer.read())
        os.waitpid(pid, 0)
    assert got == expected


def test_spawned_processes_compute_the_same(expected: list[str]) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(digest, range(PROCESSES)).get(timeout=50) == expected


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_data_loader_workers_compute_the_same(start: str, expected: list[str]) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    loader = DataLoader(
        Digests(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=50
    )
    assert list(loader) == expected
