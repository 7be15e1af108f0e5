"""Images: the released code's pixels, every kind of file upright, every broken one refused in a sentence."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.image import FITS, MEAN_COLOR, augment, load_image, to_pixels

GOLDEN = Path(__file__).parent / "golden" / "text"


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------------------------
# The released code's pixels


def test_golden_pixels():
    golden = load_file(GOLDEN / "pixels.safetensors")
    seen = set()
    for key, expected in golden.items():
        model, fit, name = key.split("/")
        size = {"owl1": 224, "owl2": 448}[model]
        pixels = to_pixels(load_image(GOLDEN / "images" / name), size, fit)
        assert pixels.shape == (3, size, size)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[:, ::7, ::7], expected, rtol=0, atol=1e-6, msg=lambda text: f"{key}: {text}")
        seen.add(fit)
    assert seen == set(FITS)


def test_fits_differ_as_they_should():
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 60, 40))  # red, blue, red; the middle square is blue
    pixels = {fit: to_pixels(image, 40, fit) for fit in FITS}
    assert (pixels["crop"] == pixels["crop"][:, :1, :1]).all()  # blue only
    assert pixels["crop"][2, 0, 0] > 1.5
    assert pixels["pad"][:, 0].abs().max() < 0.02  # the bar of mean colour is about zero
    assert pixels["pad"][0, 20, 0] > 1.5  # and between the bars there is red
    assert torch.allclose(pixels["stretch"], pixels["square"], atol=0.2)
    assert pixels["stretch"][0, 0, 0] > 1.5


def test_unknown_fit_names_the_four():
    with pytest.raises(ValueError, match="stretch, square, pad, crop"):
        to_pixels(noise(5, 5), 14, "Stretch")


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation):
    stored = Image.new("RGB", (32, 16))
    stored.paste((255, 255, 255), (0, 0, 8, 8))  # a white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    stored.save(path, exif=exif)
    image = load_image(path)

    corners = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    corners |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    assert image.size == ((32, 16) if orientation <= 4 else (16, 32))
    x = 2 if "left" in corners[orientation] else image.width - 3
    y = 2 if "top" in corners[orientation] else image.height - 3
    assert image.getpixel((x, y))[0] > 240
    assert np.asarray(image)[..., 0].mean() < 60  # and only that corner


LEVELS = np.array([[0, 257 * 10, 65535], [257 * 100, 257 * 200, 257 * 255]])  # 16 bits


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("rotated", [False, True])
def test_16_bits_are_scaled_not_clipped(tmp_path, mode, rotated):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
    image = Image.frombytes(mode, (3, 2), LEVELS.astype(dtype).tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6 if rotated else 1
    image.save(tmp_path / "image.tif", exif=exif)
    expected = np.array([[0, 10, 255], [100, 200, 255]])
    if rotated:
        expected = np.rot90(expected, -1)
    loaded = np.asarray(load_image(tmp_path / "image.tif"))
    assert loaded.shape == (*expected.shape, 3)
    assert (loaded == expected[..., None]).all()


def test_16_bit_png(tmp_path):
    Image.fromarray(LEVELS.astype(np.uint16)).save(tmp_path / "image.png")
    assert np.asarray(load_image(tmp_path / "image.png"))[..., 1].tolist() == [[0, 10, 255], [100, 200, 255]]


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_of_any_range(tmp_path, white):
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32) * white).save(tmp_path / "image.tif")
    assert np.asarray(load_image(tmp_path / "image.tif"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png"), ("RGBA", "png")])
def test_modes_become_rgb(tmp_path, mode, suffix):
    image = noise(20, 10).convert(mode)
    image.save(tmp_path / f"image.{suffix}")
    loaded = load_image(tmp_path / f"image.{suffix}")
    assert loaded.mode == "RGB"
    difference = np.asarray(loaded, dtype=int) - np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(difference).mean() < (30 if suffix == "jpg" else 1e-9)  # JPEG blurs noise


def test_transparency_is_dropped(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png").getpixel((1, 1)) == (200, 100, 50)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0])
    image.save(tmp_path / "image.png", transparency=1)
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0]]
    assert np.asarray(load_image(tmp_path / "image.png"))[0].tolist() == expected


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    first = Image.new("RGB", (8, 8), (255, 0, 0))
    second = Image.new("RGB", (8, 8), (0, 0, 255))
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"image.{suffix}", save_all=True, append_images=[second], duration=100, **lossless)
    assert load_image(tmp_path / f"image.{suffix}").getpixel((4, 4)) == (255, 0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Broken, hostile and extreme files


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_folder_pipe_and_odd_names(tmp_path):
    assert_refused(tmp_path / "nothing.png", "no such file")
    assert_refused(tmp_path, "not a file")
    assert_refused(tmp_path / ("x" * 5000))
    assert_refused(tmp_path / "nul\0.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert_refused(tmp_path / "pipe.png", "not a file")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0"])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert_refused(path)


def test_postscript_is_not_run(tmp_path):
    noise(8, 8).save(tmp_path / "image.eps")
    assert_refused(tmp_path / "image.eps", "PostScript")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(40, 40).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_refused(path)


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_a_value_error(tmp_path):
    """Bytes changed at random: an image or a ValueError, nothing else."""
    generator = np.random.default_rng(0)
    n_refused = 0
    for suffix in ("png", "jpg", "gif", "tif", "bmp", "webp", "ppm", "ico", "tga"):
        path = tmp_path / f"image.{suffix}"
        noise(24, 16).save(path)
        intact = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(30):
            damaged = intact.copy()
            places = generator.integers(0, min(len(intact), 100), 4)
            damaged[places] = generator.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            try:
                assert load_image(path).mode == "RGB"
            except ValueError:
                n_refused += 1
    assert n_refused > 30


@pytest.mark.parametrize("width, height", [(10_000, 10_000), (60_000, 60_000), (2_000_000_000, 1)])
def test_decompression_bomb(tmp_path, width, height):
    path = tmp_path / "image.png"
    path.write_bytes(png_header(width, height))
    assert_refused(path, "decompression bomb")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp"])
def test_a_files_content_gives_what_the_file_gives(tmp_path, suffix):
    """Upright as well: a tar's member is an image like any other."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"image.{suffix}"
    noise(32, 16).save(path, **({} if suffix == "gif" else {"exif": exif}))
    image = load_image(path.read_bytes())
    assert image.tobytes() == load_image(path).tobytes()
    assert image.size == ((32, 16) if suffix == "gif" else (16, 32))


def test_content_is_refused_as_files_are(tmp_path):
    """Nothing, no image, half an image, PostScript, a bomb: a sentence each, and none of the content in it."""
    noise(40, 40).save(tmp_path / "image.png")
    noise(8, 8).save(tmp_path / "image.eps")
    half = (tmp_path / "image.png").read_bytes()[:2000]
    cases = {b"": "unknown format", b"hello": "unknown format", half: "truncated"}
    cases[(tmp_path / "image.eps").read_bytes()] = "PostScript"
    cases[png_header(10_000, 10_000)] = cases[png_header(60_000, 60_000)] = "decompression bomb"
    for content, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            load_image(content)
        message = str(caught.value)
        assert message.startswith("Cannot read the image: ") and "\n" not in message and len(message) < 300


def test_zero_size(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png_header(0, 5))
    assert_refused(path)
    for fit in FITS:
        with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
            to_pixels(Image.new("RGB", (0, 5)), 14, fit)


@pytest.mark.parametrize("width, height", [(1, 60_000), (60_000, 1)])
def test_elongated(width, height):
    image = Image.new("RGB", (width, height), MEAN_COLOR)
    assert to_pixels(image, 448, "stretch").abs().max() < 0.02
    for fit in ("square", "pad", "crop"):
        with pytest.raises(ValueError, match=f"{width} x {height} pixels is too long for the fit '{fit}'"):
            to_pixels(image, 448, fit)


def test_stretch_of_a_line_of_millions():
    """Pillow resizes rows first, to 448 x 1,000,000."""
    with pytest.raises(ValueError, match="too long"):
        to_pixels(Image.new("RGB", (1, 1_000_000)), 448, "stretch")


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("width, height", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_small_and_narrow(width, height, fit):
    pixels = to_pixels(noise(width, height), 28, fit)
    assert pixels.shape == (3, 28, 28)
    assert pixels.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augment_depends_on_the_seed_only():
    image = noise(60, 40)
    torch.manual_seed(1)
    first = augment(image, seeded(7), (0.5, 1.0))
    torch.manual_seed(2)
    again = augment(image, seeded(7), (0.5, 1.0))
    other = augment(image, seeded(8), (0.5, 1.0))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert image.tobytes() == noise(60, 40).tobytes()  # the image itself stays


def test_augment_crops_and_mirrors():
    column = np.arange(200, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(column[None, :, None], (180, 200, 3)).copy())  # brightness = x
    n_mirrored = 0
    areas = []
    for seed in range(200):
        crop = np.asarray(augment(image, seeded(seed), (0.5, 1.0)), dtype=int)[..., 0]
        steps = np.unique(np.diff(crop, axis=1))
        assert steps.tolist() in ([1], [-1])  # a part of the image, or of its mirror image
        n_mirrored += steps[0] == -1
        height, width = crop.shape
        areas.append(width * height / (200 * 180))
        assert 0.73 < width / height < 1.36
    assert 70 < n_mirrored < 130
    assert min(areas) > 0.49
    assert min(areas) < 0.55
    assert max(areas) > 0.9


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000), (1, 60_000), (1, 1)])
def test_augment_of_a_long_image_is_its_middle(width, height):
    crop = augment(Image.new("RGB", (width, height)), seeded(0), (0.5, 1.0))
    assert 1 <= min(crop.size)
    assert max(crop.size) <= max(1, 1.4 * min(width, height))
