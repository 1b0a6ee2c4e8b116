"""Triton's kernels, run by its interpreter, against PyTorch: LoRA's with the kernels' own mask, and the rotation."""

import math
import os
import subprocess
import sys

import pytest
import torch

from helpers import speed

pytest.importorskip("triton")
HERE = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported, so in a process of its own
interpreted = pytest.mark.skipif(not HERE, reason="runs in the process of the test below")


@pytest.mark.skipif(HERE, reason="is here")
def test_the_kernels_in_tritons_interpreter():
    words = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ended = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0 and "7 passed, 1 skipped" in ended.stdout, ended.stdout


@pytest.fixture
def kernels():
    from helpers import kernels

    return kernels


@interpreted
# the interpreter multiplies no bf16; half precision shows the same code in 16 bits
@pytest.mark.parametrize(("rows", "inputs", "rank", "p", "dtype"), [
    (70, 52, 8, 0.3, torch.float32), (130, 130, 16, 0.05, torch.float32), (33, 97, 192, 0.5, torch.float32),
    (64, 64, 24, 0.0, torch.float32), (65, 72, 64, 0.1, torch.float16),
])  # fmt: skip
def test_a_pass_is_dropout_and_a_product(kernels, rows, inputs, rank, p, dtype):
    """Forward and backward share one mask; it drops a share of p, alike for the same seed and not for another."""
    mask = mask_of(kernels, rows, inputs, p, seed=7)
    assert torch.allclose(mask[mask > 0], torch.tensor(1 / (1 - p)))
    assert abs((mask == 0).float().mean() - p) <= 4 * math.sqrt(p * (1 - p) / mask.numel())
    wide = torch.randn(rows, inputs + 3).to(dtype)
    x, a, gradient = wide[:, :inputs], torch.randn(rank, inputs).to(dtype), torch.randn(rows, rank).to(dtype)
    low = kernels.down(x, a, 7, p, 2.0)
    of_x, of_a = kernels.up(x, a, gradient, 7, p, 2.0, True)
    near = 1e-6 if dtype == torch.float32 else 1e-3
    for found, expected in ((low, 2 * (x.double() * mask) @ a.double().T),
                            (of_x, 2 * gradient.double() @ a.double() * mask),
                            (of_a, 2 * gradient.double().T @ (x.double() * mask))):
        assert (found - expected).norm() <= near * expected.norm()
    assert (low.dtype, of_x.dtype, of_a.dtype) == (dtype, dtype, torch.float32)
    none, same = kernels.up(x, a, gradient, 7, p, 2.0, False)
    assert none is None and torch.equal(same, of_a)
    assert torch.equal(kernels.down(x, a, 8, p, 2.0), low) == (p == 0)


def mask_of(kernels, rows, inputs, p, seed):
    """Dropout's factors, read off with rows of ones against the unit vectors."""
    units = torch.eye(inputs).split(200)
    return torch.cat([kernels.down(torch.ones(rows, inputs), unit.contiguous(), seed, p, 1.0) for unit in units], 1)


@interpreted
def test_neighbours_are_dropped_independently(kernels):
    """No column, row or place in a quad of numbers drops more than others, and no neighbour with its neighbour."""
    kept = mask_of(kernels, 512, 128, 0.5, seed=3) > 0
    assert abs(kept.float().mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(512)
    assert abs(kept.float().mean(1) - 0.5).max() < 5 * 0.5 / math.sqrt(128)
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(2, 1), kept.roll(4, 1), kept.roll(64, 0)):
        assert abs((kept == other).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(kept.numel())


@interpreted
def test_queries_and_keys_are_turned_as_transformers_does(kernels):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    qkv, angles = torch.randn(9, 3, 5, 20), torch.randn(9, 10).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    for turned in (kernels.turned(qkv, cos, sin), speed.PlainPasses.turned(qkv, cos, sin)):
        assert torch.allclose(turned, torch.stack([q, k, qkv[:, 2]], 1), atol=1e-6)
    assert torch.allclose(kernels.turned(turned, cos, -sin), qkv, atol=1e-6)  # back, as gradients are
