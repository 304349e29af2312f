"""tsp_ref on a GPU: are the bits equal, does the memory agree with the accounts, and how fast is it against PyTorch.

    python benchmarks/gpu.py                                     everything, on a GPU of about 64 GB; writes gpu.json
    python benchmarks/gpu.py --set num_layers=2 hidden_size=2048 ffn_size=5504 num_heads=16 num_kv_heads=16
    python benchmarks/gpu.py --parts equality against_cpu memory
    python benchmarks/gpu.py --backend numpy --preset tiny --equal tiny --memory tiny     dry: no GPU is used

Four parts, on a GPU of NVIDIA's or AMD's that CuPy sees:

equality     `verify --backend cupy` under mpiexec: N ranks, which share the GPU if there is one, against a single
             process on it, every bit of every activation, gradient, weight and moment, in float32 and float64
against_cpu  losses and gradient norms of a few steps, against NumPy on the processor, by tolerance
memory       what CuPy's pool gave out in a step, at most and after it, against the accounts (NumPy's, which count every
             array), by tolerance: a pool rounds up, and the library may hold more than the program asks it for
step         a training step against PyTorch eager on the same GPU, by turns, in float32, TensorFloat-32 off in both;
             both models are in the GPU's memory at once. Without a PyTorch that sees the GPU only tsp_ref is timed

Where CuPy sees no GPU it says so in one line, and the exit code is 3. With --backend numpy the same code runs on the
processor, to try the benchmark itself; the output and the file say that no GPU was used. The exit code is 0 only if all
that was checked holds, else 1; each part that was not checked is named with the reason. One JSON file has all figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    Benchmark,
    Steps,
    UserError,
    by_turns,
    installed,
    jobs,
    json,
    rank_command,
    run,
    short,
    table_with,
    workers,
)

from tsp_ref.backends.gpu import BACKENDS, REPEATABLE, open_backend
from tsp_ref.backends.host import Backend
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.formulas.memory import alone
from tsp_ref.formulas.work import step_flops
from tsp_ref.model.config import PLANNING_ONLY, PRESETS, make_config

Part = dict[str, Any]

NO_GPU = 3
TORCH = str(Path(__file__).with_name("torch_llama.py"))
OURS, THEIRS = "tsp_ref, 1 process", "PyTorch eager"
# State of 16 bytes a parameter and the activations are some 25 GB, and PyTorch's beside it: together below 64 GB.
LARGE = ["vocab_size=32000", "hidden_size=4096", "num_layers=5", "num_heads=32", "num_kv_heads=32", "ffn_size=11008",
         "seq_len=4096"]
CPU_STEPS = 3
CPU_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
ASK_TORCH = "import torch; print(torch.cuda.is_available(), torch.__version__)"


def refused(options: argparse.Namespace) -> int:
    """Say in one line, and with a code of its own, that there is no GPU."""
    try:
        open_here(options)
    except UserError as error:
        print(f"no GPU: {error}", file=sys.stderr)
        return NO_GPU
    return 0


def open_here(options: argparse.Namespace) -> Backend:
    """The backend in this process, to ask what it is; what is timed and compared lives in children."""
    return open_backend(options.backend, VirtualWorld(1).communicators[0])


def main(benchmark: Benchmark) -> int:
    """All parts that are asked for."""
    options, used = benchmark.options, benchmark.options.backend != "numpy"
    if not used and options.preset == "gpu":
        raise UserError("--backend numpy is a dry run on the processor, for which --preset gpu is too large: use "
                        "--preset tiny")
    backend = open_here(options)
    benchmark.say(f"backend: {backend.describe()}")
    if not used:
        benchmark.say("[yellow]DRY RUN: no GPU was used.[/] It shows that the benchmark runs, and nothing about a GPU.")
    parts: dict[str, Part] = {}
    for name, work in PARTS.items():
        benchmark.say(f"\n[bold]{name}[/]")
        parts[name] = work(benchmark) if name in options.parts else unchecked("not asked for with --parts")
        if not parts[name]["checked"]:
            benchmark.say(f"not checked: {parts[name]['reason']}")
    holds = all(part["holds"] for part in parts.values() if part["checked"])
    checked = [name for name, part in parts.items() if part["checked"]]
    where = backend.describe() if used else "on the processor, NO GPU"
    benchmark.say(f"\n{'[green]all that was checked holds[/]' if holds else '[red]NOT ALL HOLDS[/]'} "
                  f"({', '.join(checked) or 'nothing'}; {where})")
    benchmark.finish("gpu", {
        "backend": options.backend, "gpu_used": used, "gpu": backend.describe() if used else None,
        "environment": {name: os.environ.get(name) for name in REPEATABLE}, **parts, "holds": holds})
    return int(not holds)


def unchecked(reason: str, **known: Any) -> Part:
    """A part about which nothing is claimed."""
    return {"checked": False, "reason": reason, "holds": None, **known}


# Bits.


def equality(benchmark: Benchmark) -> Part:
    """`verify` on real ranks, once for each size, dtype and N."""
    options, rows = benchmark.options, []
    for preset in options.equal:
        for dtype in options.dtypes:
            for n in options.ranks:
                equal, said = verified(options, preset, dtype, n)
                rows.append({"preset": preset, "dtype": dtype, "ranks": n, "equal": equal, "said": said})
                benchmark.say(f"{preset} {dtype} N={n}: {said}")
    return {"checked": True, "holds": all(row["equal"] for row in rows), "rows": rows}


def verified(options: argparse.Namespace, preset: str, dtype: str, n: int) -> tuple[bool, str]:
    """Whether every bit agreed, and the last thing that was said."""
    command = ["-m", "tsp_ref", "verify", "--backend", options.backend, "--preset", preset, "--dtype", dtype,
               "--steps", str(options.steps), *jobs.TEXT]
    try:
        ended = jobs.mpirun(n, *command, limit=options.patience)
    except AssertionError as error:  # it did not end
        return False, str(error).splitlines()[0]
    lines = [line for line in (ended.output + ended.errors).splitlines() if line.strip()] or ["nothing was said"]
    return ended.code == 0 and "EQUAL, every bit" in ended.output, lines[-1].strip()


# The processor's numbers.


def against_cpu(benchmark: Benchmark) -> Part:
    """The same single process on both."""
    rows = []
    for dtype in benchmark.options.dtypes:
        config = make_config("tiny", dtype=dtype)
        commands = {"gpu": (rank_command(config, "single", benchmark.options.backend), 1, 1),
                    "cpu": (rank_command(config, "single"), 1, 1)}
        with workers(commands) as started:
            steps = {name: Steps(worker) for name, worker in started.items()}
            for _ in range(CPU_STEPS):
                for each in steps.values():
                    each()
        gap, tolerance = largest_gap(steps["gpu"], steps["cpu"]), CPU_TOLERANCE[dtype]
        rows.append({"dtype": dtype, "largest_relative_gap": gap, "tolerance": tolerance, "holds": gap <= tolerance,
                     "losses": steps["gpu"].losses, "norms": steps["gpu"].norms})
        benchmark.say(f"{dtype}: losses and gradient norms of {CPU_STEPS} steps differ by at most {gap:.1e}, relative "
                      f"(allowed {tolerance:g})")
    return {"checked": True, "holds": all(row["holds"] for row in rows), "rows": rows}


def largest_gap(some: Steps, others: Steps) -> float:
    """The largest relative difference of losses and gradient norms of the same steps; not a number counts as much."""
    gaps = [abs(a / b - 1) for a, b in zip(some.losses + some.norms, others.losses + others.norms)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


# Memory.


def memory(benchmark: Benchmark) -> Part:
    """CuPy's pool against the accounts, on a model whose every array NumPy can count in seconds."""
    options = benchmark.options
    config = make_config(options.memory)
    commands = {"gpu": (rank_command(config, "single", options.backend), 1, 1),
                "cpu": (rank_command(config, "single"), 1, 1)}
    with workers(commands) as started:
        peak, pool = started["cpu"].ask("count")["peak_bytes"], started["gpu"].ask("device")
    part = compared(peak, pool["accounts_held"], pool["pool_peak"], pool["pool_held"], options.memory_tolerance)
    part["preset"] = options.memory
    if part["checked"]:
        benchmark.say(f"at most: accounts {short(peak)}B, pool {short(pool['pool_peak'])}B, {part['over_peak']:.3f}; "
                      f"after the step: {short(pool['accounts_held'])}B and {short(pool['pool_held'])}B, "
                      f"{part['over_held']:.3f} (allowed: 1 within {options.memory_tolerance:g})")
    return part


def compared(
    accounts_peak: int, accounts_held: int, pool_peak: int | None, pool_held: int | None, tolerance: float
) -> Part:
    """What a pool gave out against what the accounts say; bytes."""
    known = {"accounts_peak_bytes": accounts_peak, "accounts_held_bytes": accounts_held, "device_peak_bytes": pool_peak,
             "device_held_bytes": pool_held, "tolerance": tolerance}
    if pool_peak is None or pool_held is None:
        return unchecked("NumPy has no pool of its own to compare with", **known, over_peak=None, over_held=None)
    over_peak, over_held = pool_peak / accounts_peak, pool_held / accounts_held
    holds = max(abs(over_peak - 1), abs(over_held - 1)) <= tolerance
    return {"checked": True, "holds": holds, **known, "over_peak": over_peak, "over_held": over_held}


# Time.


def step(benchmark: Benchmark) -> Part:
    """A training step of the large model, with PyTorch's in turn."""
    config, options = benchmark.config, benchmark.options
    reason = no_torch(options.backend)
    commands = {OURS: (rank_command(config, "single", options.backend), 1, 1)}
    if not reason:
        commands[THEIRS] = ([TORCH, json.dumps(vars(config)), "1", "cuda"], 1, 1)
    with workers(commands) as started:
        steps = {name: Steps(worker) for name, worker in started.items()}
        spreads = by_turns(benchmark, steps)
        pool = started[OURS].ask("pool")["pool_bytes"]
    flops, tokens = sum(step_flops(config, alone(config)).values()), config.batch_size * config.seq_len
    table, rows = table_with("", "ms a step", "quartiles", "tokens/s", "TFLOP/s in products"), {}
    for name, spread in spreads.items():
        table.add_row(name, *spread.cells(), f"{tokens / spread.median:,.0f}",
                      f"{flops / spread.median / 1e12:.2f}" if name == OURS else "")
        rows[name] = spread.record() | {"losses": steps[name].losses, "norms": steps[name].norms}
    benchmark.say(table)
    part: Part = {"rows": rows, "flops": flops, "pool_bytes": pool, "over_torch": None, "largest_relative_gap": None,
                  "tolerance": options.tolerance}
    if reason:
        return unchecked(reason, **part)
    ratio, gap = spreads[OURS].over(spreads[THEIRS]), largest_gap(steps[OURS], steps[THEIRS])
    benchmark.say(f"over PyTorch {ratio.median:.3f} ({ratio.quartiles[0]:.3f} to {ratio.quartiles[1]:.3f}); losses and "
                  f"gradient norms differ by at most {gap:.1e}, relative (allowed {options.tolerance:g})")
    part |= {"over_torch": ratio.median, "over_torch_quartiles": list(ratio.quartiles), "largest_relative_gap": gap}
    return {"checked": True, "holds": gap <= options.tolerance, **part}


def no_torch(backend: str) -> str:
    """Why PyTorch cannot be compared with on the GPU; "" if it can. Asked in a process of its own, which ends."""
    if backend == "numpy":
        return "no GPU was used"
    if not installed("torch"):
        return "PyTorch is not installed"
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, cwd=ROOT)
    if asked.returncode:
        return f"PyTorch cannot be imported: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    sees, version = asked.stdout.split()
    return "" if sees == "True" else f"PyTorch {version} sees no GPU"


PARTS: dict[str, Callable[[Benchmark], Part]] = {
    "equality": equality, "against_cpu": against_cpu, "memory": memory, "step": step,
}


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    sizes = [name for name in PRESETS if name not in PLANNING_ONLY]
    parser.set_defaults(json="gpu.json")
    parser.add_argument("--backend", default="cupy", choices=BACKENDS,
                        help="cupy (default); numpy: a dry run on the processor")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is done (all)")
    parser.add_argument("--equal", nargs="+", default=["tiny", "small"], choices=sizes,
                        help="presets whose bits are compared (tiny small)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"], choices=["float32", "float64"],
                        help="in which bits and the processor's numbers are compared (both)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N",
                        help="ranks whose bits are compared with the single process's (1 2 4)")
    parser.add_argument("--steps", type=int, default=2, metavar="K", help="optimizer steps of `verify` (2)")
    parser.add_argument("--patience", type=float, default=600, metavar="S",
                        help="seconds after which one `verify` counts as failed (600)")
    parser.add_argument("--memory", default="bench", choices=sizes, help="preset whose memory is compared (bench)")
    parser.add_argument("--memory-tolerance", type=float, default=0.1, metavar="X",
                        help="how far the pool may be from the accounts, relative (0.1)")
    parser.add_argument("--tolerance", type=float, default=1e-3, metavar="X",
                        help="largest relative difference of losses and gradient norms from PyTorch's (1e-3)")


if __name__ == "__main__":
    run(__doc__, main, repeats=9, more=own_options, own_sizes={"gpu": LARGE}, refused=refused)
