"""The job of a variant's retrieval, from files to files."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from kvbench import jobs, needles, tables
from kvbench.errors import Unsupported
from kvbench.jobs import Job
from kvbench.needles import Point

RETRIEVAL = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("task", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("depth", pa.float64()),
        ("sample", pa.int32()),
        ("document", pa.string()),
        ("expected", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("correct", pa.bool_()),
        ("query_aware", pa.bool_()),
        ("kept_fraction", pa.float64()),
        ("simulated", pa.bool_()),
    ]
)


def retrieval(job: Job, request: dict[str, Any]) -> None:
    """Write what a variant finds of what was hidden in texts, one row a sample.

    A point (task × length × depth) that cannot be run as asked is one row with its status and reason.

    Parameters
    ----------
    request : ``quality.retrieval`` of the config.
    """

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from transformers import AutoTokenizer

        from kvbench.manifest import load_manifest

        manifest = load_manifest(job.manifest)
        if manifest.tokenizer is None:
            raise Unsupported("random weights have no tokenizer, and their answers would mean nothing")
        ready = jobs.ready(job, facts)
        ready.method.check(ready.model, 1)
        tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer, trust_remote_code=manifest.trust_remote_code)
        points = tqdm(needles.points(request), desc="retrieval", unit="point", mininterval=1.0)
        return [row for point in points for row in _rows(ready, tokenizer, point, request)]

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        overall = {key: job.variant[key] for key in ("model", "method")} | {"status": status, "status_reason": reason}
        rows = [overall | row for row in (result if result is not None else [{}])]
        tables.write(job.output, pa.Table.from_pylist(rows, RETRIEVAL), facts | {"retrieval": request})

    jobs.run(job, work, write)


def _rows(ready: Any, tokenizer: Any, point: Point, request: dict[str, Any]) -> list[dict[str, Any]]:
    """A point's samples, or one row that says why there are none."""
    status, reason, rows = jobs.attempt(lambda: list(_samples(ready, tokenizer, point, request)))
    if reason is not None:
        print(f"{point.task}, {point.prompt_tokens} tokens: {status}: {reason}", flush=True)
    known = vars(point) | {"query_aware": request["query_aware"]}
    return [known | row for row in rows] if rows is not None else [known | {"status": status, "status_reason": reason}]


def _samples(ready: Any, tokenizer: Any, point: Point, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from kvbench import haystack, recall

    quizzes = [needles.quiz(point, sample) for sample in range(request["samples"])]
    prompts = [haystack.prompt(tokenizer, quiz, point.prompt_tokens) for quiz in quizzes]
    longest = point.prompt_tokens + max(prompt.new_tokens for prompt in prompts)
    if ready.manifest.context is not None and longest > ready.manifest.context:
        raise Unsupported(f"prompt and answer take {longest} tokens, the model's context is {ready.manifest.context}")
    answers = recall.answers(ready.model, tokenizer, ready.method, prompts, request["query_aware"])
    for sample, (quiz, answer) in enumerate(zip(quizzes, answers, strict=True)):
        share = needles.score(quiz.expected, answer["answer"])
        scored = {"expected": quiz.expected, "score": share, "correct": share == 1}
        yield {"sample": sample, "document": quiz.document} | scored | answer
