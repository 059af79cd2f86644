"""Every network compiles as one graph, forward and backward."""

from typing import Any

import pytest
import torch

import diffusion_cli as diffuse

COMPILED: dict[str, dict[str, Any]] = {
    "unet_cifar10": {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
    "ncsnpp_tiny": {"num_res_blocks": 1},
    "unet1d_tiny": {"channel_mult": [1, 2]},
    "unet3d_tiny": {"num_res_blocks": 1, "window": [8, 8, 4], "window_overlap": 2},
    "dit_tiny": {"depth": 1, "dropout": 0.1},
    "edm2_tiny": {"channel_mult": [1, 2], "attention_resolutions": [16], "dropout": 0.1},
    "set_tiny": {"depth": 1},
    "classifier_tiny": {"num_res_blocks": 1},
    "kl_tiny": {},
}
"""Networks of all kinds with few layers, those of published names with their dropout."""


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_every_kind_of_network_compiles_as_one_graph(name):
    torch._dynamo.reset()
    shape = {"set_tiny": (3, 16), "unet1d_tiny": (2, 30), "unet3d_tiny": (1, 8, 8, 8)}.get(name, (1, 16, 16))
    classes = 10 if name == "classifier_tiny" else None
    network = diffuse.option("model", name, shape, classes, **COMPILED[name]).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if name == "kl_tiny":
        output = compiled(x, torch.zeros(2, *network.latent_shape(shape)))
    else:
        output = (
            compiled(x, torch.tensor([1.0, 500.0]), None) if classes is None else compiled(x, torch.ones(2))
        )
    for part in output if isinstance(output, tuple) else [output]:
        part.square().sum().backward(retain_graph=True)
    assert all(weight.grad is not None for weight in network.parameters())
