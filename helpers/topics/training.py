"""A model, rows and a trainer for a training of a few steps: what several topic notebooks need before their subject."""

import torch
from datasets import DatasetDict
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from trl import SFTConfig, SFTTrainer

from helpers import data, model
from helpers.collate import IGNORED, Collator
from helpers.model import nf4 as nf4
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE
from helpers.trainer import BoxTrainer

PROMPT = "Detect the bounding box of the nutrition table."


def load(config: BitsAndBytesConfig | None = None, dtype: torch.dtype | None = None, path: str = str(TINY_BASE)
         ) -> Qwen2VLForConditionalGeneration:
    """The frozen base, quantized as `config` says; all else in `dtype` (None: `model.compute_dtype()`)."""
    model.patches_as_product()
    return model.load(
        path, dtype=dtype or model.compute_dtype(), quantization_config=config, attn_implementation=model.attention(),
        device_map=model.device_map()).requires_grad_(False).eval()


@torch.inference_mode()
def completion_logits(vlm: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [n, vocabulary] on the CPU: the logits that choose each token inside the loss of a collated batch."""
    logits = vlm(**{name: tensor.to(vlm.device) for name, tensor in batch.items() if name != "labels"}).logits
    return logits[:, :-1].cpu()[batch["labels"][:, 1:] != IGNORED].float()


def rows_and_processor(scale: str = "tiny", path: str = str(TINY_BASE), **limit: int
                       ) -> tuple[DatasetDict, Qwen2VLProcessor]:
    """The scale's rows, at most `limit` of each split, and the processor of the model at `path`, with its budget."""
    budget = {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
    raw = data.load_raw(SCALES[scale]["dataset_id"], limit=limit)
    rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
    return rows, Qwen2VLProcessor.from_pretrained(path, **budget)


def trainer_for(vlm: nn.Module, rows, processor, folder, kind: type[SFTTrainer] = BoxTrainer, collator=None, **options
                ) -> SFTTrainer:
    """A trainer of `kind` for a short, silent training of what `vlm` has to train; `options` go to SFTConfig.

    `collator`: None for the project's own. `BoxTrainer` trains in fp32, whatever TRL has cast.
    """
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    usual = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
             "warmup_steps": 0.05, "bf16": model.compute_dtype() == torch.bfloat16, "gradient_checkpointing": False,
             "max_length": None, "remove_unused_columns": False, "use_cpu": not torch.cuda.is_available()}
    sft = kind(vlm, args=SFTConfig(str(folder), **quiet | usual | options), train_dataset=rows,
               processing_class=processor, data_collator=collator or Collator(processor, PROMPT))
    if issubclass(kind, BoxTrainer):
        model.trainable_to_fp32(vlm)
    sft.callback_handler.callbacks = [one for one in sft.callback_handler.callbacks
                                      if type(one).__name__ not in ("PrinterCallback", "ProgressBar")]
    return sft
