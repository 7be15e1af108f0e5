"""Images: from a file to the normalized pixels that the vision encoder reads.

    file --load_image--> upright RGB image [W x H] --to_pixels(size, fit)--> float32 [3, size, size]
                                   |                     ^
                                   +------augment--------+          (stage 1 only: a random crop, perhaps mirrored)

The vision encoder takes square images. Four ways to make an image square, described for a wide one:

    stretch   one resize to the square                          Owl1
    square    a resize to a square of the longer edge,          Owl2's chat and evaluation
              then one to the size: the shape of "stretch",
              other pixels (each resize rounds to 8 bits)
    pad       bars of CLIP's mean color above and below,        Owl2's training scripts, image quality models
              then a resize
    crop      a resize of the shorter edge to the size,         checkpoints without "image_aspect_ratio"
              then a center crop

All resizes are Pillow's bicubic on 8-bit values, as in the released code; PyTorch's own gives other pixels.
"""

import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vit import CLIP_MEAN, CLIP_STD
from weights import reading

FITS = ("stretch", "square", "pad", "crop")
DEFAULT_FIT = {"owl1": "stretch", "owl2": "square"}  # as in the papers' training and the released chats
MEAN_COLOR = (122, 116, 104)  # CLIP_MEAN in 8 bits: about zero after normalization
MAX_PIXELS = 100_000_000  # of any intermediate image: 400 MB in Pillow
ASPECTS = (3 / 4, 4 / 3)  # of random crops


# --- from a file to upright RGB ----------------------------------------------------------------------


def load_image(source: str | Path | bytes) -> Image.Image:
    """Reads an image as upright 8-bit RGB; of an animation, the first frame. source: a path, or a file's content.

    Raises FileNotFoundError, PermissionError, or ValueError for a file that is not a usable image.
    """
    is_content = isinstance(source, bytes)
    with reading("the image" if is_content else source), warnings.catch_warnings():
        # Pillow refuses an image of 179 million pixels and only warns about one of 90 million: refuse both.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not is_content and Path(source).exists() and not Path(source).is_file():
            raise ValueError("it is not a file")  # opening a pipe would block
        try:
            # An open file, not its path: from a path Pillow reads some rotated TIFFs in scrambled order.
            with BytesIO(source) if is_content else open(source, "rb") as file, Image.open(file) as image:
                if image.format == "EPS":
                    raise ValueError("PostScript is a program, and reading it would run it")
                return to_rgb(image)
        except UnidentifiedImageError:  # its message has the address of the file object
            raise ValueError("it is not an image, or of an unknown format") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB, upright by the EXIF orientation. Transparency is dropped, as in the released code."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = to_8_bits(upright)
    return upright.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scales a gray image of 16 bits or floats; Pillow's `convert` would clip it to almost all white.

    Floating-point files do not define white. It is the smallest of 1, 255 and 65535 that no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    white = 65535
    if image.mode == "F":
        white = next((level for level in (1, 255, 65535) if values.max() <= level), 65535)
    values = np.clip(values * (255 / white), 0, 255)
    return Image.fromarray(values.round().astype(np.uint8))


# --- from RGB to the vision encoder's input ----------------------------------------------------------


def to_pixels(image: Image.Image, size: int, fit: str) -> torch.Tensor:
    """Makes an image square and normalizes it: float32 [3, size, size]. Raises ValueError as fit_to_square does."""
    if image.mode != "RGB":
        image = to_rgb(image)
    square = fit_to_square(image, size, fit)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # [3, size, size], 0..255
    return ((pixels.float() / 255 - CLIP_MEAN) / CLIP_STD).contiguous()


def fit_to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """RGB [W x H] to RGB [size x size], in one of the four ways. Raises ValueError if it is too elongated."""
    assert fit in FITS and min(image.size) > 0, (fit, image.size)
    width, height = image.size
    shorter, longer = sorted(image.size)

    # The largest intermediate image. A line of 1 x 60,000 pixels is a small file, and its square 3.6 billion pixels.
    largest = {
        "stretch": (size, height),  # Pillow resizes the rows first, then the columns
        "square": (longer, longer),
        "pad": (longer, longer),
        "crop": (int(width * size / shorter), int(height * size / shorter)),  # int, not round: as the released code
    }[fit]
    if math.prod(largest) > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is too elongated for the fit {fit!r}")

    if fit == "crop":
        return center_crop(resize(image, *largest), size, size)
    if fit == "square":
        image = resize(image, longer, longer)
    elif fit == "pad":
        image = pad_to_square(image)
    return resize(image, size, size)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), MEAN_COLOR)
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# --- augmentation (stage 1) --------------------------------------------------------------------------


def augment(image: Image.Image, generator: torch.Generator, scale: tuple[float, float] = (0.5, 1.0)) -> Image.Image:
    """Random resized crop and mirroring, without the resize, which to_pixels does with the fit "stretch".

    The crop has a share of the area sampled from `scale` and an aspect ratio between 3:4 and 4:3. All random numbers
    come from the generator: equal seeds give equal crops.
    """
    image = random_crop(image, generator, scale)
    if uniform(0, 1, generator) < 0.5:
        image = ImageOps.mirror(image)
    return image


def random_crop(image: Image.Image, generator: torch.Generator, scale: tuple[float, float]) -> Image.Image:
    for _ in range(10):
        area = uniform(*scale, generator) * image.width * image.height
        aspect = math.exp(uniform(*map(math.log, ASPECTS), generator))  # uniform in the logarithm: 3:4 as likely as 4:3
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = random_int(image.width - width, generator)
            top = random_int(image.height - height, generator)
            return image.crop((left, top, left + width, top + height))
    # An elongated image has no crop of that area and aspect ratio: take as much of its center as the ratio allows.
    width = min(image.width, round(image.height * ASPECTS[1]))
    height = min(image.height, round(image.width / ASPECTS[0]))
    return center_crop(image, width, height)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def random_int(high: int, generator: torch.Generator) -> int:
    """A random integer from 0 to `high`, both included."""
    return int(torch.randint(high + 1, (), generator=generator))
