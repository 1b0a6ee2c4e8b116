# %% [markdown]
# # Deployment: a model behind an address, a page, and a million photos
#
# A run ends with a merged model: one folder that loads like any other. This notebook puts it to use, for real, on this
# machine:
#
# 1. What must travel with the weights
# 2. A server that speaks OpenAI's protocol, and a client of a dozen lines
# 3. Are the server's boxes the model's?
# 4. Requests that are wrong
# 5. How long callers wait, and the command for 7B on a GPU
# 6. A page to try it
# 7. Many photos, on one machine and on a cluster
# 8. Copies to give away

# %% tags=["parameters"]
model = None  # a merged model's folder, such as ../runs/…-r4-joint-merged; None: a small one, trained here
steps = 40  # of that training
pictures = 24  # of val, asked of the server and of the model itself
callers = "1,4,16"  # how many ask at the same time
requests = 16  # of each number of callers

# %%
import re

from helpers import finished, parameters

known = {
    "model": parameters.default(parameters.text("a merged model's folder")),
    "steps": parameters.whole(1, 10**4), "pictures": parameters.whole(4, 123),
    "callers": ("numbers of callers from 1 to 64 such as 1,4,16", lambda value: re.fullmatch(
        r"([1-9]|[1-5]\d|6[0-4])(,([1-9]|[1-5]\d|6[0-4]))*", str(value)) is not None),
    "requests": parameters.whole(4, 10**4),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)
callers = [int(number) for number in str(callers).split(",")]
if model is not None:
    finished.check(model)

# %%
from helpers import runs

runs.quiet_libraries()
import atexit
import base64
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import datasets
import httpx
import numpy as np
import openai
import pandas as pd
import torch
from IPython.display import Markdown, display
from PIL import Image
from transformers import BitsAndBytesConfig

from helpers import app, data, evaluate, files, many, messages, predict, quick
from helpers.dev.check_served import served
from helpers.model import load, nf4_layers
from helpers.plots import serving
from helpers.recipes import SCALES

scratch = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1 · What must travel with the weights
#
# Without a model of yours a small one is made here: the pipeline's steps, and far too few of them. What it answers is
# poor, how it is used is the same.

# %%
prompt = "Detect the bounding box of the nutrition table."
folder = Path(model).resolve() if model else quick.finished_model(scratch / "quick-merged", prompt, steps)
made_with = finished.check(folder)
name = folder.name
pd.Series({key: str(value) for key, value in made_with.items()}, name=f"{name}/parity.json").to_frame()

# %% [markdown]
# `parity.json` says what the answers depend on beside the weights: the question, the pixel budget, tokenizer and chat
# template, the format of a box. Everything below reads it first. A folder without it, an adapter, or a processor with
# another pixel budget is refused with one sentence, before any weights are loaded:

# %%
wrong = {"an adapter": scratch / "adapter", "another pixel budget": scratch / "other-budget",
         "no folder": scratch / "nothing"}
files.write_json(wrong["an adapter"] / "adapter_config.json", {})
shutil.copytree(folder, wrong["another pixel budget"], copy_function=os.symlink)
config = files.read_json(folder / "processor_config.json")
config["image_processor"]["size"]["longest_edge"] *= 4
files.write_json(wrong["another pixel budget"] / "processor_config.json", config)
for what, place in wrong.items():
    try:
        finished.check(place)
    except parameters.ParameterError as error:
        print(f"{what}: {str(error).replace(f'{scratch}/', '')}", end="\n\n")

# %% [markdown]
# ## 2 · A server and a client
#
# `transformers serve FOLDER` is an OpenAI-compatible server that comes with the library. `make serve MODEL=FOLDER` is
# its chat handler with a check in front ([`helpers/serve.py`](../helpers/serve.py)): part 4 says why. Both start here,
# on free ports of this machine.

# %%
processes = ExitStack()
atexit.register(processes.close)
transformers_cli = str(Path(sys.executable).with_name("transformers"))
stock = processes.enter_context(served(transformers_cli, "serve", name, folder=folder.parent))
ours = processes.enter_context(served(sys.executable, "-m", "helpers.serve", str(folder)))
for what, address in {"transformers serve": stock, "make serve": ours}.items():
    print(f"{what}: {address.rpartition(':')[0]}:…/v1")

# %% [markdown]
# The client. A picture travels as a data URL; the answer is text, with boxes in thousandths of the picture's width and
# height, and becomes pixels of the picture as it is *shown*, its EXIF tag obeyed. `temperature=0` and
# `skip_special_tokens` mean nothing to this server, which answers greedily and keeps the special tokens; with them the
# same client works with vLLM.

# %%
def ask(address, photo):
    """(the raw text, [(name, (x0, y0, x1, y1) in pixels)]) for a picture file's bytes."""
    url = "data:image/jpeg;base64," + base64.b64encode(photo).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": made_with["prompt"]}]
    answer = clients[address].chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=128,
        extra_body=extra[address])
    text, size = answer.choices[0].message.content, finished.open_upright(photo).size
    found = messages.parse_text(text)
    boxes = [finished.to_pixels(box, size) for box in found.boxes_xyxy_unit.tolist()]
    return text, list(zip(found.labels, boxes, strict=True))


clients = {url: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in (ours, stock)}
extra = {ours: {"skip_special_tokens": False}, stock: {}}  # the stock server refuses fields that it does not know
rows = data.load_splits("embedded", limit={"train": 1, "selection": 1, "val": pictures})["val"]
stored = rows.cast_column("image", datasets.Image(decode=False))
photos = {row["image_id"]: row["image"]["bytes"] for row in stored}
ask(ours, photos[rows[0]["image_id"]])

# %% [markdown]
# ## 3 · The same boxes?
#
# The server is right when it says what the model says. The same file of each picture goes to the model in this process,
# alone in its batch, and to the server. Nothing may differ: neither resizing, nor the template, nor the parser.
# `python -m helpers.dev.check_served FOLDER` does this for all 123 pictures.

# %%
vlm, processor, prompt = finished.load(folder)
greedy = {"max_new_tokens": finished.MAX_NEW_TOKENS, "do_sample": False}
local = [predict.generate_lines(vlm, processor, [finished.as_row(image_id, finished.open_upright(photo))], prompt,
                                greedy)[0] for image_id, photo in photos.items()]
answers = {image_id: ask(ours, photo) for image_id, photo in photos.items()}
texts = {line["image_id"]: line["text"] for line in local}
same = sum(texts[image_id] == text for image_id, (text, _) in answers.items())
assert same == len(photos), f"the server's text is the model's in {same} of {len(photos)}"
bare = {image_id: re.sub(r"<\|\w+\|>", "", text) for image_id, text in texts.items()}
read = sum(messages.parse_text(bare[line["image_id"]]).boxes_xyxy_unit.tolist() == line["boxes"] for line in local)
two = messages.target_text({"bbox": [[0.1, 0.1, 0.3, 0.9], [0.5, 0.2, 0.8, 0.7]],
                            "category_name": ["nutrition-table", "nutrition-table-small"]})
stripped = re.sub(r"<\|\w+\|>", "", two)
keeps = "keeps" if "<|box_start|>" in ask(stock, next(iter(photos.values())))[0] else "strips"
assert len(messages.parse_text(stripped).labels) == 2
Markdown(f"""The server's text is the model's, to the last character, in **{same} of {len(photos)}** pictures. Many
servers strip special tokens (`transformers serve` {keeps} them here, vLLM strips them unless a request says
`skip_special_tokens: false`). The parser reads both spellings, several boxes too: without them {read} of {len(local)}
answers give the same boxes, and `{stripped}` gives {len(messages.parse_text(stripped).labels)}.""")

# %%
together = []
for start in range(0, len(rows), 16):
    batch = [finished.as_row(image_id, finished.open_upright(photo)) for image_id, photo
             in list(photos.items())[start : start + 16]]
    together += predict.generate_lines(vlm, processor, batch, prompt, greedy)
truth = data.truth_rows(rows)
scores = [evaluate.score(truth, lines) for lines in (together, local)]
change = evaluate.paired_bootstrap(scores[0]["per_picture"], scores[1]["per_picture"])["difference"]
moved = sum(a["boxes"] != b["boxes"] for a, b in zip(together, local, strict=True))
Markdown(f"In batches, as the pipeline and `make predict` ask, the same picture can give a slightly other box: in bf16 "
         "a sum taken in another order rounds otherwise, and a digit tips over. In batches of 16, "
         f"{moved} of {len(local)} answers have other boxes than one at a time; mean IoU in batches minus one at a "
         f"time: {evaluate.with_interval(change)}, of {evaluate.with_interval(scores[1]['summary']['mean_iou'])}.")

# %% [markdown]
# ## 4 · Requests that are wrong
#
# A server stands in front of strangers. Each of these goes to both servers, and then a good one, to see that they live.

# %%
photo = next(iter(photos.values()))
(scratch / "secret.jpg").write_bytes(photo)
broad, tiff = io.BytesIO(), io.BytesIO()
Image.new("RGB", (7200, 7200)).save(broad, "PNG")
Image.new("RGB", (64, 64)).save(tiff, "TIFF")
url = {key: "data:image/jpeg;base64," + base64.b64encode(content).decode() for key, content in {
    "good": photo, "hello": b"hello", "cut": photo[:2000], "broad": broad.getvalue(), "tiff": tiff.getvalue()}.items()}
bad = {
    "not a picture": {"url": url["hello"]}, "a picture cut off": {"url": url["cut"]}, "a TIFF": {"url": url["tiff"]},
    "52 million pixels": {"url": url["broad"]}, "30 MB of text": {"url": "data:image/png;base64," + "A" * 30_000_000},
    "a file on the server's disk": {"url": str(scratch / "secret.jpg")},
    "an address inside the network": {"url": "http://127.0.0.1:9/x.jpg"},
    "another model": {"url": url["good"], "model": "gpt-4o"},
    "another question": {"url": url["good"], "text": "Where is the bar code?"}, "a good one": {"url": url["good"]},
}


def outcome(address, url, text=made_with["prompt"], model=name):
    """The status, and the server's sentence or the model's text."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
    said = answer.json() if "json" in answer.headers["content-type"] else {"detail": answer.text}
    said = said["choices"][0]["message"]["content"] if "choices" in said else \
        said["error"]["message"] if "error" in said else said["detail"]
    return f"{answer.status_code} {said[:150]}"


# %%
table = pd.DataFrame({what: {"transformers serve": outcome(stock, **request), "make serve": outcome(ours, **request)}
                      for what, request in bad.items()}).T
display(table)
codes = table.map(lambda said: int(said.split()[0]))
alive = (codes.loc["a good one"] == 200).all()
opened = codes.loc["a file on the server's disk", "transformers serve"] == 200
Markdown(f"""`transformers serve` answers 500, without a word, to {(codes["transformers serve"] >= 500).sum()} of these,
and {"opens a file of its own disk when a request names one" if opened else "opens no file that a request names"}.
`make serve` answers {(codes["make serve"] < 500).sum()} of {len(codes)} with a status that says whose fault it is, and
the {(codes["make serve"] >= 400).sum()} bad ones with one sentence. It serves one model, whatever name a client sends:
its own name, or a 404. It opens no files and no addresses, and it asks the one question that the model was trained
with. {"Both servers" if alive else "Not both"} lived on: the last row.""")

# %% [markdown]
# ## 5 · How long callers wait
#
# One model, one queue: the server generates for one request after the other.

# %%
def timed(photo):
    """Seconds until the answer for a picture."""
    start = time.perf_counter()
    ask(ours, photo)
    return time.perf_counter() - start


sent = [photo for _, photo in zip(range(requests), itertools.cycle(photos.values()), strict=False)]
waited, rates = {}, {}
for count in callers:
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        waited[count] = list(pool.map(timed, sent))
    rates[count] = len(sent) / (time.perf_counter() - start)
display(serving.waiting(waited, rates))
few, most = min(callers), max(callers)
gained = rates[most] / rates[few]
Markdown(f"With {few} caller(s) the median answer takes {np.median(waited[few]):.2f} s, with {most} "
         f"{np.median(waited[most]):.2f} s, and the server gives {rates[few]:.1f} and {rates[most]:.1f} pictures a "
         f"second, {gained:.1f} times as many: pictures are read while others are answered, and the rest of the time "
         "callers stand in a queue. That is fine for a few users and for tests. For many, take a server that works on "
         "many requests at once.")

# %%
budget = {key: SCALES["7b"][key] for key in ("min_pixels", "max_pixels")}
Markdown(f"""For 7B on a GPU of 24 GiB or more that is [vLLM](https://docs.vllm.ai). **Not run here**: written from its
documentation, so try it before you trust it.

```sh
vllm serve runs/qwen2vl-nutrition-detection-r4-joint-merged \\
    --served-model-name qwen2vl-nutrition-detection-r4-joint-merged \\
    --dtype bfloat16 --max-model-len 2048 --max-num-seqs 16 \\
    --limit-mm-per-prompt '{{"image": 1, "video": 0}}' \\
    --mm-processor-kwargs '{json.dumps(budget)}'
```

* `--mm-processor-kwargs` keeps the pixel budget: the one that stands in the folder's `parity.json`.
* `--max-model-len` holds {budget["max_pixels"] // 28**2} image tokens, the question and the answer.
* In the request: `temperature=0` (vLLM samples by default), `max_tokens=128`, and
  `extra_body={{"skip_special_tokens": False}}` for the text as the model wrote it. The client above sends all three.
* The merged model, not the adapter: vLLM drops LoRA on the vision tower.
* A client of vLLM can name files and addresses as well: see its `--allowed-local-media-path` and
  `--allowed-media-domains`, and keep it away from strangers.

Check such a server before you trust it, text against text, as part 3 does; the client above takes any address.""")

# %% [markdown]
# ## 6 · A page to try it
#
# `make app` opens a page at http://127.0.0.1:7860: a photo in by upload, clipboard or a click on an example; out come
# the boxes with the model's confidence, the text as it was written and the crops. The page and the figure below call
# the same function.

# %% tags=["thumbnail"]
find = app.finder(vlm, processor, prompt)
shown = []
for i in range(min(6, len(rows))):
    (scratch / "photo.jpg").write_bytes(photos[rows[i]["image_id"]])
    (picture, boxes), text, crops = find(str(scratch / "photo.jpg"))
    shown.append((picture, boxes, crops))
serving.found(shown)

# %% [markdown]
# Above what the page draws, with the confidence of each box, below what it cuts out. The confidence is the model's own:
# the mean probability of the digits it wrote ([`04_evaluation_analysis`](04_evaluation_analysis.ipynb) shows how far to
# trust it).
#
# ## 7 · Many photos
#
# `make predict INPUT=photos OUTPUT=boxes` takes a folder or a data set. The work is cut into parts of 64 pictures, each
# one file that is whole or not there: a killed command goes on where it was, and a part that is done twice changes
# nothing. Here 70 files, two of them no pictures, are shared by two runs, and the first share is run twice.

# %%
(scratch / "photos").mkdir()
for number, photo in zip(range(70), itertools.cycle(photos.values()), strict=False):
    (scratch / "photos" / f"{number:02}.jpg").write_bytes(b"hello" if number in (5, 66) else photo)
for shard in ((0, 2), (0, 2), (1, 2)):
    counts = many.predict_many(str(scratch / "photos"), scratch / "boxes", folder, coco=True, crops=True, shard=shard)
    print(f"share {shard[0] + 1} of {shard[1]}:", counts)
lines = predict.read_jsonl(scratch / "boxes" / "predictions.jsonl")
display(pd.DataFrame([lines[0], lines[5]]).T.rename(columns={0: "a picture", 1: "no picture"}))
sorted(path.name for path in (scratch / "boxes").iterdir())

# %% [markdown]
# On many GPUs of one machine each process takes its share; on a cluster each job of an array does:
#
# ```sh
# make predict INPUT=photos OUTPUT=boxes ARGS='--coco --crops'          # one process
# accelerate launch --multi_gpu -m helpers.many photos boxes            # a process a GPU
# sbatch --array=1-16 --wrap 'python -m helpers.many photos boxes --shard $SLURM_ARRAY_TASK_ID/16'
# python -m helpers.dev.measure_many FOLDER --pictures 5000             # is the memory flat?
# ```
#
# `coco_results.json` and `coco_images.json` are what COCO's `loadRes` reads; `crops/` holds the boxes cut out of the
# pictures in their own resolution.
#
# For a million photos at 7B, vLLM's offline batch works on hundreds at once. **Not run here**; it writes the same
# lines, confidences included, because they are made by the same function:
#
# ```python
# import json, os
# from pathlib import Path
# from vllm import LLM, SamplingParams
# from helpers import finished, predict
#
# folder, shard, shards = "runs/…-merged", int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
# made_with = finished.check(folder)
# budget = {key: made_with[key] for key in ("min_pixels", "max_pixels")}
# llm = LLM(folder, dtype="bfloat16", max_model_len=2048, mm_processor_kwargs=budget,
#           limit_mm_per_prompt={"image": 1, "video": 0}, allowed_local_media_path="/data/photos")
# greedy = SamplingParams(temperature=0, max_tokens=128, logprobs=0, skip_special_tokens=False)
# photos = sorted(Path("/data/photos").rglob("*.jpg"))[shard::shards]
# for start in range(0, len(photos), 512):
#     part = Path(f"boxes/{shard:03}-{start:08}.jsonl")
#     if part.exists():
#         continue
#     some = photos[start : start + 512]
#     chats = [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"file://{photo}"}},
#                                            {"type": "text", "text": made_with["prompt"]}]}] for photo in some]
#     lines = []
#     for photo, output in zip(some, llm.chat(chats, greedy)):
#         tokens = list(output.outputs[0].token_ids)
#         logs = [chosen[token].logprob for token, chosen in zip(tokens, output.outputs[0].logprobs)]
#         lines.append(predict.line(photo.name, tokens, logs, llm.get_tokenizer()))
#     part.with_suffix(".part").write_text("".join(json.dumps(line) + "\n" for line in lines))
#     part.with_suffix(".part").rename(part)
# ```
#
# Leave out what cannot be opened first (`finished.open_upright` says why): there, one broken picture ends the batch.

# %% [markdown]
# ## 8 · Copies to give away
#
# The merged model in bf16 is what is served above. `make export MODEL=FOLDER` writes it once more and a copy in 4 bits
# beside it, each with `parity.json` and a model card made from its run's manifest and scores (the small model here has
# no run); `ARGS=--compare` asks both about `val` and puts into the cards what four bits cost. Nothing is uploaded
# unless `PUSH=user/name` asks for it. The 4-bit copy is these calls; it needs no setting when it is read again.

# %%
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["model.visual", "lm_head"])
four_bits = load(folder, quantization_config=nf4, dtype=torch.bfloat16)
four_bits.save_pretrained(scratch / "nf4")
again = load(scratch / "nf4")
size = {what: sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e6
        for what, place in {"bf16": folder, "NF4": scratch / "nf4"}.items()}
layers = len(nf4_layers(again))
processes.close()
shutil.rmtree(scratch, ignore_errors=True)
Markdown(f"""{size['bf16']:.1f} MB in bf16, **{size['NF4']:.1f} MB** with {layers} layers in NF4. The vision tower, the
embeddings and the head stay in bf16, and in a small model they are most of it; at 7B, where they are a fifth, the copy
is about 60 % smaller (`06_quantization_and_trainable_params` has the arithmetic).""")

# %% [markdown]
# ## What to remember
#
# * Prompt, pixel budget and tokenizer are part of a model. They stand in `parity.json`, and every way to use it here
#   reads them first.
# * Test a server with the model's own answers, text against text, and with requests that are wrong.
# * Boxes come back in thousandths of the picture *as shown*: apply EXIF before you draw or cut.
# * Long jobs are killed. Parts that are whole or absent make a second start, or a second machine, harmless.
#
# ```sh
# make demo                                  # a model, in minutes
# make app                                   # a page to try it
# make serve MODEL=runs/…-merged PORT=8000   # an address for programs
# make predict INPUT=photos OUTPUT=boxes     # many photos
# papermill notebooks/08_deployment.ipynb out.ipynb --cwd notebooks -p model ../runs/…-merged
# ```
