"""Measurements: our code and its peers in turn, in one process, on one machine; see `mai_thinking.bench.command`."""
