"""The whole model on a stand-in for CuPy: the same bits as on NumPy, and nothing crosses but where the code says so."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import case_config, random_text
from gpu_ranks import GpuCommunicator
from strict import CONSTANTS, FUNCTIONS, StrictCupy

import tsp_ref
from tsp_ref.backends import gpu as backends
from tsp_ref.backends.gpu import HOST, Backend, CupyBackend, open_backend
from tsp_ref.cli import main
from tsp_ref.comm import mpi
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import AgreedError, UserError
from tsp_ref.model.config import Config
from tsp_ref.model.model import Model
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = case_config("plain", "float32", num_layers=1, hidden_size=16, num_heads=4, num_kv_heads=4, ffn_size=16,
                     seq_len=16, blocks=4, tiles=4)
PLANS = [(Plan("single"), 1),
         *((Plan(name), size) for name in ("tp", "sp", "tp+sp", "fsdp+sp", "tsp") for size in (1, 2, 4))]
SETTINGS = ("num_layers=1", "hidden_size=16", "num_heads=4", "num_kv_heads=4", "ffn_size=16", "seq_len=16", "blocks=4",
            "tiles=4")
ROOT = Path(tsp_ref.__file__).parent


def trained(config: Config, comm: Communicator, plan: Plan, library: Any) -> Training:
    """After a step, and a forward of another batch."""
    training = Training(config, comm, plan, random_text(), library)
    training.step()
    training.validate()
    return training


def digest_on(library: Any, plan: Plan, ranks: int, config: Config = CONFIG) -> str:
    return VirtualWorld(ranks, seed=ranks).run(lambda comm: digest(trained(config, comm, plan, library)))[0]


@pytest.fixture(scope="module")
def wanted() -> str:
    return digest_on(np, Plan("single"), 1)


@pytest.mark.parametrize(("plan", "ranks"), PLANS, ids=str)
def test_every_schedule_has_numpy_s_bits_on_the_stand_in(plan: Plan, ranks: int, wanted: str) -> None:
    assert digest_on(CupyBackend(StrictCupy()), plan, ranks) == wanted


@pytest.mark.parametrize("recompute", ["attention", "full"])
@pytest.mark.parametrize("case", ["grouped-query", "tied head", "every option"])
def test_so_have_other_models_and_recomputation(case: str, recompute: str) -> None:
    config = case_config(case, "float64", num_layers=1, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=16,
                         blocks=2, tiles=2, seq_len=8)
    plan = Plan("tsp", recompute=recompute)
    assert digest_on(CupyBackend(StrictCupy()), plan, 2, config) == digest_on(np, Plan("single"), 1, config)


def test_the_accounts_of_memory_are_the_same_on_the_stand_in() -> None:
    def held(library: Any) -> list[Any]:
        def accounts(comm: Communicator) -> Any:
            memory = trained(CONFIG, comm, Plan("tsp"), library).model.memory
            return memory.peak, memory.total_peak, memory.peaks

        return VirtualWorld(2).run(accounts)

    assert held(CupyBackend(StrictCupy())) == held(np)


def names_used_of_xp() -> set[str]:
    """Every `xp.name` in the source, by whatever way it came to be called xp; the backends' own files set apart."""
    found = set()
    for file in ROOT.rglob("*.py"):
        if file.parent.name != "backends":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "xp":
                    found.add(node.attr)
    return found


def test_every_function_of_xp_in_the_source_is_in_the_list_of_cupy_s() -> None:
    used = names_used_of_xp()
    assert {"matmul", "exp", "empty"} <= used
    assert used - set(FUNCTIONS) - set(CONSTANTS) == set()


def test_a_backend_of_numpy_s_changes_nothing() -> None:
    array = np.ones(3)
    assert HOST.to_host(array) is HOST.from_host(array) is array
    assert (HOST.name, HOST.peak_bytes()) == ("numpy", None) and HOST.describe().startswith("NumPy ")
    assert Model(CONFIG, np).xp is np and Model(CONFIG, HOST).backend is HOST


def test_a_gpu_s_backend_copies_both_ways() -> None:
    backend, array = CupyBackend(StrictCupy()), np.arange(5.0)
    there = backend.from_host(array)
    array[0] = 9.0
    back = backend.to_host(there)
    assert back.tolist() == [0, 1, 2, 3, 4] and not np.shares_memory(back, array)
    assert (backend.peak_bytes() or 0) >= array.nbytes


def opened(name: str, gpu_aware: bool = False, size: int = 1) -> list[Backend]:
    return VirtualWorld(size).run(lambda comm: open_backend(name, comm, gpu_aware))


def install(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(AgreedError, match="--backend torch is unknown: use one of numpy, cupy"):
        opened("torch", size=2)


def test_without_cupy_the_refusal_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(AgreedError, match=r'--backend cupy needs CuPy.*pip install -e "\.\[cuda\]".*"\.\[rocm\]"'):
        opened("cupy", size=2)


@pytest.mark.parametrize("how", ["zero", "error"])
def test_without_a_gpu_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    cupy = StrictCupy(gpus=0)
    if how == "error":
        def fail() -> int:
            raise RuntimeError("no driver here")
        cupy.cuda.runtime.getDeviceCount = fail
    install(monkeypatch, cupy)
    with pytest.raises(AgreedError, match=f"finds no GPU .{'no driver here' if how == 'error' else 'none is visible'}"):
        opened("cupy")


def test_a_stream_for_each_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StrictCupy())
    monkeypatch.setenv(backends.OWN_STREAMS, "1")
    with pytest.raises(AgreedError, match=f"{backends.OWN_STREAMS}=1"):
        opened("cupy")


def test_gpu_aware_messages_need_a_gpu_and_real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgreedError, match=r"--gpu-aware.*add --backend cupy"):
        opened("numpy", gpu_aware=True)
    install(monkeypatch, StrictCupy())
    with pytest.raises(AgreedError, match="--gpu-aware is for real ranks"):
        opened("cupy", gpu_aware=True)


def test_the_settings_that_make_products_repeatable_are_set_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, StrictCupy())
    for name in backends.REPEATABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUPY_TF32", "1")
    opened("cupy")
    assert {name: os.environ[name] for name in backends.REPEATABLE} == {**backends.REPEATABLE, "CUPY_TF32": "1"}


def described(size: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the ranks of one machine say of their backends."""
    install(monkeypatch, StrictCupy(gpus=gpus))
    world = VirtualWorld(size)
    world.communicators = [GpuCommunicator(world, rank) for rank in range(size)]
    return [backend.describe() for backend in world.run(lambda comm: open_backend("cupy", comm))]


def test_ranks_take_the_gpus_of_their_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a stand-in for a GPU"
    assert [line.split(", ", 1)[1] for line in described(3, 2, monkeypatch)] == [
        f"GPU 0 of 2: {name}, shared by 2 ranks", f"GPU 1 of 2: {name}", f"GPU 0 of 2: {name}, shared by 2 ranks"]


def test_virtual_ranks_share_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StrictCupy(gpus=2))
    assert all(backend.describe().endswith("GPU 0 of 2: a stand-in for a GPU, shared by 3 ranks")
               for backend in opened("cupy", size=3))


def run(*arguments: str) -> int:
    return main([*arguments, "--text", str(ROOT / "backends" / "gpu.py"), str(ROOT / "cli.py"), "--set", *SETTINGS])


@pytest.mark.parametrize("command", [
    ("train", "--preset", "tiny", "--steps", "1", "--digest"), ("verify", "--steps", "1"),
    ("overlap", "--preset", "tiny", "--repeats", "1"),
])
def test_commands_run_on_the_stand_in(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, StrictCupy())
    assert run(*command, "--ranks", "2", "--backend", "cupy") == 0
    found = capsys.readouterr().out
    if command[0] == "train":
        assert "arrays: CuPy 0 (a stand-in), GPU 0 of 1" in found and "pool of GPU memory took" in found
        assert run(*command) == 0
        assert found.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    if command[0] == "verify":
        assert "EQUAL, every bit" in found


def test_compare_refuses_what_cannot_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, StrictCupy())
    assert run("compare", "--ranks", "2", "--backend", "cupy") == 2
    assert capsys.readouterr().err.startswith("error: --backend cupy cannot count every array, as compare does")


class Forgetful(CupyBackend):
    """Leaves the crossing to whoever uses the array."""

    def __init__(self, forgotten: str) -> None:
        super().__init__(StrictCupy())
        setattr(self, forgotten, lambda array: array)


@pytest.mark.parametrize("forgotten", ["from_host", "to_host"])
def test_a_crossing_that_is_left_out_is_found(forgotten: str) -> None:
    with pytest.raises(TypeError, match="host"):
        digest_on(Forgetful(forgotten), Plan("single"), 1)


@pytest.mark.parametrize(("kind", "answers", "variable", "why"), [
    ("cuda", {"MPIX_Query_cuda_support": 1}, None, None),  # Open MPI, MPICH
    ("hip", {"MPIX_Query_rocm_support": 1}, None, None),  # Open MPI
    ("hip", {"MPIX_Query_hip_support": 1}, None, None),  # MPICH
    ("hip", {}, "1", None),  # Cray
    ("hip", {}, "0", "it has no MPIX_Query_rocm_support or MPIX_Query_hip_support"),
    ("hip", {"MPIX_Query_cuda_support": 1}, None, "it has no MPIX_Query_rocm_support"),
    ("cuda", {"MPIX_Query_cuda_support": 0}, None, "its MPIX_Query_cuda_support says no"),
])
def test_an_mpi_is_asked_whether_it_takes_this_kind_of_gpu(
    kind: str, answers: dict[str, int], variable: str | None, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(**{name: (lambda answer=answer: answer) for name, answer in answers.items()})
    monkeypatch.setattr(mpi.ctypes, "CDLL", lambda file: library)
    monkeypatch.delenv(mpi.CRAY_GPU_SUPPORT, raising=False)
    if variable is not None:
        monkeypatch.setenv(mpi.CRAY_GPU_SUPPORT, variable)
    asked = SimpleNamespace(_library=SimpleNamespace(__file__="", Get_library_version=lambda: "Some MPI 1.0, more"))
    if why is None:
        mpi.MPICommunicator.require_gpu_support(asked, kind)  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match=f"--gpu-aware needs an MPI .*, and Some MPI 1.0 does not say so .{why}"):
            mpi.MPICommunicator.require_gpu_support(asked, kind)  # type: ignore[arg-type]


def test_a_user_error_of_one_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any of them waits for a message of the first."""
    install(monkeypatch, StrictCupy())
    calls = []

    def count(cupy: Any) -> int:
        calls.append(cupy)
        if len(calls) == 2:
            raise UserError("this one has none")
        return 1

    monkeypatch.setattr(backends, "_count_gpus", count)
    with pytest.raises(AgreedError, match="on rank 1: this one has none"):
        opened("cupy", size=3)
