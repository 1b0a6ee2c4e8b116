"""Parameters: read from papermill's cell or the command line, and refused with one sentence."""

import ast
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator
from transformers import Qwen2VLProcessor

from helpers import runs, settings
from helpers.recipes import PARAMETERS, RECIPES, REVISIONS, SCALES
from helpers.runs import read_json, write_json
from helpers.settings import ParameterError


@pytest.fixture
def defaults(repo) -> dict:
    """The parameters cell of pipeline.py, as a namespace."""
    source = (repo / "pipeline.py").read_text().split('# %% tags=["parameters"]')[1].split("# %%")[0]
    names = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}
    return names


def test_the_cell_the_rules_and_papermill_name_the_same_parameters(defaults, repo):
    assert set(defaults) == set(PARAMETERS) == set(papermill.inspect_notebook(str(repo / "pipeline.ipynb")))
    settings.check(defaults)


def settle(defaults, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pipeline.py", *arguments])
    return settings.settle(dict(defaults))


def refusal(defaults, monkeypatch, *arguments):
    with pytest.raises(ParameterError) as refused:
        settle(defaults, monkeypatch, *arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_was_not_given_comes_from_the_scale_and_the_recipe(defaults, monkeypatch):
    run = settle(defaults, monkeypatch)
    assert run.scale == "tiny" and run.recipe == "r4-joint" and run.model_id == "embedded"
    assert run.values.items() >= SCALES["tiny"].items() and run.folder.name == "qwen2vl-nutrition-detection-r4-joint"
    assert run.merged_folder.name == "qwen2vl-nutrition-detection-r4-joint-merged"
    run = settle(defaults, monkeypatch, "recipe=r3-two-stage")
    names = [stage.folder.name for stage in run.stages]
    assert names == ["qwen2vl-nutrition-detection-r3-stage1", "qwen2vl-nutrition-detection-r3-stage2"]
    assert run.folder == run.stages[-1].folder and run.merged_folder.name.endswith("-r3-merged")
    assert run.stages[1].base == str(run.stages[0].result) and not run.stages[1].start
    run = settle(defaults, monkeypatch, "memory=low", "batch_size=3")
    assert (run.batch_size, run.accumulation, run.gradient_checkpointing, run.predict_batch_size) == (3, 4, True, 8)
    assert "needs the base in nf4" in refusal(defaults, monkeypatch, "memory=low", "precision=bf16")


def test_r5_goes_on_with_the_adapter_of_a_stage_that_is_r1s_own(defaults, monkeypatch):
    alone = settle(defaults, monkeypatch, "recipe=r1-llm-only", "learning_rate=0.002")
    run = settle(defaults, monkeypatch, "recipe=r5-reward", "learning_rate=0.002", "reward_learning_rate=3e-5",
                 "reward_beta=0")
    labels, rewards = run.stages
    assert [stage.folder.name for stage in run.stages] == [f"{settings.PROJECT}-r5-reward-r1", run.folder.name]
    assert rewards.base == labels.base == run.model_path and (labels.start, rewards.start) == (None, labels.result)
    assert (labels.learning_rate, rewards.learning_rate) == (0.002, 3e-5)
    assert runs.training_values(run, labels.stage) == runs.training_values(alone)
    assert runs.training_values(run, rewards.stage)["reward_beta"] == 0


@pytest.mark.parametrize(
    "argument, words",
    [
        ("recipe=r5", ["recipe='r5'", "r1-llm-only", "r4-joint"]),
        ("recpie=r4-joint", ["recpie", "did you mean recipe"]),
        ("reward_completions=1", ["reward_completions=1", "from 2"]),
        ("epochs=three", ["epochs='three'", "number above 0"]),
        ("lora_rank=0", ["lora_rank=0", "whole number from 1"]),
        ("batch_size=True", ["batch_size=True"]),
        ("seed=None", ["seed=None"]),
        ("epochs=inf", ["epochs=inf", "number above 0"]),
        ("lora_dropout=-nan", ["lora_dropout=nan", "from 0 to below 1"]),
        ("prompt=None", ["prompt=None", "text for every picture"]),
        ("prompt=Where is <|image_pad|>?", ["prompt='Where is <|image_pad|>?'", "without special tokens"]),
        ("run_name=\udce9", [r"'run_name=\udce9'", "not UTF-8"]),
        ("gpus=a", ["gpus='a'", "0,1"]),
        ("max_pixels=784", ["min_pixels", "max_pixels=784"]),
        ("model_id=./nowhere", ["./nowhere", "config.json"]),
        ("model_id=nobody/nothing", ["nobody/nothing", "HF_TOKEN"]),
        ("output_root=/proc/nowhere", ["output_root='/proc/nowhere'", "cannot be written"]),
        ("scale=7b", ["scale=7b", "needs 22 GiB", "no GPU", "scale=tiny"]),
        ("run_name=../x", ["run_name='../x'"]),
        ("keep=best", ["keep='best'", "eval_steps"]),
        ("constrained=1", ["constrained=1", "True or False"]),
        ("r4-joint", ["'r4-joint'", "name=value"]),
    ],
)
def test_bad_input_is_refused_with_one_sentence(defaults, monkeypatch, argument, words):
    said = refusal(defaults, monkeypatch, argument)
    assert all(word in said for word in words), said


def test_what_the_machine_cannot_give_is_refused(defaults, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    place = f"{tmp_path}/file/below"
    with monkeypatch.context() as patch:
        patch.delenv("HF_DATASETS_CACHE", raising=False)
        patch.setattr("huggingface_hub.constants.HF_HOME", place)
        assert f"hf_home='{place}' cannot be written (" in refusal(defaults, monkeypatch, f"hf_home={place}")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ParameterError, match="launcher"):
            settings.choose_gpus("0,1")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 2**20})())
    assert "GiB free" in refusal(defaults, monkeypatch)


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
    assert all(namespace[name] == value for name, value in read.items())
    return read


def test_papermills_numbers_become_text_again_where_they_can_and_are_refused_where_not():
    assert injected(run_name=2024, prompt=123, model_id=True) == {"run_name": "2024", "prompt": "123",
                                                                  "model_id": "True"}
    assert injected(run_name=None, memory=None, epochs=1.5) == {"run_name": None, "memory": None, "epochs": 1.5}
    with pytest.raises(ParameterError, match="^run_name=100000.0 is not valid: expected text of letters"):
        settings.check({"run_name": injected(run_name=1e5)["run_name"]}, {"run_name": PARAMETERS["run_name"]})


@pytest.mark.parametrize("text", ["2024", "007", "1e5", "nan", "True", "0x10", "2024-01-01", "yes", "1_000",
                                  'Say "box" or \'none\' = \\n?', "one line\nand another", "où ? `x` $HOME {a} %d #"])
def test_text_stays_text_in_the_script_and_in_the_manifests_command(text, defaults, monkeypatch):
    run = settle(defaults, monkeypatch, f"prompt={text}", "run_name=1e5", "seed=3", "epochs=2.5", "gpus=0",
                 "memory=None")
    assert (run.prompt, run.run_name, run.seed, run.gpus, run.memory) == (text, "1e5", 3, "0", None)
    python, script, *words = shlex.split(runs.command(run))
    assert (python, script) == ("python", "pipeline.py")
    assert settle(defaults, monkeypatch, *words).values == run.values

    monkeypatch.setattr("IPython.get_ipython", lambda: "a kernel")
    words = shlex.split(runs.command(run))
    assert words[:3] == ["papermill", "pipeline.ipynb", "out.ipynb"]
    read = {name: _resolve_type(value) if how == "-p" else value
            for how, name, value in zip(words[3::3], words[4::3], words[5::3], strict=True)}
    assert injected(**read) == run.given


CHOSEN = """
import sys
from helpers import settings
assert not {"torch", "huggingface_hub"} & set(sys.modules), "imported before GPUs and cache were chosen"
settings.choose_gpus("0,1")
settings.choose_cache(sys.argv[1])
import datasets, huggingface_hub.constants, os
print(os.environ["CUDA_VISIBLE_DEVICES"], huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
"""


def test_gpus_and_caches_are_chosen_before_the_libraries(repo, tmp_path):
    ended = subprocess.run([sys.executable, "-c", CHOSEN, tmp_path / "given"], capture_output=True, text=True, cwd=repo)
    assert ended.stdout.split() == ["0,1", f"{tmp_path}/given/hub", f"{tmp_path}/given/datasets"], ended.stderr


def test_a_choice_that_comes_after_the_libraries_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    settings.choose_gpus("0,1")  # a cell that runs for the second time
    with pytest.raises(ParameterError, match="gpus=1 comes too late: CUDA has started"):
        settings.choose_gpus("1")
    with pytest.raises(ParameterError, match="hf_home='/elsewhere' comes too late: this process uses"):
        settings.choose_cache("/elsewhere")


def base(folder, **config):
    """The tiny base in a folder of its own, values of its config.json changed."""
    shutil.copytree(settings.TINY_BASE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_json(folder / "config.json", read_json(folder / "config.json") | config)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A Hub of models that are the tiny base: what is changed in their config.json, and a list of what was read."""
    config, read = {}, []

    def config_of(path, revision):
        read.append((path, revision))
        return read_json(Path(path if Path(path).is_dir() else settings.TINY_BASE) / "config.json") | config, {}

    processor = Qwen2VLProcessor.from_pretrained(settings.TINY_BASE)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", config_of)
    monkeypatch.setattr("transformers.Qwen2VLProcessor.from_pretrained", lambda path, revision: processor)
    return config, read


def test_another_architecture_and_a_quantized_base_are_refused_from_the_config_alone(defaults, monkeypatch, hub):
    config, read = hub
    for kind in ("qwen2_5_vl", None):
        config["model_type"] = kind
        said = refusal(defaults, monkeypatch, "model_id=a/b")
        assert f"model_id='a/b' is a model of type {kind!r}, and only qwen2_vl works here, such as Qwen/" in said
    config |= {"model_type": "qwen2_vl", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for recipe in (recipe for recipe, stages in RECIPES.items() if stages):
        said = refusal(defaults, monkeypatch, "model_id=a/b", f"recipe={recipe}")
        assert f"is quantized already (bitsandbytes), and recipe={recipe} trains and merges" in said
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    assert "is quantized (awq) and not to bitsandbytes' NF4" in refusal(
        defaults, monkeypatch, "model_id=a/b", "recipe=base")
    assert set(read) == {("a/b", None)}


def test_the_model_is_pinned_and_another_one_is_not(defaults, monkeypatch, hub, tmp_path):
    ((name, pinned),) = REVISIONS.items()
    for words, revision in (((), pinned), (("model_revision=v2",), "v2")):
        assert settle(defaults, monkeypatch, f"model_id={name}", *words).model_revision == revision
        assert hub[1][-1] == (name, revision)
    assert settle(defaults, monkeypatch, "model_id=some/one-else").model_revision is None
    base(tmp_path / "mirror")
    run = settle(defaults, monkeypatch, f"model_id={tmp_path}/mirror")
    assert run.model_revision is None and run.model_path == f"{tmp_path}/mirror"


@pytest.mark.parametrize("file, content, said", [  # None: the file is missing
    ("model.safetensors", None, "is not whole: model.safetensors cannot be read"),
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 9\n", "is not whole: model.safetensors"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "is not whole: b cannot be read"),
    ("adapter_config.json", "{}", "holds an adapter"),
    ("config.json", "{", "not a valid JSON file"),
    ("chat_template.jinja", None, "has no chat template"),
    ("tokenizer.json", None, "its tokenizer writes 00,01,02 as []"),  # transformers makes one of nothing
])
def test_a_folder_that_is_no_model_is_refused_at_the_start(file, content, said, defaults, monkeypatch, tmp_path):
    folder = base(tmp_path / "folder")
    (folder / file).write_text(content) if content else (folder / file).unlink()
    assert said in refusal(defaults, monkeypatch, f"model_id={folder}")


def test_a_model_whose_copy_was_cut_is_refused_at_the_start(defaults, monkeypatch, tmp_path):
    weights = base(tmp_path / "folder") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = refusal(defaults, monkeypatch, f"model_id={weights.parent}")
    assert "is not whole: model.safetensors cannot be read" in said


def test_seven_b_is_chosen_only_where_the_recipe_fits(monkeypatch):
    import torch

    card = type("card", (), {"total_memory": 24 * 2**30, "major": 8, "name": "A10"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    for cards, processes, recipe, scale in ((1, 1, "r4-joint", "7b"), (1, 1, "r2-vision-only", "tiny"),
                                            (2, 1, "r4-joint", "7b"), (2, 2, "r2-vision-only", "tiny")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        monkeypatch.setenv("WORLD_SIZE", str(processes))  # one card a process: their memory does not add up
        assert settings._choose_scale("auto", recipe, None) == scale
    with pytest.raises(ParameterError, match=r"2 GPU\(s\) with 24 GiB for each process \(one .* uses all 48\)"):
        settings._choose_scale("7b", "r2-vision-only", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for memory in (None, "low"):
        with pytest.raises(ParameterError, match="needs 36 .* 24 each, and the one with the vision tower takes 30"):
            settings._choose_scale("7b", "r2-vision-only", memory)
    monkeypatch.setenv("WORLD_SIZE", "2")
    card.total_memory = 15.7 * 2**30  # what a card of 16 GiB shows
    assert [settings._choose_scale("auto", "r4-joint", memory) for memory in (None, "low")] == ["tiny", "7b"]
    with pytest.raises(ParameterError, match=r"needs 22 GiB of GPU memory \(14 with memory=low\), and this machine sh"):
        settings._choose_scale("7b", "r4-joint", None)
    with pytest.raises(ParameterError, match="r5-reward trains on one GPU a process, and this one shows 2; give"):
        monkeypatch.setenv("WORLD_SIZE", "1")
        settings._choose_scale("tiny", "r5-reward", None)
    card.major, card.name = 7, "T4"
    with pytest.raises(ParameterError, match="T4 has no instructions"):
        settings._choose_scale("7b", "r4-joint", "low")


def test_the_curve_goes_to_wandb_only_where_that_asks_for_no_login(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    for given, chosen in (({}, "tensorboard"), ({"WANDB_MODE": "offline"}, "wandb"), ({"WANDB_API_KEY": "0"}, "wandb"),
                          ({"WANDB_MODE": "disabled"}, "tensorboard"),
                          ({"WANDB_MODE": "offline", "WANDB_DISABLED": "true"}, "tensorboard")):
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert settings._report_target("auto", tmp_path) == chosen
    with pytest.raises(ParameterError, match="report_to=wandb finds WANDB_DISABLED=true: set WANDB_API_KEY"):
        settings._report_target("wandb", tmp_path)
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ParameterError, match="report_to=wandb finds no credentials"):
        settings._report_target("wandb", tmp_path)
