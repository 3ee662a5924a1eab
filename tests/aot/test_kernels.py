"""The estimated time of attention kernels equals a count of blocks by hand."""

import pytest

from dalle_jax.aot import kernels, topologies
from dalle_jax.models.attention import splash
from dalle_jax.models.attention.patterns import Full, Row
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

PAPER = TokenLayout(Text(16_384, 256), image_vocab=8192, height=32, width=32)
V5P, V5E = topologies.CHIPS["TPU v5"], topologies.CHIPS["TPU v5 lite"]


def test_row_layers_at_the_papers_size():
    """The mask has two by two blocks of 640, and the upper right one is empty."""
    mask = splash.kernel_mask(Row(), PAPER, PAPER.length)
    assert splash.block_size(mask) == 640 and splash.filled_blocks(mask, 640).tolist() == [[True, False], [True, True]]
    for kind in splash.KERNEL_KINDS:
        step, row, body = splash.SCHEDULES["v5p"][640][kind]
        assert splash.kernel_cycles(kind, Row(), PAPER, PAPER.length, "v5p") == 2 * (2 * step + row) + 3 * body


@pytest.mark.parametrize("chip", [V5P, V5E])
def test_calls_heads_cores_and_clock(chip):
    calls = {"splash_mha_fwd_residuals": 4, "splash_mha_dq_no_residuals": 2}
    cycles = {
        kind: [splash.kernel_cycles(kind, pattern, PAPER, PAPER.length, chip.name) for pattern in (Row(), Full())]
        for kind in ("fwd", "dq")
    }
    expected = 10 * (4 * sum(cycles["fwd"]) / 2 / chip.cores + 2 * sum(cycles["dq"]) / 2) / chip.clock
    found = kernels.seconds(calls, (Row(), Full()), PAPER, PAPER.length, 10, chip)
    assert found == pytest.approx(expected)


def test_unknown_kernels():
    assert kernels.seconds({"other_kernel": 1}, (Row(),), PAPER, PAPER.length, 10, V5P) is None
    assert kernels.of_subject({}, None, 8, sampling=False) == 0.0


def test_every_chip_has_every_kernel():
    assert set(splash.SCHEDULES) == {chip.name for chip in topologies.CHIPS.values()}
    for blocks in splash.SCHEDULES.values():
        assert set(blocks) == {128, 256, 512, 640}
        assert all(set(each) == set(splash.KERNEL_KINDS) for each in blocks.values())
        assert all(min(numbers) > 0 for each in blocks.values() for numbers in each.values())
