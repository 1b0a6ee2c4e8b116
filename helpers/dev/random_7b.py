"""Folders that stand in for the Hub: the 7B architecture with random weights, and random pictures with boxes.

`PUBLISHED` is the configuration that `Qwen/Qwen2-VL-7B-Instruct` serves, its real token ids included. The folder is
laid out as on the Hub (older key names, shards and an index, flat config.json, chat_template.json), so that the
project's own loading is what gets tried. The text is the tiny base's: its tokenizer, with the published token ids.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.settings import TINY_BASE

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
# The same architecture at 41 M parameters, nearly all of them the vocabulary's: to try the command without a GPU.
SHRUNKEN = PUBLISHED | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_window_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": PUBLISHED["vision_config"] | {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128},
}  # fmt: skip
GENERATION = {
    "bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "do_sample": True,
    "repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1,
}  # fmt: skip
PICTURES = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
}  # fmt: skip
FIRST_SPECIAL_TOKEN = 151643  # <|endoftext|>; the others follow in the tiny base's order, which is the published one
SHARD = 4 * 10**9  # bytes


def config(published: dict) -> Qwen2VLConfig:
    """The configuration that transformers makes of a flat, older config.json."""
    return Qwen2VLConfig.from_dict(json.loads(json.dumps(published)))


def hub_name(name: str) -> str:
    """A weight's name in the published files: `visual.*`, `model.*` without `language_model`, `lm_head.weight`."""
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def write_model(folder: Path, published: dict, seed: int = 0) -> dict[str, int]:
    """Write a model folder with random bf16 weights; returns `{"weights", "shards"}`, counts.

    The weights are made on the GPU where there is one: 8.29 B of them in seconds instead of minutes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(config(published))
    torch.set_default_dtype(torch.float32)
    shards, size = [{}], 0
    for name, weight in model.state_dict().items():
        if size + weight.nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][hub_name(name)] = weight
        size += weight.nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: weight.cpu().contiguous() for name, weight in shard.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    write_json(folder / "config.json", published)
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "preprocessor_config.json", PICTURES)
    write_json(folder / "chat_template.json", {"chat_template": (TINY_BASE / "chat_template.jinja").read_text()})
    write_tokenizer(folder)
    return {"weights": total // 2, "shards": len(shards)}


def write_tokenizer(folder: Path) -> None:
    """The tiny base's tokenizer with the special tokens at their published ids."""
    tokenizer = json.loads((TINY_BASE / "tokenizer.json").read_text())
    for number, token in enumerate(tokenizer["added_tokens"], FIRST_SPECIAL_TOKEN):
        token["id"] = tokenizer["model"]["vocab"][token["content"]] = number
    write_json(folder / "tokenizer.json", tokenizer)
    shutil.copy(TINY_BASE / "tokenizer_config.json", folder)


def write_pictures(folder: Path, counts: dict[str, int], sizes: list[tuple[int, int]], seed: int = 0) -> None:
    """Write an imagefolder: `counts` pictures a split, coarse random colours under noise, one box in each.

    `sizes` (width, height) are taken in turn.
    """
    random = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            width, height = sizes[number % len(sizes)]
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
            noise = random.integers(-20, 21, (height, width, 3))
            name = f"{split}-{number:04}.jpg"
            Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(folder / split / name)
            low, high = random.uniform(0.05, 0.4, 2), random.uniform(0.6, 0.95, 2)
            objects = {"bbox": [[*low, *high]], "category_id": [0], "category_name": ["nutrition-table"]}
            lines.append({"file_name": name, "image_id": name, "width": width, "height": height, "objects": objects})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
