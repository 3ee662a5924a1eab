"""Plain PyTorch (`plain_torch.py`) on the same card, at the sizes of the phases `decoding` and `training`.

Decoding has a key-value cache of fixed size and `torch.compile`. The autoregressive model has 20 layers of width 2,048,
MaskGIT's has 24 of width 768.
"""

from __future__ import annotations

import functools
import time

from recorder import Recorder

try:
    import torch
    from plain_torch import Model
    from torch.nn.functional import cross_entropy
except ImportError:  # the phase says so
    torch = None


def run(record: Recorder) -> None:
    if torch is None:
        record("torch", skipped="PyTorch is not installed")
        return
    torch.set_float32_matmul_precision("high")
    tiny = record.tiny
    record.run([
        ("maskgit 16x16, 1 image", 6, functools.partial(_steps, tiny, 1)),
        (f"maskgit 16x16, {4 if tiny else 128} images", 6, functools.partial(_steps, tiny, 4 if tiny else 128)),
        ("autoregressive 32x32, 1 image", 12, functools.partial(_tokens, tiny, 1)),
        (f"autoregressive 32x32, {4 if tiny else 64} images", 12, functools.partial(_tokens, tiny, 4 if tiny else 64)),
        ("autoregressive 1B", 12, functools.partial(_train, tiny, 2048, 20, 16, 1088, True, 2 if tiny else 16)),
        ("maskgit 24x768, 16x16", 8, functools.partial(_train, tiny, 768, 24, 12, 320, False, 2 if tiny else 128)),
    ])  # fmt: skip


def _model(tiny: bool, width: int, depth: int, heads: int, positions: int):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tiny:
        width, depth, heads, positions = 32, 2, 2, 16
    return Model(width, depth, heads, positions, 128 if tiny else 8192).to(device), positions, device


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(run, device: str, least: float = 0.5) -> float:
    """Returns the seconds of a call: the mean of enough calls, after two that compile and warm up."""
    for _ in range(2):
        run()
    _wait(device)
    calls, began = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - began < least:
        run()
        _wait(device)
        calls += 1
    return (time.perf_counter() - began) / calls


def _compiled(model, tiny: bool, mode: str | None = None):
    return model if tiny else torch.compile(model, mode=mode)


def _steps(tiny: bool, rows: int) -> dict:
    """Eight passes over text and image tokens, each with a draw from the logits, as MaskGIT makes them."""
    model, positions, device = _model(tiny, 768, 24, 12, 320)
    model = model.to(torch.bfloat16).eval()
    places = torch.arange(positions, device=device)
    ids = torch.zeros(rows, positions, dtype=torch.long, device=device)
    program = _compiled(model, tiny)

    @torch.no_grad()
    def draw():
        current = ids
        for _ in range(8):
            logits = program(current, places)
            noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
            current = (logits + noise).argmax(-1)

    passed = _timed(draw, device)
    return {"seconds": passed, "images_per_s": rows / passed, "rows": rows, "decoder": "none"}


def _tokens(tiny: bool, rows: int) -> dict:
    """Draws tokens one after the other. Some positions stand for all, because the cache has a fixed size."""
    model, positions, device = _model(tiny, 2048, 20, 16, 1088)
    model = model.to(torch.bfloat16).eval()
    caches = model.caches(rows, positions)
    program, state = _compiled(model, tiny, "reduce-overhead"), [torch.zeros(rows, 1, dtype=torch.long, device=device)]
    place, last = torch.zeros(1, dtype=torch.long, device=device), positions - 1

    @torch.no_grad()
    def some(count: int = 32):
        for i in range(count):
            place.fill_(min(last, last - count + i) if last > count else i % positions)
            logits = program(state[0], place, caches=caches)[:, -1].float()
            noise = -torch.empty_like(logits).exponential_().log()
            state[0] = (logits + noise).argmax(-1, keepdim=True).clone()

    passed = _timed(some, device) / 32
    return {"seconds_per_token": passed, "tokens_per_s": rows / passed, "rows": rows}


def _train(tiny: bool, width: int, depth: int, heads: int, positions: int, causal: bool, rows: int) -> dict:
    """A step of AdamW in bfloat16 autocast, parameters in float32."""
    model, positions, device = _model(tiny, width, depth, heads, positions)
    program = _compiled(model, tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    ids = torch.randint(0, 128, (rows, positions), device=device)
    places = torch.arange(positions, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            logits = program(ids, places, causal)
        loss = cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    passed = _timed(step, device)
    return {"seconds": passed, "rows": rows, "params": sum(p.numel() for p in model.parameters())}
