"""What generates rollouts. Another engine is a class with what `Engine` has."""

from mai_thinking.rl.engine.engine import BatchedEngine, Engine, inference_copy

__all__ = ["BatchedEngine", "Engine", "inference_copy"]
