"""What a frozen vision tower sees of the training pictures, computed once instead of in every epoch.

For stages whose tower does not train (r1, r3's second) and pictures that stay as they are (no augmentation). The
numbers are those of a training step, with autocast where the tower is held in bf16, as many pictures at a time: the
same to the last bit.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from helpers.collate import IGNORED, Collator
from helpers.recipes import Stage
from helpers.runs import progress_bar

PADDING = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}  # None: the tokenizer's


def worth_keeping(stage: Stage, augment: bool, epochs: float) -> bool:
    """Whether a frozen tower sees pictures more than once, always alike, in one process (each would see all)."""
    frozen = "vision" not in stage.towers
    return frozen and not augment and epochs > 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1


class SeenCollator:
    """Batches of rows whose pictures have been seen: no picture is opened any more, and the tower does not run.

    Args:
        collator: makes tokens and labels, without augmentation (ValueError with).
        vlm: a Qwen2-VL whose vision tower is frozen, held in bf16 or fp32.
        rows: what will be asked for, by `image_id`. `self.rows` are the same ones, their pictures left undecoded.
        file: where the features go as long as this process runs: hidden size x image tokens of each picture
            (9 MB at 7B and 1280 tokens). It has no name any more once it is whole: no kill leaves it behind.
        batch_size: of a training step. A matrix product rounds otherwise for a single picture than for several.

    Calling it with N rows returns what `Collator` returns, with `image_features` ([image tokens, hidden]) in the
    place of `pixel_values`: `BoxTrainer` hands them to the model.
    """

    def __init__(self, collator: Collator, vlm: torch.nn.Module, rows: datasets.Dataset, file: Path, batch_size: int,
                 workers: int | None = None):
        if collator.augment:
            raise ValueError("augmented pictures are other ones in each epoch: what the tower sees cannot be kept.")
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.pad = collator.processor.tokenizer.pad_token_id
        self.ready: dict[str, dict[str, torch.Tensor]] = {}  # image_id -> tensors of one row, without padding
        self.places: dict[str, slice] = {}  # image_id -> rows of `self.features`
        ids, end, width = iter(rows["image_id"]), 0, vlm.config.text_config.hidden_size
        bar = progress_bar(len(rows), 0, "seen once", "picture")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            workers = (4 if torch.cuda.is_available() else 0) if workers is None else workers
            for batch in DataLoader(rows, batch_size, collate_fn=collator, num_workers=workers):
                seen = see(vlm, batch["pixel_values"], batch["image_grid_thw"])
                for number, tokens in enumerate(seen):
                    real, image_id = batch["attention_mask"][number].bool(), next(ids)
                    self.ready[image_id] = {name: batch[name][number][real].clone() for name in PADDING}
                    self.ready[image_id]["image_grid_thw"] = batch["image_grid_thw"][number]
                    self.places[image_id] = slice(end, end := end + len(tokens))
                    out.write(tokens.cpu().view(torch.uint8).numpy().tobytes())
                bar.update(len(seen))
        bar.close()
        self.features = torch.from_file(str(file), size=end * width, dtype=tokens.dtype).view(end, width)
        file.unlink()

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        ready = [self.ready[row["image_id"]] for row in rows]
        batch = {name: pad_sequence([one[name] for one in ready], True, self.pad if value is None else value)
                 for name, value in PADDING.items()}  # fmt: skip
        batch["image_grid_thw"] = torch.stack([one["image_grid_thw"] for one in ready])
        batch["image_features"] = torch.cat([self.features[self.places[row["image_id"]]] for row in rows])
        return batch


@torch.no_grad()
def see(vlm: torch.nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the tower makes of N pictures in a training step: N tensors [image tokens, hidden]."""
    with torch.autocast(vlm.device.type, torch.bfloat16, enabled=vlm.dtype == torch.bfloat16):
        return vlm.get_image_features(pixel_values.to(vlm.device), grids.to(vlm.device)).pooler_output
