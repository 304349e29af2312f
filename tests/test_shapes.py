"""Shape comments are true: every assignment in the tile maths that has one is run, and compared with it.

A comment reads `# [B*s, h] -> [B*s, f/G]`: a shape that some operand has, and the shape of the result; `# -> ...` and
`# [B, s, h]` give the result alone; several results are separated by commas. Letters are those of tsp_ref's docstring.
"""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import cut, random_batch, schedule_calls

from tsp_ref import ops
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters, zero_parameters
from tsp_ref.reference import naive, single
from tsp_ref.training.strategy import Plan

PACKAGE = Path(ops.__file__).parent.parent
OPS = sorted((PACKAGE / "ops").glob("*.py"))
OTHERS = [PACKAGE / name for name in (
    "model/tilewise.py", "reference/single.py", "reference/naive.py", "schedules/tp.py",
                                      "schedules/sp.py", "schedules/tp_sp.py", "schedules/tsp.py",
                                      "schedules/collectives.py")]
COMMENT = re.compile(r"#\s*((?:->\s*)?\[.*)$")
SHAPE = re.compile(r"\[([^\]]*)\]")
PURE = {"reshape", "transpose", "swapaxes"}

CONFIG = make_config("tiny", hidden_size=96, num_layers=1, num_heads=12, num_kv_heads=4, ffn_size=44, vocab_size=260,
                     seq_len=20, batch_size=3, blocks=2, tiles=4)
LETTERS = dict(B=3, S=20, s=5, t=5, r=5, h=96, H=12, K=4, g=3, e=8, f=44, L=1, G=2, T=4, V=260)

# n, the keys that a tile sees, and c, those of a chunk, are whole tiles; m, the blocks at
# hand, are at most all. A strip of t queries is a whole tile here, and all its queries see every chunk.
VARYING = {"n": range(5, 21, 5), "c": range(5, 21, 5), "m": range(1, 3)}


class Line:
    """A statement with a shape comment: what it assigns, and the shapes that its comment gives."""

    def __init__(self, statement: ast.stmt, comment: str) -> None:
        before, arrow, after = comment.rpartition("->")
        self.operand = SHAPE.findall(before)[:1] if arrow else []
        self.results = SHAPE.findall(after)
        self.targets = _targets(statement)
        value = getattr(statement, "value", None)
        self.operands = [compile(ast.Expression(node), "operand", "eval") for node in ast.walk(value) if _is_pure(node)]
        self.first, self.last = statement.lineno, statement.end_lineno
        self.returns = isinstance(statement, ast.Return)


def _targets(statement: ast.stmt) -> list[str]:
    if not isinstance(statement, ast.Assign):
        return []
    target = statement.targets[0]
    return [ast.unparse(part) for part in target.elts] if isinstance(target, ast.Tuple) else [ast.unparse(target)]


def _is_pure(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in PURE
    return isinstance(node, ast.Name | ast.Subscript) and isinstance(node.ctx, ast.Load)


def commented_lines(path: Path) -> dict[int, Line]:
    """First line number -> the statement there, for all statements with a shape comment on their last line."""
    text = path.read_text().splitlines()
    lines = {}
    for node in ast.walk(ast.parse("\n".join(text))):
        if isinstance(node, ast.Assign | ast.Return):
            match = COMMENT.search(text[node.end_lineno - 1])
            if match:
                lines[node.lineno] = Line(node, match.group(1))
    return lines


def sizes(shape: str) -> list[int | str]:
    """The sizes that a comment's shape stands for; those that vary from call to call stay letters."""
    return [term if term in VARYING else eval(term.replace("/", "//"), {}, LETTERS) for term in _terms(shape)]


def _terms(shape: str) -> list[str]:
    return [term.strip() for term in shape.split(",")]


def fits(shape: str, found: tuple[int, ...]) -> bool:
    """Whether an array's shape is the comment's."""
    wanted = sizes(shape)
    return len(wanted) == len(found) and all(
        size in VARYING[want] if want in VARYING else size == want for want, size in zip(wanted, found))


class Watch:
    """Follows every line of some files as they run, and keeps what is wrong with their shape comments."""

    def __init__(self, paths: list[Path]) -> None:
        self.lines = {str(path): commented_lines(path) for path in paths}
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, action) -> None:
        """Run an action under the watch, on this thread and those that it starts."""
        sys.settrace(self._call)
        threading.settrace(self._call)
        try:
            action()
        finally:
            sys.settrace(None)
            threading.settrace(None)

    def _call(self, frame, event, argument):
        lines = self.lines.get(frame.f_code.co_filename)
        if not lines:
            return None
        waiting: list[Line] = []

        def step(frame, event, argument):
            # A statement over several lines has events for each: it has been run when an event comes from elsewhere.
            if waiting and not (event == "line" and waiting[0].first <= frame.f_lineno <= waiting[0].last):
                self._check(waiting.pop(), frame, argument)
            if event == "line" and frame.f_lineno in lines and not waiting:
                waiting.append(lines[frame.f_lineno])
                self._check_operand(waiting[0], frame)
            return step

        return step

    def _check_operand(self, line: Line, frame) -> None:
        for shape in line.operand:
            shapes = []
            for operand in line.operands:
                try:
                    value = eval(operand, frame.f_globals, frame.f_locals)
                except NameError:
                    continue
                if isinstance(value, np.ndarray):
                    shapes.append(value.shape)
            if not any(fits(shape, found) for found in shapes):
                self._complain(frame, line, f"no operand is [{shape}]: {shapes}")

    def _check(self, line: Line, frame, returned) -> None:
        names = frame.f_globals, frame.f_locals
        values = [returned] if line.returns else [eval(target, *names) for target in line.targets]
        self.seen[f"{frame.f_code.co_filename}:{line.last}"] += 1
        if len(values) != len(line.results):
            self._complain(frame, line, f"{len(line.results)} shapes for {len(values)} results")
        for value, shape in zip(values, line.results):
            if not fits(shape, value.shape):
                self._complain(frame, line, f"the result is {list(value.shape)}, not [{shape}]")

    def _complain(self, frame, line: Line, what: str) -> None:
        self.wrong.append(f"{Path(frame.f_code.co_filename).name}:{line.last} {frame.f_code.co_name}: {what}")


def a_training_step(comm, plan) -> None:
    """Forward and backward on virtual ranks: every operation runs."""
    calls, model = schedule_calls(CONFIG, plan, comm)
    weights, gradients = initial_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = (cut(model, whole) for whole in random_batch(CONFIG))
    _, saved = calls.model_forward(weights, tokens, targets)
    calls.model_backward(saved, weights, gradients)


def a_training_step_of_the_references() -> None:
    """The same in one process, on the grid and without it."""
    model = Model(CONFIG, np)
    weights, gradients = initial_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = random_batch(CONFIG)
    _, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    single.model_backward(model, saved, weights, gradients)
    naive.loss_and_gradients(CONFIG, naive.assemble(CONFIG, weights), tokens, targets)


@pytest.mark.parametrize("paths, least", [(OPS, 40), (OTHERS, 60)], ids=["ops", "references and schedules"])
def test_every_shape_comment_is_true(paths, least):
    watch = Watch(paths)
    for plan, ranks in ((Plan("tp"), 2), (Plan("sp"), 2), (Plan("tp+sp", "2x2"), 4), (Plan("tsp"), 2)):
        watch.run(lambda ranks=ranks, plan=plan: VirtualWorld(ranks).run(lambda comm: a_training_step(comm, plan)))
    watch.run(a_training_step_of_the_references)
    assert watch.wrong == []
    written = {f"{path}:{line.last}" for path, lines in watch.lines.items() for line in lines.values()}
    assert written - set(watch.seen) == set(), "these lines were never run"
    assert len(written) >= least


@pytest.mark.parametrize("wrong", [
    "y = x @ w  # [B*s, h] -> [B*s, h]",
    "y = x @ w  # [B, s, h] -> [B*s, f]",
    "y, z = x, w  # -> [B*s, h]",
    "y = x[None]  # [B*s, h]",
])
def test_a_false_shape_comment_is_seen(wrong, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(f"def work(x, w):\n    {wrong}\n    return y\n")
    names: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    watch = Watch([path])
    watch.run(lambda: names["work"](np.zeros((15, 96)), np.zeros((96, 44))))
    assert watch.wrong


def changes_shape(node: ast.Assign) -> bool:
    """Whether an assignment's value, at its top, is a product, a reduction or a change of shape."""
    value = node.value
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.MatMult):
        return True
    name = value.func.attr if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else ""
    return name in {*PURE, "mean", "sum", "max", "stack", "concatenate", "empty", "zeros", "arange"} and (
        not ast.unparse(value).startswith("xp.empty(") or ".shape, dtype" not in ast.unparse(value))


def test_every_line_of_the_tile_maths_that_changes_a_shape_says_so():
    silent = []
    for path in OPS:
        text = path.read_text()
        commented = commented_lines(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and changes_shape(node) and (
                    node.lineno not in commented):
                silent.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert silent == []
