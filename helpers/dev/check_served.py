"""Are the boxes that come out of the server those of `helpers.predict`? All pictures of the embedded val, by default.

    python -m helpers.dev.check_served runs/qwen2vl-nutrition-detection-r4-joint-merged

Both get the same file of a picture, alone in its batch: then nothing may differ. The pipeline asks in batches, of
pictures that were made smaller and stored as JPEG again; in bf16 that moves some boxes by a few thousandths, and the
run's own `merged.jsonl` is held against the server's answers too, as a difference of mean IoU.
"""

import argparse
import base64
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import openai

from helpers import data, evaluate, finished, predict, runs
from helpers.messages import parse_text


@contextlib.contextmanager
def served(*command: str, folder: str | Path = ".", patience: float = 300) -> Iterator[str]:
    """Run a server's command in `folder`, with `--port` of a free port added; yields its address, and ends it.

    Raises RuntimeError with what the command has written, where it ends or is not there after `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe that nobody reads would fill, and stop the server
    process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=log, text=True)
    try:
        address, start = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() - start > patience:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)}: no server: {log.read().strip()[-2000:]}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # `transformers serve` waits for its threads
            process.kill()
            process.wait()
        log.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def serve(model: str | Path) -> contextlib.AbstractContextManager[str]:
    """`make serve` of a merged model's folder, on a free port."""
    return served(sys.executable, "-m", "helpers.serve", str(model))


def ask(address: str, image: dict[str, Any]) -> str:
    """The text that the one model at `address` answers to an undecoded picture ({"bytes", "path"})."""
    content = image["bytes"] or Path(image["path"]).read_bytes()
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    messages: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    answer = client.chat.completions.create(model=client.models.list().data[0].id, messages=messages)
    return answer.choices[0].message.content or ""


def compare(model: str | Path, rows: datasets.Dataset) -> tuple[list[dict], list[dict]]:
    """The lines of `predict` and of the server for `rows`, each picture asked alone, in their order."""
    stored = rows.cast_column("image", datasets.Image(decode=False))
    loaded, processor, prompt = finished.load(model)
    greedy = {"do_sample": False}
    local, remote = [], []
    with serve(model) as address:
        for row in stored:
            picture = finished.open_upright(row["image"]["bytes"] or row["image"]["path"])
            local += predict.generate_lines(loaded, processor, [finished.as_row(row["image_id"], picture)], prompt,
                                            greedy)
            text = ask(address, row["image"])
            parsed = parse_text(text)
            remote.append({"image_id": row["image_id"], "text": text, "labels": parsed.labels,
                           "boxes": parsed.boxes_xyxy_unit.tolist(), "confidences": [1.0] * len(parsed.labels)})
    return local, remote


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.check_served")
    parser.add_argument("model", help="a merged model's folder")
    parser.add_argument("--limit", type=int, default=123, help="pictures of the embedded val")
    chosen = parser.parse_args(arguments)
    runs.quiet_libraries()
    rows = data.load_splits("embedded", limit={"train": 1, "selection": 1, "val": chosen.limit})["val"]
    local, remote = compare(chosen.model, rows)
    different = [a["image_id"] for a, b in zip(local, remote, strict=True) if a["boxes"] != b["boxes"]]
    print(f"the server's boxes are those of predict in {len(rows) - len(different)} of {len(rows)} pictures, "
          f"{sum(len(line['boxes']) > 1 for line in remote)} of them with several boxes"
          + (f"; not in {', '.join(different[:5])}" if different else ""))
    folder = Path(chosen.model).resolve()
    kept = folder.with_name(folder.name.removesuffix("-merged")) / "merged.jsonl"
    if not kept.is_file():  # r3's predictions stand in the folder of its second stage
        kept = folder.with_name(folder.name.removesuffix("-merged") + "-stage2") / "merged.jsonl"
    if kept.is_file():
        pipeline = {line["image_id"]: line for line in predict.read_jsonl(kept)}
        truth = [row for row in data.truth_rows(rows) if row["image_id"] in pipeline]
        scores = [evaluate.score(truth, lines)["per_picture"] for lines in (remote, list(pipeline.values()))]
        difference = evaluate.paired_bootstrap(*scores)["difference"]
        same = sum(line["boxes"] == pipeline[line["image_id"]]["boxes"] for line in remote
                   if line["image_id"] in pipeline)
        print(f"against the pipeline's batches in {kept}: the same boxes in {same} of {len(truth)}, mean IoU of the "
              f"server minus the pipeline's {evaluate.with_interval(difference)}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
