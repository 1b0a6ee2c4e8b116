"""Constrained decoding: whatever the model wants, its answer is in the format; a well-formed answer is not changed."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, Qwen2VLProcessor

from helpers.boxes import CATEGORIES
from helpers.grammar import Grammar, GrammarConstraint
from helpers.messages import NO_TABLE, parse_text, target_text
from helpers.settings import TINY_BASE


@pytest.fixture(scope="module")
def tokenizer():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE).tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def walk(grammar, tokens):
    """Whether the grammar lets these tokens through, one after the other."""
    steps = grammar.answer()
    allowed = next(steps)
    for token in tokens:
        if token not in allowed:
            return False
        allowed = steps.send(token)
    return True


def decode_greedily(tokenizer, wishes, constraint, prompt_length):
    """What greedy decoding makes of `wishes` [steps, N, vocabulary], scores that do not look at the answer."""
    answers = torch.zeros(wishes.shape[1], prompt_length, dtype=torch.long)
    for scores in wishes:
        scores = LogitsProcessorList([constraint])(answers, scores.clone())
        answers = torch.cat([answers, scores.argmax(-1, keepdim=True)], dim=1)
    return answers[:, prompt_length:].tolist()


def test_any_model_answers_in_the_format(tokenizer):
    grammar, limit = Grammar(tokenizer, max_new_tokens=128), 128
    wishes = torch.randn(limit, 64, len(tokenizer), generator=torch.Generator().manual_seed(0))
    wishes[:, :32, grammar.end] -= 10  # half of the rows never want to stop
    answers = decode_greedily(tokenizer, wishes, GrammarConstraint(grammar, 5), prompt_length=5)
    counts = []
    for answer in answers:
        assert grammar.end in answer
        text = tokenizer.decode(answer[: answer.index(grammar.end)])
        parsed = parse_text(text)
        assert not parsed.rejected and set(parsed.labels) <= set(CATEGORIES), text
        assert parsed.empty_answer == (text == NO_TABLE)
        counts.append(len(parsed.labels))
    assert 0 in counts and max(counts) == grammar.max_boxes > 1


def test_every_pair_of_edges_can_be_written(tokenizer):
    grammar = Grammar(tokenizer, max_new_tokens=64)
    head = ids(tokenizer, "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(")
    edges = (0, 1, 9, 10, 99, 100, 101, 499, 998, 999, 1000)
    for x0, x1 in itertools.product(edges, edges):
        answer = head + ids(tokenizer, f"{x0},7),({x1},8)<|box_end|><|im_end|>")
        assert walk(grammar, answer) == (x0 < x1), (x0, x1)
    for number in ("00", "01", "007", "1001", "", "-1", " 1"):
        assert not walk(grammar, head + ids(tokenizer, f"{number},7),(")), number


@pytest.mark.parametrize("objects", [
    {"bbox": [], "category_name": []},
    {"bbox": [[0.1, 0.2, 0.3, 0.4]], "category_name": ["nutrition-table-small-energy"]},
    {"bbox": [[0, 0, 1, 1], [0.5, 0.25, 1, 0.999]], "category_name": ["nutrition-table", "nutrition-table-text"]},
])
def test_a_well_formed_answer_is_not_changed(tokenizer, objects):
    answer = ids(tokenizer, target_text(objects) + "<|im_end|>")
    wishes = torch.nn.functional.one_hot(torch.tensor(answer), len(tokenizer)).float()[:, None]
    constraint = GrammarConstraint(Grammar(tokenizer, max_new_tokens=128), 3)
    assert decode_greedily(tokenizer, wishes, constraint, prompt_length=3) == [answer]


def test_names_are_a_choice_and_may_begin_alike(tokenizer):
    grammar = Grammar(tokenizer, ("table", "table 2", "barcode"), max_new_tokens=64)
    for name in ("table", "table 2", "barcode"):
        assert walk(grammar, ids(tokenizer, f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>(1"))
    assert not walk(grammar, ids(tokenizer, "<|object_ref_start|>nutrition-table<|object_ref_end|>"))


def test_what_cannot_work_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_new_tokens=20 leaves no room for a box"):
        Grammar(tokenizer, max_new_tokens=20)
    with pytest.raises(ValueError, match="at least one"):
        Grammar(tokenizer, (), max_new_tokens=64)

    class WholeNumbers:
        unk_token_id = None

        def convert_tokens_to_ids(self, token):
            return 0

        def encode(self, text, **options):
            return [0]

        def tokenize(self, text):
            return [text]

    with pytest.raises(ValueError, match="each digit must be a token"):
        Grammar(WholeNumbers(), max_new_tokens=64)
