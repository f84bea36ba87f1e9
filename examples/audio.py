"""Sound for Whisper: WAV files of any kind to 16 kHz, windows of at most 30 seconds, and log-mel features."""

from __future__ import annotations

import functools
import math
import struct
from pathlib import Path

import numpy as np

RATE = 16000
SECONDS = 30
#: Samples a Fourier transform sees, and samples from one to the next: 25 ms and 10 ms.
WINDOW, HOP = 400, 160
FRAMES = SECONDS * RATE // HOP


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(samples, channels) as float32 within -1 .. 1, and the rate.

    Integers of 8 to 32 bits and floats of 32 or 64, as WAVE_FORMAT_PCM, _IEEE_FLOAT or _EXTENSIBLE.

    Raises
    ------
    ValueError
        The file is no WAV file, or of another encoding.
    """
    data = path.read_bytes()
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{path}: not a WAV file")
    place, form, sound = 12, None, None
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body = data[place + 8 : place + 8 + size]  # shorter where a recorder never wrote the length
        if name == b"fmt " and len(body) >= 16:
            form = body
        elif name == b"data":
            sound = body
        place += 8 + size + size % 2
    if form is None or sound is None:
        raise ValueError(f"{path}: a WAV file without {'a format' if form is None else 'sound'}")
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if code == 0xFFFE and len(form) >= 26:
        code = int.from_bytes(form[24:26], "little")
    if channels < 1 or rate < 1 or (code, bits) not in {*((1, b) for b in (8, 16, 24, 32)), (3, 32), (3, 64)}:
        raise ValueError(f"{path}: no reader for WAV format {code}, {bits} bits, {channels} channels, {rate} Hz")
    whole = len(sound) - len(sound) % (channels * bits // 8)
    raw = np.frombuffer(sound[:whole], np.uint8)
    if code == 3:
        samples = raw.view(f"<f{bits // 8}").astype(np.float32)
    elif bits == 8:
        samples = (raw.astype(np.float32) - 128) / 128
    elif bits == 24:
        words = np.zeros((len(raw) // 3, 4), np.uint8)
        words[:, 1:] = raw.reshape(-1, 3)
        samples = words.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        samples = raw.view(f"<i{bits // 8}").astype(np.float32) / 2 ** (bits - 1)
    return samples.reshape(-1, channels), rate


def resample(x: np.ndarray, rate: int, to: int = RATE) -> np.ndarray:
    """x (samples,) at another rate: a sinc under a Kaiser window, cut off at the lower Nyquist frequency."""
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    if up == down:
        return x.astype(np.float32, copy=False)
    cutoff = min(1.0, to / rate)
    half = math.ceil(24 / cutoff)  # 24 zero crossings either side
    padded = np.pad(x.astype(np.float32), (half, half + down + 1))
    count = -(-len(x) * up // down)
    out = np.empty(count, np.float32)
    taps = np.arange(-half, half + 1)
    views = np.lib.stride_tricks.sliding_window_view(padded, len(taps))
    # Every up-th output sample lies between input samples as the first one of its kind does.
    for phase in range(min(up, count)):
        first, part = divmod(phase * down, up)
        distance = taps - part / up
        window = np.i0(12 * np.sqrt(np.clip(1 - (distance / (half + 1)) ** 2, 0, None))) / np.i0(12.0)
        filter_ = (cutoff * np.sinc(cutoff * distance) * window).astype(np.float32)
        wanted = len(out[phase::up])
        out[phase::up] = views[first::down][:wanted] @ filter_
    return out


def load(path: Path) -> np.ndarray:
    """A WAV file as Whisper wants it: (samples,) of one channel at 16 kHz."""
    samples, rate = read_wav(path)
    return resample(samples.mean(axis=1), rate)


def pieces(sound: np.ndarray, longest: float = SECONDS) -> list[tuple[float, np.ndarray]]:
    """(start in seconds, samples) of pieces of at most `longest` seconds, cut where it is quietest.

    Cuts lie in the last third of what a piece may be. Pieces of silence are left out.
    """
    limit, step = int(longest * RATE), RATE // 50
    found, start = [], 0
    while start < len(sound):
        end = start + limit
        if end < len(sound):
            early = start + 2 * limit // 3
            stretch = sound[early:end]
            blocks = stretch[: len(stretch) // step * step].reshape(-1, step)
            power = np.convolve(np.square(blocks).mean(axis=1), np.ones(10), "same")  # over 200 ms
            end = early + step * int(power.argmin()) + step // 2
        piece = sound[start:end]
        if np.abs(piece).max(initial=0) > 1e-3:  # -60 dB
            found.append((start / RATE, piece))
        start = end
    return found


@functools.cache
def mel_filters(count: int = 80) -> np.ndarray:
    """(count, frequencies): triangles of area 1, evenly spaced on Slaney's mel scale from 0 to 8 kHz."""

    # Slaney's scale is linear up to 1 kHz (15 mels) and logarithmic above, 27 mels to a factor of 6.4.
    def hertz(mels: np.ndarray) -> np.ndarray:
        return np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))

    highest = 15 + 27 * math.log(RATE / 2 / 1000, 6.4)
    corners = hertz(np.linspace(0, highest, count + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - frequencies) / np.diff(corners)[1:, None]
    triangles = np.clip(np.minimum(rising, falling), 0, None)
    return (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).astype(np.float32)


def log_mel(sound: np.ndarray) -> np.ndarray:
    """(samples,) of at most 30 seconds at 16 kHz -> (80, 3000): what Whisper's encoder takes.

    What is missing to 30 seconds is silence. Logarithms reach 8 powers of ten below the loudest.
    """
    if len(sound) > SECONDS * RATE:
        raise ValueError(f"sound: expected at most {SECONDS * RATE} samples, got {len(sound)}")
    half = WINDOW // 2
    filled = np.zeros(SECONDS * RATE + WINDOW, np.float32)
    filled[half : half + len(sound)] = sound
    filled[:half] = filled[WINDOW:half:-1]  # the ends are mirrored
    filled[-half:] = filled[-half - 2 : -WINDOW - 2 : -1]
    # Frames of silence alone need no transform.
    heard = min(FRAMES, -(-(len(sound) + half) // HOP)) if len(sound) < SECONDS * RATE - half else FRAMES
    frames = np.lib.stride_tricks.sliding_window_view(filled, WINDOW)[::HOP][:heard]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum = np.fft.rfft(frames * hann.astype(np.float32), axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    mel = np.full((80, FRAMES), -10.0, np.float32)
    mel[:, :heard] = np.log10(np.maximum(mel_filters() @ power.T, 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4
