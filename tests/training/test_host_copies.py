"""Copies of a state in host memory."""

import torch

from mai_thinking.training.checkpoint import HostCopies


def test_copies_are_apart_from_the_state_and_their_memory_is_used_again() -> None:
    state = {"weight": torch.randn(5, 3).mT, "step": torch.tensor(7), "gone": torch.zeros(2)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    host = HostCopies()
    first = host.take(state)
    for tensor in state.values():
        tensor.add_(1)
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    del state["gone"]
    second = host.take(state)
    assert second.keys() == state.keys()
    torch.testing.assert_close(second, state, rtol=0, atol=0)
    assert second["weight"].data_ptr() == first["weight"].data_ptr()


def test_a_tensor_of_another_shape_gets_another_place() -> None:
    host = HostCopies()
    host.take({"x": torch.zeros(3)})
    assert host.take({"x": torch.ones(2, 2)})["x"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert host.take({"x": torch.ones(2, 2, dtype=torch.int32)})["x"].dtype == torch.int32


def test_a_thousand_checkpoints() -> None:
    """More than one, at which PyTorch's own fails in torch 2.11."""
    host, weight = HostCopies(), torch.zeros(3)
    for count in range(1, 1001):
        weight.add_(1)
        assert host.take({"weight": weight})["weight"][0] == count
