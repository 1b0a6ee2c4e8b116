"""Files that are whole or not there, and hashes of their content."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

WHOLE = 2**24  # bytes: a larger file is hashed by samples of it
SAMPLES, SAMPLE = 64, 2**16  # how many, and the bytes of each


def write_text(path: Path, text: str) -> None:
    """Write all or nothing: a killed process never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".part-{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` of `content` as JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """What a JSON file holds; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def file_hash(path: Path) -> str:
    """A hash over a file's content; of a large one over its size and 64 samples of 64 KiB, spread over all of it."""
    size = path.stat().st_size
    if size <= WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek((size - SAMPLE) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
