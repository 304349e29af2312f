"""The commands as people type them, on N real ranks: what they print, what they refuse, and how they end."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import cache
from unittest import mock

import numpy as np
import pytest
import within
from cases import single_training

from tsp_ref.comm.control import gather_texts
from tsp_ref.model.config import make_config
from tsp_ref.process import arithmetic, jobs
from tsp_ref.process.jobs import ROOT, TEXT, begin, begin_words, collect, end, mpiexec, mpirun
from tsp_ref.training.collect import digest
from tsp_ref.training.data import load_text

DIGEST = re.compile(r"^digest sha256:([0-9a-f]{64})$", re.MULTILINE)
TINY = ("-m", "tsp_ref", "train", "--preset", "tiny", "--digest")
WARM_UP_AND_DECAY = (*TEXT, "--set", "warmup_steps=2", "--steps", "5")


def printed_digest(ended):
    """The digest that a run has printed as its last line."""
    assert ended.code == 0, ended.output + ended.errors
    assert DIGEST.fullmatch(ended.output.rstrip().splitlines()[-1]), ended.output
    return DIGEST.search(ended.output).group(1)


def digest_of(n, *arguments):
    """The digest that N ranks print."""
    return printed_digest(mpirun(n, *TINY, *arguments))


@pytest.fixture(scope="module")
def single_digest():
    """What one process prints."""
    return digest_of(1, *WARM_UP_AND_DECAY, "--schedule", "single")


def test_train_prints_the_single_process_s_digest(n, single_digest):
    assert digest_of(n, *WARM_UP_AND_DECAY) == single_digest


@pytest.mark.ranks(3)
def test_the_lines_of_the_readme_print_one_digest_of_twenty_steps_on_the_standard_library(n):
    assert digest_of(n, "--steps", "20") == digest_of(1, "--steps", "20", "--schedule", "single")


@pytest.mark.ranks(3)
@pytest.mark.parametrize("rank", ["0", "2"])
def test_messages_prints_the_step_of_any_rank_with_the_totals_of_a_virtual_one(n, rank):
    words = ("-m", "tsp_ref", "messages", *TEXT, "--part", "mlp", "--rank", rank)
    ended = mpirun(n, *words)
    virtual = subprocess.run([sys.executable, *words, "--ranks", str(n)], cwd=ROOT, capture_output=True, text=True,
                             timeout=60, env=jobs.environment())
    assert ended.code == virtual.returncode == 0, ended.errors + virtual.stderr
    assert f"tsp on 3 ranks, 4 blocks, 8 tiles: what rank {rank} posted" in ended.output
    assert ended.output.splitlines()[-1] == virtual.stdout.splitlines()[-1] and ended.output.count("posted for") == 1


@cache
def digest_of_one(dtype="float32"):
    """The single process's, after a few steps, computed by the caller."""
    config = make_config("tiny", steps=3, dtype=dtype)
    training = single_training(config, load_text([str(ROOT / TEXT[1])], config))
    for _ in range(config.steps):
        training.step()
    training.validate()  # as `train` does at its end
    return digest(training)


def require_digest_of_one(comm, *options, dtype="float32"):
    """That `train` with these options, called on every rank, prints the single process's digest, once."""
    ended = within.command(*TINY[2:], *TEXT, "--steps", "3", "--dtype", dtype, *options)
    if comm.rank == 0:
        assert printed_digest(ended) == digest_of_one(dtype), options
    else:
        assert (ended.code, ended.output) == (0, "")


@pytest.mark.ranks(4)
def test_in_float64_it_is_another_digest_and_the_single_process_s_too(comm):
    require_digest_of_one(comm, dtype="float64")
    assert comm.rank or digest_of_one("float64") != digest_of_one("float32")


SCHEDULES_AT = {1: ["tp", "sp", "tp+sp", "fsdp+sp"], 2: ["tp", "sp"], 3: ["tp+sp", "fsdp+sp"], 4: ["tp", "sp", "tp+sp"],
                8: ["tp+sp"]}
RECOMPUTE_AT = {1: "none", 2: "attention", 3: "full", 4: "none", 8: "none"}


def test_train_under_another_schedule_prints_the_same_digest(comm):
    """That every schedule computes the same at every N is tested without the command; here are the options."""
    for schedule in SCHEDULES_AT[comm.size]:
        require_digest_of_one(comm, "--schedule", schedule, "--recompute", RECOMPUTE_AT[comm.size])


@pytest.mark.ranks(8)
def test_train_on_another_mesh_than_the_squarest_prints_the_same_digest(comm):
    """That every mesh computes the same is tested without the command; here is the option."""
    require_digest_of_one(comm, "--schedule", "tp+sp", "--mesh", "4x2")


@pytest.mark.parametrize("options", ["--recompute attention", "--recompute full --layout contiguous"])
@pytest.mark.ranks(4)
def test_train_prints_the_same_digest_whatever_is_recomputed_and_whoever_holds_which_tiles(comm, options):
    require_digest_of_one(comm, *options.split())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.ranks(1, 4)
def test_verify_is_green(comm, dtype):
    require_green(within.command("verify", *TEXT, "--dtype", dtype), comm.size, comm.rank)


@pytest.mark.ranks(4)
def test_verify_as_it_is_typed_is_green(n):
    require_green(mpirun(n, "-m", "tsp_ref", "verify", *TEXT), n)


def require_green(ended, n, rank=0):
    """Every tensor of the preset is equal, and rank 0 says so."""
    assert ended.code == 0, ended.output + ended.errors
    if rank:
        assert ended.output == ""
        return
    assert re.search(rf"EQUAL, every bit: 86 tensors, {n} ranks? against one process, 2 steps$", ended.output.rstrip())
    assert "DIFFERS" not in ended.output
    for name in ("layers.1.attention.q ", "head.x ", "gradient of layers.0.mlp.down ", "updated embedding "):
        assert f"equal    {name}" in ended.output


@pytest.mark.parametrize("schedule", ["tp", "sp", "tp+sp"])
@pytest.mark.ranks(4)
def test_verify_is_green_under_another_schedule(comm, schedule):
    ended = within.command("verify", *TEXT, "--steps", "1", "--schedule", schedule)
    assert ended.code == 0, ended.output + ended.errors
    assert comm.rank or ended.output.rstrip().endswith(
        "EQUAL, every bit: 86 tensors, 4 ranks against one process, 1 step")


BROKEN_TREE = """
from tsp_ref.grid.tree import Tree
from tsp_ref.schedules import all_reduce, gradients, keys_values

def add(self, index, partial, level=0):
    waiting = self._waiting.pop(self._root, None)
    self._waiting[self._root] = partial if waiting is None else self.merge(waiting, partial)

def cover(leaves, part):
    return [Tree(leaves)._root] if part else []

def reaching(model, slots, slot):
    return [Tree(range(model.config.tiles))._root] if {*slots} & {*model.grid.readers(slot)} else []

BROKEN = [(Tree, "add", add), (all_reduce, "cover", cover), (gradients, "cover", cover),
          (keys_values, "reaching", reaching)]
"""

VERIFY_WITH_BROKEN_TREE = f"""
import sys
{BROKEN_TREE}
for where, name, broken in BROKEN:
    setattr(where, name, broken)
from tsp_ref.cli import main
sys.exit(main(["verify", *sys.argv[1:]]))
"""


def require_red(ended):
    """It is said that not all tensors are equal, and of a gradient that it is not."""
    assert ended.code == 1, ended.output + ended.errors
    assert re.search(r"NOT EQUAL: \d+ of 8\d tensors", ended.output)
    assert "DIFFERS  gradient of layers.0" in ended.output


@pytest.mark.ranks(4)
def test_verify_is_red_when_the_tree_sums_in_order_of_arrival(n):
    require_red(mpirun(n, "-c", VERIFY_WITH_BROKEN_TREE, *TEXT))


@pytest.mark.ranks(4)
def test_verify_is_red_in_float64_too(comm):
    names = {}
    exec(BROKEN_TREE, names)
    with ExitStack() as stack:
        for broken in names["BROKEN"]:
            stack.enter_context(mock.patch.object(*broken))
        ended = within.command("verify", *TEXT, "--dtype", "float64")
    assert ended.code == 1
    if comm.rank == 0:
        require_red(ended)


@pytest.mark.ranks(8)
def test_eight_ranks_show_an_eighth_each_in_the_table_at_the_end(comm):
    ended = within.command(*TINY[2:], *TEXT, "--steps", "2")
    assert ended.code == 0
    if comm.rank:
        return
    rows = [line.split() for line in ended.output.splitlines() if re.match(r"\s+[0-7]\s", line)]
    assert [row[0] for row in rows] == list("01234567")
    assert all(row.count("1/8.00") == 2 for row in rows), ended.output


# By the parser, by the configuration, by the launch, for what all ranks find or one, and in the midst of training.
REFUSED = {
    "--bogus": "unrecognized arguments: --bogus",
    "--set hidden_size=100": "hidden_size=100 is not a multiple of num_heads=16: use 96 or 128",
    "--text {short}": "holds 400 bytes: a sequence of seq_len=256 needs at least 514",
    "--text {empty}": "holds 0 bytes: a sequence of seq_len=256 needs at least 514",
    "--schedule single --text README.md": "--schedule single is one process, and this job has 4 ranks",
    "--ranks 4": "--ranks 4 asks for virtual ranks inside one process",
    "--log /no/such/folder/log --text README.md": "--log /no/such/folder/log cannot be written",
    "--preset tiny --set learning_rate=1e9 warmup_steps=0 --text README.md": "is not finite: lower learning_rate",
}


@pytest.mark.parametrize("request_", REFUSED)
@pytest.mark.ranks(4)
def test_an_impossible_request_is_one_line_and_exit_code_2(n, request_, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_bytes(b"word" * 100)
    ended = mpirun(n, "-m", "tsp_ref", "train", *request_.format(empty=empty, short=short).split())
    assert ended.code == 2, ended.output + ended.errors
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and REFUSED[request_] in lines[0], ended.errors
    assert "Traceback" not in ended.errors
    assert "Warning" not in ended.errors


ALSO_REFUSED = {
    "--preset huge": "preset=huge is unknown: use one of tiny, small, bench, smollm-135m, tinyllama-1.1b, llama-3-8b, "
                     "qwen3-0.6b, 7b",
    "--preset 7b": "preset=7b is only for planning",
    "--set num_heads=4": "num_heads=4 is not a multiple of num_kv_heads=8: use 8",
    "--set num_kv_heads=4": "num_kv_heads=4 is not a multiple of blocks=8: use 8",
    "--set seq_len=100": "seq_len=100 is not a multiple of tiles=16: use 96 or 112",
    "--set colour=3": "field colour is unknown: use one of vocab_size,",
    "--set blocks=2": "ranks=4 is not possible: with blocks=2, not every rank would hold a weight block",
    "--schedule sp --set tiles=2": "ranks=4 is not possible: with tiles=2, not every rank would hold a token tile",
    "--steps 0": "steps=0 is not valid: use a whole number of at least 1",
    "--steps many": "argument --steps: invalid int value: 'many'",
    "--text /no/such/file": "--text /no/such/file is neither a file nor a folder",
    "--dtype float16": "dtype=float16 is not valid: use float32 or float64",
    "--schedule fast": "--schedule fast is unknown: use one of single, tp, sp, tp+sp, fsdp+sp, tsp",
    "--schedule tp+sp --mesh 3x1": "--mesh 3x1 is not a mesh of 4 ranks: use one of 1x4, 2x2, 4x1",
    "--schedule tsp --mesh 2x2": "--mesh 2x2 is for --schedule tp+sp: tsp has no mesh, leave it out",
    "--layout diagonal": "--layout diagonal is unknown: use one of zigzag, contiguous",
    "--recompute some": "--recompute some is unknown: use one of none, attention, full",
}


@pytest.mark.parametrize("request_", ALSO_REFUSED)
@pytest.mark.ranks(4)
def test_an_impossible_request_is_one_line_of_one_rank_and_exit_code_2_of_all(comm, request_):
    """The command is called, not typed, so one job does for all requests; what N ranks say is seen rank by rank."""
    ended = within.command("train", *request_.split())
    assert ended.code == 2
    first, *others = gather_texts(comm, ended.errors)
    assert first.startswith("error: ") and first.count("\n") == 1 and ALSO_REFUSED[request_] in first
    assert others == [""] * (comm.size - 1)


@pytest.mark.ranks(2)
def test_ranks_that_are_given_other_texts_are_told_so_and_not_compared(n, tmp_path):
    parts = []
    for name in "ab":
        (tmp_path / name).write_text(name * 1000)
        words = [sys.executable, "-m", "tsp_ref", "verify", "--text", str(tmp_path / name)]
        parts.append(["-n", str(n // 2), *words])
    job = begin_words(mpiexec(), *parts[0], ":", *parts[1])
    job.wait(60)
    ended = collect(job)
    assert ended.code == 2 and "EQUAL" not in ended.output, ended.output + ended.errors
    assert ended.errors.count(f"error: rank 1 read another text than rank 0 from {tmp_path / 'a'}") == 1


FULL_ON_RANK_0 = """
import contextlib, os, sys
from tsp_ref.cli import main
from tsp_ref.comm.launcher import launcher_rank

with contextlib.ExitStack() as stack:
    if launcher_rank() == 0:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open("/dev/full", "w"))))
    code = main(sys.argv[1:])
sys.exit(code)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("program", [("-c", FULL_ON_RANK_0, "train"), ("-m", "tsp_ref", "train", "--log", "/dev/full")])
@pytest.mark.ranks(4)
def test_an_output_or_a_log_that_is_full_ends_all_ranks_with_one_line(n, program):
    ended = mpirun(n, *program, "--preset", "tiny", "--steps", "3", *TEXT)
    said = "--log /dev/full" if "--log" in program else "standard output"
    assert ended.code == 2, ended.output + ended.errors
    assert ended.errors.count("error: ") == 1 and "Traceback" not in ended.errors
    assert f"error: on rank 0: {said} cannot be written: No space left on device" in ended.errors


@pytest.mark.ranks(4)
def test_the_version_and_the_help_without_a_command_are_printed_once(n):
    for words, line in ((["--version"], f"NumPy {np.__version__}"), ([], "usage: tsp-ref ")):
        ended = mpirun(n, "-m", "tsp_ref", *words)
        assert ended.code == 0 and ended.output.count(line) == 1, ended.output + ended.errors


def test_virtual_ranks_run_in_a_job_of_one_process():
    ended = mpirun(1, *TINY, *TEXT, "--steps", "1", "--ranks", "2")
    assert ended.code == 0 and "tsp on 2 ranks" in ended.output, ended.errors


@pytest.mark.ranks(4)
def test_debug_shows_where_a_refusal_came_from(n):
    ended = mpirun(n, "-m", "tsp_ref", "train", "--debug", "--set", "seq_len=100")
    assert ended.code == 2 and ended.errors.count("Traceback") == 1


@pytest.mark.ranks(3)
def test_blas_threads_of_the_user_s_are_kept_and_bits_are_not_claimed_for_them(n):
    ended = mpirun(n, *TINY, *TEXT, OPENBLAS_NUM_THREADS="2", OMP_NUM_THREADS="1")
    assert ended.code == 2 and "BLAS would use 2 threads (OPENBLAS_NUM_THREADS=2)" in ended.errors


def of_two_kinds(*words):
    """A job of two processes whose BLAS takes them for processors of two kinds."""
    python = [sys.executable, "-m", "tsp_ref", *words]
    kinds = [["-n", "1", "env", f"OPENBLAS_CORETYPE={kind}", *python] for kind in ("Nehalem", "Sandybridge")]
    job = begin_words(jobs.mpiexec(), *kinds[0], ":", *kinds[1])
    try:
        job.wait(60)
    finally:
        if job.poll() is None:
            end(job)
    return collect(job)


@pytest.mark.skipif(platform.machine() != "x86_64" or "openblas" not in arithmetic.description()["BLAS"],
                    reason="needs OpenBLAS on x86-64, which can be told what kernel to choose")
def test_processes_whose_blas_chose_different_kernels_are_not_compared_bit_by_bit():
    refused = of_two_kinds("verify", *TEXT)
    assert refused.code == 2 and refused.errors.count("error: ") == 1
    assert re.search("error: verify compares bits, and not all ranks compute alike: BLAS: openblas .* for Nehalem on "
                     "rank 0, openblas .* for Sandybridge on rank 1; bits of products: ", refused.errors)
    trained = of_two_kinds("train", "--preset", "tiny", "--steps", "1", *TEXT)
    assert trained.code == 0 and trained.output.count("warning: not all ranks compute alike") == 1


ONE_RANK_FAILS = """
import sys
import numpy as np
from tsp_ref.{how}

def main(comm):
    if comm.rank == comm.size - 1:
        {fail}
    comm.Wait(comm.Irecv(np.zeros(1), (comm.rank + 1) % comm.size, 1))
    return 0

{run}
"""
PROGRAMS = {
    "program": dict(how="process.launch import start", run="sys.exit(start(main))"),
    "bare script": dict(how="comm.mpi import open_world", run="main(open_world())"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.ranks(2, 4)
def test_an_exception_on_one_rank_ends_the_job_with_one_traceback(n, program, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_FAILS.format(fail="raise ZeroDivisionError('on purpose')", **PROGRAMS[program]))
    ended = mpirun(n, str(script))
    assert ended.code != 0
    assert ended.errors.count("Traceback") == 1 and ended.errors.count("ZeroDivisionError: on purpose") == 1
    assert f"rank {n - 1} of {n} failed" in ended.errors


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.ranks(2, 4)
def test_a_refusal_by_one_rank_alone_ends_the_job_with_one_line(n, first, tmp_path):
    script = tmp_path / "script.py"
    fail = "from tsp_ref.errors import UserError; raise UserError('colour=blue is not valid: use red')"
    program = ONE_RANK_FAILS.format(fail=fail, **PROGRAMS["program"])
    script.write_text(program.replace("comm.size - 1", "0") if first else program)
    ended = mpirun(n, str(script))
    assert ended.code != 0
    assert ended.errors.count(f"error: on rank {0 if first else n - 1}: colour=blue is not valid: use red") == 1
    assert ended.errors.count("colour=blue") == 1
    assert "Traceback" not in ended.errors


@pytest.mark.ranks(4)
def test_an_exception_on_all_ranks_is_shown_once(n, tmp_path):
    script = tmp_path / "script.py"
    program = ONE_RANK_FAILS.format(fail="pass", **PROGRAMS["program"])
    script.write_text(program.replace("    comm.Wait", "    raise ZeroDivisionError('on purpose')\n    comm.Wait"))
    ended = mpirun(n, str(script))
    assert ended.code != 0
    assert ended.errors.count("Traceback") == 1


@pytest.mark.ranks(2, 4)
def test_leaving_early_with_an_exit_code_ends_the_job(n, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_FAILS.format(fail="sys.exit(3)", **PROGRAMS["program"]))
    assert mpirun(n, str(script)).code != 0


def ranks_alive(mark):
    """The processes that have a mark in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if mark.encode() in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("busy", ["training", "waiting for ever"])
@pytest.mark.ranks(4)
def test_ctrl_c_ends_the_job_and_leaves_nothing_running(n, busy, tmp_path):
    mark = f"ctrl_c_{os.getpid()}_{busy.split()[0]}"
    if busy == "training":
        log = tmp_path / mark
        job = begin(n, "-m", "tsp_ref", "train", *TEXT, "--steps", "100000", "--log", str(log))
        started = log
    else:
        started = tmp_path / "started"
        script = tmp_path / f"{mark}.py"
        script.write_text(ONE_RANK_FAILS.format(fail=f"open({str(started)!r}, 'w').close()", **PROGRAMS["program"]))
        job = begin(n, str(script))
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.exists() and job.poll() is None
        time.sleep(1)
        os.killpg(job.pid, signal.SIGINT)  # what a terminal does
        job.wait(20)
    finally:
        if job.poll() is None:
            end(job)
    ended = collect(job)
    assert ended.code != 0
    assert "Traceback" not in ended.errors
    deadline = time.monotonic() + 10
    while ranks_alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_alive(mark) == []


STARTING = """
import os, sys, time
import tsp_ref
from tsp_ref.comm.mpi import open_world
open(sys.argv[1] + os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "")), "w").close()
{wait}
"""
IMPORTING = "while True: time.sleep(0.01)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("some", ["nobody", "some"])
@pytest.mark.ranks(4)
def test_ctrl_c_while_modules_load_ends_the_job_without_a_traceback(n, some, tmp_path):
    """Also where some ranks are in the start of MPI already, which waits for the others."""
    wait = IMPORTING if some == "nobody" else f"if sys.argv[1:] and os.environ.get('PMI_RANK', '0') < '2': {IMPORTING}"
    script = tmp_path / f"ctrl_c_early_{os.getpid()}_{some}.py"
    script.write_text(STARTING.format(wait=f"{wait}\nopen_world()" if some == "some" else wait))
    job = begin(n, str(script), str(tmp_path / "rank"))
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("rank*"))) < n and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)  # until those that can have come to the start of MPI
        os.killpg(job.pid, signal.SIGINT)
        job.wait(20)
    finally:
        if job.poll() is None:
            end(job)
    ended = collect(job)
    assert ended.code != 0 and "Traceback" not in ended.errors
    deadline = time.monotonic() + 10
    while ranks_alive(script.name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_alive(script.name) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.ranks(4)
def test_sigterm_to_one_rank_ends_the_job_with_one_line(n, tmp_path):
    mark = f"sigterm_{os.getpid()}"
    log = tmp_path / mark
    job = begin(n, "-m", "tsp_ref", "train", "--preset", "tiny", *TEXT, "--steps", "100000", "--log", str(log))
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = [pid for pid in ranks_alive(mark) if "python" in os.readlink(f"/proc/{pid}/exe")]
        assert len(ranks) == n
        os.kill(ranks[1], signal.SIGTERM)
        job.wait(20)
    finally:
        if job.poll() is None:
            end(job)
    ended = collect(job)
    assert ended.code != 0 and "Traceback" not in ended.errors
    assert ended.errors.count("was told to end (SIGTERM), and ends the job") == 1


@pytest.mark.ranks(1, 4)
def test_help_is_printed_once(n):
    ended = mpirun(n, "-m", "tsp_ref", "train", "--help")
    assert ended.code == 0 and ended.output.count("usage:") == 1
    assert "num_kv_heads" in ended.output


def test_a_launcher_of_another_mpi_is_noticed_and_named(tmp_path):
    """A launcher of another vendor sets its variables, and the library ignores them: N times rank 0 of 1."""
    foreign = {"MPICH": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")}
    rank, size = foreign.get(jobs.vendor().split()[0], ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"))
    ended = subprocess.run(
        [sys.executable, "-m", "tsp_ref", "train"], capture_output=True, text=True, timeout=60,
        env=jobs.environment(**{rank: "0", size: "4"}))
    assert ended.returncode == 2
    assert "mpirun started 4 ranks, but each finds itself rank 0 of 1" in ended.stderr
