"""Tools of servers that speak the Model Context Protocol, by the protocol's own client library (the extra `tools`)."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from mai_thinking.errors import UsageError
from mai_thinking.rl.tools.base import Tool, ToolError

_START_SECONDS, _CALL_SECONDS = 60.0, 20.0


class ToolServers:
    """Server processes and their tools; on a thread of its own, since the library is asynchronous."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        """UsageError if a server does not start, or the library is missing."""
        self.tools: dict[str, Tool] = {}
        if not commands:
            return
        self._loop = asyncio.new_event_loop()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve(commands)], daemon=True)
        self._thread.start()
        try:
            self._ready.result(_START_SECONDS)
        except ModuleNotFoundError:
            raise UsageError("tools.servers needs the library mcp: pip install 'mai-thinking[tools]'") from None
        except Exception as error:
            names = ", ".join(commands)
            raise UsageError(f"tools.servers: {names}: {error!r:.200}; try the command by itself") from None

    async def _serve(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Keep the sessions open until the end, in one task, as the library wants it."""
        try:
            from mcp import ClientSession, StdioServerParameters
            from mcp.client.stdio import stdio_client

            async with AsyncExitStack() as stack:
                for command, *arguments in commands.values():
                    server = StdioServerParameters(command=command, args=arguments)
                    session = await stack.enter_async_context(
                        ClientSession(*await stack.enter_async_context(stdio_client(server)))
                    )
                    await session.initialize()
                    for one in (await session.list_tools()).tools:
                        self.tools[one.name] = self._tool(session, one)
                self._ready.set_result(None)
                await asyncio.Event().wait()  # until the process ends, and the servers with their input
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)

    def _tool(self, session: Any, described: Any) -> Tool:
        parameters = described.input_schema
        schema = {"name": described.name, "description": described.description or "", "parameters": parameters}
        hints = described.annotations
        harmless = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
        function = partial(self._call, session, described.name, list(parameters.get("properties", {})))
        return Tool(described.name, function, {"type": "function", "function": schema}, effect=not harmless)

    def _call(self, session: Any, name: str, parameters: Sequence[str], *values: Any) -> str:
        asked = session.call_tool(name, dict(zip(parameters, values, strict=False)))
        result = asyncio.run_coroutine_threadsafe(asyncio.wait_for(asked, _CALL_SECONDS), self._loop).result()
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise ToolError(text)
        return text
