"""Starting a run as several ranks, watching and restarting it, and what it cost."""
