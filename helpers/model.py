"""The model at a stated precision: loaded whole or refused, where it lives, what is quantized, what trains."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.utils import is_flash_attn_2_available

from helpers import parity
from helpers.recipes import Stage
from helpers.settings import ParameterError, check_architecture

TOWERS = {"vision": "model.visual", "language": "model.language_model", "head": "lm_head"}


def load(path: str | Path, made_with: dict[str, Any] | None = None, *, ours: bool = False, inference: bool = False,
         revision: str | None = None, **options) -> Qwen2VLForConditionalGeneration:
    """`from_pretrained` of a Qwen2-VL (a folder or Hub id), from safetensors; every model is loaded here, whole.

    `made_with` is the `parity.record` of what it will be used with; `ours`: its parity.json must be there. `inference`:
    it only generates, so that its 4-bit layers may be repacked (`keep_4bit_trainable`). `options` are those of
    `from_pretrained`. Raises ParityError for a folder that was made with something else; ParameterError for another
    architecture, a file that cannot be read, and where weights are missing, unexpected or of another shape
    (transformers would fill them with random numbers and only warn).
    """
    if made_with is not None:
        parity.check(path, made_with, required=ours)
    try:
        check_architecture(str(path), PreTrainedConfig.get_config_dict(path, revision=revision)[0])
        loaded, found = Qwen2VLForConditionalGeneration.from_pretrained(
            path, revision=revision, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **options)
    except (OSError, SafetensorError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ParameterError(f"{path} cannot be loaded ({why}); copy or download it again.") from error
    shapes = [f"{name} is {list(has)} in place of {list(needed)}" for name, has, needed in found["mismatched_keys"]]
    for name, layer in linear_4bit(loaded).items():  # transformers quantizes a weight of any shape
        state = getattr(layer.weight, "quant_state", None)
        needed = [layer.out_features, layer.in_features]
        if state is not None and list(state.shape) != needed:
            shapes.append(f"{name}.weight is {list(state.shape)} in place of {needed}")
    wrong = {"missing": found["missing_keys"], "unexpected": found["unexpected_keys"], "of another shape": shapes}
    if any(wrong.values()):
        some = "; ".join(f"{len(names)} {kind}, such as {min(names)}" for kind, names in wrong.items() if names)
        raise ParameterError(f"{path} does not hold the weights that its config.json describes: {some}; copy it again "
                             "whole, or take the model that it was made from.")
    if not inference:
        keep_4bit_trainable(loaded)
    return loaded


def nf4(dtype: torch.dtype | None = None, skip: Sequence[str] = ("model.visual", "lm_head")) -> BitsAndBytesConfig:
    """QLoRA's base: NF4 with double quantization, computing in `dtype`; modules named in `skip` are not quantized."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype or compute_dtype(), llm_int8_skip_modules=list(skip))


def linear_4bit(model: nn.Module) -> dict[str, Linear4bit]:
    """`{full name: layer}` of the layers that bitsandbytes stores in 4 bits."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def keep_4bit_trainable(model: nn.Module) -> None:
    """From now on no 4-bit layer is repacked: the model may generate, in any mode, and train or be merged afterwards.

    On a CPU with AVX512-bf16 bitsandbytes repacks the weights of such a layer when it computes in eval mode. That is
    final: no gradient passes through it, dequantizing it gives wrong numbers, and its scales are rounded to bf16.
    Raises ValueError where a layer is repacked already.
    """
    check_4bit(model)
    for layer in linear_4bit(model).values():
        layer.support_avx512bf16_for_cpu = False


def check_4bit(model: nn.Module) -> None:
    """Raise ValueError that names a 4-bit layer which bitsandbytes has repacked for inference."""
    for name, layer in linear_4bit(model).items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(f"{name} was repacked when it computed in eval mode (bitsandbytes on a CPU with AVX512-"
                             "bf16) and can be neither trained nor merged: load the model again, with model.load.")


def gpus() -> list[int]:
    """Numbers of the GPUs that this process uses: its own under a launcher (ValueError where it started more processes
    than there are GPUs), else all that are visible."""
    visible = torch.cuda.device_count()
    if not visible or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return list(range(visible))
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or int(rank) >= visible:
        raise ValueError(f"the launcher gave this process LOCAL_RANK={rank}, and this machine shows {visible} GPU(s): "
                         "start one process a GPU, with accelerate or torchrun.")
    return [int(rank)]


def device_map() -> str | dict[str, int | str]:
    """Where `from_pretrained` puts the weights: on this process's GPU, balanced over several, or on the CPU."""
    if not torch.cuda.is_available():
        return {"": "cpu"}
    return {"": gpus()[0]} if len(gpus()) == 1 else "balanced"


def attention(training: bool = True) -> str:
    """On a GPU `flash_attention_2` where the package is installed and the GPU has it (Ampere or newer), else PyTorch's
    `sdpa`; on a CPU `sdpa` too, but `eager` to train in bfloat16, where its backward pass is faster."""
    if not torch.cuda.is_available():
        return "eager" if training and compute_dtype() == torch.bfloat16 else "sdpa"
    flash = torch.cuda.get_device_capability()[0] >= 8 and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def compute_dtype() -> torch.dtype:
    """What the model computes in: bfloat16 on a GPU and on a CPU that multiplies matrices in it (AMX, Arm); float32 on
    others, AVX512-bf16 among them: there the tiny model trains r4 2.5 x as fast in float32."""
    has = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or has.get("amx_bf16") or has.get("bf16")
    return torch.bfloat16 if fast else torch.float32


def patches_as_product() -> None:
    """Let Qwen2-VL's patch embedding (of every model) be the matrix product that it is: a convolution whose stride is
    its kernel. On a CPU in bf16 the convolution takes a third of the vision tower's time, the product almost none."""
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [patches, 1176] -> [patches, hidden]
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))

    modeling_qwen2_vl.PatchEmbed.forward = forward


def tower_of(name: str) -> str:
    """`vision`, `language` or `head`, from a parameter's or module's full name (PEFT's prefix allowed)."""
    name = name.removeprefix("base_model.model.")
    return next(tower for tower, prefix in TOWERS.items() if name.startswith(prefix))


def parameters_by_tower(model: nn.Module) -> dict[str, dict[str, int]]:
    """`{tower: {"total": weights, "trainable": weights}}`; LoRA's weights count in the tower they sit in."""
    table = {tower: {"total": 0, "trainable": 0} for tower in TOWERS}
    for name, weight in model.named_parameters():
        packed = getattr(weight, "quant_state", None)  # of bitsandbytes, which packs two 4-bit weights into a byte
        size = (packed or weight).shape.numel()
        table[tower_of(name)]["total"] += size
        table[tower_of(name)]["trainable"] += size if weight.requires_grad else 0
    return table


def dtypes_by_tower(model: nn.Module) -> dict[str, str]:
    """How each tower's weights are stored, such as `"uint8, bfloat16"` (uint8: two NF4 weights in a byte)."""
    dtypes = [(tower_of(name), str(weight.dtype).removeprefix("torch.")) for name, weight in model.named_parameters()]
    return {tower: ", ".join(dict.fromkeys(dtype for place, dtype in dtypes if place == tower)) for tower in TOWERS}


def nf4_layers(model: nn.Module) -> list[str]:
    """Full names of the layers that are quantized to NF4."""
    return [name for name, layer in linear_4bit(model).items() if layer.weight.quant_type == "nf4"]


def check_precision(model: nn.Module, precision: str) -> list[str]:
    """The NF4 layers. Raises ValueError unless these are every linear layer of the language model and no other (`nf4`),
    or none (`bf16`)."""
    quantized = set(nf4_layers(model))
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    expected = {name for name in linear if precision == "nf4" and tower_of(name) == "language"}
    for name in sorted(quantized ^ expected):
        found = "is NF4 and should not be" if name in quantized else "is not NF4 and should be"
        raise ValueError(f"{name} {found}: with precision={precision}, NF4 belongs in the language model's linear "
                         "layers alone (llm_int8_skip_modules decides).")
    return sorted(quantized)


def check_trainable(model: nn.Module, stage: Stage) -> dict[str, dict[str, int]]:
    """`parameters_by_tower`. Raises ValueError unless what should train does and can, in fp32, and no other."""
    check_4bit(model)
    table = parameters_by_tower(model)
    for tower, row in table.items():
        if (tower in stage.towers) != (row["trainable"] > 0):
            raise ValueError(f"{row['trainable'] or 'no'} weights of the {tower} tower train, and this stage trains "
                             f"{', '.join(stage.towers)} alone; look at target_modules.")
    if stage.trains == "full" and table["vision"]["total"] != table["vision"]["trainable"]:
        raise ValueError("a part of the vision tower is frozen, and this stage trains all of it.")
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise ValueError(f"{name} trains in {weight.dtype}: it must be float32, or a step of 1e-5 is rounded away.")
        if weight.requires_grad and stage.trains == "lora" and "lora_" not in name:
            raise ValueError(f"{name} trains, and this stage trains LoRA adapters alone.")
    return table


def trainable_to_fp32(model: nn.Module) -> None:
    """Store every trainable weight in fp32 (TRL casts LoRA to bf16 on a quantized base)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(base: nn.Module, folder: str | Path, trainable: bool = False) -> PeftModel:
    """`base` with the adapter in `folder`, frozen or `trainable`. Raises ParityError where it was trained on another
    base, and ValueError where keys of the file found no place: after a rename of modules PEFT only warns."""
    if Path(base.config._name_or_path).is_dir():  # of a Hub id the commit is not known here: `parity.check` takes it
        parity.check_base(folder, parity.base_of(base.config._name_or_path))
    file = load_file(Path(folder) / "adapter_model.safetensors")  # first: PEFT would also take a pickle
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    loaded = get_peft_model_state_dict(model)
    lost = sorted(set(file) ^ set(loaded))
    if lost:
        raise ValueError(f"adapter {folder}: {len(lost)} keys fit only the file or only the model, such as {lost[0]}.")
    return model.eval()


def layer_kinds(names: list[str]) -> dict[str, int]:
    """`{"model.language_model.layers.N.mlp.up_proj": 28, ...}`: names with their numbers folded, counted."""
    return dict(Counter(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def free_memory() -> None:
    """Give memory back after a model went out of use (delete your own references first)."""
    clear_device_cache(garbage_collection=True)
