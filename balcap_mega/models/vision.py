"""Vision towers behind one interface, and images shared out over tensor-parallel ranks.

Parameter names are transformers' own, under the attributes that Hugging Face's model uses for them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class VisionInputs:
    """One image as its tower takes it. Compared by identity: the same object is the same image.

    pixel_values:    [patches, channels * temporal * patch * patch] of a tower that takes any number of patches;
                     [1, 3, height, width] of one that takes a single size; float32
                     [0] on a rank that does not encode the image
    image_grid_thw:  [1, 3] int64, patches in time, height and width; None for a single size
    """

    pixel_values: Tensor
    image_grid_thw: Tensor | None = None

    @classmethod
    def without_pixels(cls, image_grid_thw: Tensor | None) -> "VisionInputs":
        return cls(torch.empty(0), image_grid_thw)


class VisionTower(nn.Module, ABC):
    """A family's tower and what projects it into the decoder, from transformers' own module classes.

    width: channels of its output. Behind the `hidden_size` that stand at an image's places may follow as many again for
           each of the decoder's first layers (`Decoder.deepstack`)
    """

    width: int

    @abstractmethod
    def token_count(self, image: VisionInputs) -> int:
        """How many of the decoder's tokens the image takes."""

    @abstractmethod
    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        """[tokens of all images, width], image after image; images attend only to themselves."""


def encode_images(
    tower: VisionTower,
    images: Sequence[VisionInputs],
    group: torch.distributed.ProcessGroup,
) -> list[Tensor]:
    """[tokens_i, width] embeddings of every image, each encoded by one rank of `group` and shared with the rest.

    Every rank passes the same images, with pixels where `encoded_by` says so. In the backward pass each rank takes the
    gradient of the images it encoded, so its parameters' gradients are partial sums over the group.
    """
    counts = [tower.token_count(image) for image in images]
    if group.size() == 1:
        return list(tower(images).split(counts))
    shares = share_out(counts, group.size())
    mine = shares[group.rank()]
    if not all(images[index].pixel_values.numel() for index in mine):
        raise ValueError("an image is without pixels on the rank that encodes it")
    if mine:
        encoded = tower([images[index] for index in mine])
    else:
        reference = next(tower.parameters())
        encoded = torch.empty(0, tower.width, dtype=reference.dtype, device=reference.device)
        # Where gradients flow to the images, this rank too must take part in the collectives of their backward pass.
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        encoded.requires_grad_(trained and torch.is_grad_enabled())
    sizes = [sum(counts[index] for index in share) for share in shares]
    gathered = _GatherRows.apply(encoded, sizes, group)
    order = [index for share in shares for index in share]
    by_image = dict(zip(order, gathered.split([counts[index] for index in order]), strict=True))
    return [by_image[index] for index in range(len(images))]


def encoded_by(
    rank: int, ranks: int, rows: Iterable[Sequence[int]], counts: Mapping[int, int], *, frozen: bool
) -> set[int]:
    """The images that `encode_images` has rank `rank` of `ranks` encode, as the policy passes row after row.

    rows:   each row's images by number, in order
    counts: of the decoder's tokens, by image
    frozen: the tower is: each image is encoded in the first row that has it, and not again
    """
    mine: set[int] = set()
    known: set[int] = set()
    for row in rows:
        images = [image for image in dict.fromkeys(row) if image not in known]
        if frozen:
            known |= set(images)
        mine |= {images[index] for index in share_out([counts[image] for image in images], ranks)[rank]}
    return mine


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
