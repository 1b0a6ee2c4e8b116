# %% [markdown]
# # Deployment: a server, a page, and a million photos
#
# A run ends with a merged model: one folder that loads like any other. How is it put to use? Every code cell below
# really starts what it shows, on this machine:
#
# 1. What must travel with the weights
# 2. A server that speaks OpenAI's protocol, and a client
# 3. Are the server's boxes those of the model?
# 4. Requests that are wrong
# 5. How long callers wait, and what to take for many
# 6. A page to try it
# 7. Many photos, on one machine and on a cluster
# 8. Copies to give away

# %% tags=["parameters"]
model = None  # a merged model's folder, such as ../runs/…-r4-joint-merged; None: a small one, trained here
steps = 40  # of that training
pictures = 24  # of val, sent to the server and to the model itself
callers = "1,4,16"  # how many wait at the same time
requests = 16  # of each number of callers

# %%
from helpers.topics.opening import opening

opening(globals(), model="a merged model's folder, or None", steps=range(1, 10**4), pictures=range(4, 124),
        callers=[range(1, 65)], requests=range(4, 10**4))

# %%
import atexit
import base64
import itertools
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import datasets
import openai
import pandas as pd
from peft import LoraConfig, get_peft_model

from helpers import data, merge, messages, parity, plots, predict
from helpers import model as models
from helpers.recipes import RECIPES
from helpers.topics.serving import reply, served
from helpers.topics.training import PROMPT, TINY_BASE, load, nf4, rows_and_processor, trainer_for
from helpers.use.load import as_row, check, load_model, open_upright, to_pixels
from helpers.use.photos import predict_photos

# %% [markdown]
# ## 1 · What must travel with the weights
#
# If you name no model, a small one is trained here, for far too few steps. Its boxes are poor, but it is used like any
# other.

# %%
pd.set_option("display.max_colwidth", 200)
scratch = Path(tempfile.mkdtemp())
if model is None:
    rows, processor = rows_and_processor(train=8 * steps, selection=1, val=1)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=RECIPES["r1-llm-only"][0].lora_targets)
    tuned = get_peft_model(load(), lora)
    trainer_for(tuned, rows["train"], processor, scratch / "training", max_steps=steps).train()
    model = scratch / "quick-merged"
    merge.save_whole(tuned.merge_and_unload(), processor, model)
    parity.write(model, parity.record(processor, PROMPT), parity.base_of(TINY_BASE))
folder = Path(model).resolve()
made_with = check(folder)
pd.Series(made_with, name=f"{folder.name}/parity.json").astype(str).to_frame()

# %% [markdown]
# `parity.json` says what the boxes depend on besides the weights: the prompt, the pixel budget, the tokenizer with its
# chat template, the format of a box. Everything that uses a model reads it first, and refuses a folder that does not
# match it, with one sentence. Here somebody has changed the pixel budget:

# %%
shutil.copytree(folder, scratch / "other-budget")
config = json.loads((folder / "processor_config.json").read_text())
config["image_processor"]["size"]["longest_edge"] *= 4
(scratch / "other-budget" / "processor_config.json").write_text(json.dumps(config))
try:
    check(scratch / "other-budget")
except ValueError as error:
    print(str(error).replace(f"{scratch}/", ""))

# %% [markdown]
# ## 2 · A server and a client
#
# `make serve MODEL=FOLDER` starts a server that speaks OpenAI's protocol. `transformers serve` does so too; section 4
# shows where they differ. Both are started here, on free ports.

# %%
servers = ExitStack()
atexit.register(servers.close)
ours = servers.enter_context(served(sys.executable, "-m", "helpers.use.serve", str(folder)))
cli = str(Path(sys.executable).with_name("transformers"))
stock = servers.enter_context(served(cli, "serve", folder.name, folder=folder.parent))

# %% [markdown]
# The client sends a picture as a data URL. The completion is text with boxes in thousandths of the picture's width and
# height, and the client turns them into pixels of the picture as it is *shown*, after its EXIF rotation. (`make serve`
# also sends `message.boxes` in 0-1, without those drawn twice, and `message.confidences`; vLLM sends the text alone.)

# %%
def boxes_of(address, photo):
    """The completion for a picture file's bytes, and its [(name, (x0, y0, x1, y1) in pixels)]."""
    content = [{"type": "image_url", "image_url": {"url": data_url(photo)}},
               {"type": "text", "text": made_with["prompt"]}]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    completion = client.chat.completions.create(model=folder.name, messages=[{"role": "user", "content": content}],
                                                temperature=0, max_tokens=128)
    text = completion.choices[0].message.content
    found, size = messages.parse_text(text), open_upright(photo).size
    boxes = [to_pixels(box, size) for box in found.boxes_xyxy_unit.tolist()]
    return text, list(zip(found.labels, boxes, strict=True))


def data_url(content):
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


val = data.load_splits("embedded", limit={"train": 1, "selection": 1, "val": pictures})["val"]
photos = {row["image_id"]: row["image"]["bytes"] for row in val.cast_column("image", datasets.Image(decode=False))}
photo = photos[val[0]["image_id"]]
boxes_of(ours, photo)

# %% [markdown]
# ## 3 · The same boxes?
#
# The server is right if its completions are those of the model. So each file goes to the server, and to the model in
# this process, alone in its batch. Nothing may differ: not the resizing, not the chat template, not the text.

# %%
vlm, processor, prompt = load_model(folder)
local = [predict.generate_lines(vlm, processor, [as_row(image_id, open_upright(content))], prompt,
                                {"do_sample": False})[0] for image_id, content in photos.items()]
same = sum(boxes_of(ours, photos[line["image_id"]])[0] == line["text"] for line in local)
print(f"the server's text is the model's text, to the last character, in {same} of {len(photos)} pictures")

# %% [markdown]
# Two things to know. Many servers strip special tokens (vLLM does, unless a request says `skip_special_tokens: false`);
# `parse_text` reads boxes with or without them. And in batches, as in the pipeline and in `make predict`, a box can
# differ slightly: in bf16 a sum in another order is rounded differently.
#
# ## 4 · Requests that are wrong
#
# Strangers can send a server anything. Each of these requests goes to both servers, and at the end a good one, to see
# that they are still alive.

# %%
(scratch / "secret.jpg").write_bytes(photo)
bad = {"not a picture": {"url": data_url(b"hello")}, "a picture cut off": {"url": data_url(photo[:2000])},
       "30 MB of text": {"url": "data:image/png;base64," + "A" * 30_000_000},
       "a file on the server's disk": {"url": str(scratch / "secret.jpg")},
       "an address inside the network": {"url": "http://127.0.0.1:9/x.jpg"},
       "another model": {"model": "gpt-4o"}, "another prompt": {"text": "Where is the bar code?"}, "a good one": {}}
good = {"url": data_url(photo), "text": made_with["prompt"], "model": folder.name}
pd.DataFrame({what: {"transformers serve": reply(stock, **good | request),
                     "make serve": reply(ours, **good | request)} for what, request in bad.items()}).T

# %% [markdown]
# `transformers serve` replies to most of these with a bare 500, and opens a file on its own disk if a request names
# one. `make serve` says in one sentence what is wrong. It opens no files and no addresses, serves one model under one
# name, and takes the one prompt that the model was trained with.
#
# ## 5 · How long callers wait
#
# One model, one queue: the server generates in batches. The requests that arrive during one batch, up to 16, are the
# next one.

# %%
def timed(content):
    """Seconds until the completion is there."""
    start = time.perf_counter()
    boxes_of(ours, content)
    return time.perf_counter() - start


sent, waiting = list(itertools.islice(itertools.cycle(photos.values()), requests)), {}
for count in callers:
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        seconds = pd.Series(pool.map(timed, sent)).median()
    rate = len(sent) / (time.perf_counter() - start)
    waiting[count] = {"median wait, s": seconds, "pictures a second": rate}
pd.DataFrame(waiting).T.rename_axis("callers at the same time").round(2)

# %% [markdown]
# With more callers each waits longer, and the server gets more done, because the pictures of a batch share every step.
# A batch ends with its longest completion; only then does the next one begin. A server with *continuous batching* fills
# each place as soon as it is free. transformers has that for text alone. For 7B and many users on a GPU of 24 GiB or
# more take [vLLM](https://docs.vllm.ai). The command is written from its documentation and **was not run here**:
#
# ```sh
# vllm serve runs/qwen2vl-nutrition-detection-r4-joint-merged \
#     --served-model-name qwen2vl-nutrition-detection-r4-joint-merged \
#     --dtype bfloat16 --max-model-len 2048 --max-num-seqs 16 \
#     --limit-mm-per-prompt '{"image": 1, "video": 0}' \
#     --mm-processor-kwargs '{"min_pixels": 200704, "max_pixels": 1003520}'
# ```
#
# * `--mm-processor-kwargs` is the pixel budget; take the numbers from the folder's `parity.json`.
# * In the request: `temperature=0` (vLLM samples by default), `max_tokens=128`, and
#   `extra_body={"skip_special_tokens": False}` for the text as the model wrote it.
# * Serve the merged model, not the adapter: vLLM drops LoRA on the vision tower.
# * Keep it away from strangers, or read about `--api-key`, `--allowed-local-media-path` and `--allowed-media-domains`
#   first.
#
# Compare such a server with the model, text against text, as section 3 does. The client takes any address.
#
# What an operator should know about `make serve`: it works on at most 128 requests, and one more gets a 429. A body may
# have 20 MiB and take a minute to arrive, a picture may have 50 million pixels. With `SERVE_API_KEY` in the environment
# a request needs that key. `GET /health` is for a load balancer, `GET /metrics` for Prometheus (waits, refusals by
# status, sizes of batches, memory). After a SIGTERM the server takes no new requests, completes the others, and exits
# with 0. `compose.yaml` starts server and page in containers.
#
# ## 6 · A page to try it
#
# `make app` opens a page at http://127.0.0.1:7860: a photo goes in; out come the boxes with the model's confidence, the
# text, and the crops. These are the model's boxes in a few pictures (true boxes solid, predictions dashed):

# %%
plots.gallery(val.select(range(4)), data.truth_rows(val), local)

# %% [markdown]
# ## 7 · Many photos
#
# `make predict INPUT=photos OUTPUT=boxes` takes a folder, a zip, a list of paths or URLs, a bucket or a data set. Each
# picture's line is appended to a file as soon as it is there, with a `stamp`, a hash of the picture's name, size and
# time. A command that was killed and is started again keeps the whole lines, and predicts what is missing or was
# replaced. Here the command runs twice on 70 files, two of which are not pictures; in between, one of these two is
# replaced by a picture.

# %%
(scratch / "photos").mkdir()
for number, content in zip(range(70), itertools.cycle(photos.values()), strict=False):
    (scratch / "photos" / f"{number:02}.jpg").write_bytes(b"hello" if number in (5, 66) else content)
for _ in range(2):
    start = time.perf_counter()
    counts = predict_photos(str(scratch / "photos"), scratch / "boxes", folder, coco=True, crops=True)
    print(f"{time.perf_counter() - start:.1f} s:", counts)
    (scratch / "photos" / "66.jpg").write_bytes(photo)
print(*sorted(path.name for path in (scratch / "boxes").glob("[!.]*")))
lines = predict.read_jsonl(scratch / "boxes" / "predictions.jsonl")
pd.DataFrame({"a picture": lines[0], "not a picture": lines[5]})

# %% [markdown]
# `coco_results.json` and `coco_images.json` are what COCO's `loadRes` reads; `crops/` holds the boxes cut out of the
# pictures in their own resolution. Where one GPU is not enough, Ray Data runs the same function, an actor a GPU:
#
# ```sh
# make predict INPUT=photos OUTPUT=boxes ARGS=--ray                             # all GPUs of this machine
# make predict INPUT=s3://bucket/photos OUTPUT=/shared/boxes ARGS='--ray auto'  # or of its cluster
# ```
#
# Only names and lines pass through Ray's object store. Each actor reads and opens its pictures itself, so a broken one
# becomes a line with the reason and costs no other picture. The batches are of about one size. The work of a lost
# machine goes to the others, and Ray's `CheckpointConfig` records which pictures are done, so the same command goes on.
#
# ## 8 · Copies to give away
#
# `make export MODEL=FOLDER` writes a copy of the merged model in bf16 and one in 4 bits, each with `parity.json` and a
# model card made from its run's manifest and scores. Nothing is uploaded unless you give `PUSH=user/name`. These calls
# make the 4-bit copy, and it needs no setting when it is loaded again:

# %%
four_bits = models.load(folder, quantization_config=nf4())
four_bits.save_pretrained(scratch / "nf4")
assert models.load(scratch / "nf4").is_loaded_in_4bit
for name, place in {"bf16": folder, "NF4": scratch / "nf4"}.items():
    print(f"{name}: {sum(file.stat().st_size for file in place.glob('*.safetensors')) / 1e6:.1f} MB")
servers.close()
shutil.rmtree(scratch, ignore_errors=True)

# %% [markdown]
# The vision tower, the embeddings and the head stay in bf16, and in a small model they are most of it. At 7B they are a
# fifth, and the copy is less than half the size (`06_quantization_and_trainable_params` has the arithmetic).
#
# ## What to remember
#
# * Prompt, pixel budget and tokenizer are part of a model. They are in `parity.json`, and every use reads them first.
# * Test a server with the model's own completions, text against text, and with requests that are wrong.
# * Boxes come back in thousandths of the picture *as shown*: apply EXIF before you draw or cut.
# * Long jobs get killed. If each line names its picture and is whole or absent, a second start does no harm.
