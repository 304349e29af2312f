"""NumPy under watch: every array that a computation makes is counted, and so is every matrix product.

A model given `CountedNumpy` in place of `numpy` computes the same bits by the same functions, on arrays that enter
themselves in the accounts of memory and work when they are made. It is slower (each call passes through Python) and
NumPy reuses no temporary of such arrays, so it is for measuring, not for timing.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from ..arrays import Array
from .memory import Memory
from .work import Work


class Counted(np.ndarray[Any, np.dtype[Any]]):
    """An array that counts itself and whatever is computed from it."""

    accounts: CountedNumpy | None = None

    def __array_finalize__(self, parent: Any) -> None:
        # Views, copies, slices and conversions of a counted array come here; results of operations do not.
        self.accounts = getattr(parent, "accounts", None)
        if self.accounts is not None:
            self.accounts.memory.track_new(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """Apply any NumPy operation, and count its result and, if it is a matrix product, its work."""
        if out is not None:
            named["out"] = tuple(map(_plain, out))
        result = getattr(ufunc, method)(*map(_plain, inputs), **named)
        accounts = self.accounts or next(filter(None, (getattr(each, "accounts", None) for each in inputs)), None)
        if accounts is None:
            return result
        if ufunc is np.matmul:
            accounts.work.product(inputs[0].shape, inputs[1].shape)
        return out[0] if out is not None else accounts.counted(result)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Counted) else value


class CountedNumpy:
    """The namespace `numpy`, but all arrays that its functions make are counted."""

    def __init__(self, memory: Memory, work: Work) -> None:
        self.memory = memory
        self.work = work

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(np, name)
        # Operations are counted by the arrays that they are applied to; types and numbers are what they are.
        if not callable(attribute) or isinstance(attribute, type | np.ufunc):
            return attribute

        @wraps(attribute)
        def call(*arguments: Any, **named: Any) -> Any:
            return self.counted(attribute(*arguments, **named))

        setattr(self, name, call)
        return call

    def counted(self, result: Any) -> Any:
        """An array, entered in the accounts if it is new; anything else as it is."""
        if not isinstance(result, np.ndarray) or isinstance(result, Counted):
            return result
        self.memory.track_new(result)
        view: Array = result.view(Counted)
        view.accounts = self  # type: ignore[attr-defined]
        return view
