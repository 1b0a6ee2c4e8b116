"""A merged model -> a bf16 and a 4-bit (NF4) copy, each whole: weights, processor, parity.json and a model card.

python -m helpers.use.export runs/…-merged [--output FOLDER] [--run FOLDER] [--compare] [--push user/name]
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig, Qwen2VLProcessor

from helpers import data, evaluate, merge, model, parity, predict, runs
from helpers.files import read_json, write_json, write_text
from helpers.parameters import ParameterError
from helpers.use import load
from helpers.use.card import model_card
from helpers.use.hub import PushError, check_push, push

COPIES = ("bf16", "nf4")
COMPARED = "compared.json"  # what `compare` measured, in the export's folder: the cards take it up
NF4_SHARE = 0.8  # of the bf16 size: the most that an NF4 copy takes (the tiny one's; at 7B .39 by arithmetic)


def export(source: str | Path, output: str | Path | None = None, run: str | Path | None = None) -> Path:
    """Write `output/bf16` and `output/nf4` from a merged model's folder; returns `output`.

    Both load with `from_pretrained` alone. `output`: the model's own name with `-export` behind it where None. `run`:
    the folder whose manifest.json and metrics.json the cards are written from; the one beside the model where None.
    An output that holds an earlier export of the same weights keeps it, and gets its cards anew.
    Raises ParameterError, also for a full disk, which leaves nothing half written.
    """
    source = Path(source).expanduser()
    check_model(source)
    run = run_of(source, run)
    output = Path(output).expanduser() if output else source.with_name(f"{source.name.removesuffix('-merged')}-export")
    if not _exported(source, output):
        _check_room(source, output)
        part = output.with_name(output.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            _copy(source, part / "bf16")
            _quantise(part / "bf16", part / "nf4")
            if output.is_dir():
                output.rmdir()  # empty: see _exported
            part.rename(output)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a face of its own in each library
            free = shutil.disk_usage(output.parent).free / 2**30
            raise ParameterError(f"{output} cannot be written ({error}; {free:.2f} GiB were free); nothing is kept of "
                                 "it, choose another OUTPUT or make room.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    write_cards(output, run)
    return output


def check_model(folder: Path) -> None:
    """Raise ParameterError unless `folder` holds a finished model in bf16, as a merge writes it."""
    load.check(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        raise ParameterError(f"MODEL={folder} is quantised already; expected the merged model in bf16 that it was made "
                             "from.")
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = {file.get_slice(name).get_dtype() for name in file.keys()}
        if held != {"BF16"}:
            raise ParameterError(f"{path} holds {', '.join(sorted(held))}; expected BF16, as a merge writes it.")


def run_of(source: Path, run: str | Path | None = None) -> Path:
    """The run that made the model in `source`, with manifest.json and metrics.json; ParameterError if there is none."""
    name = source.name.removesuffix("-merged")
    beside = [source.with_name(name), source.with_name(f"{name}-stage2"), source.parent]
    places = [Path(run).expanduser()] if run else beside
    for place in places:
        if (place / "manifest.json").is_file() and (place / "metrics.json").is_file():
            return place
    raise ParameterError(f"{places[0]} has no manifest.json and metrics.json, and the model card is written from them; "
                         "name the run's folder with RUN=.")


def _exported(source: Path, output: Path) -> bool:
    """Whether `output` holds an earlier export of these weights; ParameterError where it holds anything else."""
    if not output.is_dir() or not any(output.iterdir()):
        if output.exists() and not output.is_dir():
            raise ParameterError(f"{output} is a file; expected a new folder for OUTPUT.")
        return False
    try:
        parity.check(output / "bf16", {"weights": parity.weights_hash(source)})
        parity.check(output / "nf4", {})
    except parity.ParityError:
        found = next(iter(sorted(output.iterdir()))).name
        raise ParameterError(f"{output} holds something else than an export of {source} (such as {found}); choose "
                                "another OUTPUT, or remove it.") from None
    return True


def _check_room(source: Path, output: Path) -> None:
    place = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.is_dir())
    need = (1 + NF4_SHARE) * sum(path.stat().st_size for path in source.iterdir()) / 2**30
    free = shutil.disk_usage(place).free / 2**30
    if free < need:
        raise ParameterError(f"{output} needs about {need:.2f} GiB, and its disk has {free:.2f} free; choose another "
                                "OUTPUT.")


def _copy(source: Path, folder: Path) -> None:
    """The model's files, byte for byte, into a new folder."""
    folder.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".txt"):
            shutil.copyfile(path, folder / path.name)


def _quantise(source: Path, folder: Path) -> None:
    """The bf16 model in `source` as NF4 (vision tower and head stay in bf16), with its quantisation_config inside."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    vlm = model.load(source, quantization_config=nf4, dtype=torch.bfloat16, device_map=model.device_map())
    model.check_precision(vlm, "nf4")
    vlm.save_pretrained(folder)
    Qwen2VLProcessor.from_pretrained(source).save_pretrained(folder)
    merge.check_reload(merge.fingerprints(vlm), folder)
    made_with = read_json(source / parity.FILE)
    parity.write(folder, {name: made_with[name] for name in made_with if name not in ("base", "weights")},
                 made_with.get("base"))
    model.free_memory()


def write_cards(output: Path, run: Path) -> None:
    """README.md of both copies, from the run's manifest and metrics and from what `compare` has measured, if it has."""
    for copy in COPIES:
        size = sum(path.stat().st_size for path in (output / copy).glob("*.safetensors"))
        write_text(output / copy / "README.md", model_card(copy, run, read_json(output / copy / parity.FILE), size,
                                                           read_json(output / COMPARED)))


def compare(output: str | Path, rows, batch_size: int = 16) -> dict:
    """Ask both copies about `rows` (prepared; of the project's schema), in turns of one batch; kept in `COMPARED`.

    Returns `{"bf16"|"nf4": {"bytes", "seconds" a picture, "mean_iou", "ap" (both with intervals)},
    "difference": NF4 minus bf16 in IoU, paired, "verdict", "same_boxes", "pictures", "device"}`.
    """
    output = Path(output)
    asked, lines, seconds = {}, {copy: [] for copy in COPIES}, dict.fromkeys(COPIES, 0.0)
    for copy in COPIES:
        vlm = model.load(output / copy, inference=True, device_map=model.device_map()).eval()
        asked[copy] = vlm, Qwen2VLProcessor.from_pretrained(output / copy)
    made_with = read_json(output / "bf16" / parity.FILE)
    greedy = {"max_new_tokens": made_with.get("max_new_tokens", load.MAX_NEW_TOKENS), "do_sample": False}
    batches = [[rows[i] for i in range(start, min(start + batch_size, len(rows)))]
               for start in range(0, len(rows), batch_size)]
    for number, batch in enumerate([batches[0][:4], *batches]):  # the first only warms up
        for copy in COPIES if number % 2 else reversed(COPIES):
            start = time.perf_counter()
            found = predict.generate_lines(*asked[copy], batch, made_with["prompt"], greedy)
            if number:
                seconds[copy] += time.perf_counter() - start
                lines[copy] += found
    truth = data.truth_rows(rows)
    scores = {copy: evaluate.score(truth, lines[copy]) for copy in COPIES}
    paired = evaluate.paired_bootstrap(scores["nf4"]["per_picture"], scores["bf16"]["per_picture"])
    result: dict = {copy: {
        "bytes": sum(path.stat().st_size for path in (output / copy).glob("*.safetensors")),
        "seconds": seconds[copy] / len(rows), "mean_iou": scores[copy]["summary"]["mean_iou"],
        "ap": scores[copy]["summary"]["ap"],
    } for copy in COPIES} | {
        "difference": paired["difference"], "verdict": paired["verdict"], "pictures": len(rows),
        "same_boxes": sum(a["boxes"] == b["boxes"] for a, b in zip(*lines.values(), strict=True)),
        "device": runs.machine(),
    }  # fmt: skip
    write_json(output / COMPARED, result)
    return result


def compared_table(result: dict) -> pd.DataFrame:
    """What `compare` returned, to look at: a row a copy."""
    return pd.DataFrame([{
        "copy": copy, "weights, MB": round(result[copy]["bytes"] / 1e6, 1),
        "ms a picture": round(1000 * result[copy]["seconds"], 1), "n": result[copy]["mean_iou"]["n"],
        "mean IoU (95 %)": evaluate.with_interval(result[copy]["mean_iou"]),
        "AP (95 %)": evaluate.with_interval(result[copy]["ap"]),
    } for copy in COPIES]).set_index("copy")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Export, and push where asked; a fault in the input ends in one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m helpers.use.export", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a merged model's folder")
    parser.add_argument("--output", help="a new folder; the model's name with -export behind it by default")
    parser.add_argument("--run", help="the run's folder, where it does not lie beside the model")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hub, private: NAME and NAME-nf4")
    parser.add_argument("--compare", action="store_true", help="ask both copies about val, for the cards")
    given = parser.parse_args(arguments)
    runs.quiet_libraries()
    try:
        if given.push:
            check_push(given.push)
        output = export(given.model, given.output, given.run)
        if given.compare:
            result = compare(output, val_of(run_of(Path(given.model), given.run)))
            print(compared_table(result).to_string(), f"NF4 minus bf16: {evaluate.with_interval(result['difference'])}",
                  sep="\n")
            write_cards(output, run_of(Path(given.model), given.run))
        print(*(f"{output / copy}: loads with from_pretrained; its card is README.md" for copy in COPIES), sep="\n")
        if given.push:
            print(*push({given.push: output / "bf16", f"{given.push}-nf4": output / "nf4"}), sep="\n")
    except (ParameterError, PushError, data.DataError) as error:
        sys.exit(str(error))


def val_of(run: Path):
    """The prepared val of the data that a run was made on."""
    values = read_json(run / "manifest.json")["parameters"]
    raw = data.load_raw(values["dataset_id"], revision=values["dataset_revision"], limit={"train": 1, "selection": 1})
    return data.prepare(data.clean(raw, data.audit(raw)), values["min_pixels"], values["max_pixels"])["val"]


if __name__ == "__main__":
    main()
