"""The tiny base before its training: tokenizer, processor, architecture, random weights; and how it is saved."""

import json
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
from helpers.tiny.prompts import corpus

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCAB_SIZE = 512  # 256 bytes, the merges, the special tokens last
MIN_PIXELS, MAX_PIXELS = 16 * 28**2, 144 * 28**2  # 16 to 144 image tokens of 2 x 2 patches of 14 x 14


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE on `prompts.corpus()`, split by Qwen2's own pattern: digits one by one; its special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"] | {token: size + i for i, token in enumerate(SPECIAL_TOKENS)},
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_processor(max_pixels: int = MAX_PIXELS) -> Qwen2VLProcessor:
    """The real processor with the tiny base's tokenizer and pixel budget and Qwen2-VL-7B-Instruct's chat template."""
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=train_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=(TINY_DIR / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def make_model(
    tokenizer: Qwen2Tokenizer, seed: int = 0, width: int = 192, vision_layers: int = 6, language_layers: int = 4
) -> Qwen2VLForConditionalGeneration:
    """The architecture of Qwen2-VL at a small width, heads of size 32 in both towers; random weights in fp32.

    `rope_theta` is small on purpose: at head size 32 the published 1e6 hardly turns on the width axis of a grid of
    ten tokens. `mrope_section` counts the 16 rotary frequencies given to (time, height, width), fastest first.
    The weights' spread fits the width: 1 / sqrt(inputs), less where a layer adds to the residual stream. The published
    spread of .02 is made for widths of thousands; at 192 attention starts flat and stays so for long.
    """
    token, heads = tokenizer.convert_tokens_to_ids, width // 32
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=language_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 7, 7]},
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(depth=vision_layers, embed_dim=width, num_heads=heads, hidden_size=width),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            depth = vision_layers if "visual" in name else language_layers
            adds = name.endswith(("o_proj", "down_proj", "attn.proj", "mlp.fc2"))
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5 / ((2 * depth) ** 0.5 if adds else 1))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: str | Path) -> None:
    """Write weights in bf16, configuration, generation settings (greedy), tokenizer and processor to `folder`."""
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=pad
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = processor.to_dict()["image_processor"]  # once more in the file that older releases read
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")
