"""Build of `hisa._C`. Everything that is not about compiling lives in pyproject.toml.

Environment:
    HISA_CUDA=0, 1     leave the CUDA kernels out, or insist on them; otherwise see decide_cuda
    HISA_HOPPER=0      leave the kernels of csrc/cuda/sm90 out; see decide_hopper
    HISA_WERROR=1      warnings are errors
    HISA_SANITIZE=1    AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize` uses it)
    MAX_JOBS, TORCH_CUDA_ARCH_LIST    as torch.utils.cpp_extension defines them
"""

import os
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "hisa: torch is not installed; install it first, then build against it"
    ) from None
from setuptools import Extension, setup
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
)

WERROR = os.environ.get("HISA_WERROR") == "1"
SANITIZING = os.environ.get("HISA_SANITIZE") == "1"
IS_X86 = platform.machine() in ("x86_64", "AMD64")

# The same kernel body three times: kernels_baseline.cpp is an ordinary source, these two need flags
# of their own. Which one runs is decided by the CPU at run time.
X86_KERNELS = {
    "csrc/cpu/kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "csrc/cpu/kernels_avx512.cpp": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c",
}
# Results are specified to the bit, so the compiler must not contract a * b + c by itself.
CXX_FLAGS = "-O3 -g0 -std=c++20 -fvisibility=hidden -ffp-contract=off -fopenmp"
WARNINGS = "-Wall -Wextra -Wconversion -Wshadow"
# Python's own flags hold -fwrapv, which would silence the check for signed overflow.
SANITIZE = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer "
    "-fno-wrapv -O1 -g"
)
NVCC_FLAGS = "-O3 -std=c++20 --expt-relaxed-constexpr -Xcompiler=-fvisibility=hidden"
CUDA_ARCHITECTURES = ("8.0", "8.9", "9.0", "10.0", "12.0")


def decide_cuda(
    torch_cuda: str | None, toolkit: str | None, requested: str | None, has_kernels: bool
) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why.

    Takes torch.version.cuda, CUDA_HOME, HISA_CUDA and whether csrc/cuda holds a .cu file. A visible
    GPU plays no part: wheels are built on machines without one.
    """
    if requested not in (None, "", "0", "1"):
        raise ValueError(f"HISA_CUDA: expected 0, 1 or nothing, got {requested!r}")
    if requested == "0":
        return False, "HISA_CUDA=0"
    missing = None
    if torch_cuda is None:
        missing = "this torch is built without CUDA"
    elif toolkit is None:
        missing = "no CUDA toolkit was found (set CUDA_HOME)"
    elif not has_kernels:
        missing = "csrc/cuda holds no .cu file"
    if missing is None:
        return True, f"torch has CUDA {torch_cuda}, toolkit in {toolkit}"
    if requested == "1":
        raise ValueError(f"HISA_CUDA=1, but {missing}")
    return False, missing


def default_cuda_architectures(toolkit: str) -> str:
    """TORCH_CUDA_ARCH_LIST for every supported architecture that this toolkit knows."""
    nvcc = Path(toolkit, "bin", "nvcc")
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    usable = [a for a in CUDA_ARCHITECTURES if "compute_" + a.replace(".", "") in known]
    return ";".join(usable) + "+PTX"


def decide_hopper(architectures: str, requested: str | None) -> tuple[str, bool]:
    """TORCH_CUDA_ARCH_LIST, and whether the kernels for Hopper are built and used.

    Takes TORCH_CUDA_ARCH_LIST and HISA_HOPPER. These kernels need Hopper's own instructions, so
    9.0a takes the place of 9.0. PTX of 9.0a would run nowhere else: newer GPUs get that of 8.9.
    """
    if requested not in (None, "", "0", "1"):
        raise ValueError(f"HISA_HOPPER: expected 0, 1 or nothing, got {requested!r}")
    if requested == "0":
        return architectures, False
    own = re.sub(r"9\.0a?\+PTX|Hopper", "8.9+PTX;9.0a", architectures)
    own = re.sub(r"9\.0(?!a)", "9.0a", own)
    return own, "9.0a" in own


class BuildKernels(BuildExtension):
    """BuildExtension plus flags per file (X86_KERNELS), which setuptools does not have."""

    summary = ""

    def initialize_options(self) -> None:
        super().initialize_options()
        # A fixed folder: an editable install then reuses the objects that are up to date.
        self.build_temp = "build/sanitize" if SANITIZING else "build/temp"

    def build_extension(self, ext: Extension) -> None:
        start = time.monotonic()

        def compile_kernel(source: str) -> str:
            (built,) = self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, Path(source).stem),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args["cxx"] + X86_KERNELS[source].split(),
                depends=ext.depends,
            )
            return built

        self.force = True  # link in any case: setuptools does not know what these objects depend on
        with ThreadPoolExecutor(max_workers=2 if self.use_ninja else 1) as pool:
            ext.extra_objects = list(pool.map(compile_kernel, X86_KERNELS if IS_X86 else ()))
        super().build_extension(ext)
        size = os.path.getsize(self.get_ext_fullpath(ext.name)) / 2**20
        print(f"{self.summary}, {time.monotonic() - start:.0f} s, {size:.1f} MiB", flush=True)


def make_extension(use_cuda: bool, hopper: bool = False) -> Extension:
    """`hisa._C`, with the files of csrc/cuda or with the stub that stands in for them.

    `hopper` says whether what csrc/cuda/sm90 has is used.
    """
    sources = {*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")} - set(X86_KERNELS)
    stub = "csrc/cuda/unavailable.cpp"
    if use_cuda:
        for suffix in ("cu", "cpp"):
            sources |= {*glob(f"csrc/cuda/**/*.{suffix}", recursive=True)} - {stub}
    else:
        sources.add(stub)
    flags = f"{CXX_FLAGS} {WARNINGS}".split()
    # Named as system folders, torch's own headers are exempt from the warnings.
    flags += [f"-isystem{folder}" for folder in include_paths("cuda" if use_cuda else "cpu")]
    flags += ["-Werror"] if WERROR else []
    sanitize = SANITIZE.split() if SANITIZING else []
    macros = [("HISA_TORCH_VERSION", torch.__version__)]  # another torch: everything is recompiled
    macros += [("HISA_X86", "1")] if IS_X86 else []
    macros += [("HISA_WITH_CUDA", "1")] if use_cuda else []
    macros += [("HISA_SM90", "1")] if hopper else []
    return (CUDAExtension if use_cuda else CppExtension)(
        "hisa._C",
        sorted(sources),
        include_dirs=[os.path.abspath("csrc")],
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        define_macros=macros,
        extra_compile_args={"cxx": flags + sanitize, "nvcc": NVCC_FLAGS.split()},
        extra_link_args=["-fopenmp", *sanitize],
    )


def main() -> None:
    has_kernels = bool(glob("csrc/cuda/**/*.cu", recursive=True))
    hopper, built = False, "CPU only"
    try:
        use_cuda, why = decide_cuda(
            torch.version.cuda, CUDA_HOME, os.environ.get("HISA_CUDA"), has_kernels
        )
        if use_cuda:
            wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_cuda_architectures(CUDA_HOME)
            architectures, hopper = decide_hopper(wanted, os.environ.get("HISA_HOPPER"))
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
            built = "CPU, CUDA and Hopper" if hopper else "CPU and CUDA"
    except ValueError as error:
        raise SystemExit(f"hisa: {error}") from None
    BuildKernels.summary = f"hisa: built for {built} ({why})"
    setup(ext_modules=[make_extension(use_cuda, hopper)], cmdclass={"build_ext": BuildKernels})


if __name__ == "__main__":
    main()
