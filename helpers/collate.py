"""Rows -> batches with a label mask. What the loss sees is decided here."""

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
import torch

from helpers.budget import image_tokens
from helpers.data import names_in
from helpers.data.pictures import as_rgb
from helpers.grammar import longest_unit
from helpers.messages import END_OF_TURN, target_text, to_messages
from helpers.recipes import IMAGE_TOKEN
from helpers.settings import ParameterError, Run

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


def check_limits(rows: Mapping[str, datasets.Dataset], collator: Collator, run: Run) -> None:
    """Refuse a run whose limits do not fit its data; by arithmetic, so no picture is opened.

    `rows`: train, selection and val, prepared. Raises ParameterError where the true answer of a picture of train or
    val does not fit into `max_new_tokens`; where a picture of train makes more than 2048 tokens (with `augment` each
    may become as large as `max_pixels`); where `eval_steps` would find no box on its pictures of selection.
    """
    ids = [f"{image_id!r} in {split}" for split in ("train", "val") for image_id in rows[split]["image_id"]]
    objects = [one for split in ("train", "val") for one in rows[split]["objects"]]
    need = _answer_tokens(objects, collator)
    if run.constrained:  # leaves each box the room that it takes at most
        unit = longest_unit(collator.processor.tokenizer, names_in(rows["train"]))
        need = np.maximum(need, [len(one["bbox"]) * unit + 1 for one in objects])
    if need.max() > run.max_new_tokens:
        raise ParameterError(f"max_new_tokens={run.max_new_tokens} would cut answers: the true one of image_id="
                             f"{ids[need.argmax()]} needs {need.max()}; set max_new_tokens={need.max()} or more.")
    if run.stages:
        _check_sequences(rows["train"], collator, run)
    few = rows["selection"]["objects"][: run.eval_pictures] if run.stages and run.eval_steps else None
    if few is not None and not any(objects["bbox"] for objects in few):
        raise ParameterError(f"eval_steps={run.eval_steps} finds no box on {len(few)} pictures of selection; leave it "
                             "out, raise eval_pictures, or give the data set pictures for a split named selection.")


def _check_sequences(train: datasets.Dataset, collator: Collator, run: Run) -> None:
    """Raise ParameterError for the longest sequence of `train`, where it has more than 2048 tokens."""
    answers = _answer_tokens(train["objects"], collator)
    chat = collator.texts([{"image": None, "objects": train["objects"][0]}])[0]
    text = len(collator.processor.tokenizer(chat)["input_ids"]) - 1 - answers[0] + answers  # 1: the image token itself
    images = (np.full(len(train), run.max_pixels // IMAGE_TOKEN) if run.augment else
              image_tokens(zip(train["width"], train["height"], strict=True), run.min_pixels, run.max_pixels))
    longest = int((text + images).argmax())
    tokens, room = text[longest] + images[longest], IMAGE_TOKEN * (MAX_TOKENS - text[longest])
    if tokens > MAX_TOKENS:
        raise ParameterError(f"image_id={train['image_id'][longest]!r} in train makes {tokens} tokens, {text[longest]} "
                             f"of them text, and at most {MAX_TOKENS} are allowed; "
                             + (f"set max_pixels={room} or less." if room > 0 else "take it out."))


def _answer_tokens(objects: Sequence[Mapping], collator: Collator) -> np.ndarray:
    """Tokens of each true answer, with the `<|im_end|>` that ends it: int64 [N]."""
    texts = [target_text(one) + END_OF_TURN for one in objects]
    return np.array([len(ids) for ids in collator.processor.tokenizer(texts)["input_ids"]], dtype=np.int64)
