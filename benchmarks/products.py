"""Which matrix products a training step makes, and in which of its functions it spends its time.

Products are found by watching NumPy while a step runs, so that no list of them can fall behind the code. Each is known
by everything that its speed depends on: shapes, strides and dtype of both operands and of the result.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

from common import np

from tsp_ref.grid.tree import Tree
from tsp_ref.model import tilewise
from tsp_ref.reference import single
from tsp_ref.training.optimizer import AdamW

PRODUCTS = {np.dot, np.inner, np.einsum, np.tensordot}
"""Products that are not NumPy's `matmul`: the steps make none, and one would not be noticed."""


def is_product(function: Any, arguments: Any) -> bool:
    """Whether a function's call is a matrix product. An `einsum` of arrays that all have the same indices is none: it
    multiplies element by element, and sums."""
    alike = function is np.einsum and len(set(arguments[0].partition("->")[0].split(","))) == 1
    return function in PRODUCTS and not alike


@dataclass(frozen=True)
class Operand:
    """How an array lies in memory. Strides are in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any) -> Operand:
        """An array's."""
        return cls(array.shape, tuple(stride // array.itemsize for stride in array.strides), array.dtype.name)

    def like(self, generator: np.random.Generator) -> Any:
        """An array of random numbers that lies in memory alike."""
        size = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))
        memory = generator.standard_normal(size, dtype=np.float32).astype(self.dtype)
        return np.lib.stride_tricks.as_strided(memory, self.shape, [each * memory.itemsize for each in self.strides])

    @property
    def transposed(self) -> bool:
        """Whether its rows are what lies apart least: BLAS is told to transpose it."""
        return self.strides[-2] < self.strides[-1]


@dataclass(frozen=True)
class Product:
    """One kind of product: a call of BLAS for each of its leading indices."""

    left: Operand
    right: Operand
    result: Operand

    @property
    def flops(self) -> int:
        """2·m·n·k for each of the leading indices."""
        return 2 * math.prod(self.left.shape) * self.right.shape[-1]

    @property
    def form(self) -> str:
        """BLAS's letters for it: N as it lies, T transposed."""
        return "".join("NT"[operand.transposed] for operand in (self.left, self.right))

    def call(self, generator: np.random.Generator) -> Callable[[], None]:
        """This product, of arrays of its own."""
        left, right, out = (each.like(generator) for each in (self.left, self.right, self.result))
        return lambda: np.matmul(left, right, out=out)


Journal: TypeAlias = "Counter[tuple[str, Product]]"
"""(function of `tsp_ref.ops`, product) -> how many times."""


class Watched(np.ndarray):
    """An array that enters the products made with it, and with whatever is computed from it, in a journal."""

    watcher: Watcher | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.watcher = getattr(parent, "watcher", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """Apply any NumPy operation, and note it if it is a matrix product."""
        plain = [_plain(each) for each in inputs]
        if out is not None:
            named["out"] = tuple(map(_plain, out))
        result = getattr(ufunc, method)(*plain, **named)
        watcher = next(each.watcher for each in (*inputs, *(out or ())) if getattr(each, "watcher", None) is not None)
        if ufunc is np.matmul:
            watcher.note(Product(*map(Operand.of, (*plain, result))))
        return out[0] if out is not None else watcher.watched(result)

    def __array_function__(self, function: Any, types: Any, arguments: Any, named: Any) -> Any:
        """Any other function; a product that would not be noticed is a mistake of this file."""
        assert not is_product(function, arguments), f"a step calls {function.__name__}, which is not watched"
        return super().__array_function__(function, types, arguments, named)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Watched) else value


class Watcher:
    """The namespace `numpy`; what it makes is watched."""

    def __init__(self) -> None:
        self.journal: Journal = Counter()
        self.inside = ""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(np, name)
        if not callable(attribute) or isinstance(attribute, type | np.ufunc):
            return attribute
        return lambda *arguments, **named: self.watched(attribute(*arguments, **named))

    def watched(self, result: Any) -> Any:
        """An array, watched; anything else as it is."""
        if not isinstance(result, np.ndarray):
            return result
        view = result.view(Watched)
        view.watcher = self
        return view

    def note(self, product: Product) -> None:
        """Enter a product."""
        self.journal[self.inside, product] += 1


class Clock:
    """The time within functions, without that in others of them that they call."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]

    def run(self, name: str, function: Callable[..., Any], arguments: Any, named: Any) -> Any:
        """Call a function."""
        self._inner.append(0.0)
        begin = self.now()
        try:
            return function(*arguments, **named)
        finally:
            taken = self.now() - begin
            self.seconds[name] += taken - self._inner.pop()
            self.calls[name] += 1
            self._inner[-1] += taken


@contextlib.contextmanager
def around(run: Callable[[str, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Within it, what a step of the single process calls is called by run(name, function, arguments, named): the
    functions of `tsp_ref.ops` that `tilewise` calls, its own, additions in trees, and AdamW."""
    with contextlib.ExitStack() as patches:
        for name, operations in _operations():
            wrapped = {each: _wrapped(run, each, function) for each, function in _of_module(operations)}
            patches.enter_context(mock.patch.object(tilewise, name, SimpleNamespace(**wrapped)))
        for module, name, function in _functions():
            patches.enter_context(mock.patch.object(module, name, _wrapped(run, f"tilewise.{name}", function)))
        for owner, method, name in ((Tree, "add", "sums in trees"), (Tree, "add_stack", "sums in trees"),
                                    (AdamW, "update", "AdamW")):
            patches.enter_context(mock.patch.object(owner, method, _wrapped(run, name, getattr(owner, method))))
        yield


def _operations() -> list[tuple[str, ModuleType]]:
    # As `tilewise` sees them: within ops, a function that calls another one there has its time.
    return [(name, value) for name, value in vars(tilewise).items()
            if isinstance(value, ModuleType) and value.__name__.startswith("tsp_ref.ops.")]


def _of_module(module: ModuleType) -> list[tuple[str, FunctionType]]:
    return [(name, value) for name, value in vars(module).items() if isinstance(value, FunctionType)]


def _functions() -> list[tuple[ModuleType, str, FunctionType]]:
    return [(module, name, value) for module in (single, tilewise) for name, value in _of_module(module)
            if value.__module__ == tilewise.__name__]


def _wrapped(run: Callable[..., Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: run(name, function, arguments, named)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Within it, products are entered under the function of `tsp_ref.ops` that makes them."""

    def inside(name: str, function: Callable[..., Any], arguments: Any, named: Any) -> Any:
        before, watcher.inside = watcher.inside, name
        try:
            return function(*arguments, **named)
        finally:
            watcher.inside = before

    with around(inside):
        yield
