"""What generates rollouts. Another engine is a class with `Engine`'s two methods."""

from mai_thinking.rl.engine.engine import BatchedEngine, Engine, inference_copy

__all__ = ["BatchedEngine", "Engine", "inference_copy"]
