"""bitsandbytes' NF4 on this machine, where the project depends on it."""

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from small_training import load_tiny
from torch import nn

from helpers import model


def test_rows_that_are_no_whole_number_of_blocks():
    """Nearest level x scale is the truth; on a CPU with AVX-512, bitsandbytes takes wrong scales."""
    weight = torch.randn(32, 96)
    blocks, levels = weight.reshape(-1, 64), get_4bit_type("nf4", device="cpu")
    scales = blocks.abs().amax(1, keepdim=True)
    truth = (levels[((blocks / scales)[..., None] - levels).abs().argmin(-1)] * scales).reshape(32, 96)
    back = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    right = torch.allclose(back, truth, rtol=0, atol=1e-6)
    assert right == (torch.backends.cpu.get_cpu_capability() != "AVX512")


def test_every_row_of_the_tiny_base_is_a_whole_number_of_blocks():
    """On such a CPU, bitsandbytes 0.50 would train and merge with wrong weights otherwise."""
    inputs = [layer.in_features for name, layer in load_tiny().named_modules()
              if isinstance(layer, nn.Linear) and model.tower_of(name) == "language"]
    assert inputs and all(width % 64 == 0 for width in inputs)
