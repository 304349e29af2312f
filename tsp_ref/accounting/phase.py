"""Where in a step a rank is: the phase by which messages, memory and work are kept in the books."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeAlias, TypeVar, cast

Phase: TypeAlias = tuple[str, str]
"""(part, direction): embedding, attention, mlp, head, loss, gains, optimizer or model; forward or backward."""

OUTSIDE: Phase = ("", "")
"""Before, between and after steps."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Books(Protocol):
    """What keeps books by phase: a model, and the communicator or mesh beside it."""

    phase: Phase


def phase(part: str, direction: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Everything that the decorated function sends, holds and computes belongs to this phase.

    The function's first arguments, given by place, are the model, or a communicator and the model. A forward that is
    run again within a backward belongs to the backward: that is what recomputation costs.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        keepers = list(inspect.signature(function).parameters).index("model") + 1

        @wraps(function)
        def within(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            books = cast("tuple[Books, ...]", arguments[:keepers])
            before = [book.phase for book in books]
            here = (part, "backward" if before[-1][1] == "backward" else direction)
            for book in books:
                book.phase = here
            try:
                return function(*arguments, **named)
            finally:
                for book, was in zip(books, before):
                    book.phase = was

        return within

    return decorate
