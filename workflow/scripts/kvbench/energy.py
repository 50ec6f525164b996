"""Joules an output token, in a pass of its own."""

import time
from typing import Any

import torch
from tqdm import tqdm

from kvbench.engines import Engine
from kvbench.measure import Batch
from kvbench.methods import Dense
from kvbench.nvml import Nvml

WINDOWS, WINDOW_S = 5, 2.0
"""Windows of decoding, each of at least so many seconds: the driver's counter moves every 0.1 s, 5% of one."""

SHORTEST_PART_S = 0.5
"""Where prefills lie between the parts of a window, each part must be so long for the counter to tell them apart."""


def per_token(model: Any, batch: Batch, method: Dense, engine: Engine, gpu: Nvml | None) -> list[float] | None:
    """Energy of the whole GPU while it decodes, a token: joules, one value a window.

    An engine that can go back decodes the same tokens again and again; with another one whole generations run, and
    only what follows their prefills counts.

    Returns
    -------
    None where the driver counts no energy, or a generation's decode is too short for its counter.
    """
    if gpu is None or gpu.joules() is None:
        return None
    found = []
    for _ in tqdm(range(WINDOWS), desc="energy", unit="window", mininterval=1.0):
        joules, seconds, tokens = 0.0, 0.0, 0
        while seconds < WINDOW_S:
            again = _Decode(batch.input_ids.device, gpu)
            steps = again.once_more(engine) or again.after_a_prefill(model, batch, method, engine)
            if steps is None:
                return None
            joules, seconds, tokens = (
                joules + again.joules,
                seconds + again.seconds,
                tokens + steps * len(batch.input_ids),
            )
        found.append(joules / tokens)
    return found


class _Decode:
    """One decode, and the energy and the time that it took."""

    def __init__(self, device: torch.device, gpu: Nvml) -> None:
        self.device, self.gpu = device, gpu
        self.joules = self.seconds = 0.0
        self.before = 0.0, 0.0

    def once_more(self, engine: Engine) -> int | None:
        """Steps of the last generation's decode, run again; None where the engine cannot."""
        self.begin()
        steps = engine.again()
        self.end()
        return steps

    def after_a_prefill(self, model: Any, batch: Batch, method: Dense, engine: Engine) -> int | None:
        """Steps of a whole generation, timed from the end of its prefill; None where that is too short."""
        engine.generate(model, batch.input_ids, method, batch.new_tokens, lambda: None, lambda _: self.begin())
        self.end()
        return batch.new_tokens - 1 if self.seconds >= SHORTEST_PART_S else None

    def begin(self) -> None:
        torch.cuda.synchronize(self.device)
        self.before = (self.gpu.joules() or 0.0, time.perf_counter())

    def end(self) -> None:
        torch.cuda.synchronize(self.device)
        self.joules = (self.gpu.joules() or 0.0) - self.before[0]
        self.seconds = time.perf_counter() - self.before[1]
