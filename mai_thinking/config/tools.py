"""Which tools a policy may call in RL, and within which limits. MAI-Thinking-1 report §3.3, App. D.

Importable without torch.
"""

from typing import Literal

from pydantic import Field

from mai_thinking.config.base import Count, Seconds, Section

BuiltinTool = Literal["calculator", "lookup", "python"]


class ToolsSection(Section):
    """`tools:` of an RL run; without any, a response is one stretch of text."""

    use: tuple[BuiltinTool, ...] = ()
    """Of `mai_thinking.rl.tools.builtin`."""
    servers: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Servers of the Model Context Protocol: a name, and the command that starts it. Each of its tools is one."""
    most_steps: Count = 8
    """A rollout that calls once more ends there."""
    parallel: Count = 4
    """Calls that one step may hold; further ones are not made."""
    tokens: int = Field(default=64, ge=4, lt=2**20)
    """Of what comes of one step; the rest is cut off."""
    seconds: Seconds = 2.0
    """Of processor time for one call of `python`; waiting, ten times as long, as any other tool may take."""
    megabytes: int = Field(default=256, ge=32, lt=2**31)
    """Memory of one call of `python`."""

    @property
    def enabled(self) -> bool:
        """Whether there is any."""
        return bool(self.use or self.servers)
