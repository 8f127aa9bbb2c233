"""`python -m benchmarks [case ...]`: run benchmarks, print their tables, write their CSV files."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

import hisa

from . import cases, deepgemm_peer, report, summary, tilelang_peer
from .harness import Bench

RESULTS = Path(__file__).parent / "results"


def find_cases() -> dict[str, ModuleType]:
    """Return the modules of `benchmarks.cases` by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    return {name: importlib.import_module(f"{cases.__name__}.{name}") for name in names}


def parse(arguments: list[str] | None, known: dict[str, ModuleType]) -> argparse.Namespace:
    """Parse the command line."""
    lines = [
        f"  {name:<16}{(module.__doc__ or '').splitlines()[0]}" for name, module in known.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks, print their tables, write their CSV files.",
        epilog="\n".join(["cases:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", help="which to run; all of them if none is named")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes: shows that it works, measures nothing"
    )
    parser.add_argument("--plot", action="store_true", help="also draw <case>.png (matplotlib)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for <case>.csv and <case>.md (default: benchmarks/results/local, which git "
        "ignores; none for a quick run)",
    )
    parser.add_argument(
        "--tilelang",
        type=Path,
        metavar="PATH",
        help="examples/dsa_hisa of TileLang's repository: cuda_prefill and cuda_hopper measure it "
        "too, where tilelang is installed",
    )
    parser.add_argument(
        "--deepgemm",
        type=Path,
        metavar="PATH",
        help="a clone of DeepGEMM with its submodules: these two measure it too, on an H100 or "
        "H200 with nvcc",
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="run nothing: put the table made from the committed files, or those in --out, into "
        "README.md, and draw its plot again",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.case if name not in known]
    if unknown:
        parser.error(f"case: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if options.tilelang and not (options.tilelang / tilelang_peer.FILE).is_file():
        parser.error(
            f"--tilelang: expected a folder with {tilelang_peer.FILE}, got {options.tilelang}"
        )
    if options.deepgemm and (file := deepgemm_peer.missing(options.deepgemm)):
        parser.error(f"--deepgemm: expected a folder with {file}, got {options.deepgemm}")
    return options


def run_case(
    name: str,
    module: ModuleType,
    *,
    quick: bool,
    plot: bool,
    out: Path | None,
    tilelang: Path | None,
    deepgemm: Path | None,
) -> None:
    """Run one case and write its files."""
    device = getattr(module, "DEVICE", "cpu")
    if device == "cuda" and not (hisa.build_info()["cuda"] and torch.cuda.is_available()):
        print(f"# {name}\n\nskipped: needs a GPU and a build with CUDA")
        return
    bench = Bench(name, quick=quick, device=device, tilelang=tilelang, deepgemm=deepgemm)
    title = (module.__doc__ or name).splitlines()[0]
    where = ", ".join(f"{key} {value}" for key, value in bench.environment.items() if value != "")
    bench.say(f"# {name}\n\n{title}\n\n{where}")
    module.run(bench)
    bench.print_goals()
    if out is not None:
        report.write_csv(out / f"{name}.csv", bench.rows())
        (out / f"{name}.md").write_text("\n".join(bench.text) + "\n")
        if hasattr(module, "draw"):
            module.draw(out)
        if plot:
            report.write_plot(out / f"{name}.png", title, bench.records)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    known = find_cases()
    options = parse(arguments, known)
    out = options.out or (None if options.quick else RESULTS / "local")
    if options.readme:
        results = options.out or RESULTS
        text = summary.summary(results)
        summary.update_readme(text)
        for name, module in known.items():
            if hasattr(module, "draw") and (results / f"{name}.csv").exists():
                module.draw(results)
        print(text)
        return 0
    if options.plot and out is None:
        print("--plot with --quick needs --out DIR", file=sys.stderr)
        return 2
    started = time.monotonic()
    for name in options.case or known:
        run_case(
            name,
            known[name],
            quick=options.quick,
            plot=options.plot,
            out=out,
            tilelang=options.tilelang,
            deepgemm=options.deepgemm,
        )
        print()
    print(f"{time.monotonic() - started:.0f} s in all", end="")
    print(f"; written to {out}" if out else "; nothing written (a quick run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
