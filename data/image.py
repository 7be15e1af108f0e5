"""Images: from a file to the normalised pixels that the vision tower reads.

    file --load_image--> upright RGB image [W x H] --to_pixels(size, fit)--> float32 [3, size, size]
                                   |                     ^
                                   +------augment--------+          (stage 1 only: a random crop, perhaps mirrored)

The vision tower takes squares; photographs seldom are. The four fits, for a wide image:

    stretch   one resize to the square                          Owl1
    square    a resize to a square of the longer edge,          Owl2's chat and evaluation
              then one to the size: the shape of "stretch",
              other pixels (each resize rounds to 8 bits)
    pad       bars of CLIP's mean colour above and below,       Owl2's training scripts, image quality models
              then a resize
    crop      shorter edge to the size, the middle kept         checkpoints without "image_aspect_ratio"

All resizes are Pillow's bicubic on 8-bit values, as in the released code: PyTorch's own gives other pixels.
"""

import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FITS = ("stretch", "square", "pad", "crop")
DEFAULT_FIT = {"owl1": "stretch", "owl2": "square"}  # as the papers train and the released chats ask

CLIP_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
MEAN_COLOR = (122, 116, 104)  # CLIP_MEAN in 8 bits: a padded bar is about zero after normalisation

MAX_PIXELS = 100_000_000  # of any image on the way: 400 MB in Pillow


# ----------------------------------------------------------------------------------------------------------------------
# From a file to upright RGB


def load_image(source: str | Path | bytes) -> Image.Image:
    """Reads an image as upright 8-bit RGB, an animation's first frame; ValueError if that cannot be done.

    source: an image file's path, or its content.
    """
    name = "" if isinstance(source, bytes) else f" {source}"
    try:
        if not isinstance(source, bytes):
            if not Path(source).exists():
                raise ValueError("there is no such file")
            if not Path(source).is_file():
                raise ValueError("not a file")  # opening a pipe would wait for ever
        with warnings.catch_warnings():
            # Pillow refuses an image of 179 million pixels and only warns of one of 90 million: refuse both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # An open file, not its path: from a path Pillow reads some rotated TIFFs in scrambled order.
            opened = BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
            with opened as file, Image.open(file) as image:
                if image.format == "EPS":
                    raise ValueError("PostScript is a program, and reading it would run it")
                return to_rgb(image)
    except UnidentifiedImageError:
        reason = "not an image, or of an unknown format"
    except Exception as error:
        # What Pillow raises for a broken file depends on where it is broken: OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
    reason = " ".join(reason.split())
    raise ValueError(f"Cannot read the image{name}: {reason}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by the camera's EXIF note, 8 bits a channel, RGB. Transparency is dropped, as in the released code."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode == "F" or upright.mode.startswith("I;16"):
        upright = to_8_bits(upright)
    return upright.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scales a greyscale image of 16 bits; Pillow's `convert` would clip it, and nearly all of it would be white.

    Floating-point files do not say what is white, 1 or 255 or 65535: the least of them that no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    white = 65535
    if image.mode == "F":
        white = next((level for level in (1, 255, 65535) if values.max() <= level), 65535)
    values = np.clip(values * (255 / white), 0, 255)
    return Image.fromarray(values.round().astype(np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# From RGB to the vision tower's input


def to_pixels(image: Image.Image, size: int, fit: str) -> torch.Tensor:
    """Fits an image into a square and normalises it: float32 [3, size, size]."""
    if image.mode != "RGB":
        image = to_rgb(image)
    square = fit_to_square(image, size, fit)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # [3, size, size], 0..255
    return ((pixels.float() / 255 - CLIP_MEAN) / CLIP_STD).contiguous()


def fit_to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """One of the four fits: RGB [W x H] -> RGB [size x size]."""
    if fit not in FITS:
        raise ValueError(f"unknown fit {fit!r}: it is one of {', '.join(FITS)}")
    width, height = image.size
    shorter = min(width, height)
    longer = max(width, height)
    if shorter == 0:
        raise ValueError(f"an image of {width} x {height} pixels is empty")

    if fit == "stretch":
        refuse_if_huge(image, fit, size, height)  # Pillow resizes the rows first, then the columns
    elif fit == "square":
        refuse_if_huge(image, fit, longer, longer)
        image = resize(image, longer, longer)
    elif fit == "pad":
        refuse_if_huge(image, fit, longer, longer)
        image = pad_to_square(image)
    elif fit == "crop":
        # int, not round: the released code's edge, to the pixel
        new_width = int(width * size / shorter)
        new_height = int(height * size / shorter)
        refuse_if_huge(image, fit, new_width, new_height)
        return centre_crop(resize(image, new_width, new_height), size, size)
    return resize(image, size, size)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), MEAN_COLOR)
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def refuse_if_huge(image: Image.Image, fit: str, width: int, height: int) -> None:
    """A line of 1 x 60,000 pixels is a small file, and its square 3.6 billion pixels."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels is too long for the fit {fit!r}: "
            f"it would take {width:,} x {height:,} pixels on the way"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation, stage 1


def augment(image: Image.Image, generator: torch.Generator, scale: tuple[float, float] = (0.5, 1.0)) -> Image.Image:
    """Random resized crop and mirroring, less the resize: to_pixels with the fit "stretch" does that.

    The crop holds a share of the area drawn from `scale` and has an aspect between 3:4 and 4:3. All chance comes from
    the generator: equal seeds give equal crops.
    """
    image = random_crop(image, generator, scale)
    if uniform(0, 1, generator) < 0.5:
        image = ImageOps.mirror(image)
    return image


def random_crop(image: Image.Image, generator: torch.Generator, scale: tuple[float, float]) -> Image.Image:
    min_aspect = 3 / 4
    max_aspect = 4 / 3
    for _ in range(10):
        area = uniform(*scale, generator) * image.width * image.height
        # in the logarithm, so that 3:4 is as likely as 4:3
        aspect = math.exp(uniform(math.log(min_aspect), math.log(max_aspect), generator))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = random_int(image.width - width, generator)
            top = random_int(image.height - height, generator)
            return image.crop((left, top, left + width, top + height))
    # A long image holds no such crop of that area: its middle, as much as the aspect allows.
    width = min(image.width, round(image.height * max_aspect))
    height = min(image.height, round(image.width / min_aspect))
    return centre_crop(image, width, height)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def random_int(high: int, generator: torch.Generator) -> int:
    """0 to `high`, both included."""
    return int(torch.randint(high + 1, (), generator=generator))
