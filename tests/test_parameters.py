"""Parameters: read from papermill's cell or the command line, and refused with one sentence."""

import ast
import os
import random
import re
import shlex
import shutil
import string
import subprocess
import sys
from unittest.mock import Mock

import pytest
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator

from helpers import runs, settings
from helpers.recipes import LOW_MEMORY, PARAMETERS, RECIPES, REVISIONS, SCALES
from helpers.runs import read_json, write_json
from helpers.settings import ParameterError


@pytest.fixture
def defaults(repo) -> dict:
    """The parameters cell of pipeline.py, as a namespace."""
    source = (repo / "pipeline.py").read_text().split('# %% tags=["parameters"]')[1].split("# %%")[0]
    names = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}
    return names


def test_the_cell_and_the_rules_name_the_same_parameters(defaults):
    assert list(defaults) and set(defaults) == set(PARAMETERS)
    settings.check(defaults)


def settle(defaults, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pipeline.py", *arguments])
    return settings.settle(dict(defaults))


def test_defaults_of_the_tiny_scale(defaults, monkeypatch):
    run = settle(defaults, monkeypatch)
    assert run.scale == "tiny" and run.recipe == "r4-joint" and run.model_id == "embedded"
    assert run.lora_rank == SCALES["tiny"]["lora_rank"]
    assert run.folder.name == "qwen2vl-nutrition-detection-r4-joint"
    assert run.merged_folder.name == "qwen2vl-nutrition-detection-r4-joint-merged"
    assert None not in [run.values[name] for name in SCALES["tiny"]]


def test_published_defaults_of_the_7b_scale():
    scale = SCALES["7b"]
    assert (scale["lora_rank"], scale["lora_alpha"], scale["epochs"]) == (64, 128, 3)
    assert scale["batch_size"] * scale["accumulation"] == 2 * 8  # the published update, in larger pieces
    assert (scale["min_pixels"], scale["max_pixels"]) == (256 * 784, 1280 * 784)
    assert {stage.learning_rate["7b"] for stages in RECIPES.values() for stage in stages} <= {1e-5, 2e-5}


def test_r3_has_two_folders(defaults, monkeypatch):
    run = settle(defaults, monkeypatch, "recipe=r3-two-stage")
    names = [stage.folder.name for stage in run.stages]
    assert names == ["qwen2vl-nutrition-detection-r3-stage1", "qwen2vl-nutrition-detection-r3-stage2"]
    assert run.folder == run.stages[-1].folder and run.merged_folder.name.endswith("-r3-merged")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("recipe=r5", ["recipe='r5'", "r1-llm-only", "r4-joint"]),
        ("recpie=r4-joint", ["recpie", "did you mean recipe"]),
        ("epochs=three", ["epochs='three'", "number above 0"]),
        ("epochs=0", ["epochs=0"]),
        ("lora_rank=0", ["lora_rank=0", "whole number from 1"]),
        ("lora_rank=8.5", ["lora_rank=8.5"]),
        ("batch_size=True", ["batch_size=True"]),
        ("seed=None", ["seed=None"]),
        ("learning_rate=nan", ["learning_rate=nan"]),
        ("epochs=inf", ["epochs=inf", "number above 0"]),
        ("lora_dropout=-nan", ["lora_dropout=nan", "from 0 to below 1"]),
        ("prompt=None", ["prompt=None", "text for every picture"]),
        ("prompt=Where is <|image_pad|>?", ["prompt='Where is <|image_pad|>?'", "without special tokens"]),
        ("prompt=Boxes.<|im_end|>", ["prompt='Boxes.<|im_end|>'", "without special tokens"]),
        ("run_name=\udce9", [r"'run_name=\udce9'", "not UTF-8"]),
        ("gpus=a", ["gpus='a'", "0,1"]),
        ("report_to=mlflow", ["report_to='mlflow'", "tensorboard"]),
        ("max_pixels=784", ["min_pixels", "max_pixels=784"]),
        ("model_id=./nowhere", ["./nowhere", "config.json"]),
        ("model_id=nobody/nothing", ["nobody/nothing", "Hub"]),
        ("output_root=/proc/nowhere", ["output_root='/proc/nowhere'", "cannot be written"]),
        ("scale=7b", ["scale=7b", "needs 22 GiB", "no GPU", "scale=tiny"]),
        ("run_name=../x", ["run_name='../x'"]),
        ("keep=best", ["keep='best'", "eval_steps"]),
        ("keep=first", ["keep='first'", "last, best"]),
        ("constrained=1", ["constrained=1", "True or False"]),
        ("r4-joint", ["'r4-joint'", "name=value"]),
    ],
)
def test_bad_input_is_refused_with_one_sentence(defaults, monkeypatch, argument, words):
    with pytest.raises(ParameterError) as refusal:
        settle(defaults, monkeypatch, argument)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_no_room_on_the_disk(defaults, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 2**20})())
    with pytest.raises(ParameterError, match="GiB free"):
        settle(defaults, monkeypatch)


def test_papermill_cell_is_read_from_in_and_not_from_globals():
    namespace = {"In": ["", "x = 1", "# Parameters\nrecpie = 'r4-joint'\n"], "other": 3}
    with pytest.raises(ParameterError, match="did you mean recipe"):
        settings.read_given(namespace)
    assert injected(recipe="r1-llm-only", gpus=0, seed=-1) == {"recipe": "r1-llm-only", "gpus": "0", "seed": -1}


def injected(**values) -> dict:
    """What a run is given by papermill's cell, as papermill writes it."""
    cell = PythonTranslator.codify(values)
    namespace = {"In": ["", cell], "other": 3}
    exec(cell, namespace)
    read = settings.read_given(namespace)
    assert all(namespace[name] == value or value != value for name, value in read.items())
    return read


ODD = ["2024", "007", "1e5", "1_000", "nan", "inf", "True", "False", "0x10", "-3", "2024-01-01", "yes"]
ODD_PROMPTS = [*ODD, 'Say "box" or \'none\' = \\n?', "one line\nand another", "où ? 表 `x` $HOME {a} %d #"]


@pytest.mark.parametrize("value", ODD)
def test_text_that_looks_like_something_else_is_text_in_a_script(value, defaults, monkeypatch):
    words = [f"{name}={value}" for name in ("run_name", "prompt", "dataset_id", "model_revision")]
    run = settle(defaults, monkeypatch, *words, "seed=7", "gpus=0", "memory=None")
    assert {run.run_name, run.prompt, run.dataset_id, run.model_revision} == {value}
    assert (run.seed, run.gpus, run.memory) == (7, "0", None) and run.folder.name.endswith(f"-{value}")


def test_papermills_numbers_become_text_again_where_they_can_and_are_refused_where_not():
    assert injected(run_name=2024, prompt=123, model_id=True) == {"run_name": "2024", "prompt": "123",
                                                                  "model_id": "True"}
    assert injected(run_name=None, memory=None, epochs=1.5) == {"run_name": None, "memory": None, "epochs": 1.5}
    for value in (1e5, float("nan"), float("inf")):
        with pytest.raises(ParameterError, match=rf"^run_name is text, .* number {value}; .* -r run_name TEXT\.$"):
            injected(run_name=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_papermills_numbers_that_are_none_are_refused_in_a_sentence(value, defaults):
    for name in ("epochs", "learning_rate", "lora_dropout", "batch_size"):
        with pytest.raises(ParameterError, match=f"{name}={value} is not valid"):
            settings.check(defaults | injected(**{name: value}))


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_the_manifests_command_and_a_repetition_give_the_same_values(prompt, defaults, monkeypatch):
    run = settle(defaults, monkeypatch, f"prompt={prompt}", "run_name=1e5", "seed=3", "epochs=2.5")
    python, script, *words = shlex.split(runs.command(run))
    assert (python, script) == ("python", "pipeline.py")
    assert settle(defaults, monkeypatch, *words).values == run.values

    monkeypatch.setattr("IPython.get_ipython", lambda: "a kernel")
    words = shlex.split(runs.command(run))
    assert words[:3] == ["papermill", "pipeline.ipynb", "out.ipynb"]
    read = {name: _resolve_type(value) if how == "-p" else value
            for how, name, value in zip(words[3::3], words[4::3], words[5::3], strict=True)}
    assert injected(**read) == run.given


def test_one_gpu_is_chosen_and_none_beside_a_launcher(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings.choose_gpus("0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParameterError, match="launcher"):
        settings.choose_gpus("0,1")


def test_gpus_act_before_cuda_starts_and_come_too_late_after(repo):
    """In a process of its own, as a run does it: visible before torch is there; refused once CUDA runs."""
    early = """
import os, sys
from helpers import settings as parameters
assert "torch" not in sys.modules, "torch was imported before the GPUs were chosen"
parameters.choose_gpus("0,1")
import torch
assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1" and not torch.cuda.is_initialized()
torch.cuda.is_initialized = lambda: True
parameters.choose_gpus("0,1")  # a cell run for the second time
try:
    parameters.choose_gpus("1")
except parameters.ParameterError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", early], capture_output=True, text=True, cwd=repo)
    assert ended.returncode == 0, ended.stderr
    assert "gpus=1 comes too late: CUDA has started in this process; restart the kernel." in ended.stdout


def test_the_caches_move_by_parameter_or_by_environment(repo, tmp_path):
    script = """
import os, sys
from helpers import settings as parameters
assert "huggingface_hub" not in sys.modules
parameters.choose_cache({given!r})
import datasets, huggingface_hub.constants, transformers
print(huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, sep="\\n")
try:
    parameters.choose_cache("/elsewhere")
except parameters.ParameterError as error:
    print(error)
"""
    for given, variable in ((str(tmp_path / "a"), str(tmp_path / "b")), (None, str(tmp_path / "b"))):
        ended = subprocess.run([sys.executable, "-c", script.format(given=given)], capture_output=True, text=True,
                               cwd=repo, env=os.environ | {"HF_HOME": variable})
        assert ended.returncode == 0, ended.stderr
        root = given or variable
        assert ended.stdout.splitlines()[:2] == [f"{root}/hub", f"{root}/datasets"]
        assert f"hf_home='/elsewhere' comes too late: this process uses {root}" in ended.stdout


def base(folder, **config):
    """The tiny base in a folder of its own, values of its config.json changed."""
    shutil.copytree(settings.TINY_BASE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_json(folder / "config.json", read_json(folder / "config.json") | config)
    return folder


def on_the_hub(monkeypatch, file, **config):
    """A Hub whose models' config.json is the tiny base's, `config` changed, put into `file`; returns what it gave."""
    asked = []

    def download(*arguments, revision):
        asked.append((arguments, revision))
        write_json(file, read_json(settings.TINY_BASE / "config.json") | config)
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def refusal(defaults, monkeypatch, *arguments):
    with pytest.raises(ParameterError) as refused:
        settle(defaults, monkeypatch, *arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen2", None])
def test_another_architecture_is_refused_from_its_config_alone(defaults, monkeypatch, tmp_path, kind):
    said = f"model_id='%s' is a model of type {kind!r}, and only qwen2_vl works here, such as Qwen/Qwen2-VL-2B"
    folder = base(tmp_path / "other", model_type=kind)
    assert said % folder in refusal(defaults, monkeypatch, f"model_id={folder}")
    asked = on_the_hub(monkeypatch, tmp_path / "config.json", model_type=kind)
    assert said % "a/b" in refusal(defaults, monkeypatch, "model_id=a/b")
    assert asked == [(("a/b", "config.json"), None)]


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_quantized_base_is_refused_where_something_trains(defaults, monkeypatch, tmp_path):
    folder = base(tmp_path / "nf4", quantization_config=NF4)
    for recipe, stages in RECIPES.items():
        if stages:
            said = refusal(defaults, monkeypatch, f"model_id={folder}", f"recipe={recipe}")
            assert f"is quantized already (bitsandbytes), and recipe={recipe} trains and merges" in said
    assert settle(defaults, monkeypatch, f"model_id={folder}", "recipe=base").model_path == str(folder)
    other = base(tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    assert "is quantized (awq) and not to bitsandbytes' NF4" in refusal(defaults, monkeypatch, f"model_id={other}",
                                                                         "recipe=base")


def with_tokenizer(folder, change):
    base(folder)
    write_json(folder / "tokenizer.json", change(read_json(folder / "tokenizer.json")))
    settings = read_json(folder / "tokenizer_config.json")  # which would add a token anew that is not there
    settings |= {"extra_special_tokens": [], "tokenizer_class": "PreTrainedTokenizerFast"}  # Qwen2's own splits digits
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def without_box_end(tokenizer):
    kept = [token for token in tokenizer["added_tokens"] if token["content"] != "<|box_end|>"]
    vocabulary = {token: number for token, number in tokenizer["model"]["vocab"].items() if token != "<|box_end|>"}
    return tokenizer | {"added_tokens": kept, "model": tokenizer["model"] | {"vocab": vocabulary}}


def with_pairs_of_digits(tokenizer):
    model, last = tokenizer["model"], "".join(tokenizer["model"]["merges"][-1])
    splits = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {"00" if token == last else token: number for token, number in model["vocab"].items()}
    return tokenizer | {
        "model": model | {"vocab": vocabulary, "merges": [*model["merges"][:-1], ["0", "0"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, bytes_alone]},
    }


def test_a_base_that_cannot_write_answers_is_refused_at_the_start(defaults, monkeypatch, tmp_path):
    for change, said in ((without_box_end, "its tokenizer has no token <|box_end|>, which prompts and completions"),
                         (with_pairs_of_digits, "its tokenizer writes 00,01,02 as ['00', ',', '0', ")):
        folder = with_tokenizer(tmp_path / change.__name__, change)
        assert f"model_id='{folder}' has no processor that can be used: {said}" in refusal(
            defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "more")
    settings = read_json(folder / "tokenizer_config.json")
    settings["extra_special_tokens"] += ["<|one|>", "<|more|>"]
    write_json(folder / "tokenizer_config.json", settings)
    assert "its tokenizer has 514 tokens, and the model 512" in refusal(defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "silent")
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "half")
    (folder / "tokenizer.json").unlink()  # transformers makes one of nothing
    assert "its tokenizer writes 00,01,02 as []" in refusal(defaults, monkeypatch, f"model_id={folder}")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    assert "has no processor that can be used: " in refusal(defaults, monkeypatch, f"model_id={folder}")


def test_a_folder_that_was_half_copied_is_refused_at_the_start(defaults, monkeypatch, tmp_path):
    whole = (settings.TINY_BASE / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for number, content in enumerate((None, b"", whole[:-1], pointer)):
        folder = base(tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)
        assert "is not whole: model.safetensors cannot be read" in refusal(defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "sharded")
    shards = {"lm_head.weight": "model-00001-of-00002.safetensors", "visual": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": shards})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors cannot be" in refusal(defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(defaults, monkeypatch, f"model_id={folder}")
    folder = base(tmp_path / "config")
    (folder / "config.json").write_text("{")
    assert "config.json that cannot be read" in refusal(defaults, monkeypatch, f"model_id={folder}")


@pytest.mark.parametrize("place", ["/proc/nowhere", "file/below"])
def test_a_cache_that_cannot_be_written_is_refused_at_the_start(defaults, monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    place = tmp_path / place  # of two absolute paths the second counts
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(place))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    assert f"HF_HOME={place} cannot be written (" in refusal(defaults, monkeypatch)
    assert f"hf_home='{place}' cannot be written (" in refusal(defaults, monkeypatch, f"hf_home={place}")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))  # downloads may be for reading alone
    settle(defaults, monkeypatch)


def test_a_cache_on_a_disk_for_reading_alone_is_refused(defaults, monkeypatch):
    def read_only(path, *arguments, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.touch", read_only)
    assert "cannot be written (Read-only file system: " in refusal(defaults, monkeypatch)


def test_the_model_is_pinned_and_another_one_is_not(defaults, monkeypatch, tmp_path):
    asked = on_the_hub(monkeypatch, tmp_path / "config.json")
    monkeypatch.setattr(settings, "_check_processor", lambda *arguments: None)
    run = settle(defaults, monkeypatch, "model_id=Qwen/Qwen2-VL-7B-Instruct", "scale=tiny")
    assert asked == [(("Qwen/Qwen2-VL-7B-Instruct", "config.json"), REVISIONS["Qwen/Qwen2-VL-7B-Instruct"])]
    assert run.model_revision == asked[0][1] and re.fullmatch("[0-9a-f]{40}", run.model_revision)
    run = settle(defaults, monkeypatch, "model_id=Qwen/Qwen2-VL-7B-Instruct", "model_revision=v2")
    assert run.model_revision == "v2" == asked[1][1]
    assert settle(defaults, monkeypatch, "model_id=some/one-else").model_revision is None
    base(tmp_path / "mirror")
    run = settle(defaults, monkeypatch, f"model_id={tmp_path}/mirror")
    assert run.model_revision is None and run.model_path == f"{tmp_path}/mirror" and len(asked) == 3


def test_a_gated_model_without_a_token_is_refused_in_words(defaults, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def gated(*arguments, **options):
        raise GatedRepoError("401 Client Error. (Request ID: 1)\n\nAccess is restricted.", response=Mock())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(ParameterError, match=r"^model_id='a/b' at revision main is gated: .*HF_TOKEN"):
        settle(defaults, monkeypatch, "model_id=a/b")


def test_seven_b_fits_only_where_the_recipe_fits(monkeypatch):
    import torch

    card = type("card", (), {"total_memory": 24 * 2**30, "major": 8, "name": "A10"})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert settings._choose_scale("auto", "r4-joint", None) == "7b"
    assert settings._choose_scale("auto", "r2-vision-only", None) == "tiny"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settings._choose_scale("auto", "r2-vision-only", None) == "7b"
    monkeypatch.setenv("WORLD_SIZE", "2")  # one card a process: their memory does not add up
    assert settings._choose_scale("auto", "r2-vision-only", None) == "tiny"
    card.total_memory = 15.7 * 2**30  # what a card of 16 GiB shows
    assert settings._choose_scale("auto", "r4-joint", None) == "tiny"
    assert settings._choose_scale("auto", "r4-joint", "low") == "7b"
    with pytest.raises(ParameterError, match=r"needs 22 GiB of GPU memory \(14 with memory=low\), and this machine sh"):
        settings._choose_scale("7b", "r4-joint", None)
    card.major, card.name = 7, "T4"
    assert settings._choose_scale("auto", "r4-joint", "low") == "tiny"
    with pytest.raises(ParameterError, match="T4 has no instructions"):
        settings._choose_scale("7b", "r4-joint", "low")


def test_low_memory_keeps_the_effective_batch():
    for scale, low in LOW_MEMORY.items():
        usual = SCALES[scale]
        assert low["batch_size"] * low["accumulation"] == usual["batch_size"] * usual["accumulation"]
        assert set(low) <= set(usual)


def test_low_memory_fills_in_what_was_not_given(defaults, monkeypatch):
    run = settle(defaults, monkeypatch, "memory=low", "batch_size=3")
    assert (run.batch_size, run.accumulation, run.gradient_checkpointing, run.predict_batch_size) == (3, 4, True, 8)
    with pytest.raises(ParameterError, match="needs the base in nf4"):
        settle(defaults, monkeypatch, "memory=low", "precision=bf16")


def test_report_target_never_asks_for_a_login(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert settings._report_target("auto", tmp_path) == "tensorboard"
    with pytest.raises(ParameterError, match="WANDB_API_KEY"):
        settings._report_target("wandb", tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert settings._report_target("wandb", tmp_path) == settings._report_target("auto", tmp_path) == "wandb"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert settings._report_target("auto", tmp_path) == "tensorboard"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0")
    for off in ("true", "1", "TRUE"):
        monkeypatch.setenv("WANDB_DISABLED", off)
        assert settings._report_target("auto", tmp_path) == "tensorboard"
        with pytest.raises(ParameterError, match=f"report_to=wandb, and WANDB_DISABLED={off} forbids it"):
            settings._report_target("wandb", tmp_path)
    for off in ("false", "", "0"):
        monkeypatch.setenv("WANDB_DISABLED", off)
        assert settings._report_target("auto", tmp_path) == "wandb"


def test_random_values_are_accepted_or_refused_in_words(defaults):
    """No value leads to anything but acceptance or a ParameterError."""
    draw = random.Random(0)
    odd = [None, True, -1, 0, 1, 2**40, 0.5, float("nan"), float("inf"), "", " ", "None", [], {}, "0,1", "r4-joint"]
    for _ in range(500):
        name = draw.choice(list(PARAMETERS))
        value = draw.choice([*odd, "".join(draw.choices(string.printable, k=draw.randrange(20)))])
        try:
            settings.check(defaults | {name: value})
        except ParameterError as refusal:
            assert name.split("_")[-1] in str(refusal)
