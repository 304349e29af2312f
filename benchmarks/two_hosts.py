"""Two hosts on one machine: runs an MPI command between two network namespaces of Linux, over real TCP.

    sudo "$(which python)" benchmarks/two_hosts.py -- python -m tsp_ref overlap --link none

Between ranks of one machine a message is a copy in memory, made by the processor that should compute meanwhile: there
is nothing to hide. Here half of the ranks live in one network namespace and half in another. Nothing joins the two but
a pair of virtual Ethernet devices, each of which sends no faster than --rate. So a message takes its time and needs
little of the processor, as between two machines; what is simulated is the wire alone.

Before the command, a probe with the same launcher and environment sends a known number of bytes, and the devices'
counters must show them: MPI is good at finding a way round a slow link. After it, what has crossed the link is told.
The link's speed is limited, its latency is not: that is what this machine needs to pass a packet on. The output of the
command is left alone: what this script has to say goes to stderr.

Exit code: the command's; 2 if it cannot be run here, with the remedy; 1 if the link does not carry what it should; 130
after Ctrl-C. Neither a process nor a namespace is left behind; after a kill -9, until the script is used again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tsp_ref.process import jobs

ADDRESSES = ("10.0.0.1", "10.0.0.2")  # seen by nobody but the two namespaces, so the same in every run
NETWORK = "10.0.0.0/24"
DEVICE = "veth0"
BURST = "128kb"  # what a device may send at once; a few packets as TCP hands them on, of up to 64 kB
RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
PROBE = 4 << 20  # bytes sent each way by each pair of ranks

# Of the networks that the MPI libraries know, TCP over the link; other ways are found first, or lead nowhere.
TCP_ONLY = {
    "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE,  # MPICH over UCX
    "FI_PROVIDER": "tcp", "FI_TCP_IFACE": DEVICE,  # MPICH over libfabric
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_btl_tcp_if_include": NETWORK,
    "PRTE_MCA_prte_if_include": NETWORK,
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

# A host has a name (uts) and shared memory (ipc) of its own too: by these ranks find each other past the link.
NAMED = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'

ALLOWED = "let this user make networks: run it as root of the machine, or in a container started with --privileged"

# Stands in for ssh: leaves out options and the host's name, and runs the rest on the second host.
SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
shift
exec {on_second_host} sh -c "$*"
"""


class CannotRun(Exception):
    """Why it cannot be run here, and the remedy, in one line."""


class Stopped(Exception):
    """A signal asked to stop."""


def main() -> int:
    """Parse the command line, run, and return the exit code."""
    options = parse()
    if options.probe:
        return probe()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        check_machine(options.rate)
        with two_hosts(options.rate) as hosts:
            return check_link(hosts, options) or (0 if options.check else run(hosts, options))
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as signalled:
        print("interrupted", file=sys.stderr)
        return 128 + signalled.args[0]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="two_hosts.py [--rate RATE] [--ranks-per-host N] [--check] -- COMMAND ...")
    parser.add_argument("--rate", default="1gbit", help="of the link, in each direction: a number of kbit, mbit or gbit"
                        " a second, or `none` for no limit (default: 1gbit)")
    parser.add_argument("--ranks-per-host", type=int, default=1, metavar="N", help="half of all ranks (default: 1)")
    parser.add_argument("--check", action="store_true", help="only find out whether it can be run, and try the link")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)  # what the ranks of the probe run
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="what each rank runs, without mpirun")
    options = parser.parse_args()
    if options.ranks_per_host < 1:
        parser.error(f"--ranks-per-host {options.ranks_per_host} is not valid: use 1 or more")
    if bits_per_second(options.rate) == 0:
        parser.error(f"--rate {options.rate} is not valid: use none, or a rate as 1gbit, 200mbit or 500kbit")
    if not (options.command or options.check or options.probe):
        parser.error("no command: give one after --, as in `two_hosts.py -- python -m tsp_ref overlap --link none`")
    return options


def bits_per_second(rate: str) -> float:
    """A rate as a number; infinity for none, 0 if it is no rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]bit)", rate)
    return float("inf") if rate == "none" else float(match[1]) * RATES[match[2]] if match else 0.0


def stop(number: int, frame: FrameType | None) -> None:
    """The handler of signals."""
    raise Stopped(number)


def check_machine(rate: str) -> None:
    """Raise `CannotRun` for all that can be known before anything is made."""
    if not sys.platform.startswith("linux"):
        raise CannotRun(f"network namespaces are Linux's, and this is {sys.platform}: use `--link 125MB/s` of tsp_ref, "
                        "which slows any link down")
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
    for program in ["ip", "unshare"] + ["tc"] * (rate != "none"):
        if shutil.which(program) is None:
            raise CannotRun(f"the program `{program}` is missing: apt-get install {packages[program]}")
    if os.geteuid() != 0:
        raise CannotRun(f"only root may make network namespaces: sudo {sys.executable} {shlex.join(sys.argv)}")
    try:
        jobs.mpiexec()
    except RuntimeError as error:
        raise CannotRun(str(error)) from None


# ---- the hosts and their link


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[tuple[str, str]]:
    """Two namespaces and the link between them; in the end, however that comes, all that ran there and they are gone.

    They are named after this process, so that several such runs do not meet.
    """
    remove_orphans()
    hosts = (f"two-hosts-{os.getpid()}-a", f"two-hosts-{os.getpid()}-b")
    try:
        for host in hosts:
            must(ALLOWED, "ip", "netns", "add", host)
        must("know virtual Ethernet devices: modprobe veth", "ip", "link", "add", DEVICE, "netns", hosts[0],
             "type", "veth", "peer", "name", DEVICE, "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES):
            for words in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", DEVICE],
                          ["link", "set", DEVICE, "up"]):
                must(ALLOWED, "ip", "-n", host, *words)
            if rate != "none":
                must("limit the rate (tc's token bucket filter): modprobe sch_tbf, or use --rate none",
                     "tc", "-n", host, "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", rate, "burst", BURST,
                     "latency", "50ms")
        yield hosts
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for host in hosts:
            remove(host)


def must(able: str, *command: str) -> None:
    """Run a command that makes a part of the hosts; what it fails for is what the kernel is not `able` to do."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
        able = ALLOWED if "not permitted" in said else able
        raise CannotRun(f"`{command[0]}` says \"{said}\": this machine does not {able}")


def remove(host: str) -> None:
    """End what runs on a host, and remove it, if it is there."""
    while pids := subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", host], capture_output=True)


def remove_orphans() -> None:
    """Remove the hosts of runs that were killed before they could do so."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        match = re.match(r"two-hosts-(\d+)-[ab]\b", line)
        if match and not Path("/proc", match[1]).exists():
            remove(match[0])


def bytes_sent(hosts: tuple[str, str]) -> tuple[int, int]:
    """What each host has sent over the link so far."""
    shown = (subprocess.run(["ip", "-n", host, "-s", "-json", "link", "show", DEVICE], capture_output=True, check=True)
             for host in hosts)
    first, second = (json.loads(each.stdout)[0]["stats64"]["tx"]["bytes"] for each in shown)
    return first, second


# ---- what runs on them


def run(hosts: tuple[str, str], options: argparse.Namespace) -> int:
    """Run the command and tell what has crossed the link. Returns its exit code."""
    before, began = bytes_sent(hosts), time.monotonic()
    code = mpirun(hosts, options.ranks_per_host, options.command)
    there, back = (now - then for now, then in zip(bytes_sent(hosts), before))
    print(f"two_hosts: {there / 1e6:.2f} MB crossed the link one way, {back / 1e6:.2f} MB the other, in "
          f"{time.monotonic() - began:.1f} s", file=sys.stderr)
    return code


def check_link(hosts: tuple[str, str], options: argparse.Namespace) -> int:
    """Run the probe. Returns 0, or 1 if the bytes take another way, or are faster than the link may be."""
    before = bytes_sent(hosts)
    with tempfile.TemporaryFile("w+") as output:
        code = mpirun(hosts, options.ranks_per_host, [sys.executable, __file__, "--probe"], output)
        output.seek(0)
        said = output.read().split()
    if code:
        raise CannotRun(f"the MPI here ({jobs.vendor()}) does not get from host to host, what it says is above: "
                        "use a wheel's MPI, pip install mpich")
    bandwidth, latency = map(float, said)
    crossed = min(now - then for now, then in zip(bytes_sent(hosts), before))
    limit = "without a limit" if options.rate == "none" else f"of {options.rate}"
    print(f"two_hosts: a link {limit} carries {bandwidth / 1e6:,.0f} Mbit/s each way, and 8 bytes in "
          f"{1e6 * latency:.0f} us; {jobs.vendor()}", file=sys.stderr)
    sent = options.ranks_per_host * PROBE
    if crossed < sent:
        print(f"error: of {sent} bytes that the probe sent each way, {crossed} crossed the link: MPI has found a way "
              "round it, so nothing that is timed here would mean anything", file=sys.stderr)
    elif bandwidth > 1.1 * bits_per_second(options.rate):
        print("error: that is faster than the link's limit, so nothing that is timed here would mean anything",
              file=sys.stderr)
    else:
        return 0
    return 1


def mpirun(hosts: tuple[str, str], ranks: int, command: list[str], output: object = None) -> int:
    """Run a command with so many ranks on each host, the first ranks on the first. Returns the exit code."""
    on_first, on_second = (
        ["ip", "netns", "exec", host, "unshare", "--uts", "--ipc", "sh", "-c", NAMED, host] for host in hosts)
    # The program named `python` is to be the one that runs this; sudo may have changed what it would be.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with tempfile.TemporaryDirectory() as folder:
        ssh = Path(folder, "ssh")
        ssh.write_text(SSH.format(on_second_host=shlex.join(on_second)))
        ssh.chmod(0o755)
        first, second = (f"{address}:{ranks}" for address in ADDRESSES)
        if jobs.vendor().startswith("MPICH"):
            where = ["-launcher", "ssh", "-launcher-exec", str(ssh), "-hosts", f"{first},{second}"]
        else:
            where = ["--prtemca", "plm_ssh_agent", str(ssh), "--host", f"{first},{second}", "--bind-to", "none"]
        job = subprocess.Popen(
            [*on_first, jobs.mpiexec(), *where, "-n", str(2 * ranks), *command],
            env=jobs.environment(**TCP_ONLY, PATH=path), stdin=subprocess.DEVNULL, stdout=output,
            start_new_session=True)  # so that it hears of Ctrl-C from here alone, and in order
        try:
            return job.wait()
        except Stopped as signalled:
            end(job, signalled.args[0])
            raise


def end(job: subprocess.Popen[bytes], number: int) -> None:
    """Let a job end itself, as asked and then more firmly; what still runs then is ended with its host."""
    for request in (number, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(3)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def probe() -> int:
    """What each rank of the probe does: exchange messages with a rank of the other host. Rank 0 prints the link's bits
    a second each way, and the seconds that 8 bytes take."""
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    pairs = comm.size // 2
    peer = (comm.rank + pairs) % comm.size
    message, received = np.full(PROBE, comm.rank, np.uint8), np.empty(PROBE, np.uint8)
    small = np.zeros(8, np.uint8)
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        comm.Sendrecv(small, peer, 0, small.copy(), peer, 0)
        seconds.append(time.perf_counter() - began)
    comm.Barrier()
    began = time.perf_counter()
    comm.Sendrecv(message, peer, 1, received, peer, 1)
    comm.Barrier()
    took = time.perf_counter() - began
    assert (received == peer).all()
    if comm.rank == 0:
        print(8 * pairs * PROBE / took, sorted(seconds)[len(seconds) // 2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
