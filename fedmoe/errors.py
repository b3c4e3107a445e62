"""The one error type whose message is meant for a person, and how the command line turns it into one line."""


class UserError(ValueError):
    """Something the user can put right; the message is one line with the offending values and what to do."""
