"""Sound files as numbers, without a decoder of `datasets`: with `soundfile` where it is installed, else WAV alone."""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np

from ..edits import CompressionError


def read_sound(value: Any, folder: str, rate: int, seconds: float | None = None) -> np.ndarray:
    """One channel of float32 samples in [-1, 1] at a sampling rate.

    Args:
        value (`str` or `dict`): a path, or what `datasets` holds of a sound: its `bytes` or `path`.
        folder (`str`): what a relative path begins at.
        rate (`int`): samples a second that are wanted.
        seconds (`float`, *optional*): cut to this length.

    Raises:
        CompressionError: no such file, a format that cannot be read here, a rate that cannot be changed here.
    """
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if content is None:
        try:
            content = (Path(folder) / str(name)).read_bytes()
        except OSError as error:
            raise CompressionError(f"Cannot read the sound {str(name)!r}: {error.strerror}.") from error
    samples, found = _decoded(content, str(name))
    if seconds is not None:
        samples = samples[: max(1, int(seconds * found))]
    if found != rate:
        try:
            from scipy.signal import resample_poly
        except ImportError:
            raise CompressionError(
                f"{str(name)!r} has {found} samples a second and the model wants {rate}: install scipy, or convert the files."
            ) from None
        step = math.gcd(found, rate)
        samples = resample_poly(samples, rate // step, found // step).astype(np.float32)
    return samples


def _decoded(content: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _wav(content, name)
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except Exception as error:  # the library's own errors are not exported everywhere
        raise CompressionError(f"{name!r} is no sound that can be read: {error}") from error
    return samples.mean(1), rate


def _wav(content: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise CompressionError(f"{name!r} is no PCM WAV file ({error}); install soundfile for other formats.") from error
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        whole = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    elif width == 1:
        whole = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    else:
        whole = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return whole.reshape(-1, channels).mean(1), rate
