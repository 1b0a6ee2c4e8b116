"""What a model must be used with is stored beside it, in parity.json, and a use that differs is refused by name.

Another pixel budget, prompt, tokenizer or base costs accuracy without a word.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from helpers.messages import target_text
from helpers.runs import file_hash, read_json, write_json

FILE = "parity.json"


class ParityError(ValueError):
    """One sentence: the folder, what differs, the value it was made with and the value here."""


def record(processor, prompt: str, max_new_tokens: int | None = None) -> dict[str, Any]:
    """What predictions depend on besides the weights: prompt, pixel budget, tokenizer with chat template, box format;
    and the longest completion, where `max_new_tokens` is given."""
    size = dict(processor.image_processor.size)
    example = target_text({"bbox": [[0.1, 0.2, 0.3, 0.4]], "category_name": ["nutrition-table"]})
    longest = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return {"prompt": prompt, "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"],
            "tokenizer": tokenizer_hash(processor), "box_format": f"[0.1, 0.2, 0.3, 0.4] is {example}"} | longest


def tokenizer_hash(processor) -> str:
    """A hash over the vocabulary, the merges, the special tokens and the chat template."""
    written = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in written.items() if name not in ("padding", "truncation")}  # set by each call
    return _short(json.dumps([kept, processor.chat_template], sort_keys=True))


def _short(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def weights_hash(folder: str | Path, endings: tuple[str, ...] = ("safetensors",)) -> str:
    """A hash over the names and contents of a folder's files with these endings."""
    files = [path for ending in endings for path in sorted(Path(folder).glob(f"*.{ending}"))]
    return _short("".join(f"{path.name} {file_hash(path)}\n" for path in files))


def files_hash(folder: str | Path, revision: str | None = None) -> str:
    """A hash over a model folder's files, weights and others; for a Hub id, the id and its commit."""
    if not Path(folder).is_dir():
        return f"{folder}@{hub_commit(str(folder), revision)}"
    return weights_hash(folder, ("json", "safetensors"))


def base_of(model_id: str | Path, revision: str | None = None) -> dict[str, str]:
    """`{"name", "hash"}` of a base: of a folder its weights' hash, of a Hub id the commit in the cache."""
    if Path(model_id).is_dir():
        return {"name": "/".join(Path(model_id).resolve().parts[-2:]), "hash": weights_hash(model_id)}
    return {"name": str(model_id), "hash": hub_commit(str(model_id), revision)}


def hub_commit(model_id: str, revision: str | None) -> str:
    """The commit that a branch, tag or commit (None: main) of a Hub id means in the cache, or the name as it stands."""
    found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision or "main"


def write(folder: str | Path, made_with: dict[str, Any], base: dict[str, str] | None = None) -> None:
    """Put `parity.json` beside the weights in `folder`: a `record`, the base, the hash of the weights themselves."""
    write_json(Path(folder) / FILE, made_with | ({"base": base} if base else {}) | {"weights": weights_hash(folder)})


def note_use(folder: str | Path, **used: int) -> None:
    """Put how a run predicted into `parity.json`, where it differs: `max_new_tokens`, `passes`."""
    stored = read_json(Path(folder) / FILE)
    if stored and stored | used != stored:
        write_json(Path(folder) / FILE, stored | used)


def check(folder: str | Path, here: dict[str, Any], base: dict[str, str] | None = None, required: bool = True) -> None:
    """Raise ParityError where `folder` was made with something else than `here` (a `record`) or on another `base`.

    A folder without `parity.json` is refused where it is `required`, and is someone else's model otherwise.
    `max_new_tokens` may be larger here, which cuts no completion, and is not checked where the folder has none.
    """
    path = Path(folder) / FILE
    if required and not path.is_file():
        raise ParityError(f"{folder} has no {FILE}, so nobody can tell what it must be used with; make it again.")
    if not path.is_file():
        return
    stored = read_json(path)
    for name, value in here.items():
        if stored.get(name) != value and (name != "max_new_tokens" or value < stored.get(name, 0)):
            raise ParityError(f"{folder} was made with {name}={stored.get(name)!r} and would be used with {value!r}; "
                              "give the same, or make it again.")
    if base:
        check_base(folder, base)
    if stored["weights"] != weights_hash(folder):
        raise ParityError(f"the weights in {folder} are not those that were saved there; copy or make them again.")


def check_base(folder: str | Path, base: dict[str, str]) -> None:
    """Raise ParityError where the adapter or checkpoint in `folder` names another base than `base`."""
    own = read_json(Path(folder) / FILE).get("base")
    if own and own["hash"] != base["hash"]:
        raise ParityError(f"{folder} was trained on {own['name']} ({own['hash']}), and this base is {base['name']} "
                          f"({base['hash']}): an adapter works on its own base alone.")
