"""Squeeze-and-excitation in networks that read text: real weights through regard, checked against ONNX Runtime.

    pip install onnx onnxruntime pillow matplotlib
    pip install --no-deps "rapidocr==3.10.*"         # for its models only: they are files in the package
    python examples/ocr_squeeze_excitation.py [IMAGE ...] [--plot weights.png]

(or pip install ".[ocr]", which also installs what rapidocr depends on).

PP-OCR finds text (13 blocks with squeeze-and-excitation), reads it (5, and two of self-attention) and tells which
way up it is (9). ONNX Runtime runs the three networks on images of a line of text (the built-in ones are drawn
with matplotlib's fonts); each block's input is taken out of that run and given to regard, whose output must
be ONNX Runtime's. --plot draws what the blocks make of the images: by how much each channel is multiplied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from installed import package_folder
from onnx_blocks import Array, Graph, SelfAttention, SqueezeExcitation

#: Errors beyond this, relative to the block's largest output, are reported and end the program with status 1.
TOLERANCE = 1e-4

LINES = ("Squeeze and excitation", "0123456789 + 42 = 3.14", "ATTENTION, PLEASE", "mit Umlauten: äöü ß")


def models() -> Path:
    """The folder of rapidocr's models. The package, which needs OpenCV, is not imported."""
    folder = package_folder("rapidocr")
    if folder is None:
        raise SystemExit('the models are not installed: pip install --no-deps "rapidocr==3.10.*"')
    return folder / "models"


class Network:
    """A model in ONNX Runtime that also answers what goes into its blocks and what comes out."""

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        graph = Graph(path)
        self.name = path.stem
        self.blocks: list[SqueezeExcitation | SelfAttention] = [
            *graph.squeeze_excitations(),
            *graph.self_attentions(),
        ]
        self.metadata = {p.key: p.value for p in graph.model.metadata_props}
        self._result = graph.model.graph.output[0].name
        self._inner = sorted({n for b in self.blocks for n in (b.source, b.result)} - {self._result})
        # Their types are left for ONNX Runtime to infer.
        graph.model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self._inner)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """The network's result, and the blocks' tensors by name."""
        result, *inner = self._session.run([self._result, *self._inner], {"x": x})
        return result, dict(zip(self._inner, inner, strict=True))


# Images: height x width x 3, 0 to 255. Networks take 1 x 3 x height x width.


def drawn(text: str) -> Array:
    """A line of black text on white."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 34)
    width = int(font.getlength(text)) + 32
    image = Image.new("RGB", (width, 48), "white")
    ImageDraw.Draw(image).text((16, 2), text, "black", font)
    return np.asarray(image)


def opened(path: str) -> Array:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def resized(image: Array, height: int, width: int) -> Array:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def network_input(kind: str, image: Array) -> Array:
    """The image as the detector ("det"), the reader ("rec") or the classifier ("cls") wants it."""
    height, width = image.shape[:2]
    if kind == "det":
        # Both sides are halved five times.
        scale = min(1.0, 960 / max(height, width))
        sides = (max(32, round(side * scale / 32) * 32) for side in (height, width))
        x = resized(image, *sides) / 255
        x = (x - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    else:
        x = resized(image, 48, 192 if kind == "cls" else max(48, round(width * 48 / height)))
        x = x / 127.5 - 1
    blue_first = x[..., ::-1] if kind != "det" else x
    return np.ascontiguousarray(blue_first.transpose(2, 0, 1)[None], np.float32)


def text_of(probabilities: Array, characters: Sequence[str]) -> str:
    """The likeliest character at each step, repetitions and blanks (0) dropped."""
    best = probabilities[0].argmax(-1)
    kept = best[(best != 0) & (best != np.concatenate([[0], best[:-1]]))]
    return "".join(characters[i - 1] if i <= len(characters) else " " for i in kept)


def error_of(block: SqueezeExcitation | SelfAttention, tensors: dict[str, Array]) -> float:
    """Largest difference from ONNX Runtime's output, relative to the largest value there."""
    expected = tensors[block.result]
    return float(np.abs(block(tensors[block.source]) - expected).max() / np.abs(expected).max())


def draw(path: str, names: Sequence[str], weights: dict[str, list[list[Array]]]) -> None:
    """`weights` is {network: [block: [image: (channels,)]]}. A row an image, a column a channel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(weights), 1, figsize=(13, 1 + (1 + 0.22 * len(names)) * len(weights)), layout="constrained"
    )
    for ax, (network, blocks) in zip(np.atleast_1d(axes), weights.items(), strict=True):
        picture = np.concatenate([np.stack(images) for images in blocks], axis=1)
        shown = ax.imshow(picture, aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        edges = np.cumsum([0, *(len(images[0]) for images in blocks)])
        for edge in edges[1:-1]:
            ax.axvline(edge - 0.5, color="white", linewidth=0.8)
        # On two lines in turn: the last blocks are narrow.
        ax.set_xticks((edges[:-1] + edges[1:]) / 2 - 0.5, ["\n" * (i % 2) + f"{i + 1}" for i in range(len(blocks))])
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(f"{network}: channels of blocks 1 to {len(blocks)}", fontsize=10)
    figure.colorbar(shown, ax=axes, label="channel weight")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(network: Network, errors: Array) -> None:
    """A line a block; `errors` is (images, blocks)."""
    print(f"\n{network.name}")
    for i, block in enumerate(network.blocks):
        if isinstance(block, SqueezeExcitation):
            reduced, channels = block.w_reduce.shape
            what = f"squeeze-and-excitation  {channels:3} -> {reduced:3} -> {channels:3}, slope {block.gate[1]:.4f}"
        else:
            what = f"self-attention          {block.heads} heads, {len(block.w_out)} features"
        worst = errors[:, i].max()
        print(f"  {i + 1:2}  {what:52} error {worst:.1e}" + ("" if worst <= TOLERANCE else "  DIFFERS"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures of one line of text; default: built in")
    parser.add_argument("--plot", metavar="PNG", help="draw the channels' weights there")
    options = parser.parse_args()
    names = [Path(p).name for p in options.images] or list(LINES)
    images = [opened(p) for p in options.images] or [drawn(text) for text in LINES]

    weights: dict[str, Any] = {}
    failed = False
    for path in sorted(models().glob("*.onnx")):
        network = Network(path)
        kind = next(k for k in ("det", "rec", "cls") if f"_{k}_" in path.name)
        runs = [network.run(network_input(kind, image)) for image in images]
        if kind == "rec":
            print("read as:")
            for name, (probabilities, _) in zip(names, runs, strict=True):
                print(f"  {name:26} {text_of(probabilities, network.metadata['character'].splitlines())}")
        errors = np.array([[error_of(block, tensors) for block in network.blocks] for _, tensors in runs])
        report(network, errors)
        failed = failed or not (errors <= TOLERANCE).all()
        weights[network.name] = [
            [block.channel_weights(tensors[block.source])[0] for _, tensors in runs]
            for block in network.blocks
            if isinstance(block, SqueezeExcitation)
        ]
    print("\n" + ("regard DIFFERS from ONNX Runtime" if failed else "regard agrees with ONNX Runtime"))
    if options.plot:
        draw(options.plot, names, weights)
        print(f"drawn: {options.plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
