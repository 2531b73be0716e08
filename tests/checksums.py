"""One checksum for a whole tree of tensors and values."""

import hashlib
from typing import Any

import torch


def sha256_of(tree: Any) -> str:
    """Of dtypes, shapes, bytes, keys and values; the order of keys does not matter."""
    digest = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            digest.update(f"{node.dtype}{list(node.shape)}".encode() + node.contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                digest.update(str(key).encode())
                add(node[key])
        elif isinstance(node, list | tuple):
            for value in node:
                add(value)
        else:
            digest.update(repr(node).encode())

    add(tree)
    return digest.hexdigest()
