"""The tiny base: a Qwen2-VL of a few million parameters that this project trained from scratch.

The folder is laid out as on the Hub (configuration, weights, tokenizer, processor), so
`Qwen2VLForConditionalGeneration.from_pretrained(TINY_DIR)` works offline. `build` makes one with random weights,
`pictures` and `prompts` the training material, `train` trains, `check` measures; `notebooks/00_tiny_base` shows it.
"""
from pathlib import Path

TINY_DIR = Path(__file__).parent
