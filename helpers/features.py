"""What a frozen vision tower sees of the training pictures, computed once instead of in every epoch.

Only where the tower does not train (r1, r3's second stage) and pictures are not changed (no augmentation). The numbers
are those of the training step itself, bf16 under autocast, so that they are the same to the last bit.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from helpers.collate import IGNORED, Collator
from helpers.progress import progress_bar


class SeenCollator:
    """Batches of rows whose pictures have been seen: no picture is opened any more.

    Args:
        collator: makes tokens and labels, without augmentation.
        vlm: a Qwen2-VL whose vision tower is frozen and held in bf16.
        rows: the rows that will be asked for, by their `image_id`.
        file: where the features go: bf16, hidden size x image tokens of each picture (9 MB each at 7B and 1280 tokens).

    Calling it with N rows returns what `Collator` returns, with `image_features` (bf16 [image tokens, hidden]) in the
    place of `pixel_values`: `BoxTrainer` hands them to the model.
    """

    def __init__(self, collator: Collator, vlm: torch.nn.Module, rows: datasets.Dataset, file: Path, workers: int = 0):
        if collator.augment:
            raise ValueError("augmented pictures are other ones in each epoch: what the tower sees cannot be kept.")
        self.pad = collator.processor.tokenizer.pad_token_id
        self.ready: dict[str, dict[str, torch.Tensor]] = {}
        places: dict[str, tuple[int, int]] = {}
        end, width = 0, vlm.config.text_config.hidden_size
        bar = progress_bar(len(rows), 0, "seen once", "picture")
        batches = DataLoader(rows, batch_size=1, collate_fn=collator, num_workers=workers)
        with file.open("wb") as out:
            for image_id, batch in zip(rows["image_id"], batches, strict=True):
                tokens = see(vlm, batch.pop("pixel_values"), batch["image_grid_thw"])
                out.write(tokens.cpu().view(torch.int16).numpy().tobytes())
                places[image_id] = (end, end + len(tokens))
                end += len(tokens)
                self.ready[image_id] = {name: tensor[0] for name, tensor in batch.items()}
                bar.update(1)
        bar.close()
        self.features = torch.from_file(str(file), size=end * width, dtype=torch.bfloat16).view(end, width)
        self.places = places

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        ready, places = zip(*((self.ready[row["image_id"]], self.places[row["image_id"]]) for row in rows), strict=True)
        batch = {name: pad_sequence([one[name] for one in ready], True, fill)
                 for name, fill in (("input_ids", self.pad), ("attention_mask", 0), ("mm_token_type_ids", 0),
                                    ("labels", IGNORED))}  # fmt: skip
        batch["image_grid_thw"] = torch.stack([one["image_grid_thw"] for one in ready])
        batch["image_features"] = torch.cat([self.features[start:end] for start, end in places])
        return batch


@torch.no_grad()
def see(vlm: torch.nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """bf16 [image tokens, hidden]: what the tower makes of pictures in a training step."""
    with torch.autocast(vlm.device.type, torch.bfloat16):
        seen = vlm.get_image_features(pixel_values.to(vlm.device), grids.to(vlm.device))
    return torch.cat(seen.pooler_output)
