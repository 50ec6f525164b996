"""How decode runs: transformers' eager forward, or one captured step over a packed cache."""

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

    Norms and the first projections of attention and MLP are `fused`. Compiled, Inductor's own kernels take the rest; it
    is not asked to tune matrix products, because cuBLAS is faster on these shapes, in a tenth of the time to compile.
    """

    keeps_buffers = True

    def __init__(self, compiled: bool) -> None:
        self.name = "compile" if compiled else "graph"
        self.compiled = compiled
        self.state: _State | None = None
        self.fused: tuple[Any, Fused] | None = None

    def prefill(self, model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[torch.Tensor, Any]:
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
            raise Unsupported("a press that compresses while decoding changes the cache's shapes; use engine: hf")
        fused = self._fused(model)
        mark()
        token, cache = self.prefill(model, input_ids, method)
        mark()
        prefilled(cache)
        packed.check_cache(model, cache)
        position = method.next_position(input_ids.shape[1], cache)
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
        self.state.start(self.state.tokens[:, :1].clone(), self.state.first_position)
        self.state.decode(lambda: None)
        return self.state.tokens.shape[1] - 1


class _State:
    """Static inputs, outputs and cache of a decode step, and the step itself."""

    def __init__(
        self,
        model: Any,
        fused: Fused,
        method: Dense,
        cache: Any,
        token: torch.Tensor,
        new_tokens: int,
        compiled: bool,
    ) -> None:
        rows, device = len(token), token.device
        self.model, self.fused, self.method, self.cache = model, fused, method, cache
        self.first_position = 0
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, new_tokens, dtype=torch.long, device=device)
        self.forward = model.forward
        if compiled:
            self.forward = torch.compile(model.forward, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, token: torch.Tensor, position: int) -> None:
        """Begin again after the prompt: its first new token, and that token's position."""
        self.first_position = position
        self.cache.rewind()
        self.token.copy_(token)
        self.tokens[:, :1].copy_(token)
        self.position.fill_(position)

    def decode(self, mark: Mark) -> None:
        """Decode all tokens after the first, calling ``mark`` after each."""
        with self.method.steps(self.model), self.fused.norms_applied(), self.fused.projections_applied():
            for _ in range(self.tokens.shape[1] - 1):
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
        token, position = self.token.clone(), int(self.position)
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
