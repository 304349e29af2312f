"""How the source hangs together, read as source: who imports whom, and schedules that are twins of the reference."""

import ast
from functools import cache
from pathlib import Path

import pytest

import tsp_ref

ROOT = Path(tsp_ref.__file__).parent
# Methods of mpi4py that pickle what they send; those that take buffers begin with a capital.
PICKLING = {"send", "recv", "isend", "irecv", "ssend", "bsend", "sendrecv", "bcast", "gather", "allgather", "scatter",
            "alltoall", "reduce", "allreduce", "scan", "exscan"}
# The rooms of tsp_ref from the ground up: each imports from those before it, and from itself, but from none after it.
ROOMS = ("errors", "arrays", "accounting", "grid", "ops", "comm", "backends", "model", "reference", "schedules",
         "formulas", "pictures", "training", "process", "commands", "cli", "__main__")
# Rooms that may use even less: the maths knows nothing but arrays, messages know no grid, the reference no messages.
ONLY = {
    "grid": ("errors", "grid"),
    "ops": ("arrays", "ops"),
    "comm": ("arrays", "errors", "accounting", "comm"),
    "reference": ("arrays", "errors", "accounting", "grid", "ops", "model", "reference"),
}
# What computes, and so is written for any array library.
FOR_ANY_LIBRARY = ("ops", "schedules", "reference.single", "model.tilewise", "grid", "model.activations", "model.model",
                   "training.optimizer", "training.loop")
# The only file that knows CuPy.
KNOWS_CUPY = "tsp_ref.backends.gpu"

# Every schedule, and its name for the ranks that its functions are given first.
SCHEDULES = {"tp": "comm: Communicator", "sp": "comm: Communicator", "tp_sp": "mesh: Mesh",
             "fsdp_sp": "comm: Communicator", "tsp": "comm: Communicator"}
# What is in flight when a sub-layer's backward is over, where gradients travel.
IN_FLIGHT = {"sp": "AllReduceGradients", "tp_sp": "AllReduceGradients", "fsdp_sp": "ReduceToOwner",
             "tsp": "ReduceToOwner"}
SUBLAYERS = ("embedding", "attention", "mlp", "head")
# The schedules whose functions may take more: what crosses from one sub-layer to the next.
TAKE_MORE = ("fsdp_sp", "tsp")
# The only files of the schedules that post messages.
POSTING = ("all_gather", "all_reduce", "gradients", "keys_values", "ring")

Sources = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources() -> Sources:
    """Every module of tsp_ref with its text; a package's own file as `....__init__`."""
    files = ROOT.rglob("*.py")
    return {".".join(("tsp_ref", *file.relative_to(ROOT).with_suffix("").parts)): file.read_text() for file in files}


@cache
def imports(module: str, text: str) -> list[str]:
    """The full dotted name of everything that a module imports, at its top or anywhere inside."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            found += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return found


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"tsp_ref.{name}" for name in names)


def breaches(modules: Sources) -> list[str]:
    """Every import that a rule forbids, as `module imports name`."""
    found = []
    for module, text in modules.items():
        for name in imports(module, text):
            own = within(name, "tsp_ref")
            forbidden = (
                any(own and within(module, *rooms(room)) and not within(name, *rooms(*allowed))
                    for room, allowed in ONLY.items())
                or any(within(module, *rooms(room)) and within(name, *rooms(*ROOMS[place + 1 :]))
                       for place, room in enumerate(ROOMS))
                or (within(name, "mpi4py") and module != "tsp_ref.comm.mpi")
                or within(name, "pickle")
                or (within(name, "numpy") and within(module, *rooms(*FOR_ANY_LIBRARY)))
                or (within(name, *rooms("comm")) and module == "tsp_ref.backends.host")
            )
            if forbidden:
                found.append(f"{module} imports {name}")
    return found


def reached(start: str, modules: Sources) -> set[str]:
    """Every module of tsp_ref that comes along when a room is imported, directly or by way of others."""
    seen: set[str] = set()
    waiting = [module for module in modules if within(module, start)]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += direct(module, modules)
    return seen


def direct(module: str, modules: Sources) -> list[str]:
    """The modules of tsp_ref that one imports, and their rooms' own files."""
    return [other for name in imports(module, modules[module]) for other in modules
            if within(name, other.removesuffix(".__init__")) and other != "tsp_ref.__init__"]


def pickled_messages(modules: Sources) -> list[str]:
    """Calls of mpi4py's pickling methods: on anything in the file that knows MPI, elsewhere on what is called MPI."""
    found = []
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PICKLING:
                owner = ast.unparse(node.func.value)
                if module == "tsp_ref.comm.mpi" or "mpi" in owner.lower() or "COMM_WORLD" in owner:
                    found.append(f"{module} calls {owner}.{node.func.attr}")
    return found


def knowing_cupy(modules: Sources) -> list[str]:
    """Modules whose code, not its texts, has CuPy's name in it."""
    found = []
    for module, text in modules.items():
        names: list[str] = [*imports(module, text)]
        for node in ast.walk(ast.parse(text)):
            names += [str(getattr(node, field, "")) for field in ("id", "attr", "arg")]
            if isinstance(node, ast.Constant) and str(node.value).isidentifier():  # as import_module is given it
                names.append(str(node.value))
        if any("cupy" in name.lower() for name in names):
            found.append(module)
    return found


def undocumented(modules: Sources) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    found = []
    for module, text in modules.items():
        tree = ast.parse(text)
        bodies: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, tree)]
        found += [module] * (ast.get_docstring(tree) is None)
        while bodies:
            place, body = bodies.pop()
            for node in body.body:
                if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                    setter = any(ast.unparse(part).endswith(".setter") for part in node.decorator_list)
                    found += [f"{place}.{node.name}"] * (ast.get_docstring(node) is None and not setter)
                    if isinstance(node, ast.ClassDef):
                        bodies.append((f"{place}.{node.name}", node))
    return found


def public_functions(module: str) -> dict[str, Function]:
    tree = ast.parse(sources()[f"tsp_ref.{module}"])
    return {node.name: node for node in tree.body if isinstance(node, Function) and not node.name.startswith("_")}


def parameters(function: Function) -> list[str]:
    return [ast.unparse(argument) for argument in [*function.args.posonlyargs, *function.args.args]]


def optional(function: Function) -> list[str]:
    """The parameters with a default, which are the last."""
    count = len(function.args.defaults)
    return parameters(function)[-count:] if count else []


def returned(function: Function) -> str:
    return ast.unparse(function.returns or function)


def twin_returns(schedule: str, reference: Function) -> str:
    """What a schedule's twin of a function returns: the same, and with it, after a sub-layer's backward, what is in
    flight."""
    sublayer, _, direction = reference.name.rpartition("_")
    if schedule not in IN_FLIGHT or direction != "backward" or sublayer not in SUBLAYERS:
        return returned(reference)
    in_flight = IN_FLIGHT[schedule]
    return in_flight if returned(reference) == "None" else f"tuple[{returned(reference)}, {in_flight}]"


def lines_of(function: Function) -> int:
    """Its lines without its docstring."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def posting(modules: Sources) -> list[str]:
    """The modules whose code, not its texts, names a post."""
    return sorted(module for module, text in modules.items() for node in [ast.parse(text)]
                  if any(getattr(part, field, None) in ("Isend", "Irecv")
                         for part in ast.walk(node) for field in ("attr", "id", "name", "value")))


def decorators(function: Function) -> list[str]:
    return [ast.unparse(part) for part in function.decorator_list]


def test_no_import_breaks_a_rule() -> None:
    assert breaches(sources()) == []


@pytest.mark.parametrize(("module", "text"), [
    ("ops.bad", "from ..grid.grid import Grid"),
    ("ops.bad", "from .. import model"),
    ("ops.bad", "import tsp_ref.comm.mpi"),
    ("ops.__init__", "from ..errors import UserError"),
    ("ops.bad", "def late() -> None:\n    from tsp_ref.model.config import Config"),
    ("comm.bad", "from ..model.model import Model"),
    ("comm.bad", "if True:\n    from ..ops.norm import rmsnorm_forward"),
    ("comm.mesh", "from ..grid.grid import Place"),
    ("comm.bad", "from mpi4py import MPI"),
    ("comm.mpi.bad", "import mpi4py.MPI"),
    ("process.launch", "import mpi4py as message_passing"),
    ("accounting.bad", "from ..comm.request import Request"),
    ("grid.bad", "from ..arrays import Array"),
    ("backends.host", "from ..comm.control import agreed"),
    ("model.bad", "from ..reference.single import model_forward"),
    ("reference.bad", "from ..comm.control import all_gather"),
    ("reference.bad", "from .. import schedules"),
    ("reference.bad", "from tsp_ref.schedules.tsp import ring"),
    ("reference.bad", "from ..training.data import batch"),
    ("schedules.bad", "from ..formulas.messages import Sizes"),
    ("schedules.bad", "from ..training import loop"),
    ("schedules.bad", "from ..commands.verify import verify"),
    ("schedules.bad", "from .. import cli"),
    ("training.bad", "from ..process.launch import start"),
    ("commands.verify", "from .. import cli"),
    ("arrays", "import pickle"),
    ("training.bad", "from pickle import dumps"),
    ("ops.bad", "import numpy as np"),
    ("schedules.bad", "from numpy import sum"),
    ("reference.single", "import numpy"),
])
def test_an_import_that_breaks_a_rule_is_found(module: str, text: str) -> None:
    assert len(breaches({f"tsp_ref.{module}": text})) == 1


@pytest.mark.parametrize(("module", "text"), [
    ("ops.good", "import math\nfrom ..arrays import Array\nfrom .norm import rmsnorm_forward"),
    ("comm.good", "from ..errors import MessageError\nfrom .request import Request"),
    ("comm.mesh", "from ..accounting.ledger import Ledger\nfrom .communicator import Communicator"),
    ("comm.mpi", "from mpi4py import MPI"),
    ("reference.good", "from ..model.model import Model\nfrom .single import model_forward"),
    ("schedules.good", "from ..comm.mesh import Mesh\nfrom .ring import Ring\nfrom ..grid.tree import Tree"),
    ("__main__", "from .cli import main"),
])
def test_an_import_within_the_rules_is_let_pass(module: str, text: str) -> None:
    assert breaches({f"tsp_ref.{module}": text}) == []


def test_every_module_is_in_one_of_the_rooms() -> None:
    assert [module for module in sources() if not within(module, *rooms(*ROOMS, "__init__"))] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_reaches_what_is_above_it_by_way_of_another(room: str) -> None:
    found = reached(f"tsp_ref.{room}", sources())
    above = rooms(*ROOMS[ROOMS.index(room) + 1 :])
    assert found
    assert [module for module in found if within(module, *above)] == []


def test_no_two_modules_import_each_other_by_whatever_way() -> None:
    modules = sources()
    assert [module for module in modules if module in set().union(*(
        reached(name, modules) for name in direct(module, modules)))] == []


def test_a_way_by_another_module_is_found() -> None:
    modules = {"tsp_ref.reference.a": "from ..grid.grid import Grid", "tsp_ref.grid.grid": "from ..comm import control",
               "tsp_ref.comm.__init__": "", "tsp_ref.comm.control": "", "tsp_ref.cli": ""}
    assert reached("tsp_ref.reference", modules) == set(modules) - {"tsp_ref.cli"}


def test_importing_the_package_loads_nothing_but_what_must_come_before_numpy() -> None:
    """Every module is imported after the package itself, so what this imports, all import."""
    found = imports("tsp_ref.__init__", sources()["tsp_ref.__init__"])
    assert found == ["tsp_ref.comm.launcher", "tsp_ref.process.allocator", "tsp_ref.process.threads"]


@pytest.mark.parametrize("lesson", sorted(path.name for path in (ROOT.parent / "lessons").glob("*.py")))
def test_a_lesson_comes_to_the_package_before_numpy_is_loaded(lesson: str) -> None:
    """So that Ctrl-C and the threads of BLAS are what the package has set."""
    found = imports("lesson", (ROOT.parent / "lessons" / lesson).read_text())
    heavy = [place for place, name in enumerate(found) if within(name, "numpy", "rich")]
    ours = [place for place, name in enumerate(found) if within(name, "tsp_ref", "stage")]
    assert min(ours) < min(heavy, default=len(found))


def test_no_message_and_no_file_is_pickled() -> None:
    assert pickled_messages(sources()) == []
    assert [module for module, text in sources().items() if "import pickle" in text or "allow_pickle" in text] == []


@pytest.mark.parametrize(("module", "text"), [
    ("comm.mpi", "self.mpi.send(x, 1)"),
    ("comm.mpi", "world.bcast(x)"),
    ("launch", "comm.mpi.allreduce(1)"),
    ("verify", "MPI.COMM_WORLD.gather(1)"),
])
def test_a_pickled_message_is_found(module: str, text: str) -> None:
    assert len(pickled_messages({f"tsp_ref.{module}": text})) == 1


def test_everything_public_has_a_docstring() -> None:
    assert undocumented(sources()) == []


def test_one_file_knows_cupy() -> None:
    assert knowing_cupy(sources()) == [KNOWS_CUPY]


@pytest.mark.parametrize("text", ["import cupy", "from cupy import matmul", "if model.cupy: pass", "x = cupy.ndarray",
                                  'import_module("cupy")', "def f(cupy): pass", 'gpu = name == "cupy"'])
def test_another_file_that_knows_cupy_is_found(text: str) -> None:
    assert knowing_cupy({"tsp_ref.ops.bad": text, "tsp_ref.cli": 'help("--backend cupy computes on a GPU")'}) == [
        "tsp_ref.ops.bad"]


def test_a_missing_docstring_is_found() -> None:
    text = '"""Yes."""\nclass A:\n    """Yes."""\n    def b(self): pass\n    def _c(self): pass\ndef d(): pass'
    assert undocumented({"m": text}) == ["m.d", "m.A.b"]
    assert undocumented({"m": "x = 1"}) == ["m"]


def test_every_schedule_is_held_to_the_reference() -> None:
    """A module of this room that is no schedule has no `place`."""
    found = [module.removeprefix("tsp_ref.schedules.") for module in sources() if within(module, *rooms("schedules"))]
    assert {name for name in found if "place" in public_functions(f"schedules.{name}")} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_has_the_functions_of_the_reference_in_its_order_after_its_place(schedule: str) -> None:
    reference, twins = list(public_functions("reference.single")), list(public_functions(f"schedules.{schedule}"))
    assert len(reference) >= 12
    assert twins == ["place", *reference]


@pytest.mark.parametrize("name", public_functions("reference.single"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_function_of_a_schedule_takes_its_ranks_and_then_what_the_reference_takes(schedule: str, name: str) -> None:
    """And TSP's sub-layers, by default nothing more."""
    reference, twin = public_functions("reference.single")[name], public_functions(f"schedules.{schedule}")[name]
    assert parameters(twin) == [SCHEDULES[schedule], *parameters(reference), *optional(twin)]
    assert optional(reference) == []
    assert not twin.args.kwonlyargs and not twin.args.vararg and not twin.args.kwarg
    if optional(twin):
        assert schedule in TAKE_MORE and name.rpartition("_")[0] in SUBLAYERS


@pytest.mark.parametrize("name", public_functions("reference.single"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_function_of_a_schedule_returns_what_the_reference_does_and_what_is_in_flight(
    schedule: str, name: str
) -> None:
    reference, twin = public_functions("reference.single")[name], public_functions(f"schedules.{schedule}")[name]
    assert returned(twin) == twin_returns(schedule, reference)


def test_tsp_is_read_at_a_sitting_and_each_of_its_functions_at_a_glance() -> None:
    text = sources()["tsp_ref.schedules.tsp"]
    assert len(text.splitlines()) <= 350
    functions = public_functions("schedules.tsp")
    assert {name: lines_of(function) for name, function in functions.items() if lines_of(function) > 45} == {}


def test_messages_are_posted_in_four_files_of_the_schedules() -> None:
    schedules = {module: text for module, text in sources().items() if within(module, *rooms("schedules"))}
    assert posting(schedules) == [f"tsp_ref.schedules.{name}" for name in POSTING]


@pytest.mark.parametrize("text", ["comm.Isend(x, 1, 2)", "post = comm.Irecv", 'getattr(comm, "Isend")',
                                  "from .posts import Irecv"])
def test_a_file_that_posts_a_message_is_found(text: str) -> None:
    assert posting({"bad": text, "good": '"""Isend and Irecv."""\n# Isend'}) == ["bad"]


@pytest.mark.parametrize("name", public_functions("reference.single"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_function_of_a_schedule_is_in_the_accounts_of_the_reference_s_phase(schedule: str, name: str) -> None:
    reference, twin = public_functions("reference.single")[name], public_functions(f"schedules.{schedule}")[name]
    assert decorators(twin) == decorators(reference)


def test_every_part_of_the_reference_has_a_phase_of_its_own_name() -> None:
    functions = public_functions("reference.single")
    phases = {name: decorators(function) for name, function in functions.items()}
    assert "model_forward" in phases and "model_backward" in phases
    for name, found in phases.items():
        part, _, direction = name.rpartition("_")
        if direction in ("forward", "backward"):
            assert found == [f"phase('{part}', '{direction}')"]
    assert all(len(found) == 1 for found in phases.values())


@pytest.mark.parametrize("module", [
    "reference.single", *(f"schedules.{name}" for name in SCHEDULES),
    "ops.attention", "ops.embedding", "ops.loss", "ops.mlp", "ops.norm", "ops.projection", "ops.rotary",
])
def test_every_forward_has_a_backward(module: str) -> None:
    names = public_functions(module)
    forwards = [name for name in names if name.endswith("_forward")]
    assert forwards
    assert [name for name in forwards if name.replace("_forward", "_backward") not in names] == []
