"""A training run on its device: what goes in, the state that it can go on from, and what it leaves."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from kvbench import files, jobs
from kvbench.dms import artefact, corpus, evict, method
from kvbench.dms.student import Student
from kvbench.dms.train import Row, Trainer
from kvbench.errors import UserError
from kvbench.jobs import Job
from kvbench.manifest import Manifest
from kvbench.options import Retrofit
from kvbench.provenance import PACKAGES, canonical, versions

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


class Run:
    """A retrofit between files and the training loop.

    Parameters
    ----------
    manifest : of the model, the same that the job names.
    facts : what is known of the job; the model's are added.
    """

    def __init__(self, job: Job, manifest: Manifest, path: Path, settings: Retrofit, facts: dict[str, Any]) -> None:
        self.begun = time.perf_counter()
        self.job, self.settings, self.facts, self.path = job, settings, facts, path
        self.folder = job.output.parent
        self.state = self.folder / "resume" / "state.pt"
        self.corpus = _fitting(path, settings)
        self.base = {
            "name": manifest.name,
            "source": manifest.source,
            "revision": manifest.revision,
            "licence": manifest.licence,
            "weights": {f["path"]: f["sha256"] for f in manifest.files if Path(f["path"]).suffix in WEIGHTS},
        }
        evict.check_kind(files.read_json(manifest.path / "config.json").get("model_type"), manifest.name)

    def curve(self) -> list[Row]:
        """Train to the end and keep the adapter; returns the training curve."""
        settings = self.settings
        model = jobs.ready(self.job, self.facts).model
        method.check(model)  # what could not be run must not be trained
        student = Student(model, settings.window, settings.lora_rank, settings.whole_model, settings.seed)
        key = self._key()
        trainer: Trainer

        def keep(factor: float | None, rows: list[Row]) -> None:
            place = "adapter" if factor is None else f"resume/checkpoints/cr-{factor:g}"
            artefact.save(student, self.folder / place, self._about(trainer), rows)

        def save(state: dict[str, Any]) -> None:
            with files.atomic(self.state) as temporary:
                torch.save({"key": key} | state, temporary)

        trainer = Trainer(student, self.corpus, settings, keep, save, self.begun)
        state = self._saved(key)
        if state is not None:
            trainer.restore(state)
            print(f"going on from step {trainer.step} of {trainer.steps}", flush=True)
        trainer.run()
        self._hand_over()
        return trainer.rows

    def _key(self) -> str:
        """What a state must have in common with a run that goes on from it."""
        return canonical(
            {
                "settings": self.settings.model_dump(mode="json"),
                "corpus": files.sha256(self.path),
                "base": self.base["weights"],
                "dtype": self.facts["dtype"],
                "code": self.job.provenance.get("code"),
                "versions": versions((*PACKAGES, "peft")),
            }
        )

    def _saved(self, key: str) -> dict[str, Any] | None:
        """The state to go on from; what is left of any other run is removed."""
        if self.state.is_file():
            state = torch.load(self.state, map_location="cpu", weights_only=True)
            if state.pop("key") == key:
                return state
            print(f"{self.state} is of a run with other settings, code or packages: beginning anew", flush=True)
        shutil.rmtree(self.state.parent, ignore_errors=True)
        return None

    def _about(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "base": self.base,
            "settings": self.settings.model_dump(mode="json", exclude={"model"}),
            "corpus": self.corpus.about,
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "device": self.facts["device"],
            "versions": versions((*PACKAGES, "peft")),
        }

    def _hand_over(self) -> None:
        """Copy the checkpoints to where they stay: a run that is killed before its curve is written needs its own."""
        there, here = self.folder / "checkpoints", self.folder / "resume" / "checkpoints"
        shutil.rmtree(there, ignore_errors=True)
        here.mkdir(parents=True, exist_ok=True)
        shutil.copytree(here, there)


def _fitting(path: Path, settings: Retrofit) -> corpus.Corpus:
    """A corpus that has the settings' sequences."""
    found = corpus.load(path)
    if found.train.shape[1] != settings.tokens:
        raise UserError(
            f"{path} has sequences of {found.train.shape[1]} tokens, and the retrofit wants {settings.tokens}",
            "Run the rule that makes it again",
        )
    if len(found.train) < settings.batch_size:
        raise UserError(
            f"{path} has {len(found.train)} sequences, fewer than the {settings.batch_size} of one step",
            "Lower batch_size or tokens of the retrofit, or give it more text",
        )
    return found
