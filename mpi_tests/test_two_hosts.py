"""Over real TCP: two hosts on one machine, made by benchmarks/two_hosts.py out of network namespaces of Linux.

Where these cannot be made (they take Linux, root, and `ip` and `tc`), the tests that need them are skipped, and the
reason is shown at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from tsp_ref.commands.rounds import NOISY, NOTHING
from tsp_ref.process import jobs

SCRIPT = str(jobs.ROOT / "benchmarks" / "two_hosts.py")
TRAIN = ("-m", "tsp_ref", "train", "--preset", "tiny", "--steps", "2", "--digest", *jobs.TEXT)
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")


def two_hosts(*arguments, limit=120.0, stop_when=None, **environment):
    """Run the script to its end, or to the SIGTERM that is sent once `stop_when` exists."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=jobs.ROOT, stdout=output, stderr=errors,
                               stdin=subprocess.DEVNULL, env=os.environ | environment, start_new_session=True)
        deadline, in_time = time.monotonic() + limit, True
        while job.poll() is None and in_time and not (stop_when and stop_when.exists()):
            time.sleep(0.05)
            in_time = time.monotonic() < deadline
        job.terminate()  # which lets it remove the hosts; does nothing after its end
        job.wait(60)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    assert in_time, f"no end after {limit:.0f} s\n" + "\n".join(texts)
    return jobs.Ended(job.returncode, *texts, limit - (deadline - time.monotonic()))


@pytest.fixture(scope="module")
def link():
    """Skips if there can be no two hosts here; fails if there can, but the link between them does not carry."""
    jobs.mpiexec()  # for want of MPI nothing is skipped
    ended = two_hosts("--check")
    if ended.code == 2:
        pytest.skip("no two hosts on this machine: " + ended.errors.strip().splitlines()[-1])
    assert ended.code == 0, ended.errors


def digest(text):
    """The line of a digest."""
    return next(line for line in text.splitlines() if line.startswith("digest"))


def megabytes_crossed(ended):
    """What the script says has crossed the link, one way and the other."""
    found = re.search(r"two_hosts: ([\d.]+) MB crossed the link one way, ([\d.]+) MB the other", ended.errors)
    return float(found[1]), float(found[2])


def hosts_left():
    """Hosts of runs that have ended; there may be others, of runs beside this one."""
    hosts = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [pid for pid in re.findall(r"two-hosts-(\d+)-", hosts) if not os.path.exists(f"/proc/{pid}")]


def test_two_hosts_compute_the_digest_of_one_process_and_what_they_send_crosses_the_link(link):
    alone = jobs.mpirun(1, *TRAIN, "--schedule", "single")
    ended = two_hosts("--", "python", *TRAIN)
    assert ended.code == 0, ended.output + ended.errors
    assert digest(ended.output) == digest(alone.output)
    table = [row.split() for row in ended.output.splitlines() if re.match(r"\s+[01]\s", row)]
    sent = [float(row[-1].removesuffix("M")) for row in table]
    assert len(sent) == 2 and all(
        crossed >= 0.99 * wanted > 1 for crossed, wanted in zip(megabytes_crossed(ended), sent)), ended.errors


def test_overlap_over_the_link_gives_times_and_a_figure_or_says_why_not(link, tmp_path):
    file = tmp_path / "overlap.json"
    ended = two_hosts("--", "python", "-m", "tsp_ref", "overlap", "--link", "none", "--preset", "tiny", "--repeats",
                      "3", "--json", str(file))
    assert ended.code == 0, ended.output + ended.errors
    rows = json.loads(file.read_text())
    assert [row["part"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert min(row[name] for name in ("comm_seconds", "compute_seconds", "both_seconds")) > 0
        figure = row["hidden_fraction"]
        assert row["verdict"] in (NOISY, NOTHING) if figure is None else 0 <= figure <= 1
        assert row["exposed_seconds"] < row["both_seconds"]


def test_two_ranks_a_host_start_as_four_ranks(link):
    ended = two_hosts("--ranks-per-host", "2", "--rate", "500mbit", "--", "python", *TRAIN, "--steps", "1")
    assert ended.code == 0 and "tsp on 4 ranks" in ended.output, ended.output + ended.errors


def test_the_command_s_exit_code_and_output_are_passed_on(link):
    ended = two_hosts("--", "python", "-m", "tsp_ref", "train", "--set", "seq_len=100")
    assert ended.code == 2 and ended.output == ""
    assert ended.errors.count("error: seq_len=100 is not a multiple of tiles=16") == 1


def test_a_stopped_run_leaves_neither_processes_nor_hosts(link, tmp_path):
    started = tmp_path / f"started_{os.getpid()}"
    waits = f"import time; open({str(started)!r}, 'w').close(); time.sleep(1000)"
    ended = two_hosts("--", "python", "-c", waits, stop_when=started)
    assert ended.code == 128 + signal.SIGTERM and ended.errors.endswith("interrupted\n"), ended.errors
    deadline = time.monotonic() + 10
    while started_by(started.name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started_by(started.name) == []
    assert hosts_left() == []


def started_by(mark):
    """The processes that have a mark in their command line."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if mark in line]


@ON_LINUX
def test_without_the_programs_that_make_hosts_the_package_that_brings_them_is_named(tmp_path):
    ended = two_hosts("--check", PATH=str(tmp_path))
    assert ended.code == 2
    assert ended.errors == "error: the program `ip` is missing: apt-get install iproute2\n"


@ON_LINUX
@pytest.mark.skipif(shutil.which("ip") is None, reason="the program `ip` is missing: apt-get install iproute2")
def test_what_the_system_refuses_is_one_line_with_the_remedy(tmp_path):
    refuses = tmp_path / "ip"
    refuses.write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
    refuses.chmod(0o755)
    ended = two_hosts("--check", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert ended.code == 2 and ended.errors.count("\n") == 1, ended.errors
    assert re.search("privileged|only root", ended.errors)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--rate", "fast", "--check"], "--rate fast is not valid: use none, or a rate as 1gbit"),
    (["--ranks-per-host", "0", "--check"], "--ranks-per-host 0 is not valid: use 1 or more"),
    ([], "no command: give one after --"),
])
def test_an_impossible_request_for_two_hosts_is_told_with_what_is_valid(arguments, said):
    ended = two_hosts(*arguments)
    assert ended.code == 2 and said in ended.errors
