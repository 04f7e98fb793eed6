"""The one exception type that reaches a person: what was being done, to what, and what to do next."""


class CosiloError(Exception):
    """A failure that a person can act on.

    operation: what was being done ("enrol"); subject: what it was done to, with the reason ("site st-anna: certificate expired 2026-03-01");
    hint: the next thing to do ("run cosilo-site renew"), or empty where nothing can be done.
    """

    def __init__(self, operation: str, subject: str, hint: str = "") -> None:
        self.operation = operation
        self.subject = subject
        self.hint = hint
        super().__init__(f"{operation}: {subject}" + (f"; {hint}" if hint else ""))
