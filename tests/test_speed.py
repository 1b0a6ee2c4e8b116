"""What is faster is equal: losses and gradients of each short cut against the long way."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from small_training import build, nf4_config
from transformers import Trainer, set_seed
from transformers.models.qwen2_vl import modeling_qwen2_vl

from helpers import collate, model, speed, trainer
from helpers.recipes import RECIPES
from helpers.settings import TINY_BASE

R1, R4 = RECIPES["r1-llm-only"][0], RECIPES["r4-joint"][0]


def load(**options):
    options = {"dtype": model.compute_dtype(), "device_map": {"": "cpu"}} | options
    return model.load(TINY_BASE, **options).requires_grad_(False)


def adapted(vlm, stage=R4, dropout=0.0):
    """Adapters that already do something: a fresh one's B is zero, and so would be the gradients of A."""
    set_seed(0)
    tuned = get_peft_model(vlm, LoraConfig(r=4, lora_dropout=dropout, target_modules=stage.lora_targets))
    model.trainable_to_fp32(tuned)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return tuned


def gradients(vlm):
    return {name: weight.grad for name, weight in vlm.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_adapters_of_other_kinds_compute_what_peft_makes_of_them(kind, processor, rows):
    """DoRA and a bias are left to PEFT: B A x alone would be another model, without a word."""
    tuned = get_peft_model(load(dtype=torch.float32), LoraConfig(r=4, target_modules=R4.lora_targets, **kind)).eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    batch = collate.Collator(processor, "Where?")(list(rows)[:2])
    with torch.no_grad():
        before = tuned(**batch).logits
        fused = speed.fuse_lora(tuned)
        assert (fused > 0) == ("use_rslora" in kind)
        torch.testing.assert_close(tuned(**batch).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["assistant", "all-text"])
def test_the_loss_and_its_gradients_are_those_of_all_logits(scope, tmp_path, processor, rows):
    """TRL's loss, which leaves out the logits that no label asks for, against the model's own from every token."""
    batch = collate.Collator(processor, "Where?", scope)([rows[i] for i in range(4)])
    sft = build("r4-joint", tmp_path, processor, rows)
    sft.model.float()
    for name, weight in sft.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    sft.model.eval()  # no dropout
    found = []
    for kind in (trainer.BoxTrainer, Trainer):
        sft.model.zero_grad()
        loss = kind.compute_loss(sft, sft.model, dict(batch))
        loss.backward()
        found.append((loss.item(), gradients(sft.model)))
    (ours, ours_grad), (full, full_grad) = found
    assert ours == pytest.approx(full, rel=1e-5)
    assert ours_grad.keys() == full_grad.keys() and len(full_grad) > 50
    for name, gradient in full_grad.items():
        assert torch.allclose(ours_grad[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("recipe", ["r1-llm-only", "r2-vision-only", "r4-joint"])
def test_a_step_in_fp32_is_the_step_under_bf16_autocast_to_its_rounding(recipe, tmp_path, processor, rows):
    """What trains where the CPU has no bf16: loss within .5 %, the gradient within 10 % of its size."""
    batch, found = collate.Collator(processor, "Where?")([rows[i] for i in range(4)]), []
    for dtype in (torch.float32, torch.bfloat16):
        sft = build(recipe, tmp_path / str(dtype), processor, rows, dtype=dtype)
        model.trainable_to_fp32(sft.model)
        sft.model.eval()  # no dropout
        with sft.accelerator.autocast():
            loss = sft.compute_loss(sft.model, dict(batch))
        loss.backward()
        found.append((loss.item(), torch.cat([grad.flatten() for grad in gradients(sft.model).values()])))
    (whole, fine), (half, coarse) = found
    assert half == pytest.approx(whole, rel=5e-3) and (fine - coarse).norm() < 0.1 * fine.norm()


@pytest.mark.parametrize("nf4", [False, True])
def test_lora_added_in_place_is_pefts_own(nf4, processor, rows):
    """Loss and gradients of a step in fp32, without dropout: as far apart as fp32 rounds."""
    batch, found = collate.Collator(processor, "Where?")([rows[i] for i in range(4)]), []
    in_fp32 = nf4_config(torch.float32) if nf4 else None
    tuned = adapted(load(quantization_config=in_fp32, dtype=torch.float32)).train()
    for change in (lambda vlm: None, speed.fuse_lora):
        change(tuned)
        tuned.zero_grad()
        loss = tuned(**batch).loss
        loss.backward()
        found.append((loss.item(), {name: gradient.clone() for name, gradient in gradients(tuned).items()}))
    (plain, slow), (short, fast) = found
    assert short == pytest.approx(plain, rel=1e-5) and slow.keys() == fast.keys() and len(slow) > 50
    for name, gradient in slow.items():
        assert (fast[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 3])
def test_lora_in_place_with_dropout_against_autograds_own_way(p, count):
    """`count` layers that share x, and its dropout; the mask is read off a layer whose W is 0 and A the identity."""
    layers = [torch.nn.Linear(12, 20 + i).double().requires_grad_(False) for i in range(count)]
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    a, b = ([torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
            for shapes in ([(4, 12)] * count, [(20 + i, 4) for i in range(count)]))
    torch.manual_seed(0)
    outs = speed.lora_products(x, layers, 2.0, p, a, b)
    torch.manual_seed(0)
    seed = int(torch.randint(2**31, ()))
    ones = torch.ones(15, 12, dtype=torch.float64)
    mask = speed.PlainPasses.down(ones, torch.eye(12).double(), seed, p, 1.0).view(3, 5, 12)
    expected = [layer(x) + 2 * (x * mask) @ one.T @ other.T for layer, one, other in zip(layers, a, b, strict=True)]
    assert (mask == 0).any() == (p > 0)
    weights = [torch.randn_like(out) for out in outs]
    ours = torch.autograd.grad(outs, (x, *a, *b), weights)
    for found, plain in zip((*outs, *ours), (*expected, *torch.autograd.grad(expected, (x, *a, *b), weights)),
                            strict=True):
        assert torch.allclose(found.double(), plain, rtol=1e-5, atol=1e-5)


def test_the_pass_by_pytorch_alone_is_dropout_and_a_product_too():
    x, a, gradient = (torch.randn(*shape, dtype=torch.float64) for shape in ((30, 20), (4, 20), (30, 4)))
    mask = speed.PlainPasses.down(torch.ones(30, 20).double(), torch.eye(20).double(), 5, 0.4, 1.0)
    assert torch.allclose(speed.PlainPasses.down(x, a, 5, 0.4, 3.0), 3 * (x * mask) @ a.T)
    of_x, of_a = speed.PlainPasses.up(x, a, gradient, 5, 0.4, 3.0, True)
    assert torch.allclose(of_x, 3 * gradient @ a * mask) and torch.allclose(of_a, 3 * gradient.T @ (x * mask))
    assert (mask == 0).any() and speed.PlainPasses.up(x, a, gradient, 5, 0.4, 3.0, False)[0] is None


def test_an_adapter_that_is_off_or_merged_takes_pefts_way(processor, rows):
    batch = collate.Collator(processor, "Where?")([rows[0]])
    tuned = adapted(load(dtype=torch.float32)).eval()
    with torch.no_grad():
        adapter = tuned(**batch).logits
        speed.fuse_lora(tuned)
        with tuned.disable_adapter():
            off = tuned(**batch).logits
        merged = tuned.merge_and_unload()(**batch).logits
    assert torch.equal(off, load(dtype=torch.float32)(**batch).logits)
    assert torch.allclose(merged, adapter, rtol=1e-3, atol=1e-3) and not torch.allclose(off, adapter, atol=1e-2)


def test_what_is_compiled_between_matrix_products_is_the_same(monkeypatch, processor, rows):
    """The graphs as the compiler sees them, run without its code generator; logits within bf16's rounding."""
    from torch._dynamo.backends.debugging import aot_eager  # no C compiler needed
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_eager))
    batch, vlm = collate.Collator(processor, "Where?")([rows[0]]), load(dtype=torch.float32).eval()
    with torch.no_grad():
        plain = vlm(**batch).logits
        own = [getattr(modeling_qwen2_vl, name) for name in speed.ROTATIONS]
        try:
            speed.compile_between(vlm)
            assert torch.allclose(vlm(**batch).logits, plain, rtol=1e-4, atol=1e-4)
            assert not set(own) & {getattr(modeling_qwen2_vl, name) for name in speed.ROTATIONS}
        finally:
            speed.plain_rotations()
        assert own == [getattr(modeling_qwen2_vl, name) for name in speed.ROTATIONS]


def test_on_a_cpu_lora_is_fused_and_nothing_is_compiled():
    tuned = adapted(load())
    assert speed.speed_up(tuned) == "LoRA is added in place; nothing is compiled: that pays on a GPU"
    assert {"forward" in module.__dict__ for module in tuned.modules() if isinstance(module, LoraLayer)} == {True}
    assert not any("forward" in module.__dict__ for module in tuned.modules() if isinstance(module, torch.nn.LayerNorm))
    spread = adapted(load())
    spread.hf_device_map = {"model.visual": 0, "model.language_model": 1}
    assert "nothing is fused" in speed.speed_up(spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cached_features_train_the_same_weights(tmp_path, processor, rows, dtype):
    """Two epochs of r1, the tower in every step against once before: losses and weights, to the last bit."""
    plain = build("r1-llm-only", tmp_path / "plain", processor, rows, nf4=True, dtype=dtype)
    once = build("r1-llm-only", tmp_path / "once", processor, rows, nf4=True, dtype=dtype)
    once.data_collator = speed.CachedFeaturesCollator(once.data_collator, once.model, rows,
                                                      tmp_path / "features.bin", 4)
    once.train_dataset = once.data_collator.rows
    once.model.base_model.model.model.visual.forward = None  # it does not run again
    for sft in (plain, once):
        set_seed(0)  # of LoRA's dropout
        sft.train()
    logs = [trainer.read_log(tmp_path / name / "log.jsonl") for name in ("plain", "once")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert all(torch.equal(weight, once._trainable()[name]) for name, weight in plain._trainable().items())
    assert not (tmp_path / "features.bin").exists()


def test_batches_of_encoded_pictures_are_the_collators_own(tmp_path, processor, rows):
    collator, vlm = collate.Collator(processor, "Where?"), load()
    cached = speed.CachedFeaturesCollator(collator, vlm, rows, tmp_path / "features.bin", 4)
    taken = [rows[i] for i in (5, 0, 9, 2)]
    expected, batch = collator(taken), cached(taken)
    tower = speed.vision_features(vlm, expected.pop("pixel_values"), expected["image_grid_thw"])
    assert torch.equal(batch.pop("image_features"), torch.cat(tower))
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


def test_features_are_cached_only_where_that_is_right(monkeypatch):
    assert speed.worth_caching(R1, augment=False, epochs=3)
    assert speed.worth_caching(RECIPES["r3-two-stage"][1], augment=False, epochs=2)
    for stage in (R4, RECIPES["r2-vision-only"][0], RECIPES["r3-two-stage"][0]):
        assert not speed.worth_caching(stage, augment=False, epochs=3)
    assert not speed.worth_caching(R1, augment=True, epochs=3)
    assert not speed.worth_caching(R1, augment=False, epochs=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not speed.worth_caching(R1, augment=False, epochs=3)


def test_the_longest_batch(rows):
    sized = rows.remove_columns("image_id").add_column("width", [100 * i for i in range(1, 17)])
    sized = sized.add_column("height", [300] * 16)
    three = collate.longest(sized, 3, 784, 99 * 784)
    tokens = collate.image_tokens(zip(sized["width"], sized["height"], strict=True), 784, 99 * 784)
    found = collate.image_tokens(zip(three["width"], three["height"], strict=True), 784, 99 * 784)
    assert found.tolist() == sorted(tokens, reverse=True)[:3] and found[2] > tokens.mean()
    assert len(collate.longest(sized, 99, 784, 64 * 784)) == 16


def test_larger_pieces_make_the_same_update(tmp_path, processor, rows):
    """One update of 4 pictures, at once and in two micro-batches: tokens count alike, wherever they stand."""
    found = []
    for size in (4, 2):
        sft = build("r4-joint", tmp_path / str(size), processor, rows, max_steps=1,
                    gradient_accumulation_steps=4 // size)  # fmt: skip
        sft._train_batch_size = size
        for layer in sft.model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        sft.train()
        found.append(next(log for log in sft.state.log_history if "grad_norm" in log))
    for name in ("loss", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=5e-3), name


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU of 24 GiB; a function that says what a training step takes, of (batch, model)."""
    gib = 2**30
    for name, value in {"is_available": True, "is_bf16_supported": True, "device_count": 1, "empty_cache": None,
                        "reset_peak_memory_stats": None, "max_memory_allocated": 10 * gib,
                        "get_per_process_memory_fraction": 1.0,
                        "mem_get_info": (24 * gib, 24 * gib), "memory_reserved": 0,
                        "get_device_properties": SimpleNamespace(total_memory=24 * gib)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return lambda takes: monkeypatch.setattr(speed, "_peak", lambda vlm, batch: gib * takes(batch, vlm))


def test_without_a_gpu_the_batch_is_taken_as_it_is(processor, rows):
    assert speed.fit(None, collate.Collator(processor, "Where?")([rows[0], rows[1]])) == speed.Fit()


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_is_tried_for_real(cached, tmp_path, processor, rows, request, monkeypatch):
    tuned, collator = adapted(load(dtype=torch.float32), R1), collate.Collator(processor, "Where?")
    if cached:
        collator = speed.CachedFeaturesCollator(collator, tuned, rows, tmp_path / "features.bin", 4)
        tuned.get_base_model().model.visual.forward = None  # it does not run again
    batch = collator([rows[0], rows[1]])
    request.getfixturevalue("gpu")
    assert speed.fit(tuned.eval(), batch) == speed.Fit()  # 10 GiB, as the stand-in says
    assert not gradients(tuned) and not tuned.training

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuned.get_base_model().model, "forward", out_of_memory)
    assert speed.fit(tuned.eval(), batch) == speed.Fit(True)


def test_layers_that_recompute_keep_what_memory_allows(gpu, processor, rows, capsys):
    """Attention of all vision layers first, then whole layers, the language model's and the tower's."""
    tuned = adapted(load(dtype=torch.float32))
    base = tuned.get_base_model()
    language, vision = list(base.model.language_model.layers), list(base.model.visual.blocks)
    batch = collate.Collator(processor, "Where?")([rows[i] for i in range(4)])

    def takes(batch, vlm, least=0.0, hidden=0):
        if not base.is_activation_checkpointing:
            return 12 * len(batch["labels"])
        attention = sum(isinstance(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("context_fn"),
                                   partial) for layer in vision)
        whole = [layer for layer in (*language, *vision) if not layer.gradient_checkpointing]
        return least + 0.1 * attention + len(whole) + hidden * (len(whole) > 2)

    def plan(whole, attention=True):
        return (dict.fromkeys(vision, "attention") if attention else {}) | dict.fromkeys(whole, "everything")

    for least, expected in ((21.9, plan([], False)), (21.2, plan([])), (19.0, plan(language[:2])),
                            (14.0, plan([*language, *vision[:3]]))):
        gpu(partial(takes, least=least))
        assert speed.fit(tuned, batch) == speed.Fit(True, expected)
        assert not base.is_activation_checkpointing
    assert "7 layers keep everything, 3 layers keep attention" in capsys.readouterr().out
    gpu(partial(takes, least=14.0, hidden=9))  # the last step shows that more is taken than counted
    assert speed.fit(tuned, batch).kept == plan(language[:1])


def test_what_layers_keep_changes_no_gradient(processor, rows):
    """Loss and gradients of a step with dropout in fp32; attention that is kept is not computed again."""
    batch, found = collate.Collator(processor, "Where?")([rows[0], rows[1]]), {}
    tuned = adapted(load(dtype=torch.float32, attn_implementation="sdpa"), dropout=0.3).train()
    speed.fuse_lora(tuned)
    base = tuned.get_base_model()
    vision, computed = base.model.visual.blocks, []
    real = speed._flash_on_a_cpu

    def counted(*tensors):
        computed[-1] += 1
        return real(*tensors)

    for kept in ("plain", "all", "nothing", "attention", "everything"):
        if kept == "all":
            speed.fuse_attention(tuned)
        elif kept != "plain":
            base.activation_checkpointing_enable()
            speed.KeepActivations({} if kept == "nothing" else dict.fromkeys(vision, kept)).on_train_begin()
        computed.append(0)
        torch.manual_seed(0)
        tuned.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "_flash_on_a_cpu", counted)
            loss = tuned(**batch).loss
            loss.backward()
        found[kept] = loss.item(), {name: grad.clone() for name, grad in gradients(tuned).items()}
    loss, plain = found["plain"]
    assert len(plain) > 50
    for other, grads in found.values():
        assert other == pytest.approx(loss, rel=1e-6) and grads.keys() == plain.keys()
        for name, gradient in plain.items():
            assert (grads[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    pictures = 2 * len(vision)
    assert computed == [0, pictures, 2 * pictures, pictures, pictures]
    assert not any(hasattr(layer.attn, "aside") for layer in vision)
