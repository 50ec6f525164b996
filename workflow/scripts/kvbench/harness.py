"""Tasks of EleutherAI's lm-evaluation-harness on one variant, from files to a file."""

import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

from kvbench import config as configs
from kvbench import device as devices
from kvbench import files, grid, loading, methods
from kvbench.config import Config
from kvbench.errors import Unsupported, UserError
from kvbench.lm_eval_model import CompressedLM
from kvbench.manifest import Manifest, load_manifest
from kvbench.presses import nearest
from kvbench.provenance import versions
from kvbench.tokenizer import load_tokenizer

PACKAGES = ("lm_eval", "torch", "transformers", "kvpress", "datasets")


@dataclass(frozen=True)
class Variant:
    """A model and a method of a config file, and where the part of a prompt that is not compressed begins.

    ``question_marker`` is None where the whole prompt is compressed (query-aware).
    """

    config: Path
    model: str
    method: str
    question_marker: str | None


@dataclass(frozen=True)
class Tasks:
    """What is run, as lm-evaluation-harness names it.

    Attributes
    ----------
    include : folder of task files beside those that come with it.
    limit : documents of a task, the first; None for all.
    shots : examples in a prompt; None for each task's own number.
    settings : of the generation, over the tasks' own.
    metadata : for tasks that make their own texts, ``{"max_seq_lengths": [4096]}`` say.
    """

    names: list[str]
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    settings: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


def run(variant: Variant, tasks: Tasks, output: Path) -> None:
    """Run tasks on a variant, print their metrics and write them with what the cache kept.

    Raises
    ------
    UserError : the config, the variant or a task's name is wrong, the model is not fetched or has no tokenizer, or
        the method cannot run.
    """
    config = _load(variant)
    manifest = _manifest(config, variant)
    manager = TaskManager(
        include_path=str(tasks.include) if tasks.include else None,
        metadata={"tokenizer": str(manifest.tokenizer)} | (tasks.metadata or {}),
    )
    _check_names(tasks.names, manager)
    spec = grid.method_spec(config, variant.method)
    wanted = config.models[variant.model]
    with devices.exclusive() as device:
        try:
            method = methods.build(spec)
            with method.loading(manifest):
                loaded = loading.load_model(manifest, wanted.dtype, wanted.attention, device)
            lm = CompressedLM(loaded.model, load_tokenizer(manifest), method, variant.question_marker)
        except Unsupported as error:
            raise UserError(f"{variant.method} cannot run on {variant.model}: {error}", "Choose another") from error
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks.names,
            task_manager=manager,
            limit=tasks.limit,
            num_fewshot=tasks.shots,
            apply_chat_template=tasks.chat_template,
            gen_kwargs=tasks.settings,
            log_samples=False,
        )
        about = devices.describe(device) | {"dtype": str(loaded.model.dtype)}
    shown = {key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions") if key in found}
    files.write_json(output, shown | {"kvbench": _facts(variant, tasks, spec, lm) | about})
    print("\n".join(_lines(found["results"])))


def _lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each task's metrics with their standard errors."""
    found = []
    for task, values in results.items():
        for name, value in values.items():
            metric, _, how = name.partition(",")
            error = values.get(f"{metric}_stderr,{how}")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                found.append(f"{task}: {metric} ({how}) {value:.4f}{spread}")
    return found


def _facts(variant: Variant, tasks: Tasks, spec: dict[str, Any], lm: CompressedLM) -> dict[str, Any]:
    return {
        "model": variant.model,
        "method": variant.method,
        "spec": spec,
        "query_aware": variant.question_marker is None,
        "question_marker": variant.question_marker,
        "limit": tasks.limit,
        "chat_template": tasks.chat_template,
        "settings": tasks.settings,
        "kept_fraction": fmean(kept.fraction for kept in lm.kept) if lm.kept else None,
        "simulated": any(kept.simulated for kept in lm.kept),
        "prompts_cut": lm.cut_prompts,
        "versions": versions(PACKAGES),
    }


def _load(variant: Variant) -> Config:
    try:
        data = yaml.safe_load(variant.config.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{variant.config} cannot be read: {error}", "Name a config file of the workflow") from error
    if variant.question_marker == "":
        raise UserError("The question's marker is empty", "Name a text, or give --query-aware")
    config = configs.load(data, [str(variant.config)])
    for kind, name, known in (
        ("model", variant.model, config.models),
        ("method", variant.method, config.methods),
    ):
        if name not in known:
            raise UserError(
                f"{variant.config} has no {kind} {name!r}{nearest(name, known)}", f"It has: {', '.join(known)}"
            )
    if not config.fits(variant.model, variant.method):
        raise UserError(config.misfit(variant.model, variant.method), "Name a model that it runs on")
    return config


def _manifest(config: Config, variant: Variant) -> Manifest:
    path = Path(config.results, "models", variant.model, "manifest.json")
    if not path.exists():
        raise UserError(
            f"{path} is missing", f"Run `snakemake --cores 1 {path} --configfile {variant.config}`, which fetches it"
        )
    manifest = load_manifest(path)
    if manifest.tokenizer is None:
        raise UserError(f"{variant.model} has random weights and no tokenizer", "Choose a model that has been trained")
    return manifest


def _check_names(names: list[str], manager: TaskManager) -> None:
    known = {*manager.all_subtasks, *manager.all_groups, *manager.all_tags}
    for name in names:
        if name not in known:
            raise UserError(
                f"lm-evaluation-harness has no task {name!r}{nearest(name, known)}",
                "`lm_eval ls tasks` lists them; name a folder of your own with --include-path",
            )


# the harness tells of every step at INFO; what goes wrong is told at WARNING
logging.getLogger("lm_eval").setLevel(logging.WARNING)
