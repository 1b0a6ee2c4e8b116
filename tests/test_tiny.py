"""The tiny base: its folder, its tokenizer, what it was taught, and that it still finds things."""

import random

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers.tiny import TINY_DIR
from helpers.tiny.build import SPECIAL_TOKENS, VOCAB_SIZE, make_processor, make_random, train_tokenizer
from helpers.tiny.check import ask, score, table_items, thing_items
from helpers.tiny.forward import forward, frame_of
from helpers.tiny.pictures import load_pool, model_size, patches, take
from helpers.tiny.questions import (
    NAMES,
    answer_text,
    by_name,
    corpus,
    cropped,
    made_up_name,
    prompt_text,
    question,
)
from helpers.tiny.train import Questions, chat_ids, encode, token_map, train

WHOLE = np.array([0.0, 0.0, 1.0, 1.0])
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Detect the bounding box of the barcode."}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
]


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return Qwen2VLProcessor.from_pretrained(TINY_DIR)


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(TINY_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return load_pool(tmp_path_factory.mktemp("scenes"), "check", 8)


def test_size(model):
    assert sum(p.numel() for p in model.parameters()) < 8_000_000
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    files = [path for path in TINY_DIR.iterdir() if path.suffix in {".json", ".jinja", ".safetensors", ".jsonl"}]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20


def test_weights_are_bf16():
    assert Qwen2VLForConditionalGeneration.from_pretrained(TINY_DIR).dtype == torch.bfloat16


def test_the_processor_is_the_one_of_the_training(processor):
    """The same weights lose two thirds of their IoU at another pixel budget."""
    assert dict(processor.image_processor.size) == dict(make_processor(processor.tokenizer).image_processor.size)


def test_special_tokens_are_one_token_each(processor, model):
    tokenizer = processor.tokenizer
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token)) == 1, token
    assert len(tokenizer) == VOCAB_SIZE == model.config.text_config.vocab_size
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_digits_stand_alone(processor):
    assert processor.tokenizer.tokenize("(278,495),(7,1000)") == [
        *("(", "2", "7", "8", ",", "4", "9", "5", "),("),
        *("7", ",", "1", "0", "0", "0", ")"),
    ]


@pytest.mark.parametrize("text", ["Zażółć gęślą jaźń 123,45 g 🙂", "Пищевая ценность\n\n 営養", "nutrition-table"])
def test_any_text_comes_back(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_tokenizer_is_the_one_that_the_code_makes(processor):
    assert train_tokenizer().get_vocab() == processor.tokenizer.get_vocab()


def test_chat_template(processor):
    assert processor.apply_chat_template(CHAT) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Detect the bounding box of the barcode.<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n"
    )


def test_nothing_it_was_taught_names_a_nutrition_table(pool):
    rng = random.Random(0)
    texts = corpus() + [made_up_name(rng) for _ in range(20_000)]
    for scenes in pool.things.values():
        texts += [text for scene in scenes if scene for _ in range(50) for text in question(by_name(scene), rng)]
    assert not [text for text in texts if "nutri" in text.lower()]
    with pytest.raises(ValueError, match="may not be named"):
        by_name([("nutrition table", (0.1, 0.1, 0.2, 0.2))])


def test_questions_and_answers():
    boxes = np.array([[0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4]])
    assert prompt_text("price table") == "Detect the bounding box of the price table."
    assert answer_text("price table", boxes[1:]) == (
        "<|object_ref_start|>price-table<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
    )
    assert answer_text("logo", boxes).index("(100,200)") < answer_text("logo", boxes).index("(500,600)")


def test_crops_move_the_boxes_and_drop_what_is_cut():
    named = {
        "logo": np.array([[0.0, 0.0, 0.5, 0.5]]),
        "seal": np.array([[0.4, 0.4, 1.0, 1.0]]),
        "flag": np.array([[0.8, 0.8, 0.9, 0.9]]),
    }
    kept = cropped(named, np.array([0.0, 0.0, 0.5, 0.5]))
    assert list(kept) == ["logo"] and kept["logo"].tolist() == [[0, 0, 1, 1]]
    assert {name: boxes.tolist() for name, boxes in cropped(named, WHOLE).items()} == {
        name: boxes.tolist() for name, boxes in named.items()
    }
    assert cropped({"flag": np.array([[0.8, 0.8, 0.85, 0.85]])}, WHOLE) == {}  # too small to be asked for


def test_patches_are_the_processors(processor, pool):
    photo = next(iter(pool.images))
    images = pool.images[photo][:1]
    own = patches(take(images, WHOLE[None], model_size(photo, processor.image_processor.size)))[0]
    given = processor.image_processor(images=[images[0]], return_tensors="pt")["pixel_values"]
    assert own.shape == given.shape
    assert (own - given).abs().mean() < 0.01


def test_the_training_pass_is_the_models_own(processor, model, pool):
    photo = max(pool.things, key=lambda key: len(pool.things[key]))
    size = model_size(photo, processor.image_processor.size)
    pixels = patches(take(pool.images[photo][:2], WHOLE[None], size))
    ids = encode(processor, [("Find the logo.", "a"), ("Find the best-before stamp.", "b")] * 2, size)["input_ids"]
    with torch.no_grad():
        fast, middle = forward(model, pixels, ids, frame_of(model, size, ids[:1]))
        plain = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=pixels.repeat_interleave(2, 0).flatten(0, 1),
            image_grid_thw=torch.tensor([[1, size[0] // 14, size[1] // 14]] * 4),
        ).logits
    assert torch.allclose(fast, plain, atol=1e-3)
    assert middle.shape == (2, size[0] * size[1] // 784, model.config.text_config.hidden_size)


def test_the_chat_is_the_processors(processor, pool):
    photo = next(iter(pool.images))
    chat = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    given = processor(text=[chat], images=[pool.images[photo][0]])["input_ids"][0]
    size = model_size(photo, processor.image_processor.size)
    assert chat_ids(processor, "Detect the bounding box of the barcode.", size) == list(given)


def test_labels_are_the_answer_and_its_end(processor):
    batch = encode(processor, [("Find the logo.", "(1,2)")], (56, 84))
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == "(1,2)<|im_end|>"


def test_the_guides_map():
    named = {"logo": np.array([[0.0, 0.0, 1.0, 0.5]]), "seal": np.array([[0.6, 0.6, 0.7, 0.7]])}
    kinds, boxes = token_map(named, (112, 112))
    logo, seal = NAMES.index("logo") + 1, NAMES.index("seal") + 1
    assert kinds.reshape(4, 4).tolist() == [[logo] * 4, [logo] * 4, [0, 0, seal, 0], [0] * 4]
    assert boxes.reshape(4, 4, 4)[2, 2].tolist() == pytest.approx([0.6, 0.6, 0.7, 0.7])


def test_batches_repeat_with_the_seed(processor, pool):
    first, second = (next(iter(Questions(pool.things, processor, 2, 2, seed=3))) for _ in range(2))
    assert first["input_ids"].equal(second["input_ids"]) and (first["crops"] == second["crops"]).all()


def test_training_goes_on_where_it_stopped(tmp_path, pool):
    make_random(tmp_path / "base", width=64, vision_layers=1, language_layers=2, max_image_tokens=16)
    processor = Qwen2VLProcessor.from_pretrained(tmp_path / "base")

    def go(steps: int) -> torch.nn.Module:
        fresh = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base")
        return train(fresh, processor, pool, tmp_path / "run", steps=steps, batch=2, each=2, workers=0, save_every=2,
                     log_every=2)  # fmt: skip

    go(2)
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    went_on = go(2)
    assert saved["step"] == 2
    for name, value in went_on.named_parameters():
        assert value.equal(saved["mean"][name]), name
    go(4)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_it_finds_things_and_speaks_of_tables_without_knowing_them(processor, model, pool):
    things, tables = thing_items(pool, 24), table_items(pool)
    found = score(things, ask(model, processor, pool, things))
    zero_shot = score(tables, ask(model, processor, pool, tables))
    assert found["mean_iou"] > 0.5 and found["well_formed"] >= 0.95
    assert zero_shot["well_formed"] >= 0.8
