"""The tiny base's prompts and completions: things in the scenes by their name, never a nutrition panel.

A prompt names a thing; the completion is all boxes of that name in the grounding format, with the name in hyphens. One
prompt in ten carries a made-up name for one of the things: so the base learns to copy a name that it does not know,
letter by letter, and to give a box all the same.
"""

import random
import re
from collections.abc import Sequence

import numpy as np

from helpers.boxes import xyxy_unit_to_yxyx_unit
from helpers.messages import target_text
from helpers.scenes import TABLES, THINGS

PROMPTS = (
    "Detect the bounding box of the {name}.",
    "Find the {name}.",
    "Where is the {name} in this picture?",
    "Locate the {name} and give its box.",
)
PROMPT_WEIGHTS = (0.85, 0.05, 0.05, 0.05)
MADE_UP_SHARE, MOST_BOXES = 0.1, 3
SMALLEST = 0.08  # of the picture's side: an image token is about .1 wide
WHOLE = np.array([0.0, 0.0, 1.0, 1.0])

# the tokenizer's training text, beside prompts and completions
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu zen bra clo dri fle gno pri stu tra".split()
WORDS = "table list text small energy label panel sign mark box line note seal code area block part".split()
TEXTS = (
    *("system", "user", "assistant", "You are a helpful assistant.", "there is no such thing in the picture"),
    "The picture shows the packaging of a product, with its label, its text and a panel or two.",
    "The answer names the thing and gives the box as integers from 0 to 1000, x first.",
)


def prompt_text(name: str, rng: random.Random | None = None) -> str:
    """The prompt for a name; without `rng` in the first phrasing, which is the project's own."""
    form = PROMPTS[0] if rng is None else rng.choices(PROMPTS, PROMPT_WEIGHTS)[0]
    return form.format(name=name)


def completion_text(name: str, boxes: np.ndarray) -> str:
    """The completion for `boxes` [N, 4] (x0, y0, x1, y1 in 0-1), N >= 1: `price table` is written `price-table`."""
    label = name.replace(" ", "-")
    return target_text({"bbox": xyxy_unit_to_yxyx_unit(boxes).tolist(), "category_name": [label] * len(boxes)})


def made_up_name(rng: random.Random) -> str:
    """A name that means nothing: one to three words of syllables, letters or common words."""
    words = []
    for _ in range(rng.choice((1, 2, 2, 2, 3))):
        kind = rng.random()
        if kind < 0.4:
            words.append("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))))
        elif kind < 0.7:
            words.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))))
        else:
            words.append(rng.choice(WORDS))
    return " ".join(words)


def corpus() -> list[str]:
    """The texts that the tokenizer is trained on; none names a nutrition table."""
    rng, box = random.Random(0), np.array([[0.1, 0.2, 0.3, 0.4]])
    texts = [text for text in TEXTS for _ in range(50)]
    for name in THINGS:
        texts += [form.format(name=name) for form in PROMPTS for _ in range(10)]
        texts += [re.sub(r"<\|.*?\|>", " ", completion_text(name, box))] * 10
    texts += [f" {word}-{word}" for word in WORDS for _ in range(10)]
    return texts + [made_up_name(rng) for _ in range(300)]


def by_name(things: Sequence[tuple[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    """Name -> boxes [N, 4] (x0, y0, x1, y1 in 0-1) of a scene's things."""
    names = sorted({name for name, _ in things})
    return {name: np.array([box for other, box in things if other == name]) for name in names}


def cropped(named: dict[str, np.ndarray], crop: np.ndarray, visible: float = 0.5) -> dict[str, np.ndarray]:
    """The same inside `crop` [4] (x0, y0, x1, y1 in 0-1), in the crop's own units.

    A name is kept when each of its boxes lies either outside the crop or inside it by at least `visible` of its area,
    when they are `MOST_BOXES` at most, and none is too small to be found (sides of `SMALLEST` on average).
    """
    if not named:
        return {}
    boxes, sides = np.concatenate(list(named.values())), crop[2:] - crop[:2]
    inside = ((boxes - crop[[0, 1, 0, 1]]) / np.tile(sides, 2)).clip(0, 1)
    size = (inside[:, 2:] - inside[:, :2]).prod(1)
    share = size * sides.prod() / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    fits = (share == 0) | ((share >= visible) & (size >= SMALLEST**2))
    kept, start = {}, 0
    for name, boxes in named.items():
        part = slice(start, start := start + len(boxes))
        shown = inside[part][share[part] > 0]
        if fits[part].all() and 0 < len(shown) <= MOST_BOXES:
            kept[name] = shown
    return kept


def prompt_for(named: dict[str, np.ndarray], rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion) about a thing of `named` (at least one), sometimes under a made-up name."""
    names = sorted(named)
    (name,) = rng.choices(names, [2 if name in TABLES else 1 for name in names])  # tables twice as often
    shown = made_up_name(rng) if rng.random() < MADE_UP_SHARE else name
    shown = name if "nutri" in shown else shown  # the base is never told of nutrition
    return prompt_text(shown, rng), completion_text(shown, named[name])
