"""Rows -> batches with a label mask: what the loss is computed on. And how long sequences get, by arithmetic."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import datasets
import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from helpers.data import names_in
from helpers.data.pictures import as_rgb
from helpers.messages import END_OF_TURN, longest_unit, target_text, to_messages
from helpers.recipes import IMAGE_TOKEN
from helpers.settings import ParameterError, Run

IGNORED = -100  # the label that PyTorch's cross-entropy skips
MAX_TOKENS = 2048  # a longer sequence is refused by name, never cut: a cut would lose image tokens
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Collator:
    """Turn rows of the project's schema into one padded batch.

    Args:
        processor: a `Qwen2VLProcessor`, with its pixel budget set.
        loss_scope: `"assistant"`, the completion and the `<|im_end|>` after it; or `"all-text"`, every text token,
            system and user included, without padding and vision tokens.
        augment: makes another row of each row first, such as `augment.Augment`; for training alone.

    Calling it with N rows returns `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (int64 [N, T]),
    `pixel_values` (float32 [patches, 1176]) and `image_grid_thw` (int64 [N, 3], in patches of 14 pixels).
    `labels` is `input_ids` where the loss is computed and -100 elsewhere. Raises ValueError for a row of more than
    2048 tokens, and for a completion without `<|im_end|>` in its labels.
    """

    def __init__(self, processor, prompt: str, loss_scope: str = "assistant",
                 augment: Callable[[dict], dict] | None = None):
        self.processor, self.prompt, self.loss_scope, self.augment = processor, prompt, loss_scope, augment
        tokenizer = processor.tokenizer
        self.header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.vision = torch.tensor(tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))

    def texts(self, rows: Sequence[dict]) -> list[str]:
        """The whole conversation of each row as the chat template writes it, `<|image_pad|>` still single."""
        chats = [to_messages(row, self.prompt) for row in rows]
        return [self.processor.apply_chat_template(chat["prompt"] + chat["completion"]) for chat in chats]

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = [self.augment(row) for row in rows] if self.augment else rows
        batch = self.processor(images=[as_rgb(row["image"]) for row in rows], text=self.texts(rows), padding=True,
                               padding_side="right", return_tensors="pt")
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
                start = completion_start(ids, self.header)
                if self.end in ids[start:]:  # `check_end_token` refuses a row without
                    keep[row, start : ids.index(self.end, start) + 1] = True
        return input_ids.where(keep, torch.tensor(IGNORED))


def completion_start(ids: list[int], header: list[int]) -> int:
    """The position after the last `<|im_start|>assistant\\n` (`header`, as tokens). Raises ValueError without one."""
    for start in range(len(ids) - len(header), -1, -1):
        if ids[start : start + len(header)] == header:
            return start + len(header)
    raise ValueError("there is no '<|im_start|>assistant' in the tokens: the chat template is not Qwen2-VL's.")


def check_end_token(labels: torch.Tensor, end: int) -> None:
    """Raise ValueError unless every row of `labels` [N, T] has an `<|im_end|>` (`end`)."""
    without = (labels != end).all(dim=1).nonzero()
    if len(without):
        raise ValueError(f"row {int(without[0])} of the batch has no <|im_end|> in its labels: the model would never "
                         "learn to stop.")


def image_tokens(sizes: Iterable[tuple[int, int]], min_pixels: int, max_pixels: int) -> np.ndarray:
    """Image tokens of pictures of these (width, height) in pixels: int64 [N]. No picture is opened."""
    side = math.isqrt(IMAGE_TOKEN)
    resized = [smart_resize(int(height), int(width), side, min_pixels, max_pixels) for width, height in sizes]
    return np.array([height * width // IMAGE_TOKEN for height, width in resized], dtype=np.int64)


def longest(rows: datasets.Dataset, count: int, min_pixels: int, max_pixels: int) -> datasets.Dataset:
    """The `count` rows whose pictures make most image tokens, by their `width` and `height`."""
    tokens = image_tokens(zip(rows["width"], rows["height"], strict=True), min_pixels, max_pixels)
    return rows.select(np.argsort(-tokens, kind="stable")[:count])


def check_limits(rows: Mapping[str, datasets.Dataset], collator: Collator, run: Run) -> None:
    """Refuse a run whose limits do not fit its data; by arithmetic, so no picture is opened.

    `rows`: train, selection and val, prepared. Raises ParameterError where the true completion of a picture of train
    or val does not fit into `max_new_tokens`; where a picture of train makes more than 2048 tokens (with `augment` each
    may become as large as `max_pixels`); where `eval_steps` would find no box on its pictures of selection.
    """
    tokenizer, train = collator.processor.tokenizer, rows["train"]
    ids = [f"{image_id!r} in {split}" for split in ("train", "val") for image_id in rows[split]["image_id"]]
    objects = [one for split in ("train", "val") for one in rows[split]["objects"]]
    texts = [target_text(one) + END_OF_TURN for one in objects]
    completions = np.array([len(tokens) for tokens in tokenizer(texts)["input_ids"]])
    need = completions
    if run.constrained:  # leaves each box the room that it takes at most
        unit = longest_unit(tokenizer, names_in(train, rows["val"]))
        need = np.maximum(completions, [len(one["bbox"]) * unit + 1 for one in objects])
    if need.max() > run.max_new_tokens:
        raise ParameterError(f"max_new_tokens={run.max_new_tokens} would cut completions: the true one of image_id="
                             f"{ids[need.argmax()]} needs {need.max()}; set max_new_tokens={need.max()} or more.")
    if not run.stages:
        return
    chat = collator.texts([{"image": None, "objects": objects[0]}])[0]
    text = len(tokenizer(chat)["input_ids"]) - 1 - completions[0] + completions[: len(train)]  # 1: <|image_pad|>
    images = (np.full(len(train), run.max_pixels // IMAGE_TOKEN) if run.augment else
              image_tokens(zip(train["width"], train["height"], strict=True), run.min_pixels, run.max_pixels))
    most = int((text + images).argmax())
    if text[most] + images[most] > MAX_TOKENS:
        room = IMAGE_TOKEN * (MAX_TOKENS - text[most])
        raise ParameterError(f"image_id={ids[most]} makes {text[most] + images[most]} tokens, {text[most]} of them "
                             f"text, and at most {MAX_TOKENS} are allowed; "
                             + (f"set max_pixels={room} or less." if room > 0 else "take it out."))
    if run.eval_steps:
        few = rows["selection"]["objects"][: run.eval_pictures]
        if not any(one["bbox"] for one in few):
            raise ParameterError(f"eval_steps={run.eval_steps} finds no box on {len(few)} pictures of selection; leave "
                                 "it out, raise eval_pictures, or give the data set pictures for a split named "
                                 "selection.")
