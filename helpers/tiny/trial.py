"""One experiment from random weights to its scores: `python -m helpers.tiny.trial out=runs/tiny steps=2000`.

The shipped base is the trial that was kept; notebooks/00_tiny_base has the table of all.
"""

import ast
import inspect
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from helpers.model import load
from helpers.tiny.build import make_model, make_processor, model_config, save, train_tokenizer
from helpers.tiny.check import ask, lora_probe, score, table_items, thing_items
from helpers.tiny.forward import compile_layers
from helpers.tiny.pictures import load_pool
from helpers.tiny.train import train


def run(
    out: str, *, cache: str = "runs/tiny-scenes", scenes: int = 28_000, image_tokens: int = 144, width: int = 192,
    vision_layers: int = 6, language_layers: int = 4, rope_theta: float = 10.0,
    mrope_section: tuple[int, int, int] = (2, 7, 7), steps: int = 8000, batch: int = 64, each: int = 4,
    peak: float = 2e-3, guided: float = 0.5, seed: int = 0, seconds: float = math.inf, workers: int = 2,
    start: str = "", compiled: bool = False, probe_pictures: int = 4000, probe_peak: float = 1e-3,
    probe_rank: int = 16, probe_batch: int = 8,
) -> dict:  # fmt: skip
    """Build, train, save to `out` and measure; returns the scores, which are also in `out/scores.json`.

    `start` is a folder whose weights to go on from; then the sizes come from there. `compiled` pays on a GPU.
    """
    settings = {key: value for key, value in locals().items() if key not in ("out", "cache", "workers")}
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.time()
    processor = make_processor(train_tokenizer(), image_tokens)
    config = model_config(
        processor.tokenizer,
        width=width,
        vision_layers=vision_layers,
        language_layers=language_layers,
        rope_theta=rope_theta,
        mrope_section=mrope_section,
    )
    model = load(start) if start else make_model(config, seed)
    if compiled:
        compile_layers()
    with multiprocessing.get_context("fork").Pool(workers) as crew:
        splits = ("train", "selection", "val")
        pools = {split: load_pool(cache, split, each=crew.imap, device=device) for split in splits}
        pool = load_pool(cache, "base", scenes, seed=seed, each=crew.imap, device=device)
    ready = time.time()
    model = train(model, processor, pool, out, steps=steps, batch=batch, each=each, peak=peak, guided=guided, seed=seed,
                  seconds=seconds, workers=workers, device=device)  # fmt: skip
    trained = time.time()
    save(model, processor, out)
    things = thing_items(pools["val"])
    tables = table_items(pools["val"])
    scores = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "things": score(things, ask(model, processor, pools["val"], things)),
        "zero_shot": score(tables, ask(model, processor, pools["val"], tables)),
        "seconds": {"scenes": round(ready - began), "training": round(trained - ready)},
    }
    if probe_pictures:
        tuned = lora_probe(model, processor, pools["train"], pictures=probe_pictures, peak=probe_peak, rank=probe_rank,
                           batch=probe_batch).get_base_model()  # fmt: skip
        for split in ("selection", "val"):
            tables = table_items(pools[split])
            scores[f"probe_{split}"] = score(tables, ask(tuned, processor, pools[split], tables))
    scores["seconds"]["all"] = round(time.time() - began)
    (Path(out) / "scores.json").write_text(json.dumps({"settings": settings, **scores}, indent=1) + "\n")
    return scores


def read_arguments(words: list[str]) -> dict:
    """`key=value` words as keyword arguments of `run`; an unknown key is an error."""
    known, given = inspect.signature(run).parameters, {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            raise SystemExit(f"unknown setting {key!r}; choose from {', '.join(known)}")
        given[key] = value if known[key].annotation is str else ast.literal_eval(value)
    return given


if __name__ == "__main__":
    print(json.dumps(run(**read_arguments(sys.argv[1:])), indent=1))
