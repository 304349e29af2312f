"""Shape comments are true: every assignment in the tile maths that has one is run, and compared with it.

A comment reads `# [p, B*s, h] -> [p, B*s, f/G]`: a shape that some operand has, and the shape of the result; `# -> ...`
and `# [B, s, h]` give the result alone; several results are separated by commas, and `, ...` after one says that all
have it. `...` within a shape stands for any sizes. Letters are those of tsp_ref's docstring; one that varies from
call to call stands for one number in all of a comment.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import threading
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import cut, cut_in_strips, random_batch, schedule_calls

import tsp_ref
from tsp_ref import ops
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import attention_size, initial_parameters, mlp_size, zero_parameters
from tsp_ref.ops import attention
from tsp_ref.reference import naive, single
from tsp_ref.training.strategy import Plan

PACKAGE = Path(ops.__file__).parent.parent
OPS = sorted((PACKAGE / "ops").glob("*.py"))
OTHERS = [PACKAGE / name for name in (
    "model/tilewise.py", "reference/single.py", "reference/naive.py",
    *(f"schedules/{name}.py" for name in (
        "tp", "sp", "tp_sp", "fsdp_sp", "tsp", "all_gather", "ring", "keys_values", "gradients", "all_reduce")))]
COMMENT = re.compile(r"#\s*((?:->\s*)?\[.*)$")
SHAPE = re.compile(r"\[([^\]]*)\]")
PURE = {"reshape", "transpose", "swapaxes"}

CONFIG = make_config("tiny", hidden_size=96, num_layers=1, num_heads=12, num_kv_heads=4, ffn_size=44, vocab_size=260,
                     seq_len=40, batch_size=3, blocks=2, tiles=4)
WITH_OPTIONS = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)
HALF = 5
"""Of a tile: a strip of queries, and a chunk of the tile's own keys."""
LETTERS = dict(B=3, S=40, s=10, t=HALF, h=96, H=12, K=4, g=3, e=8, f=44, L=1, G=2, T=4, V=260)
PACKED = "size of a packed block"
OF_SEVERAL_BLOCKS = {"attend_forward", "attend_strip", "write_rows", "attend_backward", "before_backward",
                     "own_backward", "add_mask", "with_column"}
"""What one who holds the whole sequence may do with several blocks at once."""

# n, the keys that a strip sees, are all up to its last; c, those of a chunk, the first half of a tile or the second, or
# whole tiles; r, the queries that see a chunk, all of a tile or the second half. m, the blocks at hand, and p, the
# tiles, are at most all.
VARYING = {"n": range(HALF, 41, HALF), "c": range(HALF, 41, HALF), "r": (HALF, 10), "m": range(1, 3), "p": range(1, 5),
           "packed": [attention_size(CONFIG), attention_size(WITH_OPTIONS), mlp_size(CONFIG)]}


class Line:
    """A statement with a shape comment: what it assigns, and the shapes that its comment gives."""

    def __init__(self, statement: ast.stmt, comment: str) -> None:
        before, arrow, after = comment.rpartition("->")
        self.operand = SHAPE.findall(before)[:1] if arrow else []
        self.targets = _targets(statement)
        self.results = SHAPE.findall(after)
        if after.endswith("], ..."):
            self.results *= len(self.targets)
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


Sizes = dict[str, int]


@cache
def _terms(shape: str) -> tuple[list[Any], set[str]]:
    """The terms of a comment's shape, with None for `...`, and the letters in them that vary."""
    terms = [term.strip().replace(PACKED, "packed").replace("/", "//") for term in shape.split(",")]
    compiled = [None if term == "..." else compile(term, shape, "eval") for term in terms]
    return compiled, {name for term in compiled if term for name in term.co_names if name in VARYING}


def readings(shapes: list[str], several_blocks: bool) -> list[Sizes]:
    """All that the varying letters of some shapes may stand for; B too, where it may be the sequences of m blocks."""
    letters = sorted(set().union(*(_terms(shape)[1] for shape in shapes)))
    found = [dict(zip(letters, values)) for values in product(*(VARYING[letter] for letter in letters))]
    batches = [LETTERS["B"] * blocks for blocks in (VARYING["m"] if several_blocks else [1])]
    return [{**reading, "B": batch} for reading in found for batch in batches]


def fits(shape: str, found: tuple[int, ...], reading: Sizes) -> bool:
    """Whether an array's shape is the comment's, read so."""
    terms, sizes = list(_terms(shape)[0]), list(found)
    if None in terms:
        place, few = terms.index(None), len(terms) - 1
        del terms[place], sizes[place : place + max(0, len(sizes) - few)]
    return len(terms) == len(sizes) and all(
        eval(term, {}, LETTERS | reading) == size for term, size in zip(terms, sizes))


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
        waiting: list[tuple[Line, set[tuple[int, ...]]]] = []

        def step(frame, event, argument):
            # A statement over several lines has events for each: it has been run when an event comes from elsewhere.
            if waiting and not (event == "line" and waiting[0][0].first <= frame.f_lineno <= waiting[0][0].last):
                self._check(*waiting.pop(), frame, argument)
            if event == "line" and frame.f_lineno in lines and not waiting:
                waiting.append((lines[frame.f_lineno], self._operands(lines[frame.f_lineno], frame)))
            return step

        return step

    def _operands(self, line: Line, frame) -> set[tuple[int, ...]]:
        """The shapes of all operands of a line that is about to be run."""
        shapes = set()
        for operand in line.operands if line.operand else ():
            try:
                value = eval(operand, frame.f_globals, frame.f_locals)
            except NameError:
                continue
            if isinstance(value, np.ndarray):
                shapes.add(value.shape)
        return shapes

    def _check(self, line: Line, operands: set[tuple[int, ...]], frame, returned) -> None:
        names = frame.f_globals, frame.f_locals
        values = [returned] if line.returns else [eval(target, *names) for target in line.targets]
        self.seen[f"{frame.f_code.co_filename}:{line.last}"] += 1
        results = [np.shape(value) for value in values]
        if len(results) != len(line.results):
            self._complain(frame, line, f"{len(line.results)} shapes for {len(results)} results")
        if not any(
            all(any(fits(shape, found, reading) for found in operands) for shape in line.operand)
            and all(fits(shape, found, reading) for shape, found in zip(line.results, results))
            for reading in readings([*line.operand, *line.results], frame.f_code.co_name in OF_SEVERAL_BLOCKS)
        ):
            self._complain(frame, line, f"operands are {sorted(operands)}, results {results}, "
                                        f"not {line.operand} -> {line.results}")

    def _complain(self, frame, line: Line, what: str) -> None:
        self.wrong.append(f"{Path(frame.f_code.co_filename).name}:{line.last} {frame.f_code.co_name}: {what}")


def a_training_step(comm, plan, config=CONFIG) -> None:
    """Forward and backward on virtual ranks: every operation runs."""
    calls, model = schedule_calls(config, plan, comm)
    weights, gradients = initial_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = (cut(model, whole) for whole in random_batch(config))
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


@pytest.mark.parametrize("paths, least", [(OPS, 60), (OTHERS, 45)], ids=["ops", "references and schedules"])
def test_every_shape_comment_is_true(paths, least, monkeypatch):
    cut_in_strips(monkeypatch, HALF)
    monkeypatch.setattr(attention, "DIAGONAL", HALF)
    watch = Watch(paths)
    for plan, ranks in ((Plan("tp"), 2), (Plan("sp"), 2), (Plan("tp+sp", "2x2"), 4), (Plan("tsp"), 2),
                        (Plan("fsdp+sp"), 2), (Plan("tsp", stack=3), 1)):
        watch.run(lambda ranks=ranks, plan=plan: VirtualWorld(ranks).run(lambda comm: a_training_step(comm, plan)))
    watch.run(lambda: VirtualWorld(2).run(lambda comm: a_training_step(comm, Plan("tsp"), WITH_OPTIONS)))
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
    "y = x @ w  # [p, h] -> [m, f]",
    "y = x.reshape(2, 3, 5, 96)  # [..., h] -> [p, p, t, h]",
    "y = x[:5].reshape(5, 2, -1)  # [..., h] -> [p, ...]",
    "y = x[:4]  # [..., f]",
    "y, z = x, w  # -> [B*r, h], ...",
])
def test_a_false_shape_comment_is_seen(wrong, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(f"def work(x, w):\n    {wrong}\n    return y\n")
    names: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    watch = Watch([path])
    watch.run(lambda: names["work"](np.zeros((30, 96)), np.zeros((96, 44))))
    assert watch.wrong


def test_every_letter_is_in_the_glossary_of_the_package():
    glossary = (tsp_ref.__doc__ or "").partition("The words:")[0]
    letters = set(re.findall(r"(?:^|  )(\w)  (?=\w)", glossary, re.MULTILINE))
    assert letters >= {*LETTERS, *VARYING} - {"packed"}


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
