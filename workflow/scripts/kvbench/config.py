"""The config as a whole: put together, checked, and one readable error for whatever is wrong with it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from kvbench import presses
from kvbench.dms import layout
from kvbench.errors import UserError
from kvbench.options import (
    CONTINUATION,
    NAME,
    Dataset,
    Dms,
    DmsMethod,
    HubSource,
    Method,
    Model,
    Name,
    Outputs,
    Pair,
    PathSource,
    PressMethod,
    Protocol,
    Quality,
    RandomSource,
    Retrofit,
    Strict,
    TextFile,
    Workload,
)
from kvbench.presses import nearest
from kvbench.yaml_keys import duplicate_keys

PLACE = r"^[\w./-]+$"


class Config(Strict):
    """A run: what is measured, on what, and how."""

    results: str = Field("results", pattern=PLACE)
    """Folder of everything that the run writes."""
    dataset: Dataset = Dataset()
    models: dict[Name, Model] = Field(min_length=1)
    methods: dict[Name, Method] = Field(min_length=1)
    workloads: dict[Name, Workload] = Field({"chat": Workload()}, min_length=1)
    variants: Literal["all"] | Annotated[list[Pair], Field(min_length=1)] = "all"
    """`all`: every method on every model it fits; or a list of `{model, method}`."""
    protocol: Protocol = Protocol()
    outputs: Outputs = Outputs()
    quality: Quality = Quality()
    retrofits: dict[Name, Retrofit] = Field({})
    """Trainings, by name; a method runs what came of one: `{dms: {retrofit: <name>}}`."""

    def padding(self, workload: str) -> str:
        """Padding of a workload: its own, or the protocol's."""
        return self.workloads[workload].padding or ("article" if self.protocol.name == "article" else "none")

    def problems(self) -> list[str]:
        """What the types alone cannot say: one message for each problem, naming key and value."""
        found = _missing_source("dataset", self.dataset.source)
        for name, method in self.methods.items():
            if isinstance(method, PressMethod):
                found += presses.check(method.model_dump(), f"methods.{name}")
            elif isinstance(method, DmsMethod):
                found += self._dms_problems(f"methods.{name}.dms", method.dms)
        for name, model in self.models.items():
            found += self._model_problems(f"models.{name}", model)
        for name, retrofit in self.retrofits.items():
            found += self._retrofit_problems(f"retrofits.{name}", retrofit)
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
        if self.protocol.max_repeats < self.protocol.repeats:
            found.append(
                f"protocol.max_repeats: {self.protocol.max_repeats} is less than repeats, {self.protocol.repeats}"
            )
        return found + self._variant_problems()

    def _dms_problems(self, where: str, dms: Dms) -> list[str]:
        if dms.retrofit not in (None, *self.retrofits):
            hint = nearest(str(dms.retrofit), self.retrofits)
            return [f"{where}.retrofit: there is no retrofit {dms.retrofit!r}{hint}"]
        problem = layout.problem(dms.adapter) if dms.adapter is not None else None
        return [f"{where}.adapter: {problem}"] if problem else []

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
        tokens = self.outputs.max_prompt_tokens + self.outputs.new_tokens
        texts = self.outputs.prompts and not isinstance(model.source, RandomSource)
        if context is not None and texts and tokens > context:
            found.append(
                f"outputs: {self.outputs.max_prompt_tokens} max_prompt_tokens + {self.outputs.new_tokens} new_tokens"
                f" are more than the {context} of {where}; lower them"
            )
        tokens = self.quality.prefix_tokens + self.quality.continuation_tokens
        if context is not None and self.quality.windows and tokens > context:
            found.append(
                f"quality: {self.quality.prefix_tokens} prefix_tokens + {self.quality.continuation_tokens}"
                f" continuation_tokens are more than the {context} of {where}; shorten them, or set quality.windows: 0"
            )
        return found

    def _retrofit_problems(self, where: str, retrofit: Retrofit) -> list[str]:
        found = []
        if isinstance(retrofit.text, TextFile) and not retrofit.text.path.is_file():
            found.append(f"{where}.text.path: there is no file {str(retrofit.text.path)!r}")
        if retrofit.model not in self.models:
            hint = nearest(retrofit.model, self.models)
            return [*found, f"{where}.model: there is no model {retrofit.model!r}{hint}"]
        source = self.models[retrofit.model].source
        if isinstance(source, RandomSource):
            found.append(f"{where}.model: {retrofit.model} has random weights, which have nothing to learn from")
        context, tokens = known_context(source), retrofit.tokens + CONTINUATION
        if context is not None and tokens > context:
            found.append(
                f"{where}.tokens: {retrofit.tokens}, and {CONTINUATION} more to judge it on, are more than the"
                f" {context} of models.{retrofit.model}; lower tokens"
            )
        return found

    def _variant_problems(self) -> list[str]:
        if self.variants == "all":
            return self._left_out()
        found: list[str] = []
        seen: set[tuple[str, str]] = set()
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
                found.append(f"variants[{i}]: {self.misfit(pair.model, pair.method)}")
        return found

    def _left_out(self) -> list[str]:
        """Methods that fit no model, and models that no method fits, which `all` would leave out in silence."""
        fitting = [(m, k) for m in self.models for k in self.methods if self.fits(m, k)]
        used = {model for model, _ in fitting} | {model.base for model in self.models.values()}
        running = {method for _, method in fitting}
        # of a retrofit whose model does not exist that is said already
        running |= {k for k in self.methods if (r := self.retrofit_of(k)) is not None and r.model not in self.models}
        some = next(iter(self.models))
        return [
            *(f"methods.{k}: it fits no model: {self.misfit(some, k)}" for k in self.methods if k not in running),
            *(
                f"models.{m}: no method fits it: each runs on another repository or revision, or on another model"
                for m in self.models
                if m not in used
            ),
        ]

    def misfit(self, model: str, method: str) -> str:
        """Why a method cannot run on a model that it does not fit."""
        retrofit = self.retrofit_of(method)
        if retrofit is not None:
            return f"{method} is a retrofit of {retrofit.model}, and {model} is another model"
        return (
            f"{method} is a DMS checkpoint, and {model} is not that repository and revision; give it a model whose"
            " source is the same"
        )

    def retrofit_of(self, method: str) -> Retrofit | None:
        """The retrofit whose adapter a method runs, if it does."""
        spec = self.methods[method]
        return self.retrofits.get(str(spec.dms.retrofit)) if isinstance(spec, DmsMethod) else None

    def fits(self, model: str, method: str) -> bool:
        """Whether a method can run on a model.

        A DMS checkpoint runs only on itself, and nothing else on it; a retrofit only on the model that it is of.
        """
        source, spec = self.models[model].source, self.methods[method]
        retrofit = self.retrofit_of(method)
        if retrofit is not None and retrofit.model != model:
            return False
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
    except (OSError, ValueError, KeyError, TypeError):
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
    PLACE: "folder's path of letters, digits, '.', '_', '-' and '/' (it becomes part of shell commands)",
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
