"""Translate dates as people write them into ISO 8601, with a recurrent network that shows where it looks.

    python examples/translate_dates.py                                    # some dates
    python examples/translate_dates.py "the 4th of July '76" "3.11.2031"  # these
    python examples/translate_dates.py --test 1000                        # strings of dates that training never saw
    python examples/translate_dates.py --picture alignment.png "Tuesday, March the fifth, 2019"

The model is regard.nn.RNNSearch (Bahdanau et al., 2014), 64 wide; train_dates.py trained it. The picture
needs matplotlib (pip install ".[examples]").
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import dates
import numpy as np
from regard import nn

WEIGHTS = Path(__file__).parent / "dates.safetensors"
EXAMPLES = (
    "5 March 2021",
    "Sat, Sept. 14th '85",
    "10/31/1999",
    "31. 10. 1999",
    "the 29th of February, 2024",
    "TWENTY-SECOND OF AUGUST 2067",
    "1931/7/4",
)
#: An ISO date is ten characters; the end is one more.
LONGEST = 12


def load() -> nn.RNNSearch:
    """The model with its weights."""
    return nn.load(nn.RNNSearch(**dates.SIZES), WEIGHTS)


def translate(model: nn.RNNSearch, texts: Any, beam: int = 1, progress: bool = False) -> list[nn.Translation]:
    """The likeliest translation of each text; with a beam above 1, the best that it holds."""
    sources = [dates.to_source(text) for text in texts]
    if beam == 1:
        return model.greedy(sources, LONGEST, batch_size=128, progress=progress)
    return [found[0] for found in model.beam_search(sources, beam, LONGEST, batch_size=64, progress=progress)]


def test(model: nn.RNNSearch, count: int, beam: int) -> float:
    """Translate held-out strings, print those that went wrong, and answer the share that is exact."""
    pairs = dates.pairs(count, seed=1, held_out=True)
    start = time.perf_counter()
    found = translate(model, [text for text, _ in pairs], beam, progress=True)
    seconds = time.perf_counter() - start
    exact = 0
    for (text, iso), translation in zip(pairs, found, strict=True):
        answer = dates.from_target(translation.tokens)
        exact += answer == iso
        if answer != iso:
            print(f"wrong: {text!r} is {iso}, not {answer}")
    print(f"{exact} of {count} held-out strings exact ({exact / count:.1%}), {count / seconds:.0f} a second")
    return exact / count


def draw(text: str, translation: nn.Translation, path: Path) -> None:
    """The weights as a picture: what was written across, what was answered down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    answer = dates.from_target(translation.tokens)
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.25 * len(text), 1.5 + 0.25 * len(answer)), layout="constrained")
    image = axes.imshow(translation.weights, cmap="gray_r", vmin=0, vmax=1, aspect="equal")
    axes.set_xticks(range(len(text)), ["␣" if c == " " else c for c in text], family="DejaVu Sans")
    axes.set_yticks(range(len(answer)), list(answer))
    axes.tick_params(length=0)
    axes.set_xlabel("as written")
    axes.set_ylabel("ISO 8601")
    axes.set_title(f"{text} → {answer}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", default=EXAMPLES)
    parser.add_argument("--beam", type=int, default=1, help="beginnings kept at each step")
    parser.add_argument("--test", type=int, metavar="COUNT", help="translate held-out strings instead")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the alignment of the first text")
    options = parser.parse_args()

    model = load()
    if options.test:
        if test(model, options.test, options.beam) < 0.99:
            raise SystemExit("fewer than 99 % are exact")
        return
    found = translate(model, options.texts, options.beam)
    width = max(map(len, options.texts))
    for text, translation in zip(options.texts, found, strict=True):
        sure = np.exp(translation.score)
        print(f"{text:<{width}}  {dates.from_target(translation.tokens)}  ({sure:.1%} sure)")
    if options.picture:
        draw(options.texts[0], found[0], options.picture)
        print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
