"""Errors whose message is meant for a person: one line, with the offending values and what to do."""


class UserError(ValueError):
    """Something the user can put right."""


class UsageError(UserError):
    """Words on the command line that cannot be understood."""


class DiskError(UserError):
    """The disk refuses a write."""


class OutputLost(Exception):
    """Nobody takes the output any more, as when `| head` has seen enough."""


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return lines[0] if lines[0].rstrip(": ") != type(error).__name__ or len(lines) < 2 else f"{lines[0]} {lines[1]}"
