"""Retrofit: teach a model to live with evictions, by agreeing with its own original.

A step reads a batch of sequences twice. The original gives the distributions to agree with; the model, under soft
evictions, pays KL(original ‖ model) a token, and a penalty as long as it evicts less than asked. What is asked grows:
the compression goes from 1 to its goal linearly, over the first part of the run; from then on the evictions harden,
until they are nearly those of the rule that the model will live under.

The order of the sequences is that of the seed and the step's number, so a run that was killed goes on as if nothing had
happened.

Source: arXiv 2506.05345, section 3.2; NVIDIA Model-Optimizer, ``experimental/dms``.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kvbench.dms import calibrate
from kvbench.dms.corpus import Corpus
from kvbench.dms.judge import divergence, judge, precision
from kvbench.dms.student import Student
from kvbench.errors import UserError
from kvbench.options import CONTINUATION, Retrofit

MILESTONES = (2.0, 4.0, 8.0)
"""Compression factors at which the adapter is kept as it then is."""
LOGGED = 20
"""Steps between two looks at the training loss; a look makes the host wait for the device."""
TIMED = (10, 40)
"""Steps between which the speed is measured where the run has to fit into given seconds."""
WARM_UP = 30
"""Steps of the learning rate's rise, at most a twentieth of all; from there it falls to nothing at the end."""
EAGER = 3
"""Steps of a run that are launched kernel by kernel on a GPU; the later ones replay a graph of such a step."""
BETAS = (0.9, 0.95)
CLIP = 1.0
"""Norm that gradients are cut at."""
TOKENS_AT_ONCE = 2048
"""Tokens whose logits exist at once."""
RATES = {"lora": 1e-3, "whole": 1e-4}

Row = dict[str, Any]


def asked(settings: Retrofit, step: int, steps: int) -> float:
    """The compression asked for at a step of so many: tokens of a sequence for each one kept, window included."""
    return 1 + (settings.cr - 1) * min(1.0, step / (settings.ramp * steps))


def rate(step: int, steps: int) -> float:
    """What the learning rates are multiplied by at a step of so many."""
    warm_up = max(1, min(WARM_UP, steps // 20))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def temperature(settings: Retrofit, step: int, steps: int) -> float:
    """That of the evictions at a step of so many: constant over the ramp, then falling by the same factor each step."""
    ramped = settings.ramp * steps
    past = max(0.0, step - ramped) / max(1.0, steps - 1 - ramped)
    return settings.temperature * (settings.last_temperature / settings.temperature) ** min(1.0, past)


class Trainer:
    """A training run.

    Parameters
    ----------
    keep : called with a compression factor when the ramp passes a milestone, and with None at the end.
    save : called with the state after every ``checkpoint_steps`` steps.
    begun : ``time.perf_counter()`` when the job began, of which ``max_seconds`` counts.

    Attributes
    ----------
    rows : the training curve so far.
    passed : how many of the `MILESTONES` the ramp has passed.
    judging_s : seconds that the last judging took.
    """

    def __init__(
        self,
        student: Student,
        corpus: Corpus,
        settings: Retrofit,
        keep: Callable[[float | None, list[Row]], None],
        save: Callable[[dict[str, Any]], None],
        begun: float,
    ) -> None:
        self.student, self.settings, self.keep, self.save = student, settings, keep, save
        self.device = student.model.device
        self.train, self.reading = corpus.train, corpus.reading
        self.judged = {name: torch.from_numpy(ids).long().to(self.device) for name, ids in corpus.held_out.items()}
        self.rows: list[Row] = []
        self.step, self.steps, self.begun = 0, settings.steps, begun
        self.optimizer, self.rates = _optimizer(student, settings)
        rows, tokens = settings.batch_size, settings.tokens
        self.ids = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        self.temperature = torch.zeros((), device=self.device)
        self.whole = torch.zeros((), dtype=torch.long, device=self.device)
        self.kept = torch.zeros((), device=self.device)
        self.rates_now = [torch.zeros((), device=self.device) for _ in self.rates]
        self.passed = 0
        self.judging_s = 0.0
        self._timed = 0, time.perf_counter()
        self._divergence: Callable[..., torch.Tensor] = divergence
        self._graph: Any = None
        self._launched = 0
        if self.device.type == "cuda":
            self._divergence = torch.compile(divergence, dynamic=False)
            self._stream = torch.cuda.Stream()

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier starts included."""
        return time.perf_counter() - self.begun

    def run(self) -> None:
        """Train from where the state stands to the end."""
        with tqdm(total=self.steps, initial=self.step, desc="retrofit", unit="step", mininterval=1.0) as bar:
            if self.step == 0:
                self._evaluate(bar)
            while self.step < self.steps:
                loss = self._attempt()
                self._look(loss, bar)
                self.step += 1
                bar.update()
                self._fit(bar)
                self._evaluate(bar)
                due = self.step % self.settings.checkpoint_steps == 0 and self.step < self.steps
                # not while the speed is being measured: a run that goes on from there would measure its start
                if due and (self.settings.max_seconds is None or self.step >= TIMED[1]):
                    self.save(self.state())

    def _evaluate(self, bar: Any) -> None:
        """Judge the model where it is due, and keep it at a milestone and at the end."""
        count, now = self.settings.evaluations, asked(self.settings, self.step, self.steps)
        passed: list[float | None] = [factor for factor in MILESTONES[self.passed :] if factor <= now]
        self.passed += len(passed)
        if self.step == self.steps:
            passed.append(None)
        if passed or self.step in {round(self.steps * i / count) for i in range(count)}:
            with self.student.rounded():
                rows = self._judge(bar)
                for factor in passed:
                    self.keep(factor, rows)

    def _attempt(self) -> tuple[torch.Tensor, ...]:
        """A step; where it does not fit into the device's memory, again with less of it."""
        try:
            return self._train()
        except torch.OutOfMemoryError:
            if self.student.net.saves_memory:
                raise
        self.optimizer.zero_grad(set_to_none=True)
        self._graph, self._launched = None, 0
        torch.cuda.empty_cache()
        print("out of memory: activations are computed again in the backward pass from now on", flush=True)
        self.student.save_memory()
        return self._train()

    def _train(self) -> tuple[torch.Tensor, ...]:
        """One step of the optimizer; KL a token and the share evicted, on the device."""
        self._feed()
        if self.device.type != "cuda":
            return self._step()
        if self._launched < EAGER:
            return self._launch()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._found

    def _feed(self) -> None:
        """Put what differs from step to step where the step reads it."""
        settings, tokens = self.settings, self.settings.tokens
        rows = batch_rows(self.step, settings.batch_size, len(self.reading), settings.seed)
        ids = torch.from_numpy(self.train[self.reading[rows]])
        if self.device.type == "cuda":
            ids = ids.pin_memory()  # else the host would wait here for the step before
        self.ids.copy_(ids, non_blocking=True)
        self.temperature.fill_(temperature(settings, self.step, self.steps))
        self.whole.fill_(whole_rows(self.step, settings.batch_size, settings.dense_share))
        self.kept.fill_(calibrate.share(asked(settings, self.step, self.steps), tokens, settings.window))
        for group, now, full in zip(self.optimizer.param_groups, self.rates_now, self.rates, strict=True):
            group["lr"] = now.fill_(full * rate(self.step, self.steps))

    def _launch(self) -> tuple[torch.Tensor, ...]:
        """A step kernel by kernel, on the stream of the graph to come."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = self._step()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._launched += 1
        return found

    def _capture(self) -> None:
        """Record a step: the host takes longer to launch the kernels of a small model than the device to run them."""
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._found = self._step()

    def _step(self) -> tuple[torch.Tensor, ...]:
        settings, tokens = self.settings, self.settings.tokens
        with precision(self.device):
            teacher = self.student.teach(self.ids, fast=True)
            hidden, evicted = self.student.learn(self.ids, self.temperature, self.whole)
            kl = self._kl(teacher, hidden, settings.window + 1)
        share = evicted[..., : tokens - 1 - settings.window].mean()
        loss = kl + settings.penalty * torch.clamp(1 - self.kept - share, min=0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.student.trained.values()), CLIP)
        self.optimizer.step()
        return kl.detach(), share.detach()

    def _kl(self, teacher: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Mean KL from position ``start`` on, the first at which a token can be missing; some tokens at a time."""

        def some(original: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            student = self.student
            return self._divergence(student.original.head(original), student.net.head(other)).sum()

        parts = [part[:, start:].flatten(0, 1) for part in (teacher, hidden)]
        count = math.ceil(len(parts[0]) / TOKENS_AT_ONCE)
        pairs = zip(*(part.tensor_split(count) for part in parts), strict=True)
        sums = [checkpoint(some, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        return torch.stack(sums).sum() / len(parts[0])

    def _look(self, found: tuple[torch.Tensor, ...], bar: Any) -> None:
        if self.step % LOGGED and self.step != self.steps - 1:
            return
        kl, share = (float(value) for value in found)
        if not math.isfinite(kl):
            raise UserError(
                f"training diverged at step {self.step}: the divergence is {kl}", "Lower the retrofit's learning_rate"
            )
        settings = self.settings
        readable = (settings.window + 1) / settings.tokens
        self._row("train", kl=kl, kept_fraction=readable + (1 - share) * (1 - readable))
        bar.set_postfix_str(f"CR {asked(settings, self.step, self.steps):.2f} KL {kl:.4f} evicted {share:.3f}")

    def _judge(self, bar: Any) -> list[Row]:
        """A row of the curve for each corpus that is held out."""
        begun = time.perf_counter()
        rows_at_once = max(1, self.settings.batch_size * self.settings.tokens // self._length())
        found = []
        for name, ids in self.judged.items():
            verdict = judge(self.student, ids, self._length() - CONTINUATION, rows_at_once)
            found.append(self._row(name, **asdict(verdict)))
            facts = f"KL {verdict.kl:.4f}, off {verdict.kl_off:.4f}, kept {verdict.kept_fraction:.3f}"
            bar.write(f"step {self.step}, {self.seconds:.0f} s, {name}: {facts}")
        self.judging_s = time.perf_counter() - begun
        self._timed = self._timed[0], self._timed[1] + self.judging_s
        return found

    def _length(self) -> int:
        return next(iter(self.judged.values())).shape[1]

    def _row(self, corpus: str, **measured: float) -> Row:
        row = {"step": self.step, "seconds": self.seconds, "corpus": corpus, **measured}
        row["asked_compression"] = asked(self.settings, self.step, self.steps)
        self.rows.append(row)
        return row

    def _fit(self, bar: Any) -> None:
        """Shorten the run to what its seconds allow, by the speed of its first steps."""
        if self.settings.max_seconds is None or self.step not in TIMED:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.step == TIMED[0]:
            self._timed = self.step, time.perf_counter()
            return
        a_step = (time.perf_counter() - self._timed[1]) / (self.step - self._timed[0])
        judging = self.judging_s * (self.settings.evaluations + len(MILESTONES))
        left = self.settings.max_seconds - self.seconds - judging
        self.steps = min(self.steps, max(self.step + 1, self.step + int(left / a_step)))
        bar.total = self.steps
        bar.write(f"{a_step:.3f} s a step: {self.steps} steps fit into {self.settings.max_seconds:g} s")

    def state(self) -> dict[str, Any]:
        """All that going on takes."""
        return {
            "step": self.step,
            "steps": self.steps,
            "passed": self.passed,
            "seconds": self.seconds,
            "judging_s": self.judging_s,
            "rows": self.rows,
            "parameters": {name: value.detach() for name, value in self.student.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of `state`."""
        for name in ("step", "steps", "passed", "judging_s", "rows"):
            setattr(self, name, state[name])
        self.begun -= state["seconds"]
        self._timed = self.step, time.perf_counter()
        with torch.no_grad():
            for name, value in self.student.trained.items():
                value.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def _optimizer(student: Student, settings: Retrofit) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW over heads and weights, and the learning rate of each."""
    named = student.trained
    heads = [value for name, value in named.items() if name.startswith("heads.")]
    weights = [value for name, value in named.items() if not name.startswith("heads.")]
    rate = settings.learning_rate or RATES["whole" if settings.whole_model else "lora"]
    rates = [settings.head_learning_rate, rate] if weights else [settings.head_learning_rate]
    groups = [{"params": group, "lr": one} for group, one in zip((heads, weights), rates, strict=False)]
    on_gpu = student.model.device.type == "cuda"
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=on_gpu, capturable=on_gpu), rates


def whole_rows(step: int, size: int, share: float) -> int:
    """How many sequences of a step are read without evictions, so that of all steps it is the share."""
    return math.floor((step + 1) * size * share) - math.floor(step * size * share)


def batch_rows(step: int, size: int, count: int, seed: int) -> np.ndarray:
    """Which sequences a step reads: all in a random order, then all in another, and so on.

    Parameters
    ----------
    size : sequences a step.
    count : sequences there are.

    Returns
    -------
    int64 [size], each from 0 to count − 1.
    """
    return np.array([_order(place // count, count, seed)[place % count] for place in _places(step, size)])


def _places(step: int, size: int) -> Iterator[int]:
    yield from range(step * size, (step + 1) * size)


@cache
def _order(turn: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)
