"""The digits with and without CBAM: stored weights, run through regard, against the reference and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_example
from regard import _backend

pytest.importorskip("sklearn", reason="the example's images are scikit-learn's")

pytestmark = pytest.mark.usefixtures("importable_examples")


@pytest.fixture(scope="module")
def networks(importable_examples: None) -> Any:
    import digits_cbam

    return digits_cbam.load()


@pytest.fixture(scope="module")
def test_set(importable_examples: None) -> Any:
    import digits_cbam

    return digits_cbam.test_set()


def test_digits_are_read(networks: Any, test_set: Any) -> None:
    import digits_cbam

    canvas, answers = test_set
    for name, network in networks.items():
        # 96.8 % and 97.3 % as trained; a digit more or less may turn with the last bits of a score.
        assert digits_cbam.accuracy(network(canvas), answers) > 0.96, name


def test_only_one_has_attention(networks: Any) -> None:
    assert len(networks["cbam"].attention) == 3
    assert not networks["plain"].attention


@pytest.mark.parametrize("name", ["cbam", "plain"])
def test_scores_are_pytorchs_on_every_instruction_set(networks: Any, test_set: Any, name: str) -> None:
    pytest.importorskip("torch", reason="what the weights were trained with")
    import digits_cbam

    canvas = test_set[0][:50]
    for isa in _backend.possible():
        with _backend.using(isa):
            scores = networks[name](canvas)
        assert digits_cbam.difference_from_torch(networks[name], canvas, scores) <= 1e-5, isa


def test_position_weights_are_what_cbam_multiplies_by(networks: Any, test_set: Any) -> None:
    import digits_cbam
    import regard

    network, canvas = networks["cbam"], test_set[0][:5]
    x, cbam = network.features(np.moveaxis(canvas, 1, 3), 0), network.attention[0]
    shared = [w for fc in (cbam.fc1, cbam.fc2) for w in (fc.weight[:, :, 0, 0], fc.bias)]
    by_channel = regard.channel_attention(x, *shared, layout="nhwc")
    maps = network.position_weights(canvas)
    assert maps.shape == (5, digits_cbam.SIDE, digits_cbam.SIDE)
    # Both convolutions sum 98 terms, in their own orders.
    np.testing.assert_allclose(by_channel * maps[..., None], cbam(x), rtol=0, atol=1e-5 * np.abs(x).max())
    assert np.ptp(maps) > 0.1  # positions are told apart


def test_program_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the example draws with it")
    picture = tmp_path / "maps.png"
    done = run_example("digits_cbam.py", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 597 digits right") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
