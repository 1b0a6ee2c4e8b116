"""Rows -> batches with a label mask. What the loss sees is decided here."""

from collections.abc import Callable, Sequence

import torch

from helpers.data.pictures import as_rgb
from helpers.messages import to_messages

IGNORED = -100  # the label that PyTorch's cross-entropy skips
MAX_TOKENS = 2048  # a longer sequence is refused by name, never cut: a cut would lose image tokens
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Collator:
    """Turn rows of the project's schema into one padded batch.

    Args:
        processor: a `Qwen2VLProcessor`, with its pixel budget set.
        prompt: the question asked of every picture.
        loss_scope: `"assistant"`, the answer and the `<|im_end|>` after it; or `"all-text"`, every text token,
            system and user included, without padding and vision tokens.
        augment: makes another row of each row first, such as `augment.Augment`; for training alone.

    Calling it with N rows returns `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (int64 [N, T]),
    `pixel_values` (float32 [patches, 1176]) and `image_grid_thw` (int64 [N, 3], in patches of 14 pixels).
    `labels` is `input_ids` where the loss looks and -100 elsewhere.

    Raises:
        ValueError: a row is longer than 2048 tokens, or an answer has no `<|im_end|>` in its labels.
    """

    def __init__(self, processor, prompt: str, loss_scope: str = "assistant",
                 augment: Callable[[dict], dict] | None = None):
        if loss_scope not in ("assistant", "all-text"):
            raise ValueError(f"loss_scope={loss_scope!r} is not valid: expected one of assistant, all-text.")
        self.processor, self.prompt, self.loss_scope, self.augment = processor, prompt, loss_scope, augment
        tokenizer = processor.tokenizer
        self.header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.vision = torch.tensor(tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))

    def texts(self, rows: Sequence[dict]) -> list[str]:
        """The whole conversation of each row as the chat template writes it, `<|image_pad|>` still single."""
        chats = [to_messages(row, self.prompt) for row in rows]
        return [self.processor.apply_chat_template(chat["prompt"] + chat["completion"]) for chat in chats]

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = [self.augment(row) for row in rows] if self.augment else rows
        images = [as_rgb(row["image"]) for row in rows]
        batch = self.processor(images=images, text=self.texts(rows), padding=True, padding_side="right",
                               return_tensors="pt")
        lengths = batch["attention_mask"].sum(1)
        for row, length in zip(rows, lengths.tolist(), strict=True):
            if length > MAX_TOKENS:
                raise ValueError(f"image_id={row['image_id']!r} makes {length} tokens, and at most {MAX_TOKENS} are "
                                 "allowed; lower max_pixels.")
        batch["labels"] = self.labels(batch["input_ids"], batch["attention_mask"])
        check_end_token(batch["labels"], self.end)
        return dict(batch)

    def labels(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 [N, T]: `input_ids` inside the loss scope, -100 outside."""
        if self.loss_scope == "all-text":
            keep = attention_mask.bool() & ~torch.isin(input_ids, self.vision)
        else:
            keep = torch.zeros_like(input_ids, dtype=torch.bool)
            for row, ids in enumerate(input_ids.tolist()):
                start = answer_start(ids, self.header)
                stop = ids.index(self.end, start) + 1 if self.end in ids[start:] else len(ids)
                keep[row, start:stop] = attention_mask[row, start:stop].bool()
        return input_ids.where(keep, torch.tensor(IGNORED))


def answer_start(ids: list[int], header: list[int]) -> int:
    """The position after the last `<|im_start|>assistant\\n` (`header`, as tokens). Raises ValueError without one."""
    for start in range(len(ids) - len(header), -1, -1):
        if ids[start : start + len(header)] == header:
            return start + len(header)
    raise ValueError("there is no '<|im_start|>assistant' in the tokens: the chat template is not Qwen2-VL's.")


def check_end_token(labels: torch.Tensor, end: int) -> None:
    """Raise ValueError unless every row of `labels` [N, T] ends with `<|im_end|>` inside the loss.

    Without it the model never learns to stop: it repeats boxes until the token limit.
    """
    kept = [row[row != IGNORED] for row in labels]
    for number, row in enumerate(kept):
        if not (row == end).any():
            raise ValueError(f"row {number} of the batch has no <|im_end|> in its labels: the model would never "
                             "learn to stop.")
