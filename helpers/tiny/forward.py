"""The tiny base on many pictures of one size at once: the model's own numbers, several times as fast.

transformers walks through the pictures one by one and builds the positions anew for each; here a batch of pictures of
one size passes as one. A test compares the two.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

Turns = tuple[torch.Tensor, torch.Tensor]  # cos and sin of rotary positions


@dataclass(frozen=True)
class Frame:
    """What is the same for all batches of one picture size and text length."""

    start: int  # where the image tokens begin
    count: int  # how many there are
    vision: Turns  # [P, head size]
    language: Turns  # [1, L, head size]


@torch.no_grad()
def frame_of(model: torch.nn.Module, size: tuple[int, int], row: torch.Tensor) -> Frame:
    """The frame for pictures that the model sees at `size` (height, width) and one row of ids [1, L] (on the CPU)."""
    grid, core, device = torch.tensor([1, size[0] // 14, size[1] // 14]), model.model, model.lm_head.weight.device
    kinds = (row == model.config.image_token_id).int()
    positions, _ = core.get_rope_index(row, mm_token_type_ids=kinds, image_grid_thw=grid[None])
    language = core.language_model.rotary_emb(model.lm_head.weight, positions.to(device))
    return Frame(int(kinds[0].argmax()), int(kinds.sum()), rotary(core.visual, grid), language)


def picture_features(visual: torch.nn.Module, pixels: torch.Tensor, turns: Turns) -> torch.Tensor:
    """The vision tower on B pictures of one size: pixels [B, P, 1176] -> image tokens [B, P / 4, width]."""
    batch, count, _ = pixels.shape
    x = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))  # a convolution whose stride is its size
    for block in visual.blocks:
        x = vision_block(block, x, *turns)
    return visual.merger(x.reshape(batch * count, -1)).reshape(batch, count // 4, -1)


def vision_block(block: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One block on pictures of one size, x [B, P, width]; cos and sin [P, head size]."""
    attn, (batch, count, _) = block.attn, x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q.float(), k.float()))
    mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    x = x + attn.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
    return x + block.mlp(block.norm2(x))


def language_layer(layer: torch.nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One layer on sequences padded on the right, states [B, L, width]."""
    return layer(states, attention_mask=None, position_embeddings=(cos, sin))


def compile_layers() -> None:
    """Let torch fuse the many small operations of a block and of a layer: about twice as fast on a GPU.

    Each is compiled once, for any size of picture and length of text; where compiling fails, torch runs them as before.
    """
    global vision_block, language_layer
    torch._dynamo.config.suppress_errors = True
    vision_block = torch.compile(vision_block, dynamic=True)
    language_layer = torch.compile(language_layer, dynamic=True)


def rotary(visual: torch.nn.Module, grid: torch.Tensor, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, head size] of the vision tower's two-dimensional rotary positions, patches in groups of 2 x 2."""
    _, rows, columns = grid.tolist()
    device, quarter = visual.patch_embed.proj.weight.device, visual.blocks[0].attn.head_dim // 4
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).to(device)
    where = where.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2).float()
    turns = theta ** -(torch.arange(quarter, device=device) / quarter)
    angle = (where[:, :, None] * turns).flatten(1).repeat(1, 2)
    return angle.cos(), angle.sin()


def forward(
    model: torch.nn.Module, pixels: torch.Tensor, ids: torch.Tensor, frame: Frame
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model on B pictures of one size with k questions each, `ids` [B * k, L] padded on the right.

    Returns the logits [B * k, L, vocabulary] and, half-way up the language model, the states of each picture's image
    tokens [B, N, width].
    """
    core, language = model.model, model.model.language_model
    states, features = core.get_input_embeddings()(ids), picture_features(core.visual, pixels, frame.vision)
    each, picture = len(ids) // len(features), slice(frame.start, frame.start + frame.count)
    features = features.repeat_interleave(each, 0).to(states.dtype)
    states = torch.cat([states[:, : picture.start], features, states[:, picture.stop :]], 1)
    for number, layer in enumerate(language.layers, start=1):
        states = language_layer(layer, states, *frame.language)
        if number == len(language.layers) // 2:
            middle = states[::each, picture]
    return model.lm_head(language.norm(states)), middle
