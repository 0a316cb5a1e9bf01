"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Wrong use: its message is one sentence naming the value, the rule and the remedy.

    The command line prints the message alone and exits with code 2; anything else is a failure of ours.
    """
