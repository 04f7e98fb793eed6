"""The one exception type that reaches a person: what was being done, to what, and what to do next; and what a terminal may be shown."""


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


def printable(text: str) -> str:
    """Text as it may be written to a terminal or a log: line ends and tabs stay, other control characters become U+FFFD.

    Much of what is shown was said by somebody else: a site's software, a coordinator's reason. Escape sequences in it would move the cursor
    and write over what a person compares, and marks of direction would turn it around.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def one_line(text: str) -> str:
    """Text as `printable` has it, and on one line: a cell or an entry that ends its line could begin another that nobody wrote."""
    return printable(text).translate(_ONE_LINE)


_ONE_LINE = str.maketrans("\n\t", "\ufffd\ufffd")
