"""The Hub, a local file or folder -> {split: rows of the schema}."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import pyarrow.parquet
from datasets.fingerprint import Hasher

from helpers.data import formats
from helpers.data.pictures import Pictures, escaped, files_below
from helpers.data.schema import FEATURES, DataError, fingerprint, meta_of, safe_path
from helpers.data.splits import by_place, split_of

HUB_ID = "openfoodfacts/nutrition-table-detection"
HUB_REVISION = "b1931722f06a0cd7f74c190cb9081348fbec4680"  # its data files as uploaded: 1083 train, 123 val
_COMMIT = re.compile("[0-9a-f]{40}")
Splits = dict[str, datasets.Dataset]


# --- tables that already have columns ---------------------------------------------------------------------------------


def _check_columns(columns: list[str], where: str | Path) -> None:
    missing = [name for name in FEATURES if name not in columns and name != "meta"]
    if missing:
        raise DataError(f"{where} has the columns {columns}; it lacks {missing}, expected {list(FEATURES)}")


def _to_schema(split: datasets.Dataset, where: str, root: Path | None) -> datasets.Dataset:
    """`split` with the schema's columns alone; `DataError` names the columns it lacks or that have another type."""
    _check_columns(split.column_names, where)
    if "meta" not in split.column_names:
        split = split.add_column("meta", [meta_of()] * len(split), feature=FEATURES["meta"])
    split = split.select_columns(list(FEATURES))
    try:
        split = split if split.features == FEATURES else split.cast(FEATURES)
    except Exception as error:  # pyarrow and datasets raise many kinds
        found = {name: split.features[name] for name in FEATURES if split.features[name] != FEATURES[name]}
        raise DataError(f"{where}: the columns {found} cannot be read as {[FEATURES[n] for n in found]}") from error
    return _only_own_pictures(split, where, root)


def _only_own_pictures(split: datasets.Dataset, where: str, root: Path | None) -> datasets.Dataset:
    """Pictures given by path must lie in `root`; from the Hub (`root` None) each must bring its bytes."""
    if not len(split) or not pyarrow.compute.struct_field(split.data.column("image"), "bytes").null_count:
        return split

    def own(image: dict[str, Any] | None) -> dict[str, Any]:
        if image is None or image["bytes"] is not None or image["path"] is None:
            return {"image": image}
        if root is None:
            return {"image": None}  # the audit lists it as unreadable
        return {"image": {"bytes": None, "path": str(safe_path(root, image["path"], where))}}

    undecoded = split.cast_column("image", datasets.Image(decode=False))
    paths = pyarrow.compute.struct_field(split.data.column("image"), "path").to_pylist()
    stamps = [_stamp(root / path) if root and path else None for path in paths]
    new = fingerprint(undecoded, str(root), where, stamps)  # a picture file that changes is read anew
    own_alone = undecoded.map(own, input_columns="image", features=undecoded.features, new_fingerprint=new)
    return own_alone.cast_column("image", datasets.Image())


def load_hub(dataset_id: str, revision: str | None, cache_dir: str | None) -> Splits:
    """A data set of the Hub that has the schema. Offline, gated or missing: a `DataError` that says what to do."""
    revision = revision or (HUB_REVISION if dataset_id == HUB_ID else None)
    name = f"{dataset_id} at revision {revision or 'main'}"
    try:
        found = datasets.load_dataset(dataset_id, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # huggingface_hub, datasets, requests and fsspec each have their own
        reason = " ".join(str(error).split())[:300]
        offline = "HF_HUB_OFFLINE is set and it is not in the cache" if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"the data set {name} cannot be loaded ({offline or f'{type(error).__name__}: {reason}'}); expected an "
            "existing local path, or a Hub id with access to the Hub (a gated one needs a token: HF_TOKEN or "
            "`hf auth login`); offline, bring its Parquet files and give their folder as dataset_id"
        ) from error
    cached = {Path(file["filename"]).parent.name for rows in found.values() for file in rows.cache_files}
    commits = {name for name in cached if _COMMIT.fullmatch(name)}  # datasets names the folder after the commit
    if _COMMIT.fullmatch(revision or "") and commits - {revision}:
        raise DataError(f"the cache has {dataset_id} at revision {', '.join(commits)} only; expected {revision}")
    return {split: _to_schema(rows, f"{name}, {split}", None) for split, rows in found.items()}


def _load_parquet(root: Path, files: list[Path], cache_dir: str | None) -> Splits:
    by_split: dict[str, list[str]] = {}
    for file in files:
        try:
            columns = pyarrow.parquet.read_schema(file).names
        except Exception as error:
            raise DataError(f"{file}: not a whole Parquet file ({error}); expected one as the Hub serves it") from error
        _check_columns(columns, file)  # what one shard of several lacks, `datasets` fills with None
        by_split.setdefault(split_of(file, root), []).append(str(file))
    splits = {}
    for name, own in by_split.items():
        try:
            rows = datasets.load_dataset("parquet", data_files=own, split="train", cache_dir=cache_dir)
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise DataError(f"{', '.join(own)}: cannot be read as Parquet ({reason})") from error
        splits[name] = _to_schema(rows, ", ".join(own), root)
    return splits


def _load_saved(root: Path, cache_dir: str | None) -> Splits:
    """A folder of `save_to_disk`, read through the cache: `datasets` would else write its own files into the folder."""
    splits = {}
    try:
        found = datasets.load_from_disk(str(root))
        for name, rows in found.items() if isinstance(found, dict) else [(str(found.split or ""), found)]:
            files = [file["filename"] for file in rows.cache_files]
            splits[name] = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=cache_dir)
    except Exception as error:
        raise DataError(f"{root}: cannot be read as a folder of save_to_disk ({error})") from error
    return {name: _to_schema(rows, f"{root}, {name or 'its rows'}", root) for name, rows in splits.items()}


# --- a local path -----------------------------------------------------------------------------------------------------

FORMATS = {
    "Parquet": "*.parquet files, as the Hub serves them",
    "save_to_disk": "state.json or dataset_dict.json, written by datasets",
    "metadata.jsonl": "a Hugging Face imagefolder",
    "YOLO": "a .yaml with names, or classes.txt",
    "Pascal VOC": "*.xml",
    "COCO": "*.json with images, annotations, categories",
}


def detect_format(path: Path) -> str:
    """The key of `FORMATS` that fits `path`; `DataError` for none or for several."""
    if path.is_file():
        found = {".parquet": ["Parquet"], ".json": ["COCO"]}.get(path.suffix.lower(), [])
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        found = ["save_to_disk"]
    else:
        marks = {"Parquet": "*.parquet", "metadata.jsonl": "metadata.jsonl", "Pascal VOC": "*.xml"}
        found = [name for name, mark in marks.items() if any(files_below(path, mark))]
        found += ["YOLO"] if formats.yolo_files(path) else []
        found += ["COCO"] if formats.coco_files(path, sure=bool(found)) else []
    if len(found) != 1:
        known = "; ".join(f"{name}: {mark}" for name, mark in FORMATS.items())
        raise DataError(f"{path} holds {' and '.join(found) or 'no known format'}; expected one of: {known}")
    return found[0]


def _rows(rows: tuple[dict[str, Any], ...]) -> Iterator[dict[str, Any]]:
    yield from rows


def _cached(rows: list[dict[str, Any]], cache_dir: str | None) -> datasets.Dataset:
    """Rows whose pictures are files, as a cached split; a picture file that changes is read anew."""
    files = [Path(row["image"]["path"]) for row in rows]
    stamps = [_stamp(file) for file in files]
    if not any(stamps):
        raise DataError(f"none of the {len(rows)} pictures exists, such as {files[0]}; expected picture files there")
    return datasets.Dataset.from_generator(
        _rows,
        features=FEATURES,
        gen_kwargs={"rows": tuple(_in_utf8(row) for row in rows)},
        cache_dir=cache_dir,
        fingerprint=Hasher.hash(["files", rows, stamps]),
    )


def _in_utf8(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a file whose name is not UTF-8, which Arrow holds alone: the name escaped, the bytes for the path."""
    path = row["image"]["path"]
    if path == escaped(path):
        return row
    image = {"path": None, "bytes": Path(path).read_bytes() if Path(path).is_file() else None}
    return row | {"image_id": escaped(row["image_id"]), "image": image}


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of a file, which tell where it was replaced."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


def load_local(path: Path, cache_dir: str | None) -> Splits:
    """Every split of a local file or folder under the name it has there ("" without one), its format said out loud."""
    path = path.resolve()
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name == "annotations":
        root = root.parent  # COCO's usual layout: annotations/ beside the folders of pictures
    kind = detect_format(path)
    print(f"data: {path} is read as {kind} ({FORMATS[kind]})")
    if kind == "Parquet":
        return _load_parquet(root, list(files_below(path, "*.parquet")) if path.is_dir() else [path], cache_dir)
    if kind == "save_to_disk":
        return _load_saved(root, cache_dir)
    read = {"metadata.jsonl": formats.read_metadata, "YOLO": formats.read_yolo, "Pascal VOC": formats.read_voc}
    splits = formats.to_rows(formats.read_coco(root, path if path.is_file() else None) if kind == "COCO"
                             else read[kind](root))
    splits = by_place(splits, root, list(files_below(root)))
    used = {Path(row["image"]["path"]).resolve() for rows in splits.values() for row in rows}
    unused = [file for file in Pictures(root).files if file.resolve() not in used]
    if unused:  # neither trained on nor scored
        first = escaped(unused[0].name)
        print(f"data: {len(unused)} pictures in {root} have no annotation and are not used, such as {first}")
    return {name: _cached(rows, cache_dir) for name, rows in splits.items()}


def check_content(splits: Splits, where: str) -> None:
    """`DataError` where a source has no pictures or no boxes: nothing can be learned."""
    objects = [entry or {} for rows in splits.values() for entry in rows["objects"]]
    if not objects:
        raise DataError(f"{where} has no pictures; expected at least one")
    if not any(entry.get("bbox") for entry in objects):
        raise DataError(f"{where}: objects.bbox is empty in all {len(objects)} pictures; expected boxes")
