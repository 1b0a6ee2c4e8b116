"""Precision, towers, trainable weights, adapters: each check is broken on purpose and must say so."""

import shutil

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_training import load_tiny, nf4_config
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

from helpers import collate, merge, model, predict, speed
from helpers.recipes import RECIPES, Stage
from helpers.settings import TINY_BASE, ParameterError

R1, R2, R4 = (RECIPES[name][0] for name in ("r1-llm-only", "r2-vision-only", "r4-joint"))


def base(precision="bf16", skip=("model.visual", "lm_head"), dtype=torch.bfloat16):
    return load_tiny(quantization_config=nf4_config(torch.bfloat16, skip) if precision == "nf4" else None, dtype=dtype)


def with_lora(vlm, targets, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(vlm, lora)


def changed(folder, change):
    """The tiny base with its weights (`{name: tensor}`) as `change` returns them."""
    shutil.copytree(TINY_BASE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    save_file(change(load_file(TINY_BASE / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj.weight"  # as the Hub's files name it


@pytest.mark.parametrize("nf4, change, said", [
    (False, lambda w: {name: weight for name, weight in w.items() if "layers.1." not in name},
     "12 missing, such as model.language_model.layers.1.input_layernorm.weight;"),
    (False, lambda w: {f"module.{name}": weight for name, weight in w.items()},
     "130 missing, such as lm_head.weight; 130 un"),
    (True, lambda w: {name.replace("up_proj", "w1"): weight for name, weight in w.items()},
     "4 missing, .*up_proj.weight; 4 unexpected, .*w1.weight;"),
    (True, lambda w: w | {"value_head.weight": torch.zeros(3)}, ": 1 unexpected, such as value_head.weight;"),
    *((nf4, lambda w: w | {UP: w[UP][8:].clone()},
       r": 1 of another shape, such as \S+layers.0.mlp.up_proj.weight is \[504, 192\] in place of \[512, 192\];")
      for nf4 in (False, True)),
])
def test_a_model_is_loaded_whole_or_refused_in_one_sentence(nf4, change, said, tmp_path):
    quantization = {"quantization_config": nf4_config()} if nf4 else {}
    with pytest.raises(ParameterError, match=f"folder does not hold the weights that its config.json .*{said}") as no:
        model.load(changed(tmp_path / "folder", change), dtype=model.compute_dtype(), **quantization)
    assert "\n" not in str(no.value)


def test_names_of_today_and_a_head_that_is_tied_are_whole(tmp_path):
    def today(weights):  # the tiny base has the names of the Hub's files, which are older
        assert UP in weights
        return {name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): weight
                for name, weight in weights.items()}

    exact = load_tiny()
    again = model.load(changed(tmp_path / "today", today), dtype=exact.dtype)
    assert all(torch.equal(weight, exact.state_dict()[name]) for name, weight in again.state_dict().items())
    exact.config.tie_word_embeddings = exact.config.text_config.tie_word_embeddings = True
    Qwen2VLForConditionalGeneration(exact.config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    tied = model.load(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight


def test_a_file_that_was_cut_and_another_architecture_are_refused(tmp_path):
    folder = changed(tmp_path / "folder", lambda weights: weights)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ParameterError, match="folder cannot be loaded .*copy or download it again"):
        model.load(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"qwen2_vl"', '"qwen2_5_vl"'))
    with pytest.raises(ParameterError, match="folder is a model of type 'qwen2_5_vl', and only qwen2_vl works here"):
        model.load(folder)


def test_a_model_in_nf4_generates_trains_and_generates(processor, rows):
    """On either kind of CPU; where it has AVX512-bf16, eval mode is what repacks."""
    tuned = with_lora(load_tiny(quantization_config=nf4_config()), R4.lora_targets)
    model.trainable_to_fp32(tuned)
    name, layer = next(iter(model.linear_4bit(tuned).items()))
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    batch = collate.Collator(processor, "Where?")([rows[0], rows[1]])
    for _ in range(2):
        tuned.eval()
        predict.generate_lines(tuned, processor, [rows[0]], "Where?", {"max_new_tokens": 2, "do_sample": False})
        model.check_trainable(tuned, R4)
        tuned.train()(**batch).loss.backward()
        assert all(weight.grad is not None for name, weight in tuned.named_parameters() if "lora_A" in name)
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), before), name


def test_the_branches_of_avx2_are_those_of_a_cpu_without_bf16(avx2, processor, rows):
    assert model.compute_dtype() == torch.float32
    vlm = load_tiny(quantization_config=nf4_config())
    assert vlm.dtype == torch.float32
    assert not any(layer.support_avx512bf16_for_cpu for layer in model.linear_4bit(vlm).values())
    test_a_model_in_nf4_generates_trains_and_generates(processor, rows)


def test_a_repacked_layer_is_neither_trained_nor_merged_and_the_sentence_says_why():
    finished = model.load(TINY_BASE, inference=True, quantization_config=nf4_config())  # may be repacked
    repacks = {layer.support_avx512bf16_for_cpu for layer in model.linear_4bit(finished).values()}
    assert repacks == {functional.has_avx512bf16()}
    tuned = with_lora(base("nf4"), R1.lora_targets)
    model.trainable_to_fp32(tuned)
    model.keep_4bit_trainable(tuned)
    layer = list(model.linear_4bit(tuned).values())[3]  # repacked as in eval mode on a CPU with AVX512-bf16
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    for refused in (lambda: model.check_trainable(tuned, R1), lambda: model.keep_4bit_trainable(tuned),
                    lambda: merge.merge_adapter(tuned, None)):  # fmt: skip
        with pytest.raises(ValueError, match="o_proj.*was repacked when it computed in eval mode .*model.load"):
            refused()


def test_nf4_is_in_the_language_model_and_nowhere_else():
    vlm, plain = base("nf4"), base()
    layers = model.check_precision(vlm, "nf4")
    depth = vlm.config.text_config.num_hidden_layers
    assert len(layers) == 7 * depth and all(name.startswith("model.language_model.layers.") for name in layers)
    assert model.dtypes_by_tower(vlm)["vision"] == "bfloat16"
    assert model.parameters_by_tower(vlm) == model.parameters_by_tower(plain), "two weights in a byte count as two"
    assert sum(row["total"] for row in model.parameters_by_tower(vlm).values()) == plain.num_parameters() < 8e6
    assert model.check_precision(plain, "bf16") == []
    for wrong, said in ((base("nf4", skip=("visual", "lm_head")), r"model\.visual\..* is NF4 and should not be"),
                        (plain, "is not NF4 and should be")):
        with pytest.raises(ValueError, match=said):
            model.check_precision(wrong, "nf4")


def test_lora_covers_every_linear_layer_of_both_towers():
    vlm = with_lora(base(), R4.lora_targets)
    linear = {name for name, layer in base().named_modules() if isinstance(layer, torch.nn.Linear)}
    hit = {name.removeprefix("base_model.model.") for name, layer in vlm.named_modules() if hasattr(layer, "lora_A")}
    assert hit == linear - {"lm_head"}


def half_a_tower():
    vlm = base()
    vlm.model.visual.blocks.float().requires_grad_(True)
    return vlm


def in_bf16():
    vlm = with_lora(base("nf4"), R1.lora_targets)
    for weight in vlm.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()
    return vlm


@pytest.mark.parametrize("stage, made, said", [
    (R4, lambda: with_lora(base(), R1.lora_targets), "no weights of the vision tower train"),
    (R1, lambda: with_lora(base(), R4.lora_targets), "vision tower train, and this stage trains language alone"),
    (R2, half_a_tower, "a part of the vision tower is frozen"),
    (Stage("lora", ("vision", "language", "head"), "bf16", {}), lambda: base().requires_grad_(True).float(),
     "trains LoRA adapters alone"),
    (R1, in_bf16, "trains in torch.bfloat16: it must be float32"),
])
def test_what_should_not_train_or_does_not_train_is_named(stage, made, said):
    vlm = made()
    with pytest.raises(ValueError, match=said):
        model.check_trainable(vlm, stage)
    if made is in_bf16:
        model.trainable_to_fp32(vlm)
        model.check_trainable(vlm, stage)


def test_an_adapter_loads_whole_or_not_at_all(tmp_path):
    vlm = with_lora(base(), R4.lora_targets)
    vlm.save_pretrained(tmp_path)
    model.load_adapter(base("nf4"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    renamed = {name.replace("model.visual", "visual"): weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="keys fit only the file or only the model"):
        model.load_adapter(base(), tmp_path)


def test_merging_is_right_and_a_wrong_merge_is_caught(tmp_path, processor, rows, monkeypatch):
    vlm = with_lora(base(dtype=torch.float32), R4.lora_targets)
    batch = collate.Collator(processor, "Where?")([rows[0]])
    merged, difference = merge.merge_adapter(vlm, batch)
    assert 0 < difference < 1e-5
    merge.save_whole(merged, processor, tmp_path / "merged")
    merge.check_reload(merge.fingerprints(merged), tmp_path / "merged")
    assert not (tmp_path / "merged.part").exists()
    merged.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match="lm_head.weight is not the weight that was saved"):
        merge.check_reload(merge.fingerprints(merged), tmp_path / "merged")
    with pytest.raises(ValueError, match="lm_head.extra is not the weight that was saved"):
        merge.check_reload({**merge.fingerprints(base()), "lm_head.extra": ""}, tmp_path / "merged")

    broken = with_lora(base(dtype=torch.float32), R4.lora_targets)
    broken.merge_and_unload = lambda **kwargs: broken.unload()  # forgets the adapter
    with pytest.raises(ValueError, match="rounding does not explain it: the merge is wrong"):
        merge.merge_adapter(broken, batch)
    logits = iter((torch.ones(3), torch.ones(3) + 2e-5))
    monkeypatch.setattr(merge, "_last_logits", lambda *given: next(logits))
    with pytest.raises(ValueError, match="logits differ by 2.00e-05 .* in torch.float32, .* the merge is wrong"):
        merge.merge_adapter(with_lora(base(dtype=torch.float32), R4.lora_targets), batch)


def test_a_merge_in_bf16_is_proven_layer_by_layer(processor, rows):
    """Rounding in bf16 hides a small adapter in the logits; in the weights of a layer it hides nothing."""
    for forget in (False, True):
        vlm = with_lora(base(), R4.lora_targets)
        for name, weight in vlm.named_parameters():
            weight.data *= 0.01 if "lora_B" in name else 1
        if forget:
            vlm.base_model.model.model.visual.blocks[0].attn.proj.merge = lambda **kwargs: None
            with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj: .*the merge is wrong"):
                merge.merge_adapter(vlm, None)
        else:
            _, difference = merge.merge_adapter(vlm, collate.Collator(processor, "Where?")([rows[0]]))
            assert 0 < difference < 0.1


def show_gpus(monkeypatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


def test_device_map(monkeypatch):
    assert model.device_map() == {"": "cpu"}
    show_gpus(monkeypatch, 1)
    assert model.device_map() == {"": 0}
    show_gpus(monkeypatch, 2)
    assert model.device_map() == "balanced" and model.gpus() == [0, 1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert model.device_map() == {"": 1} and model.gpus() == [1]
    for rank in ("2", None):  # more processes than GPUs; no launcher's
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK")
        with pytest.raises(ValueError, match=f"LOCAL_RANK={rank}, and this machine shows 2 GPU.*one process a GPU"):
            model.device_map()


def test_room_is_what_this_process_may_take_and_what_others_leave(monkeypatch):
    show_gpus(monkeypatch, 2)
    card = type("card", (), {"total_memory": 24})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.75)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4)
    free = {0: 16, 1: 18}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 24))
    assert speed._room() == 18  # three quarters of 24
    free[1] = 10
    assert speed._room() == 14


@pytest.mark.parametrize("gpus, capability, installed, dtype, attention", [
    (0, {"amx_bf16": True, "avx512_bf16": True}, True, torch.bfloat16, "eager"),
    (0, {"bf16": True}, True, torch.bfloat16, "eager"),
    (0, {"avx512_bf16": True, "amx_bf16": False}, True, torch.float32, "sdpa"),
    (0, {"avx2": True}, True, torch.float32, "sdpa"),
    (1, (9, 0), True, torch.bfloat16, "flash_attention_2"), (1, (9, 0), False, torch.bfloat16, "sdpa"),
    (1, (7, 5), True, torch.bfloat16, "sdpa"),
])
def test_dtype_and_attention_are_what_the_machine_is_fast_with(monkeypatch, gpus, capability, installed, dtype,
                                                               attention):
    show_gpus(monkeypatch, gpus, capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if gpus else capability)
    monkeypatch.setattr(model, "is_flash_attn_2_available", lambda: installed)
    assert (model.compute_dtype(), model.attention()) == (dtype, attention)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_patch_embedding_as_a_product_is_the_convolution(monkeypatch, dtype, bound):
    monkeypatch.setattr(modeling_qwen2_vl.PatchEmbed, "forward", modeling_qwen2_vl.PatchEmbed.forward)
    torch.manual_seed(0)
    embed, pixels = modeling_qwen2_vl.PatchEmbed(embed_dim=32).to(dtype), torch.randn(7, 3 * 2 * 14 * 14)
    convolved = embed(pixels)
    (slope,) = torch.autograd.grad(convolved.sum(), embed.proj.weight)
    model.patches_as_product()
    product = embed(pixels)
    torch.testing.assert_close(product, convolved, atol=bound, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(product.sum(), embed.proj.weight)[0], slope, atol=20 * bound, rtol=0)
