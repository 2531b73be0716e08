"""Projections whose output is added to the residual stream."""

from torch import nn


def residual_projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias, marked so that its weights are initialised 1/√(residual connections) smaller."""
    projection = nn.Linear(inputs, outputs, bias=False)
    projection.feeds_residual = True  # type: ignore[assignment]
    return projection
