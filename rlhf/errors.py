"""The one error that people are meant to read: what is wrong, where, and what to do."""


class UserError(Exception):
    """A mistake that its reader can fix. Shown as one message without a traceback; the process exits with `exit_code`.

    Exit codes: 2 for a mistake in settings or on the command line, 3 for bad data, 4 for a missing or broken model or
    artifact, 5 for a machine that is too small (CPUs, disk), 6 for training that had to stop, 8 for a server that cannot
    be reached. `rlhf promote` ends with 7 where it refuses.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code

    @property
    def is_stop(self) -> bool:
        """Whether somebody stopped the run (Ctrl-C: 130, SIGTERM: 143) or a stage so that it can grow (138): nothing has
        failed."""
        return self.exit_code in (130, 138, 143)

    def __reduce__(self):  # crosses process borders with its exit code
        return UserError, (self.message, self.exit_code)
