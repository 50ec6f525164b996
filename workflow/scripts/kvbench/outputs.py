"""The job of a variant's texts, from files to files."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import jobs
from kvbench.errors import Unsupported, UserError
from kvbench.jobs import Job

OUTPUTS = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("rank", pa.int64()),
        ("conversation_id", pa.string()),
        ("prompt", pa.large_string()),
        ("prompt_tokens", pa.int32()),
        ("way", pa.string()),
        ("text", pa.large_string()),
        ("token_ids", pa.list_(pa.int32())),
        ("new_tokens", pa.int32()),
        ("stop_reason", pa.string()),
        ("simulated", pa.bool_()),
    ]
)


def outputs(job: Job, prompts: Path, count: int, new_tokens: int, max_prompt_tokens: int) -> None:
    """Write a variant's answers to the first ``count`` prompts.

    One row a prompt, of the ``way`` "alone"; under the article's protocol another, "batch", of its padded batch.
    """

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from kvbench import answers
        from kvbench.manifest import load_manifest

        manifest = load_manifest(job.manifest)
        if manifest.tokenizer is None:
            raise Unsupported("random weights have no tokenizer, and their text would mean nothing")
        if manifest.context is not None and max_prompt_tokens + new_tokens > manifest.context:
            raise UserError(
                f"Prompts of up to {max_prompt_tokens} tokens and {new_tokens} new ones are more than the context of"
                f" {manifest.name}, {manifest.context} tokens",
                "Lower outputs.max_prompt_tokens or outputs.new_tokens",
            )
        ready = jobs.ready(job, facts)
        ready.method.check(ready.model, 1)
        limits = answers.Limits(count, new_tokens, max_prompt_tokens)
        answer = answers.both_ways if job.protocol["name"] == "article" else answers.alone
        return answer(ready.model, ready.manifest, ready.method, prompts, limits)

    jobs.run(job, work, jobs.rows_writer(job, OUTPUTS))
