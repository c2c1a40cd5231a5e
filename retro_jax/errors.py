"""What a user can get wrong: one sentence that names the mend. Commands print it and exit with 2."""


class UserError(ValueError):
    """A mistake in input, config or files, told in one sentence: what was given, what is allowed, how to mend it."""
