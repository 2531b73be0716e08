"""The tasks of a preparation on a Ray cluster, where one machine is not enough. MAI-Thinking-1 report §2.4.

Ray places them, and does again what a dead worker or machine had under way. The machines need this package, and see
the preparation's folder at the same path.
"""

import importlib
import socket
from collections.abc import Sequence
from typing import Any

from mai_thinking.errors import UsageError


def connect(key: str, address: str) -> Any:
    """Ray, connected to the cluster that the config's `key` names; UsageError if there is none."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(f"{key}: Ray is not installed; pip install 'mai_thinking[ray]'") from error
    try:
        if ":" in address:  # where nobody listens Ray waits for minutes, and then ends the process
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=True, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{key}: there is no cluster at {address!r}; `ray start --head` starts one") from error
    return ray


class Cluster:
    """The machines on which shards are worked on."""

    def __init__(self, address: str) -> None:
        self._ray = connect("data.ray", address)

    def run(self, function: Any, task: Any, calls: Sequence[Sequence[Any]]) -> None:
        """`function(task, *call)` for each call. A call that is lost with its machine is made again, three times."""
        remote, shared = self._ray.remote(function), self._ray.put(task)
        try:
            self._ray.get([remote.remote(shared, *call) for call in calls])
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        """Ends what is still under way."""
        self._ray.shutdown()
