"""The profile of the calls with goals: what is read from ncu's report. The run needs a GPU."""

from __future__ import annotations

import pytest

from benchmarks import profiled
from benchmarks.cases import cuda_profile
from benchmarks.cases.cuda_profile import CLOCK, SHARES, TIME

PREFIX = "void hisa::cuda::sm90::kernel<hisa::cuda::sm90::Config<(hisa::ElementType)3, (int)64"
KERNELS = {
    "pool_kernel<__nv_fp8_e4m3, (bool)1>(hisa::PoolParams)": "2,000",
    f"{PREFIX}, (int)128, (int)2, (bool)0, (bool)0>>(Params)": "10,000",
    f"{PREFIX}, (int)128, (int)2, (bool)1, (bool)0>>(Params)": "100,500",
    f"{PREFIX}, (int)128, (int)1, (bool)0, (bool)0>>(Params)": "300",
}


def report(calls: int) -> list[str]:
    """What ncu writes for so many calls of these kernels."""
    names = ["ID", "Kernel Name", TIME, CLOCK, *SHARES.values()]
    units = ["", "", "ns", "Ghz", *["%"] * len(SHARES)]
    lines = ["==PROF== Connected to process 1", ",".join(f'"{name}"' for name in names),
             ",".join(f'"{unit}"' for unit in units)]  # fmt: skip
    for _ in range(calls):
        for kernel, time in {profiled.MARK: "900", **KERNELS}.items():
            cells = ["0", kernel, time, "1.5", *(str(i) for i in range(len(SHARES)))]
            lines.append(",".join(f'"{cell}"' for cell in cells))
    return lines


def test_kernels_of_each_call() -> None:
    """Times in seconds, calls parted by the mark, stages named, what takes no time left out."""
    calls = list(cuda_profile.split_calls(cuda_profile.parse(report(3))))
    assert [len(call) for call in calls] == [4, 4, 4]
    stages = dict(cuda_profile.name_stages(calls[1]))
    assert list(stages) == ["pool", "coarse", "refine by pairs"]
    assert stages["refine by pairs"][TIME] == pytest.approx(100.5e-6)
    assert stages["coarse"][CLOCK] == 1.5e9
    assert [stages["coarse"][metric] for metric in SHARES.values()] == list(range(len(SHARES)))
    ((stage, _),) = cuda_profile.name_stages(calls[0][3:])
    assert stage == "flat"
    pool, coarse, _, single = calls[0]
    short = "void sm90::kernel<sm90::Config<3, 64, 128, {}, 0>>(sm90::Params)"  # by newer versions
    for numbers, want in (("2, 1", "refine by pairs"), ("1, 0", "refine row by row")):
        other = {**single, TIME: 1e-4, "kernel": short.format(numbers)}
        assert [s for s, _ in cuda_profile.name_stages([pool, coarse, other])][2] == want
    single = {**single, TIME: 1e-4}
    assert [s for s, _ in cuda_profile.name_stages([pool, coarse, single])][
        2
    ] == "refine row by row"


def test_what_is_no_report() -> None:
    """Nothing, where ncu wrote nothing."""
    assert list(cuda_profile.parse(["==ERROR== no permission"])) == []
    assert list(cuda_profile.split_calls([])) == []
    assert [row.shape.rows for row in profiled.profiled(quick=True)] == [1024]
