"""LayerNorm of tokens, plus what a layer is told of positions: one kernel forward and one backward, written in Triton.

For tokens x (B, N, D) and positions p (N, D), with mean and variance over D channels:

    x̂ = (x - mean) / sqrt(variance + eps)
    y = x̂ ⊙ γ + β + p

With g the gradient of y, and h = g ⊙ γ:

    ∂x = (h - mean(h) - x̂ · mean(h ⊙ x̂)) / sqrt(variance + eps)
    ∂p[n] = Σ_b g[b, n]        ∂β = Σ_n ∂p[n]        ∂γ = Σ_n Σ_b g[b, n] ⊙ x̂[b, n]

All of it is computed in float32, whatever the tensors hold, and rounded once, when it is written. A program holds one
token n of several samples b at a time (a tile), so it reads γ, β and p[n] once for all of them, and adds up ∂p[n] by
itself. x̂ is computed again in the backward pass: that takes less time than reading it would.

Nothing here is imported before the first tokens come that lie on a GPU: see `lape.surgery.fused`.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # channels of tokens that a program holds at a time: 16 in each of 128 threads
PROGRAMS = 1024  # of a backward pass, at least, where there is so much to do: a few for each unit of a large GPU


@triton.jit
def normed(tokens, inside, channels, eps):
    """Return x̂ of a tile (samples, channels), 0 where it is outside of the tokens, and 1 / sqrt(variance + eps)."""
    x = tl.load(tokens, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return tl.where(inside, centred * scale[:, None], 0.0), scale


@triton.jit(do_not_specialize=["samples", "count"])
def forward_kernel(
    tokens, gain, shift, position, output,
    samples, count, channels, eps,
    to_sample, to_token, to_channel,
    SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write y of one token of SAMPLES samples."""
    n = (tl.program_id(0) % count).to(tl.int64)
    b = (tl.program_id(0) // count).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (b < samples) & (d < channels)
    x_hat, _ = normed(tokens + b * to_sample + n * to_token + d * to_channel, inside, channels, eps)
    gamma = tl.load(gain + d, mask=d < channels, other=0.0).to(tl.float32)
    beta = tl.load(shift + d, mask=d < channels, other=0.0).to(tl.float32)
    p = tl.load(position + n * channels + d, mask=d < channels, other=0.0).to(tl.float32)
    tl.store(output + (b * count + n) * channels + d, x_hat * gamma + beta + p, mask=inside)


@triton.jit(do_not_specialize=["samples", "count", "tiles", "parts"])
def backward_kernel(
    gradient, tokens, gain, of_tokens, sums,
    samples, count, channels, eps, tiles, parts,
    gradient_to_sample, gradient_to_token, gradient_to_channel,
    to_sample, to_token, to_channel,
    of_tokens_to_sample, of_tokens_to_token, of_tokens_to_channel,
    SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write ∂x of one token of `tiles` times SAMPLES samples, and the sums of g and of g ⊙ x̂ over them."""
    n = (tl.program_id(0) % count).to(tl.int64)
    part = (tl.program_id(0) // count).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    gamma = tl.load(gain + d, mask=d < channels, other=0.0).to(tl.float32)
    sum_of_g = tl.zeros([SAMPLES, WIDTH], tl.float32)
    sum_of_gx = tl.zeros([SAMPLES, WIDTH], tl.float32)
    for tile in range(tiles):
        b = (part * tiles + tile) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
        inside = (b < samples) & (d < channels)
        x_hat, scale = normed(tokens + b * to_sample + n * to_token + d * to_channel, inside, channels, eps)
        at = b * gradient_to_sample + n * gradient_to_token + d * gradient_to_channel
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        sum_of_g += g
        sum_of_gx += g * x_hat
        h = g * gamma
        mean_of_h = tl.sum(h, axis=1) / channels
        mean_of_hx = tl.sum(h * x_hat, axis=1) / channels
        of_x = (h - mean_of_h[:, None] - x_hat * mean_of_hx[:, None]) * scale[:, None]
        at = b * of_tokens_to_sample + n * of_tokens_to_token + d * of_tokens_to_channel
        tl.store(of_tokens + at, of_x, mask=inside)
    at = (part * count + n) * channels + tl.arange(0, WIDTH)
    known = tl.arange(0, WIDTH) < channels
    tl.store(sums + at, tl.sum(sum_of_g, axis=0), mask=known)
    tl.store(sums + parts * count * channels + at, tl.sum(sum_of_gx, axis=0), mask=known)


def tile_of(tokens: Tensor) -> dict[str, Any]:
    """Return how many samples and channels of tokens (B, N, D) a program holds, and how it is compiled."""
    width = triton.next_power_of_2(tokens.shape[2])
    samples = min(max(TILE // width, 1), triton.next_power_of_2(tokens.shape[0]))
    # A product and a sum are rounded once, as in torch's own LayerNorm; unsaid, Triton 3.9 warns of another default.
    return {"SAMPLES": samples, "WIDTH": width, "num_warps": max(4, width // 512), "enable_fp_fusion": True}


def summed(tokens: Tensor, gain: Tensor, shift: Tensor, position: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return y, contiguous."""
    samples, count, channels = tokens.shape
    output = torch.empty((samples, count, channels), dtype=dtype, device=tokens.device)
    tile = tile_of(tokens)
    launch: Any = forward_kernel[(count * triton.cdiv(samples, tile["SAMPLES"]),)]
    with torch.cuda.device_of(tokens):  # Triton launches on the device that is set
        launch(
            *(tokens, gain.contiguous(), shift.contiguous(), position.contiguous(), output),
            *(samples, count, channels, eps),
            *tokens.stride(),
            **tile,
        )
    return output


def gradients(gradient: Tensor, tokens: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ∂x as x lies, and ∂γ, ∂β and ∂p in float32."""
    samples, count, channels = tokens.shape
    tile = tile_of(tokens)
    needed = triton.cdiv(samples, tile["SAMPLES"])
    tiles = triton.cdiv(needed, min(needed, triton.cdiv(PROGRAMS, count)))  # of a program
    parts = triton.cdiv(needed, tiles)
    of_tokens = torch.empty_like(tokens)
    sums = torch.empty((2, parts, count, channels), dtype=torch.float32, device=tokens.device)
    launch: Any = backward_kernel[(count * parts,)]
    with torch.cuda.device_of(tokens):
        launch(
            *(gradient, tokens, gain.contiguous(), of_tokens, sums),
            *(samples, count, channels, eps, tiles, parts),
            *gradient.stride(),
            *tokens.stride(),
            *of_tokens.stride(),
            **tile,
        )
    by_token = sums.sum(1)  # few launches: for small models the host is slower than the card
    of_shift, of_gain = by_token.sum(1)
    return of_tokens, of_gain, of_shift, by_token[0]


class LayerNormPlus(torch.autograd.Function):
    """y with its gradients; no operator of `torch.library`, which takes the host longer to call."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gain: Tensor, shift: Tensor, position: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(tokens, gain, shift, position)
        ctx.eps = eps
        return summed(tokens, gain, shift, position, eps, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # a gradient of gradients: by operators that have one
            learns = [one for one, needed in zip(inputs, needs, strict=True) if needed]
            tokens, gain, shift, position = (one.float() for one in inputs)
            output = (F.layer_norm(tokens, gain.shape, gain, shift, ctx.eps) + position).to(gradient.dtype)
            found = iter(torch.autograd.grad(output, learns, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in needs), None, None
        found = gradients(gradient, inputs[0], inputs[1], ctx.eps)
        return *(part.to(one.dtype) for part, one in zip(found, inputs, strict=True)), None, None


def layer_norm_plus(
    tokens: Tensor, gain: Tensor, shift: Tensor, position: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Return LN(x) + p, contiguous, of a dtype, for tokens x (B, N, D) on any strides and positions p (N, D)."""
    if torch.is_grad_enabled():
        return LayerNormPlus.apply(tokens, gain, shift, position, eps, dtype)  # pyright: ignore[reportReturnType]
    return summed(tokens, gain, shift, position, eps, dtype)
