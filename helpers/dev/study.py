"""What a choice brings at the tiny scale, over three seeds: `python -m helpers.dev.study --folder runs/study`.

Each run is pipeline.py up to its evaluation, with the parameters of a variant; an adapter of another kind is an option
of PEFT that the pipeline has no parameter for. Then come the boxes for `val-multi` and `val-none`, on which no run
trains and no choice is made, and what a confidence could be computed from. Runs go side by side, `--at-once` of them;
those that are finished are kept. At last the report is written, `notebooks/study_tiny.json`, of all that are there.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from datetime import date
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats

from helpers import data, evaluate, predict, runs
from helpers.boxes import distinct
from helpers.collate import IGNORED, Collator
from helpers.data.paste import with_pasted
from helpers.evaluate.confidence import reliability, threshold_for_precision
from helpers.evaluate.intervals import over_seeds
from helpers.messages import parse_text, to_messages
from helpers.recipes import SCALES
from helpers.runs import read_json, write_json
from helpers.settings import PROJECT
from helpers.trainer import read_log

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "notebooks" / "study_tiny.json"
CHILD = "import json, sys; from helpers.dev.study import child; child(json.loads(sys.argv.pop()))"
DRAWS = 64  # boxes that an expected IoU is the mean of
R1, R4 = {"recipe": "r1-llm-only"}, {"recipe": "r4-joint"}
PASTED, MORE = {"paste": 1.5, "epochs": 3}, {"paste": 4, "epochs": 3}
R5 = {"recipe": "r5-reward"}  # takes over the adapter of the r1 beside it that was trained with the same pictures
VARIANTS: dict[str, dict[str, Any]] = {  # name -> parameters of pipeline.py; "peft": of LoraConfig; "lora+": its ratio
    "r1": R1, "r4": R4, "r1, pasted": R1 | PASTED, "r4, pasted": R4 | PASTED, "r1, more pasted": R1 | MORE,
    "r5": R5, "r5, pasted": R5 | PASTED, "r5, more pasted": R5 | MORE,
    "r1, pasted, 1 epoch": R1 | {"paste": 1, "epochs": 1}, "r1, 7.5 epochs": R1 | {"epochs": 7.5},
    "r1, augment": R1 | {"augment": True}, "r1, loss on all text": R1 | {"loss_scope": "all-text"},
    "r1, rank 4": R1 | {"lora_rank": 4, "lora_alpha": 8}, "r1, rank 64": R1 | {"lora_rank": 64, "lora_alpha": 128},
    "r1, dropout .05": R1 | {"lora_dropout": 0.05},
    "r1, rsLoRA": R1 | {"peft": {"use_rslora": True}}, "r1, DoRA": R1 | {"peft": {"use_dora": True}},
    "r1, LoRA+": R1 | {"lora+": 16},
    "r1, bf16": R1 | {"precision": "bf16"},
    "r1, bf16, PiSSA": R1 | {"precision": "bf16", "peft": {"init_lora_weights": "pissa"}},
}  # fmt: skip
MEASURED = ("val", "val-multi", "val-none")
PASSES = 4  # of inference, where there is more than one


def child(task: dict) -> None:
    """One run: train, and write what its model makes of each split into `task["folder"]`/found.json."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    from helpers import trainer

    given = task["parameters"]
    if options := given.pop("peft", {}):
        peft.LoraConfig = partial(peft.LoraConfig, **options)
    if ratio := given.pop("lora+", None):
        def create_optimizer(self, *_):
            self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, lr=self.args.learning_rate,
                                                       loraplus_lr_ratio=ratio)
            return self.optimizer

        trainer.BoxTrainer.create_optimizer = create_optimizer
    sys.argv = ["pipeline.py", *(f"{name}={value}" for name, value in given.items())]
    source, cut, _ = (ROOT / "pipeline.py").read_text().partition("# %%\npredictions = baseline")
    assert cut, "pipeline.py has no such cell: where do its predictions begin?"
    story: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(ROOT / "pipeline.py"), "exec"), story)

    predict_all(story["run"], story["processor"], story["load_trained"](), story["rows"], task["passes"])


def predict_all(run, processor, vlm, rows: dict, passes: bool) -> None:
    """Write the trained model's lines for each of `splits`, with PASSES too where wanted, and found.json."""
    greedy = {"max_new_tokens": run.max_new_tokens, "do_sample": False}
    found = {"updates": len(read_log(run.folder / "log.jsonl")), "splits": {},
             "minutes": round(read_json(run.folder / "manifest.json")["timings"]["train"] / 60, 2)}
    for split, some in splits(rows).items():
        if split == "calibration" and not passes:
            continue
        lines = predict.predict(vlm, processor, some, run.prompt, run.folder / f"{split}.jsonl", batch_size=32,
                                key="study", **greedy)
        some = list(some)
        found["splits"][split] = decisions(vlm, processor, run.prompt, some, lines)
        if passes and split != "calibration":
            more = [line for at in range(0, len(some), 32) for line in predict.look_again(
                vlm, processor, some[at : at + 32], lines[at : at + 32], run.prompt, greedy, None, PASSES)]
            (run.folder / f"{split}.passes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in more))
    write_json(run.folder / "found.json", found)


def splits(rows: dict) -> dict:
    """What is measured on, and `selection` with a made picture to each: what a calibration is fitted on."""
    more = data.prepare(data.load_extra(), **{name: SCALES["tiny"][name] for name in ("min_pixels", "max_pixels")})
    return {"val": rows["val"], **more, "selection": rows["selection"],
            "calibration": with_pasted(rows["selection"], 1, 0)}


class OwnWords(Collator):
    """Batches of pictures with the completions `words` {image_id: text} in place of the true ones."""

    words: dict[str, str]

    def texts(self, rows) -> list[str]:
        def own(row):
            return {"role": "assistant", "content": [{"type": "text", "text": self.words[row["image_id"]]}]}

        return [self.processor.apply_chat_template([*to_messages(row, self.prompt)["prompt"], own(row)])
                for row in rows]


@torch.inference_mode()
def decisions(vlm, processor, prompt: str, rows: list[dict], lines: list[dict]) -> dict[str, dict]:
    """`{image_id: {"begins": [K + 1], "boxes": [{"digits", "start", "expected IoU"}]}}` of a model's own boxes.

    `begins` are the probabilities that a box begins at the first token and behind each of K boxes. Of a box, `start` is
    the one before it, `digits` the geometric mean of its digits' probabilities, and `expected IoU` the mean IoU of the
    box with DRAWS boxes drawn from its digits' distributions. Boxes that are drawn again are left out. A picture
    without `boxes` has one that was rejected.
    """
    tokenizer, found, draw = processor.tokenizer, {}, np.random.default_rng(0)
    collator = OwnWords(processor, prompt)
    collator.words = {line["image_id"]: line["text"] for line in lines}
    begin, over = tokenizer.convert_tokens_to_ids([predict.BOX_BEGINS, "<|box_end|>"])
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        batch = collator(some)
        labels = batch.pop("labels")[:, 1:]
        logits = vlm(**{name: tensor.to(vlm.device) for name, tensor in batch.items()}).logits[:, :-1].float().cpu()
        for row, own, scores in zip(some, labels, logits, strict=True):
            tokens, p = own[own != IGNORED].tolist(), scores[own != IGNORED].softmax(-1).numpy()
            ends = [i + 1 for i, token in enumerate(tokens) if token == over and i + 1 < len(tokens)]
            begins = [float(p[i, begin]) for i in [0, *ends]]
            found[row["image_id"]] = one = {"begins": np.round(begins, 4).tolist()}
            read = parse_text(collator.words[row["image_id"]])
            if len(read.labels) == len(ends):
                one["boxes"] = []
                for k in distinct(read.boxes_xyxy_unit, read.labels):
                    since, end, box = [0, *ends][k], ends[k], read.boxes_xyxy_unit[k]
                    numbers = last_four([i for i in range(since, end) if tokens[i] in digits])
                    likely = np.log([p[i, tokens[i]] for number in numbers for i in number])
                    one["boxes"].append({"start": begins[k], "digits": float(np.exp(likely.mean())),
                                         "expected IoU": expected_iou([p[i][:, digits] for i in numbers], box, draw)})
    return found


def last_four(places: list[int]) -> list[list[int]]:
    """The places of a box's digits, number by number; those before the last four were broken off, or are no box."""
    return [[i for _, i in group] for _, group in groupby(enumerate(places), lambda pair: pair[1] - pair[0])][-4:]


def expected_iou(numbers: list[np.ndarray], box: np.ndarray, draw: np.random.Generator) -> float:
    """Mean IoU of `box` [4] in 0-1 with boxes whose digits are drawn from the `numbers`, four times [digits, 10]."""
    def drawn(p: np.ndarray) -> np.ndarray:
        total = (p / p.sum(1, keepdims=True)).cumsum(1)
        found = (draw.random((DRAWS, len(p), 1)) > total[None]).sum(2).clip(max=9)  # [DRAWS, digits]
        return found @ 10 ** np.arange(len(p))[::-1] / 1000

    edges = np.stack([drawn(p) for p in numbers], 1)  # [DRAWS, 4]
    low, high = np.maximum(edges[:, :2], box[:2]), np.minimum(edges[:, 2:], box[2:])
    shared = np.prod(np.clip(high - low, 0, None), 1)
    area = np.prod(np.clip(edges[:, 2:] - edges[:, :2], 0, None), 1) + np.prod(box[2:] - box[:2])
    return float((shared / np.maximum(area - shared, 1e-9)).mean())


def summary(folders: dict[str, dict[int, Path]], rows: dict) -> dict[str, dict]:
    """The report's rows: each variant's scores over its seeds, and its differences to the plain recipe, by pairs.

    `folders`: of each variant, seed -> the folder of its run.
    """
    truth = {split: data.truth_rows(some) for split, some in rows.items()}
    def scores(name: str, ending: str) -> dict[int, dict[str, dict]]:
        return {seed: {split: evaluate.score(truth[split], predict.read_jsonl(one / f"{split}.{ending}"), resamples=0)
                       for split in truth if (one / f"{split}.{ending}").exists()}
                for seed, one in folders[name].items()}

    scored = {name: scores(name, "jsonl") for name in folders}
    again = {name: scores(name, "passes.jsonl") for name, some in folders.items() if more_passes(name)}
    values, passed = ({name: {seed: measures(one) for seed, one in some.items()} for name, some in every.items()}
                      for every in (scored, again))
    table = {}
    for name, some in values.items():
        plain = values.get("r4" if name.startswith("r4") else "r1", {})  # none where only others were run
        made = [read_json(one / "found.json") for one in folders[name].values()]
        machines = {read_json(one / "manifest.json")["machine"] for one in folders[name].values()}
        table[name] = {"parameters": VARIANTS[name], "machine": "; ".join(sorted(machines)), "seeds": len(some),
                       "updates": made[0]["updates"],
                       "minutes": float(np.mean([one["minutes"] for one in made])),
                       "scores": mean_of(some),
                       "by_seed": {seed: {m: round(float(own.mean()), 4) for m, own in one.items()}
                                   for seed, one in some.items()},
                       "f1": f1(scored[name]), "confidence": confidence([*scored[name].values()], made)}
        if name not in ("r1", "r4") and {*some} & {*plain}:
            table[name]["minus_plain"] = difference(some, plain)
        if name in again:
            more = passed[name]
            table[name] |= {"passes": mean_of(more), "passes_f1": f1(again[name]),
                            "passes_minus_one": difference(more, some),
                            "by_size": by_size([*scored[name].values()], [*again[name].values()])}
            table[name] |= {"passes_minus_plain": difference(more, plain)} if {*some} & {*plain} else {}
        if (before := name.replace("r5", "r1")) != name and {*some} & {*values.get(before, {})}:
            table[name]["minus_before"] = difference(some, values[before])
            table[name]["passes_minus_before"] = difference(passed[name], passed[before])
        if name in ("r1", "r1, pasted"):
            several = {line["image_id"] for line in truth["val"] if len(line["objects"]["bbox"]) > 1}
            table[name]["decisions"] = {
                "table": {split: [one["begins"][0] for one in made[0]["splits"][split].values()]
                          for split in ("val", "val-none")},
                "another": {split: [one["begins"][1] for image_id, one in made[0]["splits"][split].items()
                                    if len(one["begins"]) > 1 and image_id not in several]
                            for split in ("val", "val-multi")}}
    return table


def measures(scored: dict[str, dict]) -> dict[str, np.ndarray]:
    """What is compared, a value a picture: IoU, shares of pictures, and IoU of boxes, whose mean is that over boxes."""
    per = {split: one["per_picture"] for split, one in scored.items()}
    iou = np.array([record["iou"] for record in per["val"] if record["iou"] is not None])
    boxes = [len(record["true"]) for record in per["val-multi"]]
    return {"val": iou, "val over .7": (iou > 0.7) * 1.0, "val over .9": (iou > 0.9) * 1.0,
            "val surplus": np.array([record["surplus"] > 0 for record in per["val"]]) * 1.0,
            "val-multi": np.array([sum(record["box_ious"]) for record in per["val-multi"]]) / np.mean(boxes),
            "val-none": np.array([len(record["predicted"]) > 0 for record in per["val-none"]]) * 1.0,
            "val-multi surplus": np.array([record["surplus"] > 0 for record in per["val-multi"]]) * 1.0,
            "selection": np.array([r["iou"] for r in per["selection"] if r["iou"] is not None])}  # fmt: skip


def by_size(*ways: list[dict]) -> dict[str, list]:
    """Mean IoU of the boxes of `val-multi` in four quarters by size, one list for each of `ways` (scores of each seed);
    `edges` are the quarters' limits, as shares of the picture."""
    found: dict[str, list] = {"edges": [], "iou": []}
    for scored in ways:
        records = [record for one in scored for record in one["val-multi"]["per_picture"]]
        area = np.array([area for record in records for area in record["box_areas"]])
        iou = np.array([iou for record in records for iou in record["box_ious"]])
        edges = np.quantile(area, np.linspace(0, 1, 5))
        quarter = np.digitize(area, edges[1:4])
        found["edges"] = edges.round(4).tolist()
        found["iou"].append([round(float(iou[quarter == q].mean()), 4) for q in range(4)])
    return found


def more_passes(name: str) -> bool:
    """Whether a variant is measured with PASSES too: the recipes as they are, and what has learned to find nothing."""
    return name in ("r1", "r4", "r5") or name.endswith("pasted")


Values = dict[int, dict[str, np.ndarray]]  # seed -> measure -> a value a picture


def mean_of(values: Values) -> dict[str, dict]:
    """Each measure's mean over seeds and pictures, with its interval."""
    return {m: rounded(over_seeds(np.array([one[m] for one in values.values()]))) for m in next(iter(values.values()))}


def difference(values: Values, others: Values) -> dict[str, dict]:
    """Each measure of a variant minus that of another, on the same pictures, for the seeds that both have."""
    return mean_of({seed: {m: one[m] - others[seed][m] for m in one} for seed, one in values.items() if seed in others})


def f1(scored: dict[int, dict[str, dict]]) -> float:
    """Of boxes of `val` with IoU > .5, mean over seeds."""
    return round(float(np.mean([one["val"]["summary"]["f1"]["value"] for one in scored.values()])), 4)


def rounded(metric: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in metric.items()}


KINDS = {"digits": lambda box: box["digits"], "start": lambda box: box["start"],
         "digits x start": lambda box: box["digits"] * box["start"],
         "confidence": lambda box: box["start"] * box["digits"] ** (1 / predict.DIGITS_ROOT),
         "expected IoU x start": lambda box: box["expected IoU"] * box["start"]}  # fmt: skip


def confidence(scored: list[dict], made: list[dict]) -> dict:
    """How well each of KINDS ranks right boxes (IoU > .5) before wrong ones, by seed, on MEASURED together and on
    `calibration`, where the pipeline's was chosen; and what a logistic regression makes of digits and start."""
    found: dict[str, Any] = {"boxes": [], "wrong": [], "auroc": {}, "auroc on calibration": {}, "calibrated": []}
    for one, own in zip(scored, made, strict=True):
        for name, on in (("auroc", MEASURED), ("auroc on calibration", ("calibration",) * ("calibration" in one))):
            boxes, right = confident([one[split] for split in on], [own["splits"][split] for split in on])
            pairs = right.sum() * (~right).sum()
            for kind, of in KINDS.items() if pairs else ():
                worth = np.array([of(box) for box in boxes])
                share = float(stats.mannwhitneyu(worth[right], worth[~right])[0] / pairs)
                found[name].setdefault(kind, []).append(round(share, 4))
            if name == "auroc":
                found["boxes"].append(len(right))
                found["wrong"].append(int((~right).sum()))
        if "calibration" in one:
            found["calibrated"].append(calibrated(one, own))
    return found


def confident(scored: list[dict], own: list[dict]) -> tuple[list[dict], np.ndarray]:
    """The boxes of `decisions` of several splits, and whether each is right."""
    pairs = [pair for one, decided in zip(scored, own, strict=True) for record in one["per_picture"]
             if (boxes := decided[record["image_id"]].get("boxes")) is not None
             for pair in zip(boxes, record["predicted_correct"], strict=True)]
    return [box for box, _ in pairs], np.array([right for _, right in pairs], dtype=bool)


def calibrated(scored: dict, own: dict) -> dict:
    """Logistic regression on log(digits) and log(start), fitted on `calibration`: its expected calibration error, that
    of the confidence as it is, and the limit for 95 % precision there, all on MEASURED together."""
    def inputs(box):
        return np.array([np.log(box["digits"]), np.log(max(box["start"], 1e-6)), 1])

    boxes, right = confident([scored["calibration"]], [own["splits"]["calibration"]])
    x, sign = np.array([inputs(box) for box in boxes]), np.where(right, 1, -1)
    weights = optimize.minimize(lambda w: np.logaddexp(0, -sign * (x @ w)).mean() + 1e-3 * (w[:2] ** 2).sum(),
                                np.zeros(3)).x

    def records(names, value=lambda box: float(1 / (1 + np.exp(-inputs(box) @ weights)))):
        return [record | {"confidences": [value(box) for box in boxes]}
                for name in names for record in scored[name]["per_picture"]
                if len(boxes := own["splits"][name][record["image_id"]].get("boxes", [])) == len(record["predicted"])]

    limit, measured = threshold_for_precision(records(["calibration"])), records(MEASURED)
    kept = [(value >= limit["threshold"], right) for record in measured
            for value, right in zip(record["confidences"], record["predicted_correct"], strict=True)] if limit else []
    right_kept, true = sum(keep and right for keep, right in kept), sum(len(record["true"]) for record in measured)
    return {"ece of the confidence": round(reliability(records(MEASURED, KINDS["confidence"]))["ece"], 4),
            "ece": round(reliability(measured)["ece"], 4),
            "precision": round(right_kept / max(sum(keep for keep, _ in kept), 1), 4) if limit else None,
            "recall": round(right_kept / true, 4) if limit else None}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for everything; what is left out comes next")
    parser.add_argument("--limit", type=int, default=10**6, help="pictures of each split, for a trial")
    options = parser.parse_args(words)
    until, folder = time.monotonic() + 60 * options.minutes, options.folder.resolve()
    (folder / "peft").mkdir(parents=True, exist_ok=True)
    raw = data.load_raw("embedded", limit={split: options.limit for split in ("train", "val")})
    pixels = {name: SCALES["tiny"][name] for name in ("min_pixels", "max_pixels")}
    rows = splits(data.prepare(data.clean(raw, data.audit(raw)), **pixels))  # all runs find them in the cache

    def place(name: str, seed: int) -> Path:
        # What the pipeline has no parameter for is not among a run's inputs: r5 must not take it for its own r1.
        beside = folder / "peft" if VARIANTS[name].keys() & {"peft", "lora+"} else folder
        return beside / f"{PROJECT}-{re.sub('[ ,+]+', '-', name).strip('-')}-s{seed}"

    todo = [(name, seed) for seed in range(options.seeds) for name in options.only
            if not (place(name, seed) / "found.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    card = cycle(cards)  # a run uses one GPU, several runs share it
    while (todo or running) and time.monotonic() < until:
        while todo and len(running) < options.at_once:
            name, seed = todo.pop(0)
            own = place(name, seed)
            given = {"scale": "tiny", "seed": seed, "train_limit": options.limit, "val_limit": options.limit,
                     "output_root": str(own.parent), "run_name": own.name.removeprefix(f"{PROJECT}-")}
            with Path(f"{own}.log").open("w") as log:
                running[name, seed] = subprocess.Popen(
                    [sys.executable, "-c", CHILD,
                     json.dumps({"parameters": VARIANTS[name] | given, "passes": more_passes(name)})],
                    cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"CUDA_VISIBLE_DEVICES": next(card)}
                    | ({"OMP_NUM_THREADS": "1"} if options.at_once > 1 else {}))
        for (name, seed), process in [*running.items()]:
            if process.poll() is not None:
                del running[name, seed]
                print(f"{name}, seed {seed}: ended with {process.returncode}", flush=True)
        time.sleep(0.2)
    for process in running.values():
        process.kill()
    found = {name: {seed: place(name, seed) for seed in range(options.seeds)
                    if (place(name, seed) / "found.json").exists()} for name in VARIANTS}
    write_json(REPORT if options.limit == 10**6 else folder / "report.json", {
        "command": "python -m helpers.dev.study", "commit": runs.git_revision(), "date": f"{date.today()}",
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else runs.machine(),
        "pictures": {split: len(some) for split, some in rows.items()},
        "variants": summary({name: some for name, some in found.items() if some}, rows)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
