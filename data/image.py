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
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common.files import check_file, reading
from vit import CLIP_MEAN, CLIP_STD

FITS = ("stretch", "square", "pad", "crop")
DEFAULT_FIT = {"owl1": "stretch", "owl2": "square"}  # as in the papers' training and the released chats
MEAN_COLOR = (122, 116, 104)  # CLIP_MEAN in 8 bits: about zero after normalization
MAX_FILE = 400_000_000  # bytes
MAX_PIXELS = 100_000_000  # of any intermediate image: 400 MB in Pillow (of a file: Pillow's limit, 178,956,970)
MAX_LONGER = 20_000  # pixels of the longer edge for "square" and "pad", whose time is quadratic in it
BAND = 32  # rows that resize_in_bands resizes at a time
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # of gray images: of floats, or of 8 to 16 bits
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNSUPPORTED = {b"ftyphe": "HEIC", b"ftypmi": "HEIC", b"ftypms": "HEIC", b"ftypav": "AVIF"}  # by bytes 4 to 9 of a file
ASPECTS = (3 / 4, 4 / 3)  # of random crops


# Pillow warns of malformed metadata, which does not matter here, and of images with more than 89 million pixels.
warnings.filterwarnings("ignore", module="PIL")


# --- from a file to upright RGB ----------------------------------------------------------------------


def load_image(source: str | Path | bytes) -> Image.Image:
    """Reads an image as upright 8-bit RGB; of an animation, the first frame. source: a path, or a file's content.

    Raises OSError for a file that cannot be opened, or ValueError for one that is not a usable image. Warns of an image
    that shows nothing without its transparency.
    """
    name = "the image" if isinstance(source, bytes) else source
    with reading(name):
        if not isinstance(source, bytes):
            check_file(source, MAX_FILE)
        # An open file, not its path: from a path Pillow reads some rotated TIFFs in scrambled order.
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            try:
                return decode(file, name)
            except Exception:
                file.seek(0)
                if file.read(8) != PNG_SIGNATURE:
                    raise
            # Pillow rejects a PNG for any metadata that is malformed or unpacks to more than 1 MiB.
            file.seek(0)
            return decode(BytesIO(remove_metadata(file.read())), name)


def decode(file: BinaryIO, name: object) -> Image.Image:
    try:
        with Image.open(file) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and reading it would run it")
            return to_rgb(image, name)
    except UnidentifiedImageError:  # its message has the address of the file object
        file.seek(4)
        kind = UNSUPPORTED.get(file.read(6))
        reason = f"{kind} is not supported: convert it to JPEG or PNG" if kind else "it is no image of a known format"
        raise ValueError(reason) from None


def remove_metadata(png: bytes) -> bytes:
    """Returns a PNG file without its ancillary chunks, except an intact transparency and an intact EXIF block."""
    parts = [PNG_SIGNATURE]
    start = len(PNG_SIGNATURE)
    while start < len(png):  # a chunk: content length, four letters (the first is lower case: ancillary), content, CRC
        chunk = png[start : start + 12 + int.from_bytes(png[start : start + 4], "big")]
        is_intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if chunk[4:5].isupper() or (chunk[4:8] in (b"tRNS", b"eXIf") and is_intact):
            parts.append(chunk)
        start += len(chunk)
    return b"".join(parts)


def to_rgb(image: Image.Image, name: object = "the image") -> Image.Image:
    """Converts to 8-bit RGB, upright by the EXIF orientation. Transparency is dropped, as in the released code."""
    image = turn_upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = to_8_bits(image)
    rgb = image.convert("RGB")
    if image.has_transparency_data and all(high - low <= 32 for low, high in rgb.getextrema()):
        low, high = image.convert("RGBA").getextrema()[3]
        if low < high:  # such as black writing on a transparent background
            advice = "without its transparency, which the model does not see, it has one color: add a background"
            warnings.warn(f"{name}: {advice}", stacklevel=2)
    return rgb


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns an image by its EXIF orientation. Other fields, which may be malformed, do not matter."""
    image.load()  # some formats have their EXIF block after the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the whole block is malformed, for which Pillow raises errors of many classes
        orientation = 1
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scales a gray image of more than 8 bits, or of floats, by its range; Pillow's `convert` would clip it to 255.

    Files do not say which value is white: 16 bits often hold 12. White is the smallest of WHITES that no pixel exceeds,
    or else the largest value. Black is 0, or the smallest value if that is negative (as in CT).
    """
    values = np.asarray(image).astype(np.float32)
    values[~(np.abs(values) < 1e30)] = 0  # NaN, infinity, and the 3e38 that marks missing values
    black, largest = min(0.0, float(values.min())), float(values.max())
    whites = WHITES if image.mode == "F" else WHITES[1:]
    white = next((white for white in whites if largest <= white), largest)
    values -= black
    values *= 255 / (white - black)
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
    is_large = math.prod(largest) > MAX_PIXELS
    if is_large and (fit in ("stretch", "crop") or longer > MAX_LONGER):
        raise ValueError(f"an image of {width} x {height} pixels is too elongated for the fit {fit!r}")

    if fit == "crop":
        return center_crop(resize(image, *largest), size, size)
    if is_large:
        return resize_in_bands(image, size, fit)
    if fit == "square":
        image = resize(image, longer, longer)
    elif fit == "pad":
        image = pad_to_square(image)
    return resize(image, size, size)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize_in_bands(image: Image.Image, size: int, fit: str) -> Image.Image:
    """The fits "square" and "pad" with the same pixels, but without the square of the longer edge in memory.

    Pillow first resizes each row, rounds to 8 bits, and then resizes each column: rows can be resized in bands.
    """
    width, longer = image.width, max(image.size)
    narrow = Image.new("RGB", (size, longer))
    for top in range(0, longer, BAND):
        bottom = min(top + BAND, longer)
        if fit == "pad":
            band = Image.new("RGB", (longer, bottom - top), MEAN_COLOR)
            band.paste(image, ((longer - width) // 2, (longer - image.height) // 2 - top))
        elif image.height == longer:
            band = resize(image.crop((0, top, width, bottom)), longer, bottom - top)
        else:
            band = resize_columns(image, longer, top, bottom)
        narrow.paste(resize(band, size, bottom - top), (0, top))
    return resize(narrow, size, size)


def resize_columns(image: Image.Image, n_row: int, top: int, bottom: int) -> Image.Image:
    """The rows from `top` to `bottom` of an image that is enlarged to n_row rows. Bit-equal to Pillow's resize.

    Pillow cannot compute these rows alone: the position of its `box` has 32 bits. This is its arithmetic: bicubic
    weights of at most four rows, as integers with 22 bits after the binary point.
    """
    center = (np.arange(top, bottom)[:, None] + 0.5) * (image.height / n_row)
    first = np.maximum((center - 2 + 0.5).astype(int), 0)
    end = np.minimum((center + 2 + 0.5).astype(int), image.height)
    row = np.arange(first[0, 0], end[-1, 0])
    x = np.abs(row - center + 0.5)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    weights[(row < first) | (row >= end) | (x >= 2)] = 0
    weights /= weights.cumsum(axis=1)[:, -1:]  # the sum in Pillow's order
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)) / 2**22
    pixels = np.asarray(image.crop((0, row[0], image.width, row[-1] + 1)), dtype=np.float64)
    rows = weights @ pixels.reshape(len(row), -1)  # exact in 64 bits
    rows += 0.5  # to round, since the conversion to uint8 truncates
    rows = np.clip(rows, 0, 255, out=rows).astype(np.uint8)
    return Image.fromarray(rows.reshape(-1, image.width, 3))


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
