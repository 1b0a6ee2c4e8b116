"""Decoding that lets only the answer's own format through: the form is fixed, names and digits stay the model's.

    answer = "no nutrition table" <|im_end|>  |  unit, at most `max_boxes` times, <|im_end|>
    unit   = <|object_ref_start|>NAME<|object_ref_end|><|box_start|>(x0,y0),(x1,y1)<|box_end|>

NAME is one of the categories; coordinates are whole numbers from 0 to 1000 without leading zeros, x0 < x1, y0 < y1.
"""

from collections.abc import Generator, Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from helpers.boxes import CATEGORIES
from helpers.messages import END_OF_TURN, NO_TABLE, check_tokenizer, target_text

Steps = Generator[list[int], int, None]  # gives the token ids that may follow, is sent the one that did


class Grammar:
    """The answer's grammar over a tokenizer's ids, as that tokenizer writes it.

    Args:
        tokenizer: one with Qwen2-VL's special tokens, where each digit is a token.
        names: what may be named.
        max_new_tokens: the limit of `generate`; an answer gets only as many units (`max_boxes`) as surely fit.
    Raises ValueError where a digit is not one token, there is no name, or no box fits into `max_new_tokens`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = CATEGORIES, *, max_new_tokens: int):
        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        check_tokenizer(tokenizer)
        if not names:
            raise ValueError("an answer needs names to choose from; give at least one.")
        self.digits = {ids(digit)[0]: digit for digit in "0123456789"}
        self.end, self.no_table = tokenizer.convert_tokens_to_ids(END_OF_TURN), ids(NO_TABLE)
        self.start, self.names = ids("<|object_ref_start|>"), [ids(name) for name in names]
        self.open, self.close = ids("<|object_ref_end|><|box_start|>("), ids(")<|box_end|>")
        self.comma, self.corner = ids(","), ids("),(")
        longest = longest_unit(tokenizer, names)
        self.max_boxes = (max_new_tokens - 1) // longest
        if self.max_boxes < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a box: it takes up to {longest} "
                             "tokens, and one more to stop.")

    def answer(self) -> Steps:
        """The steps of one answer: gives the token ids that may stand next and is sent the one that does, on and on.

        The first ids come from `next`. Behind the end there is only the end again.
        """
        yield from self._text()
        while True:
            yield [self.end]

    def _text(self) -> Steps:
        first = yield [self.start[0], self.no_table[0]]
        if first == self.no_table[0]:
            yield from _one_of([self.no_table[1:]])
            return
        for unit in range(1, self.max_boxes + 1):
            yield from _one_of([name + self.open for name in self.names])
            x0 = yield from self._number(0, 999, self.comma)
            y0 = yield from self._number(0, 999, self.corner)
            yield from self._number(x0 + 1, 1000, self.comma)
            yield from self._number(y0 + 1, 1000, self.close)
            if unit == self.max_boxes or (yield self.start + [self.end]) == self.end:
                return

    def _number(self, low: int, high: int, then: list[int]) -> Generator[list[int], int, int]:
        """A number from `low` to `high` and the tokens behind it; returns the number."""
        written = ""
        while True:
            more = [token for token, digit in self.digits.items() if _leads_to(written + digit, low, high)]
            done = [then[0]] if written and low <= int(written) <= high else []
            token = yield more + done
            if token == then[0]:
                yield from _one_of([then[1:]])
                return int(written)
            written += self.digits[token]


def _one_of(choices: list[list[int]]) -> Steps:
    """The tokens of one of `choices`, none of which begins another."""
    place = 0
    while any(len(choice) > place for choice in choices):
        token = yield sorted({choice[place] for choice in choices})
        choices = [choice for choice in choices if choice[place] == token]
        place += 1


def _leads_to(written: str, low: int, high: int) -> bool:
    """Whether a number from `low` to `high` begins with these digits; nothing follows a leading zero."""
    if written[0] == "0":
        return written == "0" and low == 0
    return any(int(written) * tail <= high and (int(written) + 1) * tail > low for tail in (1, 10, 100, 1000))


def longest_unit(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> int:
    """Tokens that a box with one of these names takes at most."""
    units = [target_text({"bbox": [[0, 0, 1, 1]], "category_name": [name]}) for name in names]
    return max(len(tokenizer.encode(unit, add_special_tokens=False)) for unit in units) + 4  # 0 may be 999


class GrammarConstraint(LogitsProcessor):
    """For one call of `model.generate`, greedy or sampling: what the grammar forbids gets -inf.

    The answers begin behind `prompt_length` tokens.
    """

    def __init__(self, grammar: Grammar, prompt_length: int):
        self.grammar, self.prompt_length, self.answers = grammar, prompt_length, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids` [N, T], `scores` [N, vocabulary] -> the scores of what may stand next, -inf elsewhere."""
        if input_ids.shape[1] == self.prompt_length:
            self.answers = [self.grammar.answer() for _ in input_ids]
            choices = [next(answer) for answer in self.answers]
        else:
            choices = [answer.send(last) for answer, last in zip(self.answers, input_ids[:, -1].tolist(), strict=True)]
        pairs = [(row, token) for row, tokens in enumerate(choices) for token in tokens]
        rows, tokens = torch.tensor(pairs, device=scores.device).T
        kept = torch.full_like(scores, -torch.inf)
        kept[rows, tokens] = scores[rows, tokens]
        return kept
