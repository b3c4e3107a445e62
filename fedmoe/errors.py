"""Errors whose message is meant for a person: one line, with the offending values and what to do."""


class UserError(ValueError):
    """Something the user can put right."""


class UsageError(UserError):
    """Words on the command line that cannot be understood."""


class DiskError(UserError):
    """The disk refuses a write."""


class OutputLost(Exception):
    """Nobody takes the output any more, as when `| head` has seen enough."""
