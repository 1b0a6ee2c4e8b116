"""The Hub, a local file or folder -> {split: rows of the schema}."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import pyarrow.parquet
from datasets.fingerprint import Hasher

from helpers.data import formats
from helpers.data.pictures import ENDINGS, Pictures, escaped, files_below, head
from helpers.data.schema import FEATURES, DataError, fingerprint, safe_path
from helpers.data.splits import Rows, by_place, split_name, split_of

HUB_ID = "openfoodfacts/nutrition-table-detection"
HUB_REVISION = "b1931722f06a0cd7f74c190cb9081348fbec4680"  # its data files as uploaded: 1083 train, 123 val
_COMMIT = re.compile("[0-9a-f]{40}")
Splits = dict[str, datasets.Dataset]


# --- tables that already have columns ---------------------------------------------------------------------------------


def _check_columns(columns: list[str], where: str | Path) -> None:
    if missing := [name for name in ("image", "objects") if name not in columns]:
        raise DataError(f"{where} has the columns {columns}; it lacks {missing}, expected {list(FEATURES)}")


def _to_schema(splits: Splits, where: str, root: Path | None, **options: Any) -> Splits:
    """`splits` with the schema's columns alone; other columns beside pictures and boxes are read as `formats` does.

    `DataError` names the columns that are missing or have another type.
    """
    if any(set(FEATURES) - set(rows.column_names) for rows in splits.values()):
        return _from_columns(splits, where, root, **options)
    cast = {}
    for name, rows in splits.items():
        rows = rows.select_columns(list(FEATURES))
        try:
            rows = rows if rows.features == FEATURES else rows.cast(FEATURES)
        except Exception as error:  # pyarrow and datasets raise many kinds
            found = {name: rows.features[name] for name in FEATURES if rows.features[name] != FEATURES[name]}
            raise DataError(f"{where}, {name or 'its rows'}: the columns {found} cannot be read as "
                            f"{[FEATURES[n] for n in found]}") from error
        cast[name] = _only_own_pictures(rows, where, root)
    return cast


def _from_columns(splits: Splits, where: str, root: Path | None, **options: Any) -> Splits:
    """Rows with a picture and `objects`, such as those of cppe-5, as rows of the schema."""
    found, pictures = [], {}
    for name, rows in splits.items():
        _check_columns(rows.column_names, where)
        classes = _class_names(rows.features["objects"])
        try:
            rows = rows.cast_column("image", datasets.Image())
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise DataError(f"{where}: the column image is {rows.features['image']}; expected pictures") from error
        pictures[name] = _only_own_pictures(rows, where, root).cast_column("image", datasets.Image(decode=False))
        for number, line in enumerate(pictures[name]):
            size = line.get("width"), line.get("height")
            new = formats.row(str(number), size, str(line.get("image_id", f"{name}-{number}")), line.get("meta"))
            one = formats.Found(new, [], "", [], name, head=head(line["image"]), file=Path(where))
            one = formats.of_objects(one, line["objects"], f"{where}, {name} row {number}", "meta" in line)
            named = [classes[n] if classes and type(n) is int and 0 <= n < len(classes) else n for n in one.names]
            found.append(one._replace(names=named))
    made = {}
    for name, lines in formats.to_rows(found, None, where, **options).items():
        own = pictures[name].select([int(line["image"]["path"]) for line in lines]).select_columns("image")
        rest = [{key: value for key, value in line.items() if key != "image"} for line in lines]
        features = datasets.Features({**FEATURES, "image": datasets.Image(decode=False)})
        full = own.map(lambda row, number, rest=rest: row | rest[number], with_indices=True, features=features,
                       new_fingerprint=fingerprint(own, rest))  # fmt: skip
        made[name] = full.cast_column("image", datasets.Image())
    return made


def _class_names(feature: Any) -> list[str] | None:
    """The names of the first `ClassLabel` in a column's type."""
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return next((names for one in inner if one is not None and (names := _class_names(one))), None)


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


def load_hub(dataset_id: str, revision: str | None, cache_dir: str | None, **options: Any) -> Splits:
    """A data set of the Hub with pictures and boxes. Offline, gated or missing: a `DataError` that says what to do."""
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
    return _to_schema(dict(found), name, None, **options)


def _load_parquet(root: Path, files: list[Path], cache_dir: str | None, **options: Any) -> Splits:
    by_split: dict[str, list[str]] = {}
    for file in files:
        _check_columns(parquet_columns(file), file)  # what one shard of several lacks, `datasets` fills with None
        by_split.setdefault(split_of(file, root), []).append(str(file))
    splits = {}
    for name, own in by_split.items():
        try:
            splits[name] = datasets.load_dataset("parquet", data_files=own, split="train", cache_dir=cache_dir)
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise DataError(f"{', '.join(own)}: cannot be read as Parquet ({reason})") from error
    return _to_schema(splits, str(root), root, **options)


def parquet_columns(file: Path) -> list[str]:
    """The columns of a Parquet file; `DataError` where it is cut off."""
    try:
        return pyarrow.parquet.read_schema(file).names
    except Exception as error:
        raise DataError(f"{file}: not a whole Parquet file ({error}); expected one as the Hub serves it") from error


def _load_saved(root: Path, cache_dir: str | None, **options: Any) -> Splits:
    """A folder of `save_to_disk`, read through the cache: `datasets` would else write its own files into the folder."""
    splits = {}
    try:
        found = datasets.load_from_disk(str(root))
        for name, rows in found.items() if isinstance(found, dict) else [(str(found.split or ""), found)]:
            files = [file["filename"] for file in rows.cache_files]
            splits[name] = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=cache_dir)
    except Exception as error:
        raise DataError(f"{root}: cannot be read as a folder of save_to_disk ({error})") from error
    return _to_schema(splits, str(root), root, **options)


# --- a local path -----------------------------------------------------------------------------------------------------

FORMATS = {
    "Parquet": "*.parquet files with pictures, as the Hub serves them",
    "save_to_disk": "state.json or dataset_dict.json, written by datasets",
    **{name: mark for name, (mark, _) in formats.READERS.items()},
}
ARCHIVES = (".zip", ".tar", ".tgz", ".gz")


def _root_of(path: Path) -> Path:
    """The folder of a data set: that of a file, and the one folder in a folder that has nothing else."""
    if path.is_file():
        return path.parent.parent if path.parent.name == "annotations" else path.parent  # COCO's usual layout
    inside = [one for one in path.iterdir() if not one.name.startswith((".", "__"))]
    alone = len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink()
    return _root_of(inside[0]) if alone and split_name(inside[0].name) not in ("train", "val", "test") else path


def _unpacked(archives: list[Path], cache_dir: str | None) -> Path:
    """A folder of the cache with what the archives hold, each in a folder of its name; unpacked once."""
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    folder = cache / f"unpacked-{Hasher.hash([(str(file), _stamp(file)) for file in archives])}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as half:
            for file in archives:
                try:
                    target = Path(half, "all", file.name.split(".")[0])
                    shutil.unpack_archive(file, target, filter=None if file.suffix == ".zip" else "data")
                except Exception as error:  # zipfile, tarfile and zlib each have their own
                    raise DataError(f"{file}: cannot be unpacked ({error}); unpack it and give the folder") from error
            shutil.move(Path(half, "all"), folder)
    return folder


def detect_formats(path: Path, pictures: Pictures) -> dict[str, dict[Path, Any]]:
    """{key of `FORMATS`: its files and what they hold} of `path`; `DataError` where there is none."""
    if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return {"save_to_disk": {}}
    files = [path] if path.is_file() and not path.suffix.startswith(".y") else pictures.all
    found, others = formats.annotated(files)
    for file in files:
        if file.suffix == ".parquet":
            if "file_name" in parquet_columns(file):
                found.setdefault("metadata", {})[file] = pyarrow.parquet.read_table(file).to_pylist()
            else:
                found.setdefault("Parquet", {})[file] = None
    if files != [path] and (labels := formats.yolo_labels(pictures)):
        found["YOLO"] = labels
    if not found:
        known = "; ".join(f"{name}: {mark}" for name, mark in FORMATS.items())
        raise DataError(f"{path} holds no known format{': ' if others else ''}{', '.join(others[:3])}; "
                        f"expected one of: {known}")
    if others:
        print(f"data: {len(others)} files hold no annotations and are not read, such as {others[0]}")
    return found


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
        gen_kwargs={"rows": tuple(map(_storable, rows))},
        cache_dir=cache_dir,
        fingerprint=Hasher.hash(["files", rows, stamps]),
    )


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """The row with bytes for the path where it has them, or the file's name is not UTF-8, which Arrow holds alone."""
    path, found = row["image"]["path"], row["image"]["bytes"]
    if path == escaped(path) and found is None:
        return row
    found = found or (Path(path).read_bytes() if Path(path).is_file() else None)
    return row | {"image": {"path": None, "bytes": found}}


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of a file, which tell where it was replaced."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


def load_local(path: Path, cache_dir: str | None, **options: Any) -> Splits:
    """Every split of a local file or folder under the name it has there ("" without one), its format said out loud."""
    path = path.resolve()
    files = [path] if path.is_file() else list(files_below(path))
    archives = [file for file in files if file.suffix.lower() in ARCHIVES]
    if archives and not any(file.suffix.lower() in (*ENDINGS, ".parquet", ".arrow") for file in files):
        print(f"data: {', '.join(file.name for file in archives)} unpacked into the cache")
        path = _unpacked(archives, cache_dir)
    root = _root_of(path)
    pictures = Pictures(root)
    found = detect_formats(root if path.is_dir() else path, pictures)
    first, *more = sorted(found, key=list(FORMATS).index)
    print(f"data: {path} is read as {first} ({FORMATS[first]})")
    if first in ("Parquet", "save_to_disk"):
        if more:
            raise DataError(f"{path} holds {' and '.join([first, *more])}; expected one: give the file to read")
        if first == "save_to_disk":
            return _load_saved(root, cache_dir, **options)
        return _load_parquet(root, list(found[first]), cache_dir, **options)
    splits: Rows = {}
    for name in (first, *more):
        rows = formats.to_rows(formats.read(name, pictures, found[name]), pictures, str(root), **options)
        if name != first and not formats.same_rows(splits, rows):
            raise DataError(f"{path} holds {first} and {name}, which differ; expected one: give the file of the one to "
                            "read, or a folder without the other")  # fmt: skip
        splits = splits or rows
    splits = by_place(splits, root, pictures.all)
    used = {Path(row["image"]["path"]).resolve() for rows in splits.values() for row in rows}
    unused = [file for file in pictures.files if file.resolve() not in used]
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
