"""The embedded scenes as rows of the schema, rendered once and cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from helpers import scenes
from helpers.data.schema import FEATURES, empty_split, objects_of, source_hash, workers

SCENE_FEATURES = datasets.Features({**FEATURES, "rotation": datasets.Value("int64")})  # degrees, counter-clockwise


def scene_rows(indices: list[int], seed: int, split: str) -> Iterator[dict[str, Any]]:
    for index in indices:
        scene = scenes.render_scene(seed, index, split)
        names, boxes = zip(*scene.tables, strict=True) if scene.tables else ((), ())
        yield {
            **{name: getattr(scene, name) for name in ("image_id", "width", "height", "meta", "rotation")},
            "image": {"bytes": scene.jpeg, "path": None},
            "objects": objects_of([[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes], list(names)),
        }


def load_embedded(seed: int, limit: dict[str, int], cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """The embedded photos, rendered once by all cores and cached; an edited renderer is rendered anew."""
    return {name: _rendered(name, min(limit.get(name, size), size), seed, cache_dir)
            for name, size in scenes.SPLITS.items()}


def load_extra(seed: int = 0, cache_dir: str | None = None) -> datasets.DatasetDict:
    """What `val` has too few of: `val-multi`, pictures with two to four tables, and `val-none`, pictures without one.

    To measure on, never to train or choose on; `prepare` them as the rest.
    """
    return datasets.DatasetDict({name: _rendered(name, size, seed, cache_dir)
                                 for name, size in scenes.EXTRA_SPLITS.items()})


def _rendered(name: str, count: int, seed: int, cache_dir: str | None) -> datasets.Dataset:
    if not count:
        return empty_split()
    return datasets.Dataset.from_generator(
        scene_rows,
        features=SCENE_FEATURES,
        gen_kwargs={"indices": list(range(count)), "seed": seed, "split": name},
        num_proc=workers(count),
        split=datasets.NamedSplit(name.replace("-", "_")),
        cache_dir=cache_dir,
        fingerprint=Hasher.hash(["scenes", seed, name, count,
                                 source_hash(Path(scenes.__file__).parent, Path(__file__))]),
    )
