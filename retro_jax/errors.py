"""What a user can get wrong: one sentence that names the mend. Commands print it and exit with 2."""


class UserError(ValueError):
    """A mistake in input, config or files, told in one sentence: what was given, what is allowed, how to mend it."""


class BadInput(UserError):
    """What is wrong is the content of an input: what was built from it so far is of no use and is dropped."""
