"""Images: the pixels of the released code, every kind of file upright, every broken file rejected."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import GOLDEN
from data import image
from data.image import FITS, MEAN_COLOR, augment, load_image, to_pixels


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has hardly any pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def red_channel(path: Path) -> np.ndarray:
    """[H, W] of an image whose three channels are equal."""
    loaded = np.asarray(load_image(path))
    assert loaded.ndim == 3 and (loaded == loaded[..., :1]).all()
    return loaded[..., 0]


def test_golden_pixels():
    golden = load_file(GOLDEN / "text" / "pixels.safetensors")
    for key, expected in golden.items():
        variant, fit, name = key.split("/")
        size = {"owl1": 224, "owl2": 448}[variant]
        pixels = to_pixels(load_image(GOLDEN / "text" / "images" / name), size, fit)
        assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32
        # Decoders of JPEG differ by one or two of 255 levels; a standard deviation is at least 0.26 of the range.
        atol = 2.5 / 255 / 0.26 if name.endswith(".jpg") else 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(pixels[:, ::7, ::7], expected, rtol=0, atol=atol, msg=lambda text: f"{key}: {text}")
    assert {key.split("/")[1] for key in golden} == set(FITS)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("width, height", [(1, 1), (1, 300), (300, 1)])
def test_small_and_narrow(width, height, fit):
    pixels = to_pixels(noise(width, height), 28, fit)
    assert pixels.shape == (3, 28, 28) and pixels.isfinite().all()


@pytest.mark.parametrize("fit", FITS)
def test_elongated(fit):
    """A square of 60,000 pixels would take 11 GB; Pillow resizes 1 x 1,000,000 to 448 x 1,000,000 first."""
    for size in ((1, 1_000_000),) if fit == "stretch" else ((1, 60_000), (60_000, 1)):
        with pytest.raises(ValueError, match="elongated"):
            to_pixels(Image.new("RGB", size), 448, fit)
    assert to_pixels(Image.new("RGB", (1, 60_000), MEAN_COLOR), 448, "stretch").abs().max() < 0.02


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix):
    stored = Image.new("RGB", (32, 16))
    stored.paste((255, 255, 255), (0, 0, 8, 8))  # a white corner, top left as stored
    path = tmp_path / f"image.{suffix}"
    for value, corner in enumerate(("top left", "top right", "bottom right", "bottom left") * 2, 1):
        stored.save(path, exif=orientation(value))
        image = load_image(path)
        assert image.size == ((32, 16) if value <= 4 else (16, 32))
        x = 2 if "left" in corner else image.width - 3
        y = 2 if "top" in corner else image.height - 3
        assert image.getpixel((x, y))[0] > 240
        assert np.asarray(image)[..., 0].mean() < 60  # and only that corner


LEVELS = np.array([[0, 257 * 10, 65535], [257 * 100, 257 * 200, 257 * 255]])  # 16 bits


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "png"])
def test_16_bits_are_scaled_not_clipped(tmp_path, mode):
    levels = np.array([[0, 257 * 10, 65535], [257 * 100, 257 * 200, 257 * 255]])
    expected = np.array([[0, 10, 255], [100, 200, 255]])
    if mode == "png":
        Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "image.png")
        assert np.array_equal(red_channel(tmp_path / "image.png"), expected)
        return
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
    image = Image.frombytes(mode, (3, 2), levels.astype(dtype).tobytes())
    image.save(tmp_path / "image.tif", exif=orientation(6))
    assert np.array_equal(red_channel(tmp_path / "image.tif"), np.rot90(expected, -1))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_of_any_range(tmp_path, white):
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32) * white).save(tmp_path / "image.tif")
    assert red_channel(tmp_path / "image.tif").tolist() == [[0, 51, 255]]


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png")])
def test_modes_become_rgb(tmp_path, mode, suffix):
    image = noise(20, 10).convert(mode)
    image.save(tmp_path / f"image.{suffix}")
    difference = np.asarray(load_image(tmp_path / f"image.{suffix}"), dtype=int) - np.asarray(image.convert("RGB"))
    assert np.abs(difference).mean() < (30 if suffix == "jpg" else 1e-9)  # JPEG blurs noise


def test_transparency_is_dropped(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png").getpixel((1, 1)) == (200, 100, 50)
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "palette.png"))[0].tolist() == [[255, 0, 0], [0, 255, 0]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255)))
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"image.{suffix}", save_all=True, append_images=[second], duration=100, **lossless)
    assert load_image(tmp_path / f"image.{suffix}").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_bytes_give_the_same_image_as_their_file(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(32, 16).save(path, exif=orientation(6))
    image = load_image(path.read_bytes())
    assert image.size == (16, 32) and image.tobytes() == load_image(path).tobytes()


def test_missing_folder_pipe_and_unusual_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        load_image(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in (".", "x" * 5000, "nul\0.png", "pipe.png", "/dev/zero"):
        with pytest.raises((ValueError, OSError)):
            load_image(tmp_path / name)


def half_of(suffix: str) -> bytes:
    file = io.BytesIO()
    noise(40, 40).save(file, suffix)
    return file.getvalue()[: len(file.getvalue()) // 2]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
UNUSABLE = [(start, "") for start in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0")]
UNUSABLE += [(png_header(0, 5), ""), (POSTSCRIPT, "PostScript")]
UNUSABLE += [(png_header(*size), "bomb") for size in ((15_000, 12_000), (60_000, 60_000), (2_000_000_000, 1))]
UNUSABLE += [(b"\0\0\0\x18ftyp" + brand + bytes(50), "convert") for brand in (b"heic", b"mif1", b"avif")]
UNUSABLE += [(b"\0\0\0\x18ftypheic" + bytes(50), "HEIC")]
UNUSABLE += [(half_of(suffix), "") for suffix in ("png", "jpeg", "tiff", "bmp", "webp")]


@pytest.mark.parametrize("content, keyword", UNUSABLE)
def test_unusable_files_are_rejected(tmp_path, content, keyword):
    """As a file and as bytes; the message names the file, in one line, and has nothing of the content."""
    path = tmp_path / "image.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError) as caught:
            load_image(source)
        message = str(caught.value)
        assert keyword in message and (source is content or str(path) in message)
        assert "\n" not in message and len(message) < 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm", "ico", "tga"])
def test_any_damage_is_a_value_error(suffix):
    """Bytes changed at random: an image or a ValueError, nothing else."""
    generator = np.random.default_rng(0)
    file = io.BytesIO()
    noise(24, 16).save(file, suffix)
    intact = np.frombuffer(file.getvalue(), dtype=np.uint8)
    for _ in range(30):
        damaged = intact.copy()
        damaged[generator.integers(0, min(len(intact), 100), 4)] = generator.integers(0, 256, 4)
        with contextlib.suppress(ValueError):
            assert load_image(damaged.tobytes()).mode == "RGB"


def augment_with(seed: int, image: Image.Image) -> Image.Image:
    return augment(image, torch.Generator().manual_seed(seed), (0.5, 1.0))


def test_augment_depends_on_the_seed_only():
    image = noise(60, 40)
    first = augment_with(7, image).tobytes()
    torch.manual_seed(2)
    assert first == augment_with(7, image).tobytes() != augment_with(8, image).tobytes()
    assert image.tobytes() == noise(60, 40).tobytes()  # the image itself is unchanged


def test_augment_crops_and_mirrors():
    column = np.arange(200, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(column[None, :, None], (180, 200, 3)).copy())  # brightness = x
    n_mirrored = 0
    areas = []
    for seed in range(200):
        crop = np.asarray(augment_with(seed, image), dtype=int)[..., 0]
        steps = np.unique(np.diff(crop, axis=1))
        assert steps.tolist() in ([1], [-1])  # a part of the image, or of its mirror image
        n_mirrored += steps[0] == -1
        height, width = crop.shape
        areas.append(width * height / (200 * 180))
        assert 0.73 < width / height < 1.36
    assert 70 < n_mirrored < 130
    assert 0.49 < min(areas) < 0.55 and max(areas) > 0.9


@pytest.mark.parametrize("width, height", [(1000, 10), (1, 60_000), (1, 1)])
def test_augment_takes_the_center_of_an_elongated_image(width, height):
    crop = augment_with(0, Image.new("RGB", (width, height)))
    assert 1 <= min(crop.size) and max(crop.size) <= max(1, 1.4 * min(width, height))


def exif_block(*fields: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block with fields of (tag, type, count, 4 bytes)."""
    packed = b"".join(struct.pack("<HHI4s", *field) for field in fields)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + packed + bytes(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("field", [(0x0131, 11, 1, struct.pack("<f", -1)), (0x0111, 2, 4, b"abc\0")])
def test_only_the_orientation_of_an_exif_block_matters(tmp_path, suffix, field):
    """The other field has a type that its tag does not allow."""
    path = tmp_path / f"image.{suffix}"
    noise(32, 16).save(path, exif=orientation(6))
    expected = load_image(path)
    noise(32, 16).save(path, exif=exif_block((0x0112, 3, 1, struct.pack("<HH", 6, 0)), field))
    assert expected.size == (16, 32) and load_image(path).tobytes() == expected.tobytes()


METADATA = {
    "unpacks to 2 MiB": chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello", crc=0),
    "not packed": chunk(b"zTXt", b"Comment\0\0hello") + chunk(b"iCCP", b"profile\0\0hello"),
    "EXIF block": chunk(b"eXIf", b"garbage"),
    "EXIF block with a wrong checksum": chunk(b"eXIf", exif_block()[6:], crc=0),
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("is_before", [True, False])
def test_metadata_of_a_png_does_not_matter(metadata, is_before):
    file = io.BytesIO()
    exif = None if b"eXIf" in metadata else orientation(6)
    noise(32, 16).save(file, "png", exif=exif)
    png = file.getvalue()
    start = 33 if is_before else len(png) - 12  # after IHDR, or before IEND
    loaded = load_image(png[:start] + metadata + png[start:])
    expected = noise(32, 16) if exif is None else noise(32, 16).transpose(Image.Transpose.ROTATE_270)
    assert loaded.tobytes() == expected.tobytes() and loaded.size == expected.size


@pytest.mark.parametrize("fit", ["square", "pad"])
@pytest.mark.parametrize("width, height", [(301, 97), (97, 301), (300, 299), (200, 3)])
def test_a_large_image_is_resized_in_bands_to_the_same_pixels(monkeypatch, fit, width, height):
    picture, longer = noise(width, height), max(width, height)
    expected = to_pixels(picture, 28, fit)
    largest, real_resize = [], image.resize
    monkeypatch.setattr(image, "resize", lambda *args: largest.append(args[1] * args[2]) or real_resize(*args))
    monkeypatch.setattr(image, "MAX_PIXELS", 200 * 200 - 1)
    assert torch.equal(to_pixels(picture, 28, fit), expected)
    assert len(largest) > 3 and max(largest) <= longer * image.BAND


@pytest.mark.parametrize(
    "levels, dtype, expected",
    [
        ([0, 51, 255], np.int32, [0, 51, 255]),
        ([0, 819, 4095], np.uint16, [0, 51, 255]),  # 12 bits
        ([-1024, 0, 4095], np.int32, [0, 51, 255]),  # CT
        ([np.nan, 2e6, 1e7], np.float32, [0, 51, 255]),
        ([-3.4e38, 0.2, 1], np.float32, [0, 51, 255]),
        ([0, 0, 0], np.int32, [0, 0, 0]),
    ],
)
def test_gray_images_are_scaled_by_their_range(tmp_path, levels, dtype, expected):
    Image.fromarray(np.array([levels], dtype=dtype)).save(tmp_path / "image.tif")
    assert red_channel(tmp_path / "image.tif").tolist() == [expected]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_image_that_only_transparency_shows_is_noticed(tmp_path, mode):
    """Black writing on a transparent background: without transparency all is black."""
    path = tmp_path / "image.png"
    picture = Image.new(mode, (8, 8))
    picture.paste(Image.new(mode, (4, 4), "black"), (2, 2))
    picture.save(path)
    with pytest.warns(UserWarning, match="transparency") as caught:
        assert not np.asarray(load_image(path)).any()
    assert str(path) in str(caught[0].message)

    for background in ((255, 255, 255, 0), (0, 0, 0, 255)):  # black on white, or black on black without transparency
        picture = Image.new("RGBA", (8, 8), background)
        picture.paste("black", (2, 2, 6, 6))
        picture.save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(path)


def test_a_git_lfs_pointer_and_a_giant_file_are_refused(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_image(path)
    path.write_bytes(png_header(8, 8))
    os.truncate(path, 3_000_000_000)  # a sparse file
    with pytest.raises(ValueError, match="bytes"):
        load_image(path)
