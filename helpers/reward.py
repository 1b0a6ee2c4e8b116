"""TRL's GRPOTrainer on rows of the project's schema: completions are sampled and scored by the boxes they draw."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

from helpers.evaluate.match import match_picture
from helpers.messages import END_OF_TURN
from helpers.trainer import ExactTrainer


class RewardTrainer(ExactTrainer, GRPOTrainer):
    """`GRPOTrainer` that goes on with a trained adapter, on prompts that are those of every training here.

    Args:
        model: with an adapter that trains; where `args.beta` is above 0, TRL keeps a frozen copy, which KL is taken to.
        args: with one epoch, rows in their order (`shuffle_dataset=False`), and new completions for each update.
        rows: of the project's schema; the pictures of all updates are drawn from them, each once before any twice.
        rewards: functions of a `match`, 0-1, which `args.reward_weights` weigh; they are logged by their names.
    """

    def __init__(self, model: PeftModel, args: GRPOConfig, *, rows: datasets.Dataset, steps: int, prompt: str,
                 rewards: Sequence[Callable[[dict], float]], processing_class, **kwargs):
        trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        processing_class = copy.deepcopy(processing_class)
        tokenizer = processing_class.tokenizer
        tokenizer.padding_side = "left"  # TRL pads tokens there, and leaves their types to the tokenizer
        pictures = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        train = pictures_of(rows, prompt, steps * pictures // args.num_generations, args.seed)
        super().__init__(model, args, reward_funcs=[_for_trl(one, tokenizer) for one in rewards], train_dataset=train,
                         processing_class=processing_class, **kwargs)
        for name, weight in trained.items():  # TRL has rounded them to bf16 where the base is quantized
            self.model.get_parameter(name).data = weight


def pictures_of(rows: datasets.Dataset, prompt: str, count: int, seed: int) -> datasets.Dataset:
    """`count` rows with TRL's `prompt`, in random order, each once before any comes again: one long epoch, which a
    training can be resumed in. (TRL's own sampler begins a resumed second epoch with the first one's order.)"""
    draw = np.random.default_rng(seed)
    order = np.concatenate([draw.permutation(len(rows)) for _ in range(-(-count // len(rows)))])[:count]
    return rows.add_column("prompt", [[{"role": "user", "content": prompt}]] * len(rows)).select(order)


def match(row: Mapping, text: str) -> dict:
    """What `evaluate` finds when it matches a completion's boxes with those of `row`, one to one.

    With all that were written: a box drawn twice, which `predict` drops, is one too many here.

    `text` is as it was generated, with `<|im_end|>` where it stopped. Of the record rewards need `true` and `predicted`
    (boxes), `box_ious` (one a true box, 0 where none was matched), `format_error` and `stopped`.
    """
    written, end, _ = text.partition(END_OF_TURN)
    return match_picture(dict(row), {"text": written, "stopped": bool(end)}, defaultdict(list))


def _for_trl(reward: Callable[[dict], float], tokenizer) -> Callable[..., list[float]]:
    """A reward as TRL calls it, with columns of the rows; TRL's own `completions` are without special tokens."""
    def scores(completion_ids: list[list[int]], image_id: list[str], objects: list[dict], **others) -> list[float]:
        rows = [{"image_id": one, "objects": boxes} for one, boxes in zip(image_id, objects, strict=True)]
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
        return [reward(match(row, text)) for row, text in zip(rows, texts, strict=True)]

    scores.__name__ = reward.__name__
    return scores
