"""T26: how the package is built: the decision about CUDA, the version, what the archives hold."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hisa"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree, not an installed package"
)


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module; its setup() call is guarded."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("hisa_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "requested", "has_kernels", "use", "why"),
    [
        ("13.0", "/cuda", None, True, True, "torch has CUDA 13.0, toolkit in /cuda"),
        ("13.0", "/cuda", "1", True, True, "torch has CUDA 13.0, toolkit in /cuda"),
        ("13.0", "/cuda", "", True, True, "torch has CUDA 13.0, toolkit in /cuda"),
        ("13.0", "/cuda", "0", True, False, "HISA_CUDA=0"),
        (None, None, "0", False, False, "HISA_CUDA=0"),
        (None, "/cuda", None, True, False, "this torch is built without CUDA"),
        ("13.0", None, None, True, False, "no CUDA toolkit was found (set CUDA_HOME)"),
        ("13.0", "/cuda", None, False, False, "csrc/cuda holds no .cu file"),
    ],
)
def test_cuda_decision(
    setup_py: ModuleType,
    torch_cuda: str | None,
    toolkit: str | None,
    requested: str | None,
    has_kernels: bool,
    use: bool,
    why: str,
) -> None:
    assert setup_py.decide_cuda(torch_cuda, toolkit, requested, has_kernels) == (use, why)


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "has_kernels", "missing"),
    [
        (None, "/cuda", True, "torch is built without CUDA"),
        ("13.0", None, True, "no CUDA toolkit"),
        ("13.0", "/cuda", False, "no .cu file"),
    ],
)
def test_cuda_asked_for_but_impossible(
    setup_py: ModuleType,
    torch_cuda: str | None,
    toolkit: str | None,
    has_kernels: bool,
    missing: str,
) -> None:
    with pytest.raises(ValueError, match=f"HISA_CUDA=1, but .*{missing}"):
        setup_py.decide_cuda(torch_cuda, toolkit, "1", has_kernels)


@pytest.mark.parametrize("value", ["2", "yes", "on", " 1", "-1"])
def test_cuda_other_values_are_errors(setup_py: ModuleType, value: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"HISA_CUDA: expected 0, 1 or nothing, got '{value}'")
    ):
        setup_py.decide_cuda("13.0", "/cuda", value, True)


def test_cuda_decision_ignores_visible_gpus(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> bool:
        raise AssertionError("the decision looked for a GPU")

    monkeypatch.setattr("torch.cuda.is_available", refuse)
    monkeypatch.setattr("torch.cuda.device_count", refuse)
    setup_py.decide_cuda("13.0", "/cuda", None, True)
    setup_py.make_extension(use_cuda=False)


def test_default_architectures_are_those_the_toolkit_knows(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 89 90\n")
    nvcc.chmod(0o755)
    assert setup_py.default_cuda_architectures(str(tmp_path)) == "8.0;8.9;9.0+PTX"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 87 89 90 100 103 110 120 121\n")
    assert setup_py.default_cuda_architectures(str(tmp_path)) == "8.0;8.9;9.0;10.0;12.0+PTX"


@pytest.mark.parametrize("requested", [None, "", "1"])
@pytest.mark.parametrize(
    ("given", "architectures", "hopper"),
    [
        ("8.0;9.0;10.0+PTX", "8.0;9.0a;10.0+PTX", True),
        ("8.0 9.0a", "8.0 9.0a", True),
        ("8.0;9.0+PTX", "8.0;8.9+PTX;9.0a", True),
        ("9.0a+PTX", "8.9+PTX;9.0a", True),
        ("Hopper", "8.9+PTX;9.0a", True),
        ("8.0+PTX", "8.0+PTX", False),
        ("8.9;10.0", "8.9;10.0", False),
    ],
)
def test_hopper_gets_its_own_instructions(
    setup_py: ModuleType, requested: str | None, given: str, architectures: str, hopper: bool
) -> None:
    """By default, wherever its architecture is among those that are built."""
    assert setup_py.decide_hopper(given, requested) == (architectures, hopper)


@pytest.mark.parametrize("given", ["8.0;9.0;10.0+PTX", "9.0+PTX", "9.0a", "Hopper", "8.0"])
def test_hopper_can_be_left_out(setup_py: ModuleType, given: str) -> None:
    assert setup_py.decide_hopper(given, "0") == (given, False)


def test_hopper_other_values_are_errors(setup_py: ModuleType) -> None:
    with pytest.raises(ValueError, match="HISA_HOPPER: expected 0, 1 or nothing, got 'no'"):
        setup_py.decide_hopper("9.0", "no")


@pytest.mark.parametrize("hopper", [True, False])
def test_hopper_is_a_macro(
    setup_py: ModuleType, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are used where the macro is, and nowhere else."""
    monkeypatch.setattr(setup_py, "CUDAExtension", setup_py.Extension)
    monkeypatch.setattr(setup_py, "include_paths", lambda device: [])
    macros = setup_py.make_extension(use_cuda=True, hopper=hopper).define_macros
    assert (("HISA_SM90", "1") in macros) == hopper and ("HISA_WITH_CUDA", "1") in macros


def test_every_source_belongs_to_one_build(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sources = setup_py.make_extension(use_cuda=False).sources
    on_disk = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")}
    expected = {s for s in on_disk if not s.startswith("csrc/cuda/")}
    expected = expected - set(setup_py.X86_KERNELS) | {"csrc/cuda/unavailable.cpp"}
    assert len(sources) == len(set(sources)) and set(sources) == expected
    assert set(setup_py.X86_KERNELS) <= on_disk


def run_setup(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in a copy of the tree."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def copy_tree(target: Path) -> Path:
    """Copy what a clone would hold."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


def test_wrong_setting_fails_with_one_line(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    failed = run_setup("--version", cwd=tree, HISA_CUDA="maybe")
    assert failed.returncode != 0
    assert failed.stderr.strip() == "hisa: HISA_CUDA: expected 0, 1 or nothing, got 'maybe'"


def test_build_prints_one_line(tmp_path: Path) -> None:
    """The real build, with sources that compile in no time: what for, how long it took, how big."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "hisa").mkdir()
    for folder in ("csrc/cpu", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("python", "cpu/kernels_avx2", "cpu/kernels_avx512", "cuda/unavailable"):
        (tmp_path / "csrc" / f"{name}.cpp").write_text("")
    built = run_setup("build_ext", "--inplace", cwd=tmp_path, HISA_CUDA="0")
    assert built.returncode == 0, built.stdout + built.stderr
    (line,) = [line for line in built.stdout.splitlines() if line.startswith("hisa: ")]
    (library,) = (tmp_path / "hisa").glob("_C*.so")
    size = library.stat().st_size / 2**20
    assert re.fullmatch(rf"hisa: built for CPU only \(HISA_CUDA=0\), \d+ s, {size:.1f} MiB", line)


def test_one_version() -> None:
    import hisa

    source = (PACKAGE / "_version.py").read_text()
    found = re.search(r'__version__ = "(\d+\.\d+\.\d+\S*)"', source)
    assert found is not None and hisa.__version__ == found[1]
    assert "import" not in re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    for other in ("pyproject.toml", "setup.py", "hisa/__init__.py", "README.md"):
        assert f'version = "{found[1]}"' not in (ROOT / other).read_text()
        assert '__version__ = "' not in (ROOT / other).read_text()


def test_sdist_holds_everything(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    made = run_setup("-q", "sdist", "--dist-dir", str(tmp_path), cwd=tree, HISA_CUDA="0")
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("hisa_indexer-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = [p for p in (tree / "csrc").rglob("*") if p.is_file()]
    wanted += [*(tree / "hisa").rglob("*.py"), tree / "hisa/py.typed"]
    wanted += (tree / "examples").glob("*.ipynb")
    wanted += [tree / n for n in ("setup.py", "pyproject.toml", "LICENSE", "README.md")]
    missing = {str(p.relative_to(tree)) for p in wanted} - names
    assert not missing
    assert not [n for n in names if n.endswith((".so", ".pyc", ".o"))]


@pytest.mark.long
def test_wheel_holds_everything_and_no_more(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    made = run_setup("-q", "bdist_wheel", "--dist-dir", str(tmp_path), cwd=tree, HISA_CUDA="0")
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("hisa_indexer-*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("hisa/")}
    expected = {str(p.relative_to(tree)) for p in (tree / "hisa").rglob("*.py")}
    (extension,) = (n for n in names if n.endswith(".so"))
    assert names == expected | {"hisa/py.typed", extension}


@pytest.mark.long
def test_wide_kernels_share_no_symbol(setup_py: ModuleType, tmp_path: Path) -> None:
    """At link time, an inline function with AVX flags must not replace its portable copy."""
    if not setup_py.IS_X86 or shutil.which("nm") is None or shutil.which("c++") is None:
        pytest.skip("needs an x86-64 compiler and nm")
    for source, flags in setup_py.X86_KERNELS.items():
        built = tmp_path / "kernels.o"
        subprocess.run(
            ["c++", "-c", source, "-o", built, *setup_py.CXX_FLAGS.split(), *flags.split(),
             "-DHISA_X86", "-Icsrc"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        symbols = subprocess.run(
            ["nm", "--defined-only", "-C", built], capture_output=True, text=True, check=True
        ).stdout
        assert not [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)], source


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="for make sanitize")
def test_sanitizers_are_in_what_runs() -> None:
    """`make sanitize` proves nothing if the ordinary extension is the one that was imported."""
    extension = Path(str(importlib.import_module("hisa._C").__file__))
    assert (ROOT / "build" / "sanitize") in extension.parents
    symbols = extension.read_bytes()
    assert b"__asan_report_load4" in symbols
    assert b"__ubsan_handle" in symbols
