"""Where in a step a rank is: the phase that messages, memory and work are accounted under."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeAlias, TypeVar, cast

Phase: TypeAlias = tuple[str, str]
"""(sub-layer, direction): embedding, attention, mlp, head, loss, gains, optimizer or model; forward or backward."""

OUTSIDE: Phase = ("", "")
"""Before, between and after steps."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Account(Protocol):
    """What counts by phase: a model, and the communicator or mesh beside it."""

    phase: Phase


def phase(sublayer: str, direction: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Everything that the decorated function sends, holds and computes belongs to this phase.

    The function's first arguments, given by place, are the model, or a communicator and the model. A forward that is
    run again within a backward belongs to the backward: that is what recomputation costs.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        keepers = list(inspect.signature(function).parameters).index("model") + 1

        @wraps(function)
        def within(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            accounts = cast("tuple[Account, ...]", arguments[:keepers])
            before = [account.phase for account in accounts]
            here = (sublayer, "backward" if before[-1][1] == "backward" else direction)
            for account in accounts:
                account.phase = here
            try:
                return function(*arguments, **named)
            finally:
                for account, was in zip(accounts, before):
                    account.phase = was

        return within

    return decorate
