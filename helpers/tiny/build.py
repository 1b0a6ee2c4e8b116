"""Writes the tiny base as a Hub folder: configuration, random weights, tokenizer, processor, chat template.

`python -m helpers.tiny.build FOLDER` makes one with fresh weights.
"""
import json
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from helpers.tiny import TINY_DIR
from helpers.tiny.questions import corpus

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCAB_SIZE = 512  # 256 bytes, the merges, the special tokens last
IMAGE_TOKEN = 28 * 28  # pixels of one image token: 2 x 2 patches of 14 x 14
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 16, 144

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # Qwen2-VL-7B-Instruct's own


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE on `questions.corpus()`, split by Qwen2's own pattern: digits one by one; its special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus(), trainer)
    if bpe.get_vocab_size() != size:
        raise ValueError(f"the corpus gives {bpe.get_vocab_size()} tokens, {size} are wanted: give it more text")
    learned = json.loads(bpe.to_str())["model"]
    vocab = learned["vocab"] | {token: size + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {VOCAB_SIZE}")
    return tokenizer


def model_config(
    tokenizer: Qwen2Tokenizer,
    *,
    width: int = 192,
    vision_layers: int = 6,
    language_layers: int = 4,
    rope_theta: float = 10.0,
    mrope_section: tuple[int, int, int] = (2, 7, 7),
) -> Qwen2VLConfig:
    """The architecture of Qwen2-VL at a small width; heads of size 32 in both towers.

    `rope_theta` is small on purpose: at head size 32 the published 1e6 hardly turns on the width axis of a grid of
    ten tokens. `mrope_section` counts the 16 rotary frequencies given to (time, height, width), fastest first.
    """
    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=language_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "mrope_section": list(mrope_section)},
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(depth=vision_layers, embed_dim=width, num_heads=width // 32, hidden_size=width),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def make_processor(tokenizer: Qwen2Tokenizer, max_image_tokens: int = MAX_IMAGE_TOKENS) -> Qwen2VLProcessor:
    """The real processor; a picture becomes `MIN_IMAGE_TOKENS` to `max_image_tokens` image tokens, aspect kept."""
    size = {"shortest_edge": MIN_IMAGE_TOKENS * IMAGE_TOKEN, "longest_edge": max_image_tokens * IMAGE_TOKEN}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Random weights whose spread fits the width: 1 / sqrt(inputs), less where a layer adds to the residual stream.

    The published spread of .02 is made for widths of thousands; at 192 attention starts flat and stays so for long.
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tower = config.vision_config.depth if "visual" in name else config.text_config.num_hidden_layers
            adds = name.endswith(("o_proj", "down_proj", "attn.proj", "mlp.fc2"))
            spread = module.in_features**-0.5 / ((2 * tower) ** 0.5 if adds else 1)
            torch.nn.init.normal_(module.weight, std=spread)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def make_random(folder: str | Path, seed: int = 0, max_image_tokens: int = MAX_IMAGE_TOKENS, **sizes) -> Path:
    """Write a complete model folder with random weights (bf16); `sizes` goes to `model_config`."""
    folder = Path(folder)
    processor = make_processor(train_tokenizer(), max_image_tokens)
    model = make_model(model_config(processor.tokenizer, **sizes), seed)
    save(model, processor, folder)
    return folder


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: str | Path) -> None:
    """Write weights in bf16, configuration, generation settings (greedy), tokenizer and processor to `folder`."""
    ids = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[ids.eos_token_id, ids.pad_token_id],
        pad_token_id=ids.pad_token_id,
        bos_token_id=ids.bos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = processor.to_dict()["image_processor"]  # once more in the file that older releases read
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")


if __name__ == "__main__":
    print(make_random(sys.argv[1] if len(sys.argv) > 1 else TINY_DIR))
