"""The jobs of a retrofit, from files to files: its text, and its training."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import jobs, tables
from kvbench.errors import UserError
from kvbench.jobs import Job
from kvbench.manifest import Manifest, load_manifest
from kvbench.options import CONTINUATION, Retrofit, TextFile
from kvbench.provenance import versions
from kvbench.tokenizer import load_tokenizer

CURVE = pa.schema(
    [
        ("step", pa.int32()),
        ("seconds", pa.float64()),
        ("asked_compression", pa.float64()),
        ("corpus", pa.string()),
        ("kl", pa.float64()),
        ("kl_off", pa.float64()),
        ("top1_agreement", pa.float64()),
        ("kept_fraction", pa.float64()),
    ]
)
REMEDIES = {
    "oom": "Lower the retrofit's batch_size or tokens",
    "unsupported": "Choose another model for the retrofit",
    "failed": "Read the lines above; a killed run goes on from its last checkpoint when it is started again",
}


def make_corpus(job: Job, settings: Retrofit, prompts: Path | None, dataset: Path | None) -> None:
    """Write the sequences that a model is retrofitted on, and those that it is judged on.

    Parameters
    ----------
    prompts, dataset : prompts.parquet and the manifest of its dataset; not needed for a text file.

    Raises
    ------
    UserError : a sequence is longer than the model's context, or no text is long enough.
    """
    manifest = load_manifest(job.manifest)
    _check(manifest, settings)

    def write(facts: dict[str, Any], load: Callable[[], Any]) -> None:
        from kvbench.dms import corpus

        text = str(settings.text.path) if isinstance(settings.text, TextFile) else settings.text
        request = corpus.Request(
            text=text,
            tokens=settings.tokens,
            sequences=settings.steps * settings.batch_size,
            held_out=settings.held_out,
            prose=settings.prose,
            prose_from=settings.prose_from,
            seed=settings.seed,
        )
        found = corpus.collect(load_tokenizer(manifest), request, prompts, dataset, load)
        counts = {split: sum(each.split == split for each in found) for split in ("train", "held_out")}
        corpus.write(found, job.output, facts | vars(request) | counts)
        print(f"{counts['train']} sequences of {settings.tokens} tokens to train on, {counts['held_out']} held out")

    if settings.text == "own":  # the only text that takes a device to write
        _on_device(job, lambda facts: write(facts, lambda: jobs.ready(job, facts).model), lambda facts, _: None)
    else:
        write(job.provenance | {"versions": versions()}, lambda: None)


def train(job: Job, corpus: Path, settings: Retrofit) -> None:
    """Train, and write the curve to the job's output; beside it ``adapter/``, and ``checkpoints/`` on the way there.

    A run that was killed goes on from the last state that it saved, in ``resume/``; that of a run with other settings
    is left aside.

    Raises
    ------
    UserError : the corpus or the model does not fit the settings; training ran out of memory, or diverged.
    """
    manifest = load_manifest(job.manifest)
    _check(manifest, settings)
    _check_lora(settings)

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from kvbench.dms.run import Run

        return Run(job, manifest, corpus, settings, facts).curve()

    def write(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        facts |= {"settings": settings.model_dump(mode="json"), "corpus": tables.provenance_of(corpus)}
        tables.write(job.output, pa.Table.from_pylist(rows, CURVE), facts)
        shutil.rmtree(job.output.parent / "resume", ignore_errors=True)

    _on_device(job, work, write)


def _on_device(job: Job, work: Callable[[dict[str, Any]], Any], write: Callable[[dict[str, Any], Any], None]) -> None:
    """Run on a device; what would be a row of a measurement is an error here, since others wait for the result."""

    def finish(status: str, reason: str | None, facts: dict[str, Any], result: Any) -> None:
        if status != "ok":
            raise UserError(f"the retrofit of {job.variant['model']}: {status}: {reason}", REMEDIES[status])
        write(facts, result)

    jobs.run(job, work, finish)


def _check(manifest: Manifest, settings: Retrofit) -> None:
    """Refuse a model that cannot be retrofitted so."""
    if manifest.tokenizer is None:
        raise UserError(f"{manifest.name} has random weights, which have nothing to learn from", "Name another model")
    tokens = settings.tokens + CONTINUATION
    if manifest.context is not None and tokens > manifest.context:
        raise UserError(
            f"{settings.tokens} tokens, and {CONTINUATION} more to judge the retrofit on, are more than the context of"
            f" {manifest.name}, {manifest.context} tokens",
            "Lower tokens of the retrofit",
        )


def _check_lora(settings: Retrofit) -> None:
    if settings.lora_rank and "peft" not in versions(("peft",)):
        raise UserError("a LoRA needs the package peft, which is not installed", "Install it, or set lora_rank: null")
