"""How decode runs: transformers' eager forward, or one captured step over a packed cache."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, Protocol

import torch

from kvbench import decode, packed
from kvbench.decode import Decoded, Mark, Prefilled
from kvbench.errors import Unsupported
from kvbench.fused import Fused
from kvbench.methods import Dense


class Engine(Protocol):
    """Decodes greedily a given number of tokens; `decode.generate` says what the arguments mean."""

    name: str
    keeps_buffers: bool
    """Whether a run leaves memory taken for the next one, so that only the first run's peak is a run's own."""
    attention: str | None
    """The attention kernel of its decode steps, where that is not the model's own."""

    def prefill(self, model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[torch.Tensor, Any]:
        """The prompt's forward pass with compression, as `decode.prefill`."""

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        method: Dense,
        new_tokens: int,
        mark: Mark,
        prefilled: Prefilled,
    ) -> Decoded: ...

    def again(self) -> int | None:
        """Decode the last run's tokens once more from its prompt's end, without the prefill.

        Returns
        -------
        The number of steps; None where the engine cannot go back.
        """


class Hf:
    """transformers' eager forward with its dynamic cache, one kernel launch after another."""

    name = "hf"
    keeps_buffers = False
    attention: str | None = None

    def prefill(self, model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[torch.Tensor, Any]:
        return decode.prefill(model, input_ids, method)

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        method: Dense,
        new_tokens: int,
        mark: Mark,
        prefilled: Prefilled,
    ) -> Decoded:
        return decode.generate(model, input_ids, method, new_tokens, mark, prefilled)

    def again(self) -> int | None:
        return None


class Packed:
    """One decode step over a packed cache; on a GPU replayed as a CUDA graph, with ``compiled`` through torch.compile.

    The buffers and the graph are made in the first run and used again by every run of the same shapes, as a server
    would: what a run pays is the copy of its kept tokens into the buffers, which counts to its first step.

    Norms and the first projections of attention and MLP are `fused`, and on a GPU all else between products and
    attention. Compiled, Inductor's own kernels take that; it is not asked to tune matrix products, because cuBLAS is
    faster on these shapes, in a tenth of the time to compile.
    """

    keeps_buffers = True
    attention: str | None = packed.ATTENTION

    def __init__(self, compiled: bool) -> None:
        self.name = "compile" if compiled else "graph"
        self.compiled = compiled
        self.state: _State | None = None
        self.fused: tuple[Any, Fused] | None = None

    def prefill(self, model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[torch.Tensor, Any]:
        if method.own_code:
            raise Unsupported(f"{method.unpackable}; use engine: hf")
        with self._fused(model).norms_applied():
            return decode.prefill(model, input_ids, method)

    def _fused(self, model: Any) -> Fused:
        if self.fused is None or self.fused[0] is not model:
            self.fused = model, Fused(model)
        return self.fused[1]

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        method: Dense,
        new_tokens: int,
        mark: Mark,
        prefilled: Prefilled,
    ) -> Decoded:
        packed.check(model)
        if not method.packs:
            raise Unsupported(f"{method.unpackable}; use engine: hf")
        fused = self._fused(model)
        mark()
        token, cache = self.prefill(model, input_ids, method)
        mark()
        prefilled(cache)
        packed.check_cache(model, cache)
        position = torch.full_like(token, method.next_position(input_ids.shape[1], cache))
        if self.state is None or self.state.tokens.shape[1] != new_tokens or not self.state.cache.fits(cache):
            self.state = None  # its memory goes first
            self.state = _State(model, fused, method, method.pack(cache, new_tokens), token, new_tokens, self.compiled)
        else:
            self.state.cache.fill(cache)
        self.state.start(token, position)
        self.state.decode(mark)
        return Decoded(self.state.tokens.clone(), self.state.cache)

    @torch.no_grad()
    def again(self) -> int | None:
        if self.state is None:
            return None
        self.state.start(self.state.tokens[:, :1].clone(), self.state.first_position.clone())
        self.state.decode(lambda: None)
        return self.state.tokens.shape[1] - 1


LOOK_EVERY = 8
"""Steps between two looks of the host at whether all rows have ended."""


@torch.no_grad()
def decode_together(
    model: Any,
    method: Dense,
    first: list[torch.Tensor],
    caches: list[Any],
    positions: list[int],
    new_tokens: int,
    stop: Collection[int],
) -> torch.Tensor:
    """Go on from several prefills at once, each of any length: greedy, until every row has ended.

    Parameters
    ----------
    first : the first new token of each prefill's rows, int64 [rows, 1].
    caches : what each left under the method; plain keys and values as `packed.check_cache` demands, or its own kind.
    positions : of those first tokens.

    Returns
    -------
    int64 [all rows, at most ``new_tokens``]; what follows a row's end is of no use.
    """
    places = [torch.full_like(token, position) for token, position in zip(first, positions, strict=True)]
    token = torch.cat(first)
    state = _State(model, None, method, method.join(caches, new_tokens), token, new_tokens, compiled=False)
    state.start(token, torch.cat(places))
    endings = torch.tensor(sorted(stop), dtype=torch.long, device=token.device)
    done = 1
    while done < new_tokens and not (stop and bool(torch.isin(state.tokens[:, :done], endings).any(1).all())):
        steps = min(LOOK_EVERY, new_tokens - done)
        state.decode(lambda: None, steps)
        done += steps
    return state.tokens[:, :done]


class _State:
    """Static inputs, outputs and cache of a decode step, and the step itself."""

    def __init__(
        self,
        model: Any,
        fused: Fused | None,
        method: Dense,
        cache: Any,
        token: torch.Tensor,
        new_tokens: int,
        compiled: bool,
    ) -> None:
        rows, device = len(token), token.device
        self.model, self.fused, self.method, self.cache = model, fused, method, cache
        self.compiled = compiled
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.first_position = torch.zeros_like(self.position)
        self.tokens = torch.zeros(rows, new_tokens, dtype=torch.long, device=device)
        self.forward = model.forward
        if compiled:
            self.forward = torch.compile(model.forward, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, token: torch.Tensor, position: torch.Tensor) -> None:
        """Begin again after the prompts: their first new tokens and these tokens' positions, each int64 [rows, 1]."""
        self.first_position.copy_(position)
        self.cache.rewind()
        self.token.copy_(token)
        self.tokens[:, :1].copy_(token)
        self.position.copy_(position)

    def decode(self, mark: Mark, steps: int | None = None) -> None:
        """Decode all tokens after the first, or so many, calling ``mark`` after each."""
        with ExitStack() as stack:
            stack.enter_context(self.method.steps(self.model))
            if self.fused is not None:
                stack.enter_context(self.fused.norms_applied())
                stack.enter_context(self.fused.projections_applied())
                if self.token.is_cuda and not self.compiled:
                    stack.enter_context(self.fused.kernels_applied())
            for _ in range(self.tokens.shape[1] - 1 if steps is None else steps):
                self._advance()
                mark()

    def _advance(self) -> None:
        self.cache.reserve()
        if self.token.device.type != "cuda":
            self._step()
            return
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()

    def _step(self) -> None:
        self.cache.admit()
        logits = self.forward(
            self.token,
            position_ids=self.position,
            cache_position=self.cache.step,
            past_key_values=self.cache,
            use_cache=True,
            packed=self.cache,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.cache.step.add_(1)
        self.position.add_(1)
        self.tokens.index_copy_(1, self.cache.step, self.token)

    def _capture(self) -> None:
        """Run the step twice aside, so that kernels are chosen and compiled; capture it; and start over."""
        token, position = self.token.clone(), self.position.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.start(token, position)
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self.start(token, position)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph


def engine(name: str, device: torch.device) -> Engine:
    """An engine by its name; ``auto`` is the packed one on a GPU, where launches cost, and ``hf`` on a CPU."""
    if name == "auto":
        name = "graph" if device.type == "cuda" else "hf"
    return Hf() if name == "hf" else Packed(compiled=name == "compile")
