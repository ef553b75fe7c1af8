"""What a model that sees squares sees of other pictures: their centre, or all of them on a ground of mean colour."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def seen_share(image_processor: Any, size: tuple[int, int]) -> float:
    """The share of a picture of `size` (width, height) that a Hugging Face image processor leaves to the model.

    1 but for one that makes the shorter side a fixed length and then cuts out the centre, as CLIP's does for LLaVA-1.5.
    """
    short, crop = _sides(image_processor)
    if short is None:
        return 1.0
    width, height = (short * side / min(size) for side in size)
    return min(crop["width"] / width, 1.0) * min(crop["height"] / height, 1.0)


def pad_to_square(image: Image.Image, image_processor: Any) -> Image.Image:
    """The picture in the middle of a square of the processor's mean colour: `expand2square` of LLaVA's own training."""
    if image.width == image.height:
        return image
    side = max(image.size)
    ground = tuple(int(mean * 255) for mean in image_processor.image_mean)
    square = Image.new("RGB", (side, side), ground)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def let_processor_pad(folder: Path, padding_processor: str) -> None:
    """Have the Hugging Face processor in `folder` lay pictures on a square itself (`Family.padding_processor`)."""
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        section = config.get("image_processor", config)  # a file of its own until transformers 5
        if "image_processor_type" in section:
            section |= {"image_processor_type": padding_processor, "do_pad": True}
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sides(image_processor: Any) -> tuple[int | None, Any]:
    """(length of the shorter side, size of the crop); (None, None) where nothing is cut off."""
    crop, size = getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None) or {}
    pads = getattr(image_processor, "do_pad", False)
    if not getattr(image_processor, "do_center_crop", False) or pads or not crop or not size.get("shortest_edge"):
        return None, None
    return size["shortest_edge"], crop
