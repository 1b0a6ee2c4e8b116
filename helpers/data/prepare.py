"""Pictures decoded and brought to the pixel budget once, and cached, instead of in every epoch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
from datasets import Image
from PIL import Image as PILImage
from PIL import ImageOps

from helpers.data.pictures import as_rgb, draft_resize, open_picture
from helpers.data.schema import fingerprint, workers

BATCH = 16  # rows a process holds at once


def prepare(ds: datasets.DatasetDict, min_pixels: int, max_pixels: int, factor: int = 28) -> datasets.DatasetDict:
    """Rows whose picture is the one that the processor would make of it, as a JPEG (quality 95); written once, cached.

    A picture over `max_pixels` is turned by its EXIF tag and resized as Qwen2-VL's processor does (sides a multiple of
    `factor`, bicubic), so that the processor's own resize then changes nothing; smaller ones keep their bytes, unless
    they are transparent or have 16 bits a value (`as_rgb`). All lie in the cache then: a file that changes or goes away
    later does not reach a run that has begun.
    Boxes are in 0-1 and stay; `width` and `height` stay those of the original. A picture that cannot be read is left
    out and named: `clean` has already dropped them.
    """
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels {min_pixels}, max_pixels {max_pixels}; expected 0 < min_pixels <= max_pixels")
    import transformers.models.qwen2_vl.image_processing_qwen2_vl  # noqa: F401  slow: once, not in each worker

    budget = {"min_pixels": min_pixels, "max_pixels": max_pixels, "factor": factor}
    prepared = {}
    for name, split in ds.items():
        undecoded = split.cast_column("image", Image(decode=False))
        small = undecoded.map(
            _shrink_batch,
            batched=True,
            batch_size=BATCH,
            writer_batch_size=64,
            fn_kwargs=budget,
            features=undecoded.features,
            new_fingerprint=fingerprint(undecoded, budget),
            num_proc=workers(len(split)),
            desc=f"Preparing pictures ({name})",
        )
        prepared[name] = small.cast_column("image", Image())
    return datasets.DatasetDict(prepared)


def _shrink_batch(rows: dict[str, list], **budget: int) -> dict[str, list]:
    images: list[dict[str, Any] | None] = []
    for image_id, image in zip(rows["image_id"], rows["image"], strict=True):
        try:
            images.append(_shrink(image, **budget))
        except Exception as error:  # Pillow's readers raise many kinds; one bad picture must not end the run
            print(f"data: {image_id} is left out, its picture cannot be read: {type(error).__name__}: {error}")
            images.append(None)
    whole = [index for index, image in enumerate(images) if image is not None]
    return {name: [column[i] for i in whole] for name, column in (rows | {"image": images}).items()}


def _shrink(image: dict[str, Any], min_pixels: int, max_pixels: int, factor: int) -> dict[str, Any]:
    """The undecoded picture ({"bytes", "path"}) within the budget, as bytes; the same ones where it is already."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    with open_picture(image) as picture:
        width, height = picture.size
        if width * height <= max_pixels:
            picture.load()
            if picture.mode.startswith("I;16") or picture.has_transparency_data:
                return _as_file(ImageOps.exif_transpose(as_rgb(picture)), "PNG")
            return {"bytes": image["bytes"] or Path(image["path"]).read_bytes(), "path": None}
        new_height, new_width = smart_resize(height, width, factor, min_pixels, max_pixels)
        small = ImageOps.exif_transpose(draft_resize(picture, (new_width, new_height)))
    return _as_file(small, "JPEG", quality=95, subsampling=0)


def _as_file(picture: PILImage.Image, kind: str, **options: int) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}
