"""Two kinds of errors: a request that cannot be met, which its user can mend, and a message that is wrong."""


class UserError(Exception):
    """A request that cannot be met: one line that names the field, the value and what would be valid.

    The command line prints it once, on rank 0, and every rank exits with its code.
    """

    code = 2


class AgreedError(UserError):
    """A `UserError` that every rank raises at the same point, so that all can leave together and in good order."""


class MessageError(RuntimeError):
    """A message that is wrong: not contiguous, of another size or dtype than its receiver expects, or never matched."""
