"""On which tokens of a sequence the loss is computed."""

import html
from itertools import groupby

import numpy as np
from IPython.display import HTML
from numpy.typing import ArrayLike

_TRAINED = "background:#cfe8f7;color:#003a5d;border-bottom:2px solid #0072B2"
_MASKED = "background:#eeeeee;color:#666666"


def label_mask(tokenizer, input_ids: ArrayLike, labels: ArrayLike, title: str = "") -> HTML:
    """A sequence token by token: where the loss is computed blue and underlined, masked (label -100) grey.

    `input_ids` and `labels` of one sequence, [T]. A token that stands more than three times in
    a row is shown once and counted.
    """
    ids, trained = np.asarray(input_ids).tolist(), (np.asarray(labels) != -100).tolist()
    pieces = []
    for (token, counts), run in groupby(zip(ids, trained, strict=True)):
        count = len(list(run))
        text = html.escape(tokenizer.decode([token])).replace("\n", "⏎").replace(" ", "&nbsp;")
        texts = [f"{text} × {count}"] if count > 3 else [text] * count
        style = f"{_TRAINED if counts else _MASKED};padding:0 2px;margin:1px;display:inline-block"
        pieces += [f'<span style="{style}">{text}</span>' + ("<br>" if "⏎" in text else "") for text in texts]
    head = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    body = f"{head}{''.join(pieces)}<p>{sum(trained)} of {len(ids)} tokens are trained on</p>"
    return HTML(f'<div style="font-family:monospace;font-size:12px;line-height:1.7">{body}</div>')
