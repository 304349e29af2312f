"""Every benchmark runs, on a tiny model: what it writes is whole and finite, and no time is asserted."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import within

from tsp_ref.cli import _parser
from tsp_ref.model.config import make_config
from tsp_ref.process.jobs import ROOT, Ended, environment

LIMIT = 120  # seconds; on a machine that is busy

needs_torch = pytest.mark.skipif(util.find_spec("torch") is None, reason="PyTorch, to compare with, is not installed")

EVERY = {
    "vs_torch": ("vs_torch", "--ranks", "1"),
    "scaling": ("scaling", "--schedules", "tsp", "tp+sp"),
    "roofline": ("roofline", "--shapes"),
    "grid_cost": ("grid_cost", "--grids", "1x1", "8x16"),
    "tile_lengths": ("tile_lengths", "--lengths", "8", "9", "14", "--lengths", "16", "13"),
}
NAMES = [pytest.param(name, marks=needs_torch) if name == "vs_torch" else name for name in EVERY]


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path("benchmarks") / f"{name}.py"), *arguments]


def ended(*command_line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)


def tiny(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ended(*command(name, "--preset", "tiny", "--set", "num_layers=1", "--repeats", "1", *arguments))


def called(name: str, *arguments: str) -> Ended:
    """As typed, but in this process: what only helps or refuses takes less time than a start."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return within.script(f"benchmarks/{name}.py", *arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def numbers(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name -> what a benchmark printed and wrote; each is run once."""
    folder, found = tmp_path_factory.mktemp("benchmarks"), {}

    def result(name):
        if name not in found:
            file = folder / name
            done = tiny(*EVERY[name], "--json", str(file))
            assert done.returncode == 0, done.stdout + done.stderr
            found[name] = done.stdout, json.loads(file.read_text())
        return found[name]

    return result


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_writes_its_figures_its_machine_and_its_model(name, results):
    output, written = results(name)
    assert written["benchmark"] == name and written["config"]["hidden_size"] == 64
    assert {"cpu", "cores", "blas", "versions", "load_at_start", "load_at_end"} <= set(written["machine"])
    assert written["machine"]["cpu"] in output and "load of the machine" in output
    assert all(map(math.isfinite, numbers(written))) and len(numbers(written)) > 40


@needs_torch
def test_pytorch_computes_the_same(results):
    _, written = results("vs_torch")
    assert list(written["rows"]) == ["tsp_ref, 1 process", "PyTorch, 1 thread"]
    assert 0 < written["largest_relative_gap"] < 1e-5
    assert written["rows"]["tsp_ref, 1 process"]["over_torch"] > 0
    assert all(len(row["losses"]) == len(row["norms"]) == 2 for row in written["rows"].values())


OPTIONS = ("--set", "num_heads=16", "tied_head=true", "batch_size=1", "head_dim=10", "qkv_bias=true", "qk_norm=true",
           "rope_factor=8", "rope_original_length=16", "vocab_size=301")


@pytest.mark.parametrize("arguments", [pytest.param(("vs_torch", "--ranks", "2", *OPTIONS), marks=needs_torch),
                                       ("grid_cost", "--grids", "8x8", *OPTIONS)])
def test_a_difference_beyond_the_tolerance_is_said_and_exits_with_1(arguments, tmp_path):
    done = tiny(*arguments, "--tolerance", "0", "--json", str(tmp_path / "json"))
    assert done.returncode == 1 and "NOT THE SAME COMPUTATION" in done.stdout, done.stdout + done.stderr
    assert 0 < json.loads((tmp_path / "json").read_text())["largest_relative_gap"] < 1e-5  # it is only rounding


def test_scaling_has_a_row_for_the_single_process_and_for_each_schedule_at_each_n(results):
    rows = results("scaling")[1]["rows"]
    assert [(row["schedule"], row["ranks"]) for row in rows] == [
        ("single", 1), ("tsp", 1), ("tsp", 2), ("tp+sp", 1), ("tp+sp", 2)]
    assert all(row["speedup"] == 1 for row in rows if row["ranks"] == 1)
    held = {(row["schedule"], row["ranks"]): row["peak_bytes"] for row in rows}
    assert held["tsp", 2] < 0.7 * held["single", 1]


def test_the_roofline_has_every_product_of_the_step(results):
    from tsp_ref.formulas.memory import alone
    from tsp_ref.formulas.work import step_flops

    output, written = results("roofline")
    config = make_config("tiny", num_layers=1)
    assert written["flops"] == sum(step_flops(config, alone(config)).values())
    assert written["flops"] == sum(row["calls"] * row["flops_each"] for row in written["products"])
    assert written["flops"] == sum(row["flops"] for row in written["functions"])
    functions = {row["function"] for row in written["functions"]}
    assert {row["function"] for row in written["products"]} <= functions and "sums in trees" in functions
    assert {row["form"] for row in written["products"]} >= {"NN", "NT", "TN"}
    assert "the target is at most 1.33" in output


def test_the_grid_s_cost_is_over_the_textbook_model(results):
    rows = results("grid_cost")[1]["rows"]
    assert [row["grid"] for row in rows] == ["naive", "1x1", "8x16"] and rows[0]["over_naive"] == 1
    assert results("grid_cost")[1]["largest_relative_gap"] < 1e-5


def test_a_tile_s_length_is_over_the_first_of_its_group_and_per_token(results):
    output, written = results("tile_lengths")
    rows = written["rows"]
    assert [(row["length"], row["first"]) for row in rows] == [(8, 8), (9, 8), (14, 8), (16, 16), (13, 16)]
    assert all((row["over_first"] == 1) for row in rows if row["length"] == row["first"])
    times = {row["length"]: row["median_seconds"] for row in rows}
    assert all(row["over_first"] == pytest.approx(times[row["length"]] / times[row["first"]]) for row in rows)
    assert written["largest_ratio"] == max(row["over_first"] for row in rows)
    assert "the goal is at most 1.15" in output and set(written["losses"]) == {"8", "9", "14", "16", "13"}


@pytest.mark.parametrize("name", [*EVERY, "gpu"])
def test_help_says_what_is_measured_and_how_to_begin(name):
    done = called(name, "--help")
    assert done.code == 0 and f"python benchmarks/{name}.py" in done.output and "exit code" in done.output


@pytest.mark.parametrize(("arguments", "message"), [
    (("roofline", "--repeats", "0"), "--repeats 0 is not valid: use 1 or more"),
    (("grid_cost", "--json", "/no/such/folder/file"), "--json /no/such/folder/file cannot be written"),
    (("grid_cost", "--grids", "8by16"), "--grids 8by16 is not of the form GxT"),
    (("grid_cost", "--grids", "3x16"), "num_kv_heads=8 is not a multiple of blocks=3"),
    (("gpu", "--backend", "numpy", "--preset", "gpu"), "--preset gpu is too large: use --preset tiny"),
    (("tile_lengths", "--lengths", "8", "0"), "--lengths 0 is not valid: a tile has 1 token or more"),
    (("tile_lengths", "--tiles", "0"), "--tiles 0 is not valid: use 1 or more"),
    (("scaling", "--ranks", "99"), "--ranks 99 is not possible: use 1 to 8"),
    (("roofline", "--set", "hidden_size=many"), "hidden_size=many is not valid: use a whole number"),
])
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message):
    name, *others = arguments
    done = called(name, "--preset", "tiny", *others)
    assert done.code == 2 and done.errors.startswith("error: ") and done.errors.count("\n") == 1
    assert message in done.errors


WITHOUT_TORCH = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
sys.argv = ["vs_torch.py", "--preset", "tiny"]
runpy.run_path("benchmarks/vs_torch.py", run_name="__main__")
"""


def test_without_pytorch_the_comparison_says_how_to_get_it():
    done = ended(sys.executable, "-c", "import sys; sys.path.insert(0, 'benchmarks')\n" + WITHOUT_TORCH)
    assert done.returncode == 2
    assert done.stderr == "error: PyTorch is not installed: pip install -e '.[bench]', or pip install torch\n"


# The benchmark of a GPU, where there is none.

DRY = ("--backend", "numpy", "--preset", "tiny", "--set", "num_layers=1", "--equal", "tiny", "--memory", "tiny",
       "--dtypes", "float32", "--ranks", "2", "--steps", "1", "--repeats", "1")

WITHOUT_CUPY = """
import runpy, sys
sys.modules["cupy"] = None
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def test_without_a_gpu_its_benchmark_says_so_in_one_line_and_exits_with_3(tmp_path):
    done = ended(sys.executable, "-c", "import sys; sys.path.insert(0, 'benchmarks')\n" + WITHOUT_CUPY,
                 "--json", str(tmp_path / "gpu.json"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("no GPU: --backend cupy needs CuPy") and done.stderr.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


def test_a_dry_run_of_the_gpu_s_benchmark_writes_every_field_and_claims_no_gpu(tmp_path):
    done = ended(*command("gpu", *DRY, "--json", str(tmp_path / "json")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN: no GPU was used." in done.stdout and "on the processor, NO GPU)" in done.stdout
    written = json.loads((tmp_path / "json").read_text())
    assert (written["benchmark"], written["backend"]) == ("gpu", "numpy")
    assert written["gpu_used"] is False and written["gpu"] is None
    assert set(written["environment"]) >= {"CUPY_TF32", "CUBLAS_WORKSPACE_CONFIG", "ROCBLAS_DEFAULT_ATOMICS_MODE"}
    assert written["holds"] is True and all(map(math.isfinite, numbers(written)))
    row, = written["equality"]["rows"]
    assert row["equal"] and row["said"].startswith("EQUAL, every bit") and row["ranks"] == 2
    row, = written["against_cpu"]["rows"]
    assert row["largest_relative_gap"] == 0 and len(row["losses"]) == len(row["norms"]) == 3
    assert written["memory"]["reason"] == "NumPy has no pool of its own to compare with"
    assert written["memory"]["accounts_peak_bytes"] > written["memory"]["accounts_held_bytes"] > 0
    assert written["step"]["reason"] == "no GPU was used" and written["step"]["flops"] > 0
    assert list(written["step"]["rows"]) == ["tsp_ref, 1 process"]
    for name in ("memory", "step"):
        assert written[name]["checked"] is False and written[name]["holds"] is None


def test_what_does_not_hold_on_a_gpu_is_said_and_exits_with_1(tmp_path):
    """Here because it does not end in time; the parts that are not asked for are named."""
    done = ended(*command("gpu", *DRY, "--parts", "equality", "--patience", "0.01", "--json", str(tmp_path / "json")))
    assert done.returncode == 1 and "NOT ALL HOLDS (equality;" in done.stdout, done.stdout + done.stderr
    assert "no end after 0 s" in done.stdout and done.stdout.count("not asked for with --parts") == 3
    assert json.loads((tmp_path / "json").read_text())["holds"] is False


@pytest.fixture
def gpu_modules(monkeypatch):
    """The benchmark's own modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu"), importlib.import_module("device")


@pytest.mark.parametrize(("peak", "held", "holds"), [
    (1000, 500, True), (1090, 540, True), (0, 0, False), (1200, 500, False), (1000, 600, False), (800, 500, False)])
def test_a_pool_is_held_to_the_accounts_in_both_directions(peak, held, holds, gpu_modules):
    part = gpu_modules[0].compared(1000, 500, peak, held, 0.1)
    assert part["checked"] and part["holds"] is holds and part["over_peak"] == peak / 1000


def test_a_watch_over_a_pool_knows_what_it_gave_out_at_most_and_now(gpu_modules):
    pool = gpu_modules[1].Pool()
    hook = gpu_modules[1].hook_into(pool, object)
    assert (pool.peak, pool.used) == (0, 0)
    for size in (512, 1024):
        hook.malloc_postprocess(device_id=0, size=1, mem_size=size, mem_ptr=0, pmem_id=0)
    hook.free_postprocess(device_id=0, mem_size=512, mem_ptr=0, pmem_id=0)
    assert (pool.peak, pool.used) == (1536, 1024)


@pytest.mark.parametrize("aware", [False, True])
def test_the_slurm_file_runs_what_the_program_accepts(aware, tmp_path):
    """A stand-in for srun says what it was to start."""
    for name, text in (("srun", '#!/bin/bash\nprintf "%s " "$@"; echo'), ("activate", "")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "two", "VENV": str(tmp_path),
             "GPU_AWARE": str(int(aware)), "SRUN_MPI": "pmix", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "benchmarks/mi300x.sbatch"], cwd=ROOT, env=environment(**slurm), capture_output=True,
                          text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "-m tsp_ref" in line]
    assert [words[:5] for words in lines] == [["--mpi=pmix", "python", "-m", "tsp_ref", name]
                                              for name in ("verify", "train")]
    for words in lines:
        options = _parser().parse_args(words[4:])
        assert (options.backend, options.gpu_aware) == ("cupy", aware)
        assert make_config(options.preset, options.settings).max_ranks == 16


def running(mark: str) -> list[str]:
    """The command lines that have this mark in them."""
    lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if mark in line]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_benchmark_that_is_ended_leaves_nothing_running(number, code):
    seed = f"26042{int(number):04}"  # by which its ranks are found: a benchmark's line says seed=, a rank's "seed":
    job = subprocess.Popen(
        command("scaling", "--preset", "tiny", "--set", f"seed={seed}", "--repeats", "9999", "--schedules", "tsp"),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Ctrl-C is ignored by what a shell has started in the background, as pytest may be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert any(line.startswith("round 1/") for line in job.stdout)
        assert len(running(f'"seed": {seed}')) >= 4  # of the single process, of TSP on one rank and on two
        job.send_signal(number)
        _, errors = job.communicate(timeout=LIMIT)
        assert job.returncode == code
        assert "Traceback" not in errors and ("interrupted" in errors) == (number == signal.SIGINT)
        until = time.monotonic() + LIMIT
        while running(f'"seed": {seed}') and time.monotonic() < until:
            time.sleep(0.1)
        assert running(f'"seed": {seed}') == []
    finally:
        job.kill()
