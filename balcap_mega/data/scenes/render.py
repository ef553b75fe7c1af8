"""Draws a scene: flat shapes with an outline, supersampled so that edges come out smooth."""

from math import cos, pi, sin

from PIL import Image, ImageChops, ImageDraw, ImageFont

from balcap_mega.data.scenes.world import Scene, SceneObject

IMAGE_SIZE = 112  # 16 merged patches of 28 pixels, the grain of Qwen2.5-VL
_OVERSAMPLING = 4
_RADIUS = {"small": 0.1, "large": 0.19}  # fractions of the side
_RGB = {
    "red": (225, 45, 45),
    "green": (40, 165, 70),
    "blue": (45, 105, 235),
    "yellow": (250, 210, 40),
    "purple": (150, 65, 190),
    "orange": (250, 135, 25),
    "white": (255, 255, 255),
    "grey": (190, 192, 196),
    "black": (32, 32, 36),
}

_FRAME = (150, 105, 60)
_INKS = {
    "striped": ((255, 255, 255), 0.75),
    "dotted": ((0, 0, 0), 0.6),
}  # light stripes, dark dots: told apart when small


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """An RGB image of `size` x `size` pixels."""
    side = size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _RGB[scene.background])
    for item in scene.objects:
        _paint(canvas, item)
    draw = ImageDraw.Draw(canvas)  # a frame: a vision tower without absolute positions sees where an edge is
    draw.rectangle((0, 0, side - 1, side - 1), outline=_FRAME, width=round(side * 0.027))
    return canvas.reduce(_OVERSAMPLING)


def _paint(canvas: Image.Image, item: SceneObject) -> None:
    """Painted on a tile just large enough, then pasted."""
    side = canvas.width
    radius = side * _RADIUS[item.size]
    tile = round(2.4 * radius)
    colour = _RGB[item.colour]
    outer = _silhouette(tile, item.kind, radius)
    inner = _silhouette(tile, item.kind, radius * 0.9)
    picture = Image.new("RGB", (tile, tile), _mix(colour, (0, 0, 0), 0.35))
    picture.paste(colour, mask=inner)
    if item.texture != "plain":
        pattern = _pattern(tile, item.texture, period=side / 14)
        ink = _mix(colour, *_INKS[item.texture])
        picture.paste(ink, mask=ImageChops.multiply(inner, pattern))
    if item.word:
        font = ImageFont.load_default(size=radius * 0.72)
        draw = ImageDraw.Draw(picture)
        draw.text((tile / 2, tile / 2), item.word.upper(), fill=(20, 20, 20), font=font, anchor="mm", stroke_width=2)
    left = round(side * (0.25 + 0.5 * item.column + item.offset[0]) - tile / 2)
    top = round(side * (0.25 + 0.5 * item.row + item.offset[1]) - tile / 2)
    canvas.paste(picture, (left, top), mask=outer)


def _silhouette(side: int, kind: str, r: float) -> Image.Image:
    """The shape of radius `r` as a mask, in the middle of a square tile."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    x = y = side / 2

    def polygon(*points: tuple[float, float]) -> None:
        draw.polygon([(x + r * px, y + r * py) for px, py in points], fill=255)

    match kind:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        case "square":
            draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=255)
        case "triangle":
            polygon((0, -1), (1.02, 0.8), (-1.02, 0.8))
        case "star":
            polygon(
                *((s * sin(k * pi / 5), -s * cos(k * pi / 5)) for k in range(10) for s in [1.1 if k % 2 == 0 else 0.45])
            )
        case "heart":
            curve = (2 * pi * k / 60 for k in range(60))
            polygon(
                *(
                    (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 15.5 - 0.08)
                    for t in curve
                )
            )
        case "cross":
            draw.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=255)
            draw.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=255)
        case "sign":
            draw.rounded_rectangle((x - 1.08 * r, y - 0.62 * r, x + 1.08 * r, y + 0.62 * r), radius=0.18 * r, fill=255)
        case _:
            raise ValueError(f"no drawing for kind {kind!r}")
    return mask


def _pattern(side: int, texture: str, period: float) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    steps = int(side / period) + 2
    for i in range(-steps, steps):
        if texture == "striped":  # diagonal bands
            left = 1.33 * i * period
            draw.line((left, 0, left + side, side), fill=255, width=round(period * 0.42))
        else:
            for j in range(steps):
                x, y, r = i * period + (j % 2) * period / 2, j * period, period * 0.26
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return mask


def _mix(colour: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(colour, other))
    return red, green, blue
