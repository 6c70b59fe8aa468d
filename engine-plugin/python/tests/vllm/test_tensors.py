"""Tensors of torch go in and come out without a copy."""

import torch
from conftest import Daemon

from kvasir import Client, Layout, Namespace


def test_tensors_of_torch(daemon: Daemon) -> None:
    layout = Layout(layers=2, kv_heads=2, head_dim=8, tokens=16, dtype="bf16")
    key = Namespace(layout, architecture="a", weights="w").opaque_key(b"tensor")
    client = Client(daemon.endpoint)
    tensor = torch.randn(2, 2, 2, 16, 8, dtype=torch.bfloat16)
    client.put(key, layout, tensor)
    (came,) = client.get([key])
    for layer, expected in zip(came.layers, tensor, strict=True):
        seen = torch.from_dlpack(layer)
        assert seen.data_ptr() == torch.frombuffer(layer, dtype=torch.uint8).data_ptr()
        assert torch.equal(seen.view(torch.bfloat16), expected.flatten())
