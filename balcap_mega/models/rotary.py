"""Rotary angles of tokens with three positions, each frequency following the one that its family says."""

import torch
from torch import Tensor, nn

from balcap_mega.models.families.interface import Decoder


class MultimodalRotary(nn.Module):
    """Multimodal rotary embedding (section 2.1.3 of arXiv 2409.12191), sectioned, interleaved or plain alike.

    Megatron-Core 0.16's knows sections alone. No parameters, and no buffer: angles stay float32 in any model.
    """

    def __init__(self, decoder: Decoder, head_dim: int, base: float):
        super().__init__()
        device = torch.cuda.current_device()
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
        self.frequencies = 1.0 / (base ** (steps / head_dim))
        self.axes = torch.tensor(decoder.rotary_axes, device=device)

    def forward(self, position_ids: Tensor) -> Tensor:
        """[3, 1, S] positions -> [S, 1, 1, head_dim] float32 angles, the two halves of the channels alike."""
        positions = position_ids[:, 0].to(self.frequencies)[self.axes]
        angles = (positions * self.frequencies[:, None]).t()
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
