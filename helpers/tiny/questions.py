"""What the tiny base is asked and what it must answer: things in the scenes by their name, never a nutrition panel.

A question is (name, boxes); the answer is Qwen2-VL's grounding format with the name in hyphens, all boxes of that
name in reading order. One question in ten carries a made-up name for one of the things: so the base learns to copy a
name it does not know, and to answer with a box all the same.
"""
import random

import numpy as np

PROMPTS = (
    "Detect the bounding box of the {name}.",
    "Find the {name}.",
    "Where is the {name} in this picture?",
    "Locate the {name} and give its box.",
)
PROMPT_WEIGHTS = (0.85, 0.05, 0.05, 0.05)
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu zen bra clo dri fle gno pri stu tra".split()
WORDS = "table list text small energy label panel sign mark box line note seal code area block part".split()

# texts the tokenizer is trained on, beside the prompts: what stands on packaging and in the project's own sentences
THING_NAMES = (
    "barcode", "logo", "product name", "ingredient list", "price table", "cooking times", "best before date",
    "net weight", "recycling sign", "allergen note", "serving picture", "address block", "organic seal", "price tag",
)  # fmt: skip
TEXTS = (
    "You are a helpful assistant.",
    "system",
    "user",
    "assistant",
    "The picture shows the packaging of a product, with its label, its text and a panel or two.",
    "The answer names the thing and gives the box as integers from 0 to 1000, x first.",
    "there is no such thing in the picture",
)


def label_of(name: str) -> str:
    """The name as an answer writes it: `price table` -> `price-table`."""
    return name.strip().replace(" ", "-")


def spoken(name: str) -> str:
    """The name as a prompt writes it: `price-table` -> `price table`."""
    return name.strip().replace("-", " ")


def answer(name: str, boxes: np.ndarray) -> str:
    """Grounding text for `boxes` [N, 4] (x0, y0, x1, y1 in 0-1), N >= 1, in the order given."""
    if len(boxes) == 0:
        raise ValueError(f"no box for {name!r}: a question needs at least one")
    unit = f"<|object_ref_start|>{label_of(name)}<|object_ref_end|><|box_start|>"
    corners = np.clip(np.rint(np.asarray(boxes, np.float64) * 1000), 0, 1000).astype(int)
    return "".join(f"{unit}({x0},{y0}),({x1},{y1})<|box_end|>" for x0, y0, x1, y1 in corners.tolist())


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


def prompt(name: str, rng: random.Random | None = None) -> str:
    """The question for a name; without `rng` the first phrasing, which is the project's own."""
    form = PROMPTS[0] if rng is None else rng.choices(PROMPTS, PROMPT_WEIGHTS)[0]
    return form.format(name=spoken(name))


CORPUS = [
    *(text for text in TEXTS for _ in range(50)),
    *(form.format(name=spoken(name)) for name in THING_NAMES for form in PROMPTS for _ in range(10)),
    *(answer(name, np.array([[0.1, 0.2, 0.3, 0.4]])) for name in THING_NAMES for _ in range(10)),
    *(f" {word}-{word}" for word in WORDS for _ in range(10)),
    *SYLLABLES,
]
