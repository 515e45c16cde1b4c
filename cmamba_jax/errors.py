"""The errors that a user can mend."""


class UserError(ValueError):
    """A mistake in a command, a configuration or a file; the message names the cure.

    The command line prints the message alone, without a traceback.
    """
