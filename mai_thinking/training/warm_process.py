"""Imported by the fork server alone, for what it does to that process; nothing else may import it.

The server dies with whoever started it, and its workers with it, so that no orphan is left even by a SIGKILL; and a
SIGTERM or SIGHUP that every process of a job gets does not take the server, and so the workers, before they have saved.
"""

import signal

from mai_thinking.training.process import die_with_parent

die_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
