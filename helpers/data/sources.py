"""The Hub, a local file or folder -> {split: rows of the schema}."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from datasets.fingerprint import Hasher

from helpers.data import formats
from helpers.data.formats import FORMATS
from helpers.data.matching import Found, Pictures
from helpers.data.pictures import ENDINGS, escaped, files_below, head
from helpers.data.schema import FEATURES, DataError, fingerprint, refusing, with_columns
from helpers.data.splits import by_place, split_name, split_of

HUB_ID = "openfoodfacts/nutrition-table-detection"
HUB_REVISION = "b1931722f06a0cd7f74c190cb9081348fbec4680"  # its data files as uploaded: 1083 train, 123 val
ARCHIVES = (".zip", ".tar", ".tgz", ".gz")
_COMMIT = re.compile("[0-9a-f]{40}")
Splits = dict[str, datasets.Dataset]

# --- tables that already have columns ---------------------------------------------------------------------------------


def load_hub(dataset_id: str, revision: str | None, cache_dir: str | None, **options: Any) -> Splits:
    """A data set of the Hub with pictures and boxes. Offline, gated or missing: a `DataError` that says what to do."""
    revision = revision or (HUB_REVISION if dataset_id == HUB_ID else None)
    name = f"{dataset_id} at revision {revision or 'main'}"
    expected = ("an existing local path, or a Hub id with access to the Hub (a gated one needs a token: HF_TOKEN or "
                "`hf auth login`); offline (HF_HUB_OFFLINE), bring its Parquet files and give their folder")
    with refusing(f"the data set {name}", expected):
        found = datasets.load_dataset(dataset_id, revision=revision, cache_dir=cache_dir)
    cached = {Path(file["filename"]).parent.name for rows in found.values() for file in rows.cache_files}
    commits = {name for name in cached if _COMMIT.fullmatch(name)}  # datasets names the folder after the commit
    if _COMMIT.fullmatch(revision or "") and commits - {revision}:
        raise DataError(f"the cache has {dataset_id} at revision {', '.join(commits)} only; expected {revision}")
    return _to_schema(dict(found), name, None, **options)


def _load_tables(kind: str, root: Path, files: dict[Path, Any], cache_dir: str | None, **options: Any) -> Splits:
    """Parquet `files` with their schemas, or a folder of `save_to_disk`, which is read through the cache: `datasets`
    would else write its own files into the folder."""
    by_split: dict[str, list[str]] = defaultdict(list)
    with refusing(root, f"what {kind} writes"):
        for file, schema in files.items():  # what one shard of several lacks, `datasets` would fill with None
            _check_columns(schema.names, file)
            by_split[split_of(file, root)].append(str(file))
        if kind == "save_to_disk":
            saved = datasets.load_from_disk(str(root))
            for name, rows in saved.items() if isinstance(saved, dict) else [(str(saved.split or ""), saved)]:
                by_split[name] = [file["filename"] for file in rows.cache_files]
        builder = {"Parquet": "parquet", "save_to_disk": "arrow"}[kind]
        splits = {name: datasets.load_dataset(builder, data_files=own, split="train", cache_dir=cache_dir)
                  for name, own in by_split.items()}  # fmt: skip
    return _to_schema(splits, str(root), Pictures(root), **options)


def _check_columns(columns: list[str], where: str | Path) -> None:
    if missing := [name for name in ("image", "objects") if name not in columns]:
        raise DataError(f"{where} has the columns {columns}; it lacks {missing}, expected {list(FEATURES)}")


def _to_schema(splits: Splits, where: str, pictures: Pictures | None, **options: Any) -> Splits:
    """`splits` with the schema's columns alone; other columns beside pictures and boxes are read as `formats` does.

    `pictures`: those of the folder, None for the Hub. `DataError` names the columns that are missing or have another
    type.
    """
    whole = all(set(FEATURES) <= set(rows.column_names) for rows in splits.values())
    for name, rows in splits.items():
        _check_columns(rows.column_names, where)
        features = FEATURES if whole else {**rows.features, "image": FEATURES["image"]}
        with refusing(f"{where}, {name or 'its rows'}", f"columns of the types {features}"):
            rows = rows.select_columns(list(features)).cast(datasets.Features(features))
        splits[name] = _only_own_pictures(rows, where, pictures)
    return splits if whole else _from_columns(splits, where, **options)


def _only_own_pictures(split: datasets.Dataset, where: str, pictures: Pictures | None) -> datasets.Dataset:
    """Pictures given by path must be among `pictures`; from the Hub (None) each must bring its bytes, or is None."""
    column = split.data.column("image")
    lacking = pyarrow.compute.struct_field(column, "bytes").is_null().to_pylist()
    paths = pyarrow.compute.struct_field(column, "path").to_pylist()
    asked = [path for path, by_path in zip(paths, lacking, strict=True) if by_path and path]
    if not asked:
        return split
    found = pictures.find([Found(path, [], "", [], file=Path(where)) for path in asked]) if pictures else []
    own = {path: str(file) for path, file in zip(asked, found, strict=False)}

    def placed(image: dict[str, Any] | None) -> dict[str, Any]:
        if image and image["bytes"] is None:
            image = {"bytes": None, "path": own[image["path"]]} if image["path"] in own else None
        return {"image": image}

    undecoded = split.cast_column("image", datasets.Image(decode=False))
    new = fingerprint(undecoded, own, list(map(_stamp, found)))  # a picture file that changes is read anew
    split = undecoded.map(placed, input_columns="image", features=undecoded.features, new_fingerprint=new)
    return split.cast_column("image", datasets.Image())


def _from_columns(splits: Splits, where: str, **options: Any) -> Splits:
    """Rows with a picture and `objects`, such as those of cppe-5, as rows of the schema."""
    found = []
    for name, rows in splits.items():
        classes = _class_names(rows.features["objects"]) or []
        for number, line in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            with refusing(f"{where}, {name} row {number}", "objects with boxes and names"):
                one = formats.of_columns(str(number), line)
            one.names = [classes[n] if type(n) is int and 0 <= n < len(classes) else n for n in one.names]
            one.image_id = str(line.get("image_id", f"{name}-{number}"))
            one.split, one.head, one.file, one.path = name, head(line["image"]), Path(where), Path(one.name)
            found.append(one)
    by_split: dict[str, list[Found]] = defaultdict(list)
    for one in formats.settled(found, where, **options):
        by_split[one.split].append(one)
    made = {}
    for name, own in by_split.items():
        rows = [{key: value for key, value in one.row().items() if key != "image"} for one in own]
        pictures = splits[name].select([int(one.name) for one in own]).select_columns("image")
        made[name] = with_columns(pictures, rows)
    return made


def _class_names(feature: Any) -> list[str] | None:
    """The names of the first `ClassLabel` in a column's type."""
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return next((names for one in inner if one is not None and (names := _class_names(one))), None)


# --- a local path -----------------------------------------------------------------------------------------------------


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
    held = _held(root if path.is_dir() else path, pictures)
    first, *more = sorted(held, key=list(FORMATS).index)
    print(f"data: {path} is read as {first} ({FORMATS[first].mark})")
    if first in ("Parquet", "save_to_disk"):
        if more:
            raise DataError(f"{path} holds {' and '.join([first, *more])}; expected one: give the file to read")
        return _load_tables(first, root, held[first], cache_dir, **options)
    found = formats.read(first, pictures, held[first], **options)
    for name in more:
        if not formats.same_pictures(found, formats.read(name, pictures, held[name], **options)):
            raise DataError(f"{path} holds {first} and {name}, which differ; expected one: give the file of the one to "
                            "read, or a folder without the other")  # fmt: skip
    used = {one.path.resolve() for one in found}
    unused = [file for file in pictures.files if file.resolve() not in used]
    if unused:  # neither trained on nor scored
        print(f"data: {len(unused)} pictures in {root} have no annotation and are not used, such as "
              f"{escaped(unused[0].name)}")
    return {name: _cached(own, cache_dir) for name, own in by_place(found, pictures).items()}


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
                with refusing(file, "a whole archive; unpack it and give the folder"):
                    target = Path(half, "all", file.name.split(".")[0])
                    shutil.unpack_archive(file, target, filter=None if file.suffix == ".zip" else "data")
            shutil.move(Path(half, "all"), folder)
    return folder


def _held(path: Path, pictures: Pictures) -> dict[str, dict[Path, Any]]:
    """{key of `FORMATS`: its files and what they hold} of `path`; `DataError` where there is none."""
    if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return {"save_to_disk": {}}
    files = [path] if path.is_file() and not path.suffix.startswith(".y") else pictures.all
    held, others = formats.annotated(files)
    if files != [path] and (labels := formats.yolo_labels(pictures)):
        held["YOLO"] = labels
    if not held:
        known = "; ".join(f"{name}: {one.mark}" for name, one in FORMATS.items())
        raise DataError(f"{path} holds no known format{': ' if others else ''}{', '.join(others[:3])}; "
                        f"expected one of: {known}")
    if others:
        print(f"data: {len(others)} files hold no annotations and are not read, such as {others[0]}")
    return held


def _cached(found: list[Found], cache_dir: str | None) -> datasets.Dataset:
    """Rows whose pictures are files, as a cached split; a picture file that changes is read anew."""
    stamps = [_stamp(one.path) for one in found]
    if not any(stamps):
        raise DataError(f"none of the {len(found)} pictures exists, such as {found[0].path}; expected picture files "
                        "there")
    rows = tuple(one.row() for one in found)
    new = Hasher.hash(["files", rows, stamps])
    return datasets.Dataset.from_generator(lambda: iter(rows), FEATURES, cache_dir, fingerprint=new)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of a file, which tell where it was replaced."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None
