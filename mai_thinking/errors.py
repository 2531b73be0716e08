"""The one exception that means "the user can mend this"."""


class UsageError(Exception):
    """Bad input: a config, a data file, a checkpoint, a command line.

    The message is a single line that says what is wrong and names the fix. Scripts print it and exit with code 2,
    without a traceback; everything else that is raised is a bug and keeps its traceback.
    """
