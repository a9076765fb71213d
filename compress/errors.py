"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence with cause, place and next step.

    The CLI prints it and exits with 2.
    """
