"""mai_thinking: the MAI-Thinking-1 recipe, whole, at a scale that one person can run."""

__version__ = "0.1.0"
