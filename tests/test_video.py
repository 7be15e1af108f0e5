"""Frames of videos: sampling times, wrong durations, and files that are no video."""

import importlib.util
import sys

import pytest
from PIL import Image

from data.video import read_frames, select

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")


def save_animation(path, n, duration):
    """Frame i has the gray value 20 i."""
    first, *others = [Image.new("RGB", (16, 8), (20 * i,) * 3) for i in range(n)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0, **options)
    return path


def shown(frames):
    assert all(frame.mode == "RGB" for frame in frames)
    return [round(frame.getpixel((0, 0))[0] / 20) for frame in frames]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations(tmp_path, suffix):
    path = save_animation(tmp_path / f"a{suffix}", 10, 500)  # 5 seconds
    assert shown(read_frames(path)) == [0, 2, 4, 6, 8]
    assert shown(read_frames(path, fps=2, max_frames=4)) == [0, 3, 6, 9]
    assert shown(read_frames(path, max_frames=1)) == [0]
    assert shown(read_frames(save_animation(tmp_path / f"b{suffix}", 3, 100))) == [0]  # under a second
    assert shown(read_frames(save_animation(tmp_path / f"c{suffix}", 3, [100, 2000, 100]))) == [0, 1]


def test_durations_of_zero_count_as_a_tenth_of_a_second(tmp_path):
    assert shown(read_frames(save_animation(tmp_path / "a.gif", 12, 0), fps=5)) == [0, 2, 4, 6, 8, 10]


def test_a_wrong_duration_of_years_needs_no_more_time():
    assert select([0.0, 1e9], 2e9, 1.0, 4) == [0, 0, 1, 1]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_truncated_animation(tmp_path, suffix):
    path = save_animation(tmp_path / f"a{suffix}", 10, 500)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"a{suffix} cannot be read"):
        read_frames(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\0" * 5000, b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"])
def test_files_that_are_no_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.mp4 cannot be read"):
        read_frames(path)


def test_pyav_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ValueError, match="requirements-video.txt"):
        read_frames(tmp_path / "a.mp4")


def save_mp4(path, n_frames):
    """10 frames a second; the gray value tells the second, and a corner is red."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(n_frames):
            image = Image.new("RGB", (64, 32), (40 + 60 * (i // 10),) * 3)
            image.paste("red", (0, 0, 16, 8))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return path


def seconds(frames):
    return [round((frame.getpixel((32, 16))[0] - 40) / 60) for frame in frames]


@needs_av
def test_mp4(tmp_path):
    path = save_mp4(tmp_path / "a.mp4", 30)
    frames = read_frames(path)
    assert [frame.size for frame in frames] == [(64, 32)] * 3 and seconds(frames) == [0, 1, 2]
    assert seconds(read_frames(path, fps=10, max_frames=7)) == [0, 0, 1, 1, 1, 2, 2]  # frames 0, 5, 10, ... 29
    assert seconds(read_frames(save_mp4(tmp_path / "short.mp4", 3))) == [0]


@needs_av
def test_a_phone_held_upright(tmp_path):
    """Its video lies on its side, and the file's header has the matrix that turns it clockwise."""
    content = save_mp4(tmp_path / "a.mp4", 10).read_bytes()
    header = content.index(b"tkhd")

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    assert content.find(matrix(1, 0, 0, 1), header) > 0
    turned = content[:header] + content[header:].replace(matrix(1, 0, 0, 1), matrix(0, 1, -1, 0), 1)
    (tmp_path / "b.mp4").write_bytes(turned)
    [frame] = read_frames(tmp_path / "b.mp4")
    red, _, _ = frame.getpixel((30, 2))
    assert frame.size == (32, 64) and red > 200  # the corner is now on the right


@needs_av
def test_damaged_videos(tmp_path):
    content = save_mp4(tmp_path / "a.mp4", 30).read_bytes()
    start = content.index(b"mdat")
    header_only = content[: start - 200]
    cut = content[: start + (len(content) - start) // 2]
    overwritten = content[: start + 100] + b"\xa5" * 200 + content[start + 300 :]
    path = tmp_path / "b.mp4"
    for damaged, reason in ((header_only, "no video"), (cut, "damaged after"), (overwritten, "damaged after")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"b.mp4 cannot be read: it is {reason}"):
            read_frames(path)
