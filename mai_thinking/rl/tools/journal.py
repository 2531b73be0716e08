"""Calls that change something outside: a file for each, there before the call is made. A rollout that is generated
again, after a death or a failure, by whichever process, does not make them again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.tools.base import ToolError


class CallJournal:
    """A folder, made when there is something to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, key: tuple[int | str, ...], call: Callable[[], str]) -> str:
        """The result of `call`, or that of before. ToolError where it was begun and nobody knows what came of it."""
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(json.dumps(key).encode())}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            text = path.read_text(encoding="utf-8")
            if not text:
                raise ToolError("nobody knows whether this call has had its effect; it is not made again") from None
            return str(json.loads(text)["result"])
        result = call()
        with atomic_file(path, durable=True) as temporary:
            temporary.write_text(json.dumps({"call": key, "result": result}), encoding="utf-8")
        return result
