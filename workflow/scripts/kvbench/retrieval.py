"""The job of a variant's retrieval, from files to files."""

from itertools import groupby
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from kvbench import jobs, needles
from kvbench.errors import Unsupported
from kvbench.jobs import Job
from kvbench.needles import Point, Quiz

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

    A task that cannot be run at a length has one row a depth with its status and reason; the others go on.

    Parameters
    ----------
    request : ``quality.retrieval`` of the config.
    """

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from kvbench.manifest import load_manifest
        from kvbench.tokenizer import load_tokenizer

        manifest = load_manifest(job.manifest)
        if manifest.tokenizer is None:
            raise Unsupported("random weights have no tokenizer, and their answers would mean nothing")
        ready = jobs.ready(job, facts)
        ready.method.check(ready.model, 1)
        tokenizer = load_tokenizer(manifest)
        alike = groupby(needles.points(request), lambda point: (point.task, point.prompt_tokens))
        parts = tqdm([list(points) for _, points in alike], desc="retrieval", unit="task", mininterval=1.0)
        return [row for points in parts for row in _rows(ready, tokenizer, points, request)]

    jobs.run(job, work, jobs.rows_writer(job, RETRIEVAL, {"retrieval": request}))


def _rows(ready: Any, tokenizer: Any, points: list[Point], request: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a task at one length, or one row a depth that says why there are none."""
    status, reason, rows = jobs.attempt(lambda: _samples(ready, tokenizer, points, request))
    if reason is not None:
        print(f"{points[0].task}, {points[0].prompt_tokens} tokens: {status}: {reason}", flush=True)
    if rows is None:
        rows = [vars(point) | {"status": status, "status_reason": reason} for point in points]
    return [row | {"query_aware": request["query_aware"]} for row in rows]


def _samples(ready: Any, tokenizer: Any, points: list[Point], request: dict[str, Any]) -> list[dict[str, Any]]:
    from kvbench import haystack, recall

    asked = [(point, sample) for point in points for sample in range(request["samples"])]
    quizzes = [needles.quiz(point, sample) for point, sample in asked]
    prompts = [
        haystack.prompt(tokenizer, quiz, point.prompt_tokens) for (point, _), quiz in zip(asked, quizzes, strict=True)
    ]
    longest = points[0].prompt_tokens + max(prompt.new_tokens for prompt in prompts)
    if ready.manifest.context is not None and longest > ready.manifest.context:
        raise Unsupported(f"prompt and answer take {longest} tokens, the model's context is {ready.manifest.context}")
    answers = recall.answers(ready.model, tokenizer, ready.method, prompts, request["query_aware"])
    return [_row(*sample, quiz, answer) for sample, quiz, answer in zip(asked, quizzes, answers, strict=True)]


def _row(point: Point, sample: int, quiz: Quiz, answer: dict[str, Any]) -> dict[str, Any]:
    share = needles.score(quiz.expected, answer["answer"])
    asked = vars(point) | {"sample": sample, "document": quiz.document, "expected": quiz.expected}
    return asked | answer | {"score": share, "correct": share == 1}
