"""A checkpoint, adapter or model that was made with something else is refused, and the refusal names it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pipeline_runner import run
from safetensors.torch import load_file, save_file
from small_training import build, load_tiny, small_processor
from transformers import Qwen2VLProcessor

from helpers import model, parity, runs
from helpers.parity import ParityError
from helpers.settings import TINY_BASE, ParameterError

PREFIX = "runs/qwen2vl-nutrition-detection-"
PROMPT = "Where?"


def one_weight_else(file: Path) -> None:
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def adapter(processor, rows, tmp_path_factory) -> Path:
    """An adapter as the pipeline saves it, with a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("run")
    sft = build("r1-llm-only", folder, processor, rows, max_steps=1)
    sft.train()
    sft.model.save_pretrained(folder / "adapter")
    parity.write(folder / "adapter", parity.record(processor, PROMPT), parity.base_of(TINY_BASE))
    return folder / "adapter"


def changed(processor, what):
    """A record of the same run with one thing changed."""
    other = Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=16 * 784)
    if what == "max_pixels":
        other = Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=25 * 784)
    if what == "tokenizer":
        other.tokenizer.add_tokens(["table"])
    here = parity.record(other, "Where is it?" if what == "prompt" else PROMPT)
    return here | {"box_format": "y first"} if what == "box_format" else here


@pytest.mark.parametrize("what", ["prompt", "max_pixels", "tokenizer", "box_format"])
def test_every_mismatch_is_refused_by_name_in_an_adapter_and_in_a_checkpoint(what, processor, adapter):
    here = changed(processor, what)
    for folder in (adapter, adapter.parent / "checkpoint-1"):
        parity.check(folder, parity.record(processor, PROMPT), parity.base_of(TINY_BASE))
        with pytest.raises(ParityError, match=f"{folder.name} was made with {what}="):
            parity.check(folder, here)


def test_max_new_tokens_may_grow_and_not_shrink_and_some_folders_have_none(processor, adapter, tmp_path):
    def here(longest):
        return parity.record(processor, PROMPT, longest)

    copy = shutil.copytree(adapter, tmp_path / "adapter")
    parity.check(copy, here(8))  # a folder without the number
    parity.write(copy, here(300))
    for longest in (300, 400, None):  # None: who opens it to use it has no number of his own
        parity.check(copy, here(longest))
    with pytest.raises(ParityError, match="adapter was made with max_new_tokens=300 and would be used with 128"):
        parity.check(copy, here(128))
    parity.note_use(copy, max_new_tokens=400)
    with pytest.raises(ParityError, match="max_new_tokens=400 and would be used with 300"):
        parity.check(copy, here(300))


def test_a_chat_template_belongs_to_the_tokenizer(processor):
    before = parity.tokenizer_hash(processor)
    processor(text=["a", "a b c"], padding=True)  # a call leaves its padding in the tokenizer
    assert parity.tokenizer_hash(processor) == before
    other = small_processor()
    other.chat_template = other.chat_template.replace("assistant", "model")
    assert parity.tokenizer_hash(other) != before


def test_resuming_with_another_prompt_is_refused(processor, rows, adapter):
    sft = build("r1-llm-only", adapter.parent, processor, rows, max_steps=2)
    sft.made_with = changed(processor, "prompt")
    with pytest.raises(ParityError, match="checkpoint-1 was made with prompt='Where.'"):
        sft.train(resume_from_checkpoint=str(adapter.parent / "checkpoint-1"))


def test_an_adapter_on_another_base_is_refused_also_without_the_pipeline(adapter, tmp_path):
    model.load_adapter(load_tiny(), adapter)
    other = shutil.copytree(TINY_BASE, tmp_path / "other", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    one_weight_else(other / "model.safetensors")
    with pytest.raises(ParityError, match=r"adapter was trained on helpers/tiny .*and this base is .*/other"):
        model.load_adapter(model.load(other), adapter)


def test_weights_that_differ_are_refused(processor, adapter, tmp_path):
    copy, here = shutil.copytree(adapter, tmp_path / "copy"), parity.record(processor, PROMPT)
    parity.check(copy, here)
    one_weight_else(copy / "adapter_model.safetensors")
    with pytest.raises(ParityError, match="the weights in .* are not those that were saved there"):
        parity.check(copy, here)
    (copy / parity.FILE).unlink()
    with pytest.raises(ParityError, match="has no parity.json"):
        parity.check(copy, here)
    parity.check(copy, here, required=False)  # someone else's model


def test_a_large_file_is_told_apart_by_its_samples(tmp_path):
    content = bytearray(runs.WHOLE + 12345)
    for place, same in ((None, True), (0, False), (len(content) - 1, False), (len(content) // 2, None)):
        other = bytearray(content)
        if place is not None:
            other[place] ^= 1
        for name, data in (("a", content), ("b", other)):
            (tmp_path / name).write_bytes(data)
        if same is not None:
            assert (runs.file_hash(tmp_path / "a") == runs.file_hash(tmp_path / "b")) == same


@pytest.mark.slow
def test_the_pipeline_refuses_a_stage_2_on_another_stage_1_and_a_merged_model_that_differs():
    names = run("recipe=r3-two-stage")
    stage1, merged = Path(f"{PREFIX}r3-stage1/model"), Path(f"{PREFIX}r3-merged")
    assert parity.base_of(stage1) == json.loads((merged / parity.FILE).read_text())["base"]
    with pytest.raises(ParityError, match="r3-merged was made with prompt='Detect the bounding box"):
        run("recipe=base", f"model_id={merged.resolve()}", "prompt=Where is it?")
    one_weight_else(merged / "model.safetensors")
    with pytest.raises(ParityError, match="r3-merged are not those that were saved there"):
        names["load_base"]("bf16", merged)
    one_weight_else(stage1 / "model.safetensors")
    with pytest.raises(ParityError, match="stage2/adapter was trained on .*r3-stage1/model .*, and this base is"):
        names["load_trained"]()


def test_nothing_runs_code_from_outside_or_uploads(repo):
    """No trust_remote_code, no pickle; no upload but export.py's, which `make export PUSH=` asks for."""
    sources = [*repo.glob("helpers/**/*.py"), *repo.glob("notebooks/*.py"), repo / "pipeline.py"]
    forbidden = re.compile(r"trust_remote_code|torch\.load\((?!.*weights_only=True)|push_to_hub|upload_folder|joblib")
    assert len(sources) > 50
    found = {(path.name, word) for path in sources for word in forbidden.findall(path.read_text())}
    assert found == {("export.py", "upload_folder")}


def test_a_base_of_pickles_is_refused(tmp_path):
    for name in ("config.json", "generation_config.json"):
        shutil.copy(TINY_BASE / name, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ParameterError, match="cannot be loaded .*safetensors"):
        model.load(tmp_path)
    Path(tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        model.load_adapter(load_tiny(), tmp_path)
