"""Videos: from a file to a few upright RGB frames, sampled at equal intervals.

    file --Pillow (GIF, WebP, PNG) or PyAV (mp4, ...)--> start of each frame in seconds --select--> indices --> frames

A file is decoded twice, first for the times and then for the frames, so that a long clip does not fill the memory.
Frames are taken at 0, 1/fps, 2/fps, ... seconds: one for each whole interval, as Q-Align does, and at least one.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageSequence, UnidentifiedImageError

from common.files import check_file, reading
from data.image import MAX_PIXELS, to_rgb

MAX_FILE = 4_000_000_000  # bytes
DEFAULT_DURATION = 0.1  # seconds of a frame whose duration is missing or 0, as in browsers
DEFAULT_RATE = 25  # frames per second of a video whose times are missing or wrong
# Not FFmpeg's playlists, which name other files.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"


def read_frames(path: str | Path, fps: float = 1.0, max_frames: int = 8) -> list[Image.Image]:
    """Returns frames of a video as upright RGB: fps per second; max_frames evenly spread if there would be more.

    Raises OSError for a file that cannot be opened; ValueError for one that is not a usable video, or if it needs PyAV
    and that is not installed.
    """
    if not 0 < fps < math.inf or max_frames < 1:
        raise ValueError(f"fps must be above 0 and max_frames at least 1, not {fps} and {max_frames}")
    with reading(path):
        check_file(path, MAX_FILE)
        if os.path.getsize(path) == 0:
            raise ValueError("it is empty")
        with open(path, "rb") as file:
            try:
                with Image.open(file, formats=("GIF", "WEBP", "PNG")) as image:
                    indices = select(*animation_times(image), fps, max_frames)
                    return pick(ImageSequence.Iterator(image), indices, to_rgb)
            except UnidentifiedImageError:
                pass
            indices = select(*video_times(file), fps, max_frames)
            return pick(decode_video(file), indices, video_image)


def select(starts: list[float], end: float, fps: float, max_frames: int) -> list[int]:
    """Returns the indices of the frames to take. starts: of each frame in seconds, increasing. end: of the last one."""
    if not starts:
        raise ValueError("it has no frames")
    n = max(1, math.floor(end * fps + 1e-6))  # whole intervals; times are rounded
    n_taken = min(n, max_frames)
    steps = [round(i * (n - 1) / max(n_taken - 1, 1)) for i in range(n_taken)]
    return [max(0, bisect_right(starts, step / fps + 1e-6) - 1) for step in steps]


def pick(frames: Iterable, indices: list[int], convert: Callable[..., Image.Image]) -> list[Image.Image]:
    """Returns the frames with these indices, which increase and may repeat, converted to images."""
    found = {}
    for i, frame in enumerate(frames):
        if i in indices:
            found[i] = convert(frame)
        if i == indices[-1]:
            break
    return [found[i] for i in indices]


def animation_times(image: Image.Image) -> tuple[list[float], float]:
    """Returns the start of each frame, and the end of the last one, in seconds."""
    durations = []
    for frame in ImageSequence.Iterator(image):
        frame.load()  # WebP's duration is known then
        duration = frame.info.get("duration", 0) / 1000
        durations.append(duration if 0 < duration < math.inf else DEFAULT_DURATION)
    ends = list(accumulate(durations))
    return [0.0, *ends[:-1]], ends[-1]


def video_times(file: BinaryIO) -> tuple[list[float], float]:
    """As animation_times, of a video. Times that are missing or do not increase are replaced by DEFAULT_RATE."""
    starts = [frame.time for frame in decode_video(file)]
    if None in starts or any(after <= before for before, after in zip(starts, starts[1:])):
        starts = [i / DEFAULT_RATE for i in range(len(starts))]
    starts = [start - starts[0] for start in starts]
    last = starts[-1] / (len(starts) - 1) if len(starts) > 1 else 1 / DEFAULT_RATE
    return starts, starts[-1] + last if starts else 0.0


def decode_video(file: BinaryIO) -> Iterator["av.VideoFrame"]:  # noqa: F821  (imported below)
    """Yields the frames of the first video stream. Raises ValueError if PyAV is missing or cannot read the file."""
    try:
        import av
    except ModuleNotFoundError:
        raise ValueError(
            "it is no GIF, WebP or PNG, and other videos need PyAV: pip install -r requirements-video.txt"
        ) from None

    file.seek(0)
    n = 0
    try:
        with av.open(file, options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise ValueError("it has no video")
            for n, frame in enumerate(container.decode(video=0), start=1):
                if frame.width * frame.height > MAX_PIXELS:
                    raise ValueError(f"its frames of {frame.width} x {frame.height} pixels are too large")
                yield frame
    except av.FFmpegError as error:
        reason = f"it is damaged after {n} frames" if n else "it is no video that PyAV knows, or it is damaged"
        raise ValueError(f"{reason} ({error.strerror})") from None


def video_image(frame: "av.VideoFrame") -> Image.Image:  # noqa: F821
    """Converts a frame of PyAV to RGB, turned as its metadata says."""
    return frame.to_image().rotate(frame.rotation, expand=True)
