"""`make export`: a merged model -> a bf16 and a 4-bit (NF4) copy: weights, processor, parity.json, model card.

python -m helpers.use.export runs/…-merged [--output FOLDER] [--run FOLDER] [--compare] [--push user/name]
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import Qwen2VLProcessor

from helpers import data, evaluate, merge, model, parity, predict, runs
from helpers.boxes import CATEGORIES
from helpers.evaluate.intervals import number
from helpers.recipes import RECIPES
from helpers.runs import read_json, write_json, write_text
from helpers.settings import ParameterError
from helpers.use import load

COPIES = ("bf16", "nf4")
COMPARED = "compared.json"  # what `compare` measured, in the export's folder: the cards take it up


def export(source: str | Path, output: str | Path | None = None, run: str | Path | None = None) -> Path:
    """Write `output/bf16` and `output/nf4` from a merged model's folder; returns `output`.

    Both load with `from_pretrained` alone. `output`: the model's own name with `-export` behind it where None. `run`:
    the folder whose manifest.json and metrics.json the cards are written from; the one beside the model where None.
    An output that holds an earlier export of the same weights keeps it, and gets its cards anew.
    Raises ParameterError, also for a full disk, which leaves nothing half written.
    """
    source = Path(source).expanduser()
    load.check(source, bf16=True)
    run = run_of(source, run)
    output = Path(output or source.with_name(f"{source.name.removesuffix('-merged')}-export")).expanduser()
    if not _exported(source, output):
        part = output.with_name(output.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            shutil.copytree(source, part / "bf16")
            _quantize(part / "bf16", part / "nf4")
            part.replace(output)
        except (OSError, SafetensorError) as error:
            raise ParameterError(f"{output} cannot be written ({error}); nothing is kept of it, choose another OUTPUT "
                                 "or make room.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    write_cards(output, run)
    return output


def run_of(source: Path, run: str | Path | None = None) -> Path:
    """The run that made the model in `source`, with manifest.json and metrics.json; ParameterError if there is none."""
    name = source.name.removesuffix("-merged")
    places = [Path(run).expanduser()] if run else [source.with_name(name), source.with_name(f"{name}-stage2")]
    for place in places:
        if (place / "manifest.json").is_file() and (place / "metrics.json").is_file():
            return place
    raise ParameterError(f"{places[0]} has no manifest.json and metrics.json, and the model card is written from them; "
                         "name the run's folder with RUN=.")


def _exported(source: Path, output: Path) -> bool:
    """Whether `output` holds an earlier export of these weights; ParameterError where it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        parity.check(output / "bf16", {"weights": parity.weights_hash(source)})
        parity.check(output / "nf4", {})
        return True
    except parity.ParityError:
        raise ParameterError(f"{output} holds something else than an export of {source}; choose another OUTPUT, or "
                             "remove it.") from None


def _quantize(source: Path, folder: Path) -> None:
    """The bf16 model in `source` as NF4 (vision tower and head stay in bf16), as its config.json then says."""
    vlm = model.load(source, quantization_config=model.nf4(torch.bfloat16), dtype=torch.bfloat16,
                     device_map=model.device_map())
    model.check_precision(vlm, "nf4")
    vlm.save_pretrained(folder)
    Qwen2VLProcessor.from_pretrained(source).save_pretrained(folder)
    merge.check_reload(merge.fingerprints(vlm), folder)
    parity.write(folder, read_json(source / parity.FILE))
    model.free_memory()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_cards(output: Path, run: Path) -> None:
    """README.md of both copies, from the run's manifest and metrics and from what `compare` has measured, if it has."""
    for copy in COPIES:
        write_text(output / copy / "README.md", model_card(copy, run, read_json(output / copy / parity.FILE),
                                                           _bytes(output / copy), read_json(output / COMPARED)))


def model_card(copy: str, run: Path, made_with: dict[str, Any], size: int, compared: dict[str, Any]) -> str:
    """README.md of the `bf16` or `nf4` copy, with the Hub's YAML head: card.md, filled in.

    `run`: a folder with manifest.json and metrics.json. `made_with`: the copy's parity.json. `size`: bytes of its
    weights. `compared`: what `compare` returned, or {}. A base or data set that is not on the Hub is not named as one.
    """
    manifest, metrics = read_json(run / "manifest.json"), read_json(run / "metrics.json")
    values, scores = manifest["parameters"], metrics["scores"]
    base, photos = (values[key] if values[key] != "embedded" and values[key].count("/") == 1
                    and not Path(values[key]).exists() else None for key in ("model_id", "dataset_id"))
    words = photos or ("rendered packaging of the project itself" if values["dataset_id"] == "embedded"
                       else f"local photos ({Path(values['dataset_id']).name})")
    name = manifest["run"].removesuffix("-stage2") + ("-nf4" if copy == "nf4" else "")
    shipped = next(scores[which] for which in ("merged", "fine-tuned", "base") if which in scores)
    own = [] if {*shipped["by_category"]} <= {*CATEGORIES} else [*shipped["by_category"]]  # classes of one's own
    topics = [] if own else ["nutrition-table", "open-food-facts"]
    scored_in = "nf4" if values.get("memory") == "low" and "merged" in scores else "bf16"
    results = [
        EvalResult(task_type="object-detection", task_name=f"{', '.join(own) or 'Nutrition table'} detection",
                   dataset_split="val", dataset_type=photos or "embedded", dataset_name=words, metric_type=kind,
                   metric_name=metric, metric_value=round(shipped["summary"][key]["value"], 4))
        for kind, metric, key in (("iou", "mean IoU", "mean_iou"), ("f1", "F1 at IoU .5", "f1"),
                                  ("map", "AP (IoU .50 to .95)", "ap"))
        if copy == scored_in and shipped["summary"][key]["value"] is not None  # measured with this copy's weights
    ]  # fmt: skip
    head = ModelCardData(
        model_name=name, base_model=base, license="apache-2.0", datasets=[photos] if photos else None,
        library_name="transformers", pipeline_tag="image-text-to-text", eval_results=results or None,
        tags=["qwen2_vl", "object-detection", *topics, manifest["recipe"]]
             + (["bitsandbytes", "4-bit"] if copy == "nf4" else []))  # fmt: skip
    return ModelCard.from_template(
        head, template_path=str(Path(__file__).with_name("card.md")), copy=copy, name=name, made_with=made_with,
        prompt_literal=json.dumps(made_with["prompt"], ensure_ascii=False), values=values, manifest=manifest,
        size=f"{size / 1e9:.3g} GB" if size > 1e8 else f"{size / 1e6:.3g} MB", metrics=metrics, shipped=shipped,
        scored_in=scored_in, compared=compared, own=own, stages=RECIPES[manifest["recipe"]], data=words,
        base=base or made_with.get("base", {}).get("name", "unknown"), number=number,
        with_interval=evaluate.with_interval).content


def compare(output: str | Path, rows, batch_size: int = 16) -> dict:
    """Run both copies on `rows` (prepared; of the project's schema) and keep what was measured in `COMPARED`.

    Returns `{"bf16"|"nf4": {"bytes", "seconds" a picture, "mean_iou", "ap" (both with intervals)},
    "difference": NF4 minus bf16 in IoU, paired, "pictures", "device"}`.
    """
    output, truth, greedy = Path(output), data.truth_rows(rows), {"do_sample": False}
    result: dict[str, Any] = {"pictures": len(rows), "device": runs.machine()}
    scores = {}
    for copy in COPIES:
        vlm, processor, prompt = load.load_model(output / copy)
        predict.generate_lines(vlm, processor, [rows[0]], prompt, greedy)  # warms up
        start = time.perf_counter()
        batches = predict.generate_batches(vlm, processor, rows, range(len(rows)), prompt, greedy, None, batch_size,
                                           load.passes_of(output / copy))
        lines = [line for batch in batches for line in batch]
        seconds = (time.perf_counter() - start) / len(rows)
        scores[copy] = evaluate.score(truth, lines)
        result[copy] = {"bytes": _bytes(output / copy), "seconds": seconds,
                        **{name: scores[copy]["summary"][name] for name in ("mean_iou", "ap")}}
        del vlm
        model.free_memory()
    paired = evaluate.paired_bootstrap(scores["nf4"]["per_picture"], scores["bf16"]["per_picture"])
    result["difference"] = paired["difference"]
    write_json(output / COMPARED, result)
    return result


@contextlib.contextmanager
def on_hub(name: str) -> Iterator[None]:
    """What the Hub refuses (offline, no token or a bad one, no right, no such name) as a ParameterError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ParameterError(f"PUSH={name} cannot be written on the Hub: {load.first_line(error)}") from None


def main(arguments: list[str] | None = None) -> None:
    """Export, and push with --push; a fault in the input ends in one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m helpers.use.export", description="Copies of a merged model.")
    parser.add_argument("model", help="a merged model's folder")
    parser.add_argument("--output", help="a new folder; the model's name with -export behind it by default")
    parser.add_argument("--run", help="the run's folder, where it does not lie beside the model")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hub, private: NAME and NAME-nf4")
    parser.add_argument("--compare", action="store_true", help="run both copies on val, for the cards")
    chosen = parser.parse_args(arguments)
    names = {"bf16": chosen.push, "nf4": f"{chosen.push}-nf4"} if chosen.push else {}
    with load.one_sentence(), on_hub(chosen.push):  # before any work
        places = {copy: HfApi().create_repo(name, private=True, exist_ok=True) for copy, name in names.items()}
    with load.one_sentence():
        output = export(chosen.model, chosen.output, chosen.run)
        if chosen.compare:
            run = run_of(Path(chosen.model).expanduser(), chosen.run)
            values = read_json(run / "manifest.json")["parameters"]
            splits = data.load_splits(**data.source_of(values), limit={"train": 1, "selection": 1})
            result = compare(output, data.prepare(splits, values["min_pixels"], values["max_pixels"])["val"])
            print(f"NF4 minus bf16: {evaluate.with_interval(result['difference'])} mean IoU")
            write_cards(output, run)
        print(*(f"{output / copy}: loads with from_pretrained; its card is README.md" for copy in COPIES), sep="\n")
    with load.one_sentence(), on_hub(chosen.push):
        for copy, place in places.items():
            HfApi().upload_folder(repo_id=place.repo_id, folder_path=output / copy, commit_message=f"{copy}, with card")
            print(place)


if __name__ == "__main__":
    main()
