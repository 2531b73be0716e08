"""The exceptions whose message is all that a user needs; whatever else is raised is a bug, with its traceback. And what
makes text of others fit to be shown."""


class UsageError(Exception):
    """Bad input: a config, a data file, a checkpoint, a command line.

    The message is a single line that says what is wrong and names the fix. Scripts print it and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes, such as a field's name, may have any text


class DataError(UsageError):
    """Bad input that came to light in mid-run, such as a late line of a stream: save the last whole step, then end."""


class RunError(Exception):
    """A run that must not go on: its numbers are wrong, though its input is well-formed.

    The message is a single line that names the step. Scripts print it and exit with code 1.
    """


def one_line(error: BaseException) -> str:
    """The beginning of another library's message, for one of ours."""
    return " ".join(str(error).split())[:200]


def printable(text: str) -> str:
    """`text` with control and direction characters spelled out; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
