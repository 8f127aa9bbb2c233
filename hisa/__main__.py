"""`python -m hisa`: versions, what was built, what is usable here, and a quick self-check.

Exit code 1 if the extension is missing or a result differs from `hisa.reference`.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import hisa
from hisa import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def show(name: str, value: object) -> None:
    """Print one line of the report."""
    print(f"  {name:<18}{value}")


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def usable_devices(info: dict[str, Any]) -> list[str]:
    """Print which devices and kernels can be used, and return the devices."""
    devices = ["cpu"]
    isas = ", ".join(info["cpu_isa_available"])
    show("cpu", f"{isas} (in use: {info['cpu_isa']}; {torch.get_num_threads()} threads)")
    if not info["cuda"]:
        show("cuda", "no: built without CUDA kernels")
    elif not torch.cuda.is_available():
        show("cuda", "no: built, but torch sees no CUDA device")
    else:
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            show(f"cuda:{i}", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
            devices.append(f"cuda:{i}")
    return devices


def small_integers(dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Two packed segments of small integers: every sum is exact, so every device must agree."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    q, k, weights = draw(12, 16, 64).to(dtype), draw(430, 64).to(dtype), draw(12, 16)
    cu_seqlens_k = torch.tensor([0, 210, 430], dtype=torch.int32)
    ks = cu_seqlens_k[:2].repeat_interleave(6) + torch.arange(12, dtype=torch.int32) % 3
    ke = ks + torch.tensor([0, 5, 40, 100, 180, 207] * 2, dtype=torch.int32)
    arguments = {"ks": ks, "ke": ke, "cu_seqlens_k": cu_seqlens_k}
    if dtype == torch.float8_e4m3fn:
        arguments["k_scale"] = 2.0 ** torch.randint(-1, 2, (430,), generator=generator)
    tensors = tuple(x.to(device) for x in (q, k, weights))
    return tensors, {name: x.to(device) for name, x in arguments.items()}


def self_check(dtype: torch.dtype, device: str) -> list[str]:
    """Return the names of the operators whose results differ from the reference."""
    (q, k, weights), arguments = small_integers(dtype, device)
    options = {"block_size": 16, "block_topk": 4, "topk": 24, "return_scores": True}
    flat_options = {"topk": 24, "return_scores": True}
    flat_arguments = {name: x for name, x in arguments.items() if name != "cu_seqlens_k"}
    pool_arguments = {name: x for name, x in arguments.items() if name not in ("ks", "ke")}
    calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "pool_keys": ((k,), {**pool_arguments, "block_size": 16}),
        "index": ((q, k, weights), {**arguments, **options}),
        "flat_index": ((q, k, weights), {**flat_arguments, **flat_options}),
    }
    wrong = []
    for name, (tensors, keywords) in calls.items():
        got = getattr(hisa, name)(*tensors, **keywords)
        expected = getattr(reference, name)(*tensors, **keywords)
        if not all(torch.equal(a.float(), b.float()) for a, b in zip(got, expected, strict=True)):
            wrong.append(name)
    return wrong


def main() -> int:
    """Print the report; return the exit code."""
    print(f"hisa {hisa.__version__}")
    show("torch", torch.__version__)
    show("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    show("transformers", installed_version("transformers"))
    try:
        info = hisa.build_info()
    except (ImportError, RuntimeError) as error:
        print(f"not usable: {error}", file=sys.stderr)
        return 1

    print("built")
    kernels = "CPU, CUDA and Hopper" if info["hopper"] else "CPU and CUDA"
    show("kernels", kernels if info["cuda"] else "CPU only")
    show("torch", info["torch"])
    show("compiler", info["compiler"])

    print("usable")
    devices = usable_devices(info)

    print("self-check against hisa.reference")
    failed = False
    for device in devices:
        for dtype in DTYPES:
            wrong = self_check(dtype, device)
            failed = failed or bool(wrong)
            verdict = f"WRONG: {', '.join(wrong)}" if wrong else "ok"
            show(device, f"{str(dtype).removeprefix('torch.'):<16}{verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
