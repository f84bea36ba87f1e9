"""The blocks of PP-OCR's networks, run through regard, against ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_example
from regard import _backend, reference

for package in ("onnx", "onnxruntime", "PIL", "matplotlib"):
    pytest.importorskip(package, reason="the example reads, runs and draws with it")
if importlib.util.find_spec("rapidocr") is None:  # looked for without importing it: it needs OpenCV
    pytest.skip("the models, rapidocr, are not installed", allow_module_level=True)

#: Of each network: blocks of squeeze-and-excitation, and of self-attention.
BLOCKS = {
    "PP-OCRv6_det_small": (13, 0),
    "PP-OCRv6_rec_small": (5, 2),
    "ch_ppocr_mobile_v2.0_cls_mobile": (9, 0),
}


@pytest.fixture(scope="module")
def example(importable_examples: None) -> Any:
    """The example as a module."""
    import ocr_squeeze_excitation

    return ocr_squeeze_excitation


@pytest.fixture(scope="module", params=BLOCKS)
def run(request: pytest.FixtureRequest, example: Any) -> Any:
    """(network, its result and inner tensors) for a drawn line of text."""
    network = example.Network(example.models() / f"{request.param}.onnx")
    kind = request.param.split("_")[1 if "PP-OCRv6" in request.param else -2]
    image = example.drawn("Look here: 27 blocks")
    return network, *network.run(example.network_input(kind, image))


def test_every_block_is_found(run: Any, example: Any) -> None:
    network = run[0]
    kinds = [type(block) for block in network.blocks]
    found = kinds.count(example.SqueezeExcitation), kinds.count(example.SelfAttention)
    assert found == BLOCKS[network.name]


def test_blocks_match_onnxruntime_on_every_instruction_set(run: Any, example: Any) -> None:
    network, _, tensors = run
    for isa in _backend.possible():
        with _backend.using(isa):
            errors = [example.error_of(block, tensors) for block in network.blocks]
        assert max(errors) <= example.TOLERANCE, (isa, errors)


def test_channel_weights_are_what_the_block_multiplies_by(run: Any, example: Any) -> None:
    network, _, tensors = run
    for block in network.blocks:
        if isinstance(block, example.SqueezeExcitation):
            x = tensors[block.source]
            weights = block.channel_weights(x)
            # A few roundings of sums of up to 384 terms of about 1 apart.
            np.testing.assert_allclose(
                x * weights[:, :, None, None], block(x), rtol=0, atol=1e-5 * np.abs(tensors[block.result]).max()
            )


def test_blocks_match_the_reference(run: Any, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification itself agrees with ONNX Runtime, so that two wrongs cannot make a right."""
    import onnx_blocks

    network, _, tensors = run
    monkeypatch.setattr(onnx_blocks, "regard", reference)
    assert max(example.error_of(block, tensors) for block in network.blocks) <= example.TOLERANCE


def test_another_block_is_noticed(run: Any, example: Any) -> None:
    """The comparison is not blind: another image's input gives other outputs than these."""
    network, _, tensors = run
    for block in network.blocks:
        spoiled = {**tensors, block.source: tensors[block.source][..., ::-1] * np.float32(1.01)}
        assert example.error_of(block, spoiled) > example.TOLERANCE


def test_program_reads_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "weights.png"
    done = run_example("ocr_squeeze_excitation.py", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("error ") == 29
    assert "DIFFERS" not in done.stdout
    assert done.stdout.count("Squeeze and excitation") == 2  # the line, and what was read
    assert picture.read_bytes().startswith(b"\x89PNG")
