"""The tiny base: its folder, its tokenizer, what it was trained on and how, and that it finds things."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers.scenes import THINGS
from helpers.tiny import TINY_DIR, check, train
from helpers.tiny.build import SPECIAL_TOKENS, VOCAB_SIZE, make_model, make_processor, save
from helpers.tiny.pictures import load_pool
from helpers.tiny.prompts import by_name, corpus, made_up_name, prompt_for

HASHES = json.loads((Path(__file__).parent / "scene_hashes.json").read_text())["tiny"]


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return Qwen2VLProcessor.from_pretrained(TINY_DIR)


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(TINY_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pool():
    return load_pool("check", 8)


@pytest.mark.parametrize("name", HASHES)
def test_files_are_those_that_every_committed_number_rests_on(name):
    assert hashlib.sha256((TINY_DIR / name).read_bytes()).hexdigest() == HASHES[name]


def test_the_code_makes_the_folder_that_is_shipped(processor, model, tmp_path):
    """Tokenizer, processor (the same weights lose two thirds of their IoU at another pixel budget), architecture."""
    made = make_processor()
    random_model = make_model(made.tokenizer)
    assert sum(p.numel() for p in random_model.parameters()) < 8_000_000
    shapes = {name: value.shape for name, value in model.named_parameters()}
    assert {name: value.shape for name, value in random_model.named_parameters()} == shapes
    save(random_model, made, tmp_path)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"):
        given, kept = ((folder / name).read_text() for folder in (tmp_path, TINY_DIR))
        assert given == kept or json.loads(given).items() >= json.loads(kept).items(), name
    assert Qwen2VLForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_special_tokens_and_digits_are_one_token_each_and_any_text_comes_back(processor, model):
    tokenizer = processor.tokenizer
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    assert len(tokenizer) == VOCAB_SIZE == model.config.text_config.vocab_size
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.tokenize("(278,495),(7,1000)") == [*"(278,495", "),(", *"7,1000)"]
    for text in ("Zażółć gęślą jaźń 123,45 g 🙂", "Пищевая ценность\n\n 営養", "nutrition-table"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_token_has_a_row_of_its_own_in_the_head(model, processor):
    """Else fine-tuning, which leaves the head as it is, could not write the tokens that pre-training never wrote."""
    rows = torch.nn.functional.normalize(model.lm_head.weight.detach().float(), dim=1)
    assert (rows @ rows.T).fill_diagonal_(0).max() < 0.95
    shared = make_model(processor.tokenizer, width=64, vision_layers=1, language_layers=1)
    shared.lm_head.weight.data[:300] = shared.lm_head.weight.data[0] * torch.linspace(1, 1.1, 300)[:, None]
    assert train.separate(shared, 0, length=shared.lm_head.weight[0].norm().item()) == 300
    rows = torch.nn.functional.normalize(shared.lm_head.weight.detach()[:300], dim=1)
    assert (rows @ rows.T).fill_diagonal_(0).max() < 0.95


def test_nothing_it_was_trained_on_names_a_nutrition_table(pool):
    rng = random.Random(0)
    texts = corpus() + [*THINGS] + [made_up_name(rng) for _ in range(20_000)]
    for scenes in pool.things.values():
        texts += [text for scene in scenes if scene for _ in range(50) for text in prompt_for(by_name(scene), rng)]
    assert not [text for text in texts if "nutri" in text.lower()]


@pytest.mark.slow
def test_training_repeats_goes_on_where_it_stopped_and_learns(tmp_path, pool):
    processor = make_processor(max_pixels=16 * 28**2)

    def go(steps: int, out: str) -> dict[str, torch.Tensor]:
        model = make_model(processor.tokenizer, width=64, vision_layers=1, language_layers=2)
        trained = train.train(model, processor, pool, tmp_path / out, steps=steps, batch=2, each=2, workers=0,
                              save_every=2, log_every=2)  # fmt: skip
        return dict(trained.named_parameters())

    once, again = go(2, "a"), go(2, "b")
    assert all(value.equal(again[name]) for name, value in once.items())
    restored = go(2, "a")  # nothing is left to train
    assert all(value.equal(restored[name]) for name, value in once.items())
    longer = go(20, "a")
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(2, 21, 2)) and log[-1]["loss"] < log[0]["loss"] - 0.5
    assert all(not value.equal(longer[name]) for name, value in once.items() if value.ndim == 2)


@pytest.mark.slow
def test_the_command_trains_saves_and_scores(tmp_path):
    scores = train.retrain(tmp_path, steps=1, batch=2, each=2, scenes=4, workers=1, checked=4)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores["things"]["n"] == scores["zero_shot"]["n"] == 4
    assert type(Qwen2VLProcessor.from_pretrained(tmp_path)) is Qwen2VLProcessor
    assert Qwen2VLForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_it_finds_things_and_writes_boxes_for_tables_without_knowing_them(processor, model, pool):
    things, tables = check.thing_prompts(pool, 24), check.table_prompts(pool)
    found = check.score(things, check.generate(model, processor, pool, things))
    zero_shot = check.score(tables, check.generate(model, processor, pool, tables))
    assert found["mean_iou"] > 0.5 and found["well_formed"] >= 0.95
    assert zero_shot["well_formed"] >= 0.8
