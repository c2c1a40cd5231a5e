"""PyTorch's attention and loss for the cases, on tensors of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import FORWARD, AttentionCase, Case, CcaCase, Problem

Call = Callable[[tuple[torch.Tensor, ...], dict[str, torch.Tensor]], torch.Tensor]


def attention(case: Case) -> Call:
    """``scaled_dot_product_attention``, for CCA with a chunk a problem."""

    def call(arrays: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = arrays
        if not isinstance(case, CcaCase):
            return attend(q, k, v, given)
        (B, T, N, H), shift = q.shape, case.chunk_len - 1
        readers = F.pad(q[:, shift:], (0, 0, 0, 0, 0, shift)).reshape(B * case.chunks, case.chunk_len, N, H)
        o = attend(readers, k.flatten(0, 1), v.flatten(0, 1), given).reshape(B, T, N, H)
        return F.pad(o[:, : T - shift], (0, 0, 0, 0, shift, 0))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        causal = isinstance(case, AttentionCase) and case.mask == "causal" and case.segments == 1
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=None if causal else mask(case, given),
            is_causal=causal, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return o.transpose(1, 2)

    return call


def mask(case: Case, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """bool [X, 1, 1 or Q, S], or None where every query sees every key."""
    if isinstance(case, CcaCase):
        return given["valid"].reshape(-1, 1, 1, case.keys) if case.absent else None
    assert isinstance(case, AttentionCase)
    if case.mask == "lengths":
        lengths = given["lengths"]
        return (torch.arange(case.keys, device=lengths.device) < lengths[:, None])[:, None, None]
    if case.mask == "causal":
        segments = given["segments"]
        same = segments[:, :, None] == segments[:, None, :]
        return torch.ones_like(same[0]).tril()[None, None] & same[:, None]
    return None


def loss(case: Case) -> Call:
    """``cross_entropy`` of all logits, widened to float32 as language models in PyTorch do."""

    def call(arrays: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden, table = arrays
        losses = F.cross_entropy((hidden @ table.T).float(), given["targets"].long(), reduction="none")
        return (losses * given["weights"]).sum()

    return call


CALLS = {"attention": attention, "loss": loss}


def random_problem(case: Case, number: int, dtype: str, device: str) -> Problem:
    """As :func:`benchmarks.kernel_cases.jax_problem`, drawn by PyTorch."""
    random = torch.Generator(device).manual_seed(number)
    drawn = [
        scale * torch.randn(shape, generator=random, device=device).to(getattr(torch, dtype))
        for shape, scale in zip((*case.shapes, case.output), (*case.scales, 1.0), strict=True)
    ]
    given = {name: torch.from_numpy(a).to(device) for name, a in case.given().items()}
    cotangent = drawn.pop()
    if not case.output:
        cotangent = torch.ones((), device=device)
    return Problem(tuple(a.requires_grad_() for a in drawn), given, cotangent)


def same_problem(problem: Problem, device: str) -> Problem:
    """The numbers of a problem of JAX."""

    def tensor(array: jax.Array) -> torch.Tensor:
        wide = np.array(array, np.float32) if array.dtype.name == "bfloat16" else np.array(array)
        return torch.from_numpy(wide).to(device, torch.bfloat16 if array.dtype.name == "bfloat16" else None)

    arrays, given, cotangent = jax.tree.map(tensor, problem)
    return Problem(tuple(a.requires_grad_() for a in arrays), given, cotangent)


def run(call: Call, problem: Problem, which: str) -> Any:
    """The result, and with the backward pass the gradients."""
    if which == FORWARD:
        with torch.no_grad():
            return call(problem.arrays, problem.given)
    result = call(problem.arrays, problem.given)
    return result.detach(), torch.autograd.grad(result, problem.arrays, problem.cotangent)


def wait(_: Any) -> None:
    """Until the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device(on_gpu: bool) -> str:
    """Where PyTorch computes.

    Raises:
        RuntimeError: this PyTorch knows no GPU.
    """
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
    return "cuda" if on_gpu else "cpu"


def forget() -> None:
    """Give memory back that is no longer used."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
