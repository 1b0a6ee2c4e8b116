"""Folders that stand in for the Hub: the 7B architecture with random weights, and random pictures with boxes.

`PUBLISHED` is the configuration that `Qwen/Qwen2-VL-7B-Instruct` serves. The model's folder has the Hub's layout
(older key names, shards and an index, flat config.json, chat_template.json), so that the project's own loading is
tried. The tokenizer is the tiny base's, with the published ids of the special tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.runs import read_json, write_json, write_text
from helpers.settings import TINY_BASE

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "hidden_act": "silu",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 32768, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 28,
    "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip
# The same architecture with 41 M weights, nearly all of them the vocabulary's: for a machine without a GPU.
SHRUNKEN = PUBLISHED | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_window_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": PUBLISHED["vision_config"] | {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128},
}  # fmt: skip
GENERATION = {
    "bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "do_sample": True,
    "repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1,
}  # fmt: skip
FIRST_SPECIAL_TOKEN = 151643  # <|endoftext|>; the others follow in the tiny base's order, which is the published one
# width, height of pictures at the real pixel budget: 1280, 1280, 1274 and 1276 image tokens of 28 x 28 pixels
SIZES = [(1120, 896), (896, 1120), (1372, 728), (812, 1232)]
MANY_SIZES = [(28 * wide, 28 * (1280 // wide)) for wide in range(20, 64)]  # 1240 to 1280 image tokens


def config(published: dict) -> Qwen2VLConfig:
    """The configuration that transformers makes of a flat, older config.json."""
    return Qwen2VLConfig.from_dict(json.loads(json.dumps(published)))


def write_model(folder: Path, published: dict, shard: str = "4GB") -> int:
    """Write a model's folder with random bf16 weights, in files of at most `shard`; returns how many weights.

    The weights are made on the GPU where there is one: 8.29 B of them in seconds instead of minutes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(config(published))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)  # under the names of the published files
    write_json(folder / "config.json", published)
    write_json(folder / "generation_config.json", GENERATION)
    pictures = read_json(TINY_BASE / "preprocessor_config.json") | {"min_pixels": 3136, "max_pixels": 12845056}
    write_json(folder / "preprocessor_config.json", {key: value for key, value in pictures.items() if key != "size"})
    write_json(folder / "chat_template.json", {"chat_template": (TINY_BASE / "chat_template.jinja").read_text()})
    tokenizer = read_json(TINY_BASE / "tokenizer.json")
    for number, token in enumerate(tokenizer["added_tokens"], FIRST_SPECIAL_TOKEN):
        token["id"] = tokenizer["model"]["vocab"][token["content"]] = number
    write_json(folder / "tokenizer.json", tokenizer)
    shutil.copy(TINY_BASE / "tokenizer_config.json", folder)
    return model.num_parameters()


def write_pictures(folder: Path, counts: dict[str, int], scale: float = 1,
                   sizes: list[tuple[int, int]] = SIZES) -> None:
    """Write an imagefolder: `counts` pictures a split, coarse random colors under noise, one box in each.

    They take `sizes` in turn, times `scale`.
    """
    random = np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            width, height = (round(scale * side) for side in sizes[number % len(sizes)])
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
            noise = random.integers(-20, 21, (height, width, 3))
            name = f"{split}-{number:04}.jpg"
            Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(folder / split / name)
            box = [*random.uniform(0.05, 0.4, 2), *random.uniform(0.6, 0.95, 2)]
            objects = {"bbox": [box], "category_id": [0], "category_name": ["nutrition-table"]}
            lines.append({"file_name": name, "image_id": name, "width": width, "height": height, "objects": objects})
        write_text(folder / split / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
