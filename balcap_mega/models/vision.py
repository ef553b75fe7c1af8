"""The vision tower of either family, from transformers' own module classes, behind one interface.

Parameter names are transformers' own, under the attribute that Hugging Face's model uses for them:
`visual.*` (Qwen2.5-VL) or `vision_tower.*` and `multi_modal_projector.*` (LLaVA).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from balcap_mega.models.vision_attention import BATCHED_SEGMENTS


@dataclass(frozen=True, eq=False)
class VisionInputs:
    """One image as its tower takes it. Compared by identity: the same object is the same image.

    pixel_values:    Qwen2.5-VL [patches, channels * temporal * patch * patch]; LLaVA [1, 3, height, width]; float32
    image_grid_thw:  Qwen2.5-VL [1, 3] int64, patches in time, height and width; None for LLaVA
    """

    pixel_values: Tensor
    image_grid_thw: Tensor | None = None


class Qwen2_5_VisionTower(nn.Module):
    """Window-attention ViT with its 2x2 merger; as many embeddings an image as its size asks for."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(deepcopy(config.vision_config))
        self.visual.config._attn_implementation = BATCHED_SEGMENTS

    def token_count(self, image: VisionInputs) -> int:
        return int(image.image_grid_thw.prod()) // self.visual.spatial_merge_unit

    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        """[tokens of all images, hidden], image after image; images attend only to themselves."""
        parameter = self.visual.patch_embed.proj.weight
        pixels = torch.cat([image.pixel_values for image in images]).to(parameter)
        grids = torch.cat([image.image_grid_thw for image in images]).to(parameter.device)
        return self.visual(pixels, grid_thw=grids).pooler_output


class LlavaVisionTower(nn.Module):
    """CLIP ViT up to the feature layer, class token dropped, then the two-layer projector."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        # `vision_feature_layer` indexes the embeddings and then each layer's output; what follows it is never run.
        self.depth = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
        for unused in [*self.vision_tower.encoder.layers[self.depth :], self.vision_tower.post_layernorm]:
            unused.requires_grad_(False)

    def token_count(self, image: VisionInputs) -> int:
        return self.vision_tower.embeddings.num_patches

    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        """[tokens of all images, hidden], image after image."""
        tower = self.vision_tower
        pixels = torch.cat([image.pixel_values for image in images]).to(self.multi_modal_projector.linear_1.weight)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.depth]:
            hidden = layer(hidden, attention_mask=None)
        return self.multi_modal_projector(hidden[:, 1:]).flatten(0, 1)


def build_vision_tower(config: PretrainedConfig, dtype: torch.dtype) -> Qwen2_5_VisionTower | LlavaVisionTower:
    """The tower of `config` (a whole model's transformers config), its weights of that dtype and not yet read."""
    tower = {"qwen2_5_vl": Qwen2_5_VisionTower, "llava": LlavaVisionTower}[config.model_type](config)
    for parameter in tower.parameters():  # `tower.to(dtype)` would round the rotary frequencies, a buffer, as well
        parameter.data = parameter.data.to(dtype)
    return tower


def encode_images(
    tower: Qwen2_5_VisionTower | LlavaVisionTower,
    images: Sequence[VisionInputs],
    group: torch.distributed.ProcessGroup,
) -> list[Tensor]:
    """[tokens_i, hidden] embeddings of every image, each encoded by one rank of `group` and shared with the rest.

    Every rank passes the same images. In the backward pass each rank takes the gradient of the images it encoded, so
    its parameters' gradients are partial sums over the group.
    """
    counts = [tower.token_count(image) for image in images]
    if group.size() == 1:
        return list(tower(images).split(counts))
    shares = share_out(counts, group.size())
    mine = shares[group.rank()]
    if mine:
        encoded = tower([images[index] for index in mine])
    else:
        reference = next(tower.parameters())
        hidden = images_hidden_size(tower)
        encoded = torch.empty(0, hidden, dtype=reference.dtype, device=reference.device)
    sizes = [sum(counts[index] for index in share) for share in shares]
    gathered = _GatherRows.apply(encoded, sizes, group)
    order = [index for share in shares for index in share]
    by_image = dict(zip(order, gathered.split([counts[index] for index in order]), strict=True))
    return [by_image[index] for index in range(len(images))]


def images_hidden_size(tower: Qwen2_5_VisionTower | LlavaVisionTower) -> int:
    if isinstance(tower, LlavaVisionTower):
        return tower.multi_modal_projector.linear_2.out_features
    return tower.visual.merger.mlp[-1].out_features


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `costs` dealt to `ranks`: the largest first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


class _GatherRows(torch.autograd.Function):
    """[n_rank, H] on each rank -> [sum n, H] on all; the gradient, equal on all, is cut back to this rank's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int], group) -> Tensor:
        ctx.start, ctx.length = sum(sizes[: group.rank()]), sizes[group.rank()]
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.start : ctx.start + ctx.length], None, None
