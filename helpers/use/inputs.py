"""Photos for `make predict`: where they are, and what reads them, on every machine of a cluster."""

import functools
import ipaddress
import mimetypes
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import datasets
import fsspec
import requests
from requests.adapters import HTTPAdapter, Retry

from helpers import runs
from helpers.data import DataError, load_raw
from helpers.data.pictures import LEFTOVERS, escaped, files_below, is_picture, open_picture
from helpers.settings import ParameterError
from helpers.use.load import first_line

LARGEST = 2**28  # bytes of a download
TRIED = 20  # pictures that come through a network, to find one that can be opened; of local files all


class Picture(NamedTuple):
    image_id: str
    stamp: str  # a hash over the id and what changes where the picture does: the key of its line
    place: str  # what a `Reader` takes


Reader = Callable[[str], str | bytes]  # a place -> the path of a picture's file, or its content
Named = list[tuple[str, object, str]]  # image id, what changes where the picture does, place


def find_pictures(source: str, split: str, output: Path, private: bool = False) -> tuple[list[Picture], Reader]:
    """All pictures of `source`, and what reads them.

    `source`: a picture; a folder, where a picture's id is its path in it (without what was written into `output`); a
    .zip; a .txt with a path or URL a line; s3://bucket/folder or gs://bucket/folder; else a data set, of which `split`.
    `private`: whether URLs may lead to addresses of one's own network. Raises ParameterError where there are no
    pictures or none can be opened; `DataError` without the right to read, and that of `load_raw`.
    """
    place = Path(source).expanduser()
    whole = str(place.resolve()) if place.exists() else source  # Ray's workers stand in another folder
    read: Reader = functools.partial(read_place, private=private)
    if place.suffix.lower() == ".txt" and place.is_file():
        named = _listed(place.read_text(errors="surrogateescape").splitlines(), place.parent, private)
    elif re.match("https?://", source):
        named = _listed([source], Path(), private)
    elif "://" in source or (place.suffix.lower() == ".zip" and place.is_file()):
        named, read = _stored(whole), functools.partial(_read_stored, whole)
    elif not (named := _in_folder(place, output)):
        rows = _rows(whole, split)
        named = [(name, rows._fingerprint, str(i)) for i, name in enumerate(rows["image_id"])]
        read = functools.partial(_read_row, whole, split)
    why, local = "it names none", named and Path(named[0][2]).is_absolute()
    for image_id, _, where in named if local else named[:TRIED]:
        try:
            content = read(where)
            open_picture({"bytes": content if isinstance(content, bytes) else None, "path": content}).close()
            break
        except Exception as error:  # Pillow's readers raise many kinds
            why = f"{escaped(image_id)}: {first_line(error)}"
    else:
        raise ParameterError(f"INPUT={source} holds no picture that can be opened ({why}).")
    return [Picture(image_id, runs.key(image_id=image_id, version=version), where)
            for image_id, version, where in named], read


# --- a folder, a list, a zip or bucket, a data set: (image id, what changes where the picture does, place) ------------


def _in_folder(place: Path, output: Path) -> Named:
    found = list(files_below(place, links=True)) if place.is_dir() else [place] if place.exists() else []
    own = output.resolve() if place.resolve() in output.resolve().parents else output.resolve() / "crops"
    found = [file for file in found if not file.parent.resolve().is_relative_to(own)]
    files = [file for file in found if is_picture(file)]
    if files and (other := sorted({*found} - {*files})):
        print(f"{len(other):,} files are no pictures by name or content, such as {escaped(other[0].name)}")
    folder = place if place.is_dir() else place.parent
    return [_file(file.relative_to(folder).as_posix(), file) for file in files]


def _file(image_id: str, file: Path) -> tuple[str, object, str]:
    stat = file.stat() if file.exists() else None
    return image_id, stat and (stat.st_size, stat.st_mtime_ns), str(file.absolute())


def _listed(lines: Iterable[str], folder: Path, private: bool) -> Named:
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    for host in () if private else {urlsplit(name).hostname for name in names if re.match("https?://", name)}:
        _refuse_private(host)
    return [(name, None, name) if "://" in name else _file(name, folder / name) for name in names]


def _stored(source: str) -> Named:
    try:
        files, root = _storage(source)
        found = files.find(root, detail=True)
    except Exception as error:  # each kind of storage has its own
        raise ParameterError(f"INPUT={source} cannot be listed ({first_line(error)}); check its name, your rights, and "
                             "that s3fs (for s3://) or gcsfs (for gs://) is installed.") from None
    changes = ("size", "CRC", "ETag", "etag", "mtime")  # as each storage has them
    return [(path.removeprefix(root).lstrip("/"), {name: str(info.get(name)) for name in changes}, path)
            for path, info in found.items() if _is_photo(path.removeprefix(root))]


def _is_photo(name: str) -> bool:
    hidden = any(part.startswith(".") or part in LEFTOVERS for part in name.split("/"))
    return not hidden and (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")


# --- reading ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _rows(source: str, split: str) -> datasets.Dataset:
    try:
        rows = load_raw(source, val_share=1)  # all of a set that has no val
    except DataError as error:
        raise DataError(f"INPUT={source} holds no picture files, and as a data set: {error}") from None
    if split not in rows or not len(rows[split]):
        there = ", ".join(name for name in rows if len(rows[name]))
        raise ParameterError(f"INPUT={source} has no pictures in the split {split!r}; there is {there or 'none'}.")
    return rows[split].cast_column("image", datasets.Image(decode=False))


def _read_row(source: str, split: str, number: str) -> str | bytes:
    image = _rows(source, split)[int(number)]["image"]
    return image["bytes"] or image["path"]


@functools.lru_cache
def _storage(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The files of a .zip or a bucket, and the folder in it that `source` names."""
    return fsspec.core.url_to_fs(source) if "://" in source else (fsspec.filesystem("zip", fo=source), "")


def _read_stored(source: str, path: str) -> bytes:
    """The content of a file. ParameterError where all of `source` can no longer be read."""
    files, root = _storage(source)
    try:
        return files.cat_file(path)
    except Exception:
        try:
            files.invalidate_cache()
            files.info(root)
        except Exception as error:  # rights that have ended, a network that is gone
            raise ParameterError(f"INPUT={source} cannot be read any more ({first_line(error)}); check your rights. "
                                 "What is done is kept, and the same command goes on.") from None
        raise  # this file alone


def read_place(place: str, private: bool) -> str | bytes:
    """A local path as it is; the content of what http(s)://, s3:// or gs:// names."""
    scheme, mark, path = place.partition("://")
    if not mark:
        return place
    if not scheme.startswith("http"):
        return _storage(f"{scheme}://{path.partition('/')[0]}")[0].cat_file(path)
    with _session(private).get(place, timeout=30, stream=True) as reply:
        reply.raise_for_status()
        content = reply.raw.read(LARGEST + 1, decode_content=True)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    return content


@functools.lru_cache
def _session(private: bool) -> requests.Session:
    session = requests.Session()
    again = Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("http://", "https://"):
        session.mount(scheme, (HTTPAdapter if private else _PublicAdapter)(max_retries=again))
    return session


class _PublicAdapter(HTTPAdapter):
    """Refuses addresses of one's own network, at each redirect too."""

    def send(self, request: Any, *given: Any, **named: Any) -> Any:
        _refuse_private(urlsplit(request.url).hostname)
        return super().send(request, *given, **named)


def _refuse_private(host: str | None) -> None:
    try:
        found = {str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(host, None)}
    except OSError:  # no such host: whoever reads it says so
        return
    if not all(ipaddress.ip_address(address).is_global for address in found):
        raise ParameterError(f"{host} is an address of your own network, and a list of URLs may come from anywhere; "
                             "--private allows it.")
