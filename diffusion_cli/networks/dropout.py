"""Dropout with few random bits on CPUs."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout of features with probability p (Srivastava et al. 2014).

    On CPUs, p is rounded to a multiple of 2^-16, because masks of 16 random bits are three times faster. Compiled
    networks use dropout of torch, because `Tensor.random_` would break the graph.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
        # The mask has the memory format of the input.
        bits = words.view(torch.int16).as_strided(input.shape, torch.empty_like(input).stride())
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        return input * (bits >= dropped - 2**15).to(input.dtype).mul_(2**16 / (2**16 - dropped))
