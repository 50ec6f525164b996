"""ShareGPT conversations to a shuffled list of prompts: filter, sort by id, shuffle, filter by length.

Two selections share that order of steps:

``article``
    every conversation of at least two messages, whoever speaks first. The list equals, record for record,
    what ``pd.read_json``, ``sort_values(by="id")`` and ``sample(frac=1, random_state=seed)`` give on the file.
``human_first``
    only those whose first message is a human's (`HUMAN_ROLES`) and whose second is an assistant's, which is
    any role but a human's, the system's or a tool's: then the prompt is a question and the completion its answer.

A text counts as long enough from ``min_chars`` characters (code points) on, prompt and completion both.
"""

import tempfile
from collections import Counter
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.files import write_json
from kvbench.manifest import check_manifest_files, load_manifest
from kvbench.scan import Part, Rules, scan
from kvbench.sharegpt import SHAPE


def run(manifest_path: Path, output: Path, counts_path: Path, rules: Rules, provenance: dict[str, Any]) -> None:
    """Select the prompts of a fetched dataset and write them, and the counts manifest beside them.

    Raises
    ------
    UserError : see `select`.
    """
    dataset = load_manifest(manifest_path)
    check_manifest_files(dataset)
    inputs = {"dataset": dataset.name, "revision": dataset.revision, "files": dataset.files, **asdict(rules)}
    counts = select(dataset.file, output, rules, inputs | provenance)
    about = {"dataset": dataset.name, "selection": rules.selection, "seed": rules.seed, "file": dataset.file.name}
    write_json(counts_path, about | counts)
    cut = f", cut off: {counts['bytes_left_out']:,} bytes of an unfinished record left out"
    print(f"{dataset.file.name}: {counts['conversations_read']:,} conversations{cut if counts['truncated'] else ''}")
    for step in counts["steps"][1:]:
        print(f"{step['kept']:>10,}  {step['step']}")
    for kind, number in counts["malformed"].items():
        print(f"{number:>10,}  malformed: {kind}")


def select(path: Path, output: Path, rules: Rules, metadata: dict[str, Any]) -> dict[str, Any]:
    """Write the prompts of the ShareGPT file ``path`` to the Parquet file ``output``.

    Parameters
    ----------
    metadata : stored as JSON under the schema's key ``kvbench``.

    Returns
    -------
    The counts: records read, what each step kept, what is malformed, and whether the file is cut off.

    Raises
    ------
    UserError : the file cannot be read (see `Records`), too many records are malformed, the ids cannot be
        sorted, or no prompt is left.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        with scan(path, rules, Path(folder)) as read:
            # Not before the scan's processes have begun, which would each hold what it imports.
            from kvbench.prompt_table import write_prompts

            parts = read()
        counts = _counts(parts, rules)
        _refuse_too_many_malformed(path, counts, rules.max_malformed_share)
        if not write_prompts(path, parts, rules.seed, output, metadata):
            raise _no_prompts(path, counts)
    return counts


def _counts(parts: list[Part], rules: Rules) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    steps = {
        "read": total("read"),
        "at least 2 messages": total("two_messages"),
        "first 2 messages readable": total("readable"),
    }
    if rules.selection == "human_first":
        steps["a human first, an assistant second"] = sum(sum(part.drawn) for part in parts)
    steps[f"prompt and completion of at least {rules.min_chars} characters"] = sum(len(part.roles) for part in parts)
    malformed: Counter[str] = sum((part.malformed for part in parts), Counter())
    before = accumulate((part.read for part in parts[:-1]), initial=0)
    return {
        "conversations_read": total("read"),
        "truncated": parts[-1].truncated,
        "bytes_left_out": parts[-1].bytes_left_out,
        "steps": [{"step": step, "kept": kept} for step, kept in steps.items()],
        "malformed": dict(malformed),
        "malformed_examples": [
            example | {"index": example["index"] + first}
            for part, first in zip(parts, before, strict=True)
            for example in part.examples
        ],
    }


def _refuse_too_many_malformed(path: Path, counts: dict[str, Any], largest_share: float) -> None:
    kinds, read = counts["malformed"], counts["conversations_read"]
    malformed = sum(kinds.values())
    if malformed <= largest_share * read:
        return
    first = counts["malformed_examples"][0]
    raise UserError(
        f"{path} has {malformed:,} malformed records of {read:,}, more than the share of {largest_share:g} allowed "
        f"({', '.join(f'{kind} {number:,}' for kind, number in kinds.items())}; "
        f"the first is record {first['index']}, id {first['id']}: {first['detail']})",
        f"{SHAPE}. Mend the records, or raise dataset.max_malformed_share",
    )


def _no_prompts(path: Path, counts: dict[str, Any]) -> UserError:
    steps = ", ".join(f"{step['step']}: {step['kept']:,}" for step in counts["steps"])
    cut = " (the file is cut off)" if counts["truncated"] else ""
    return UserError(
        f"No prompt is left of {path}{cut} ({steps})",
        "Lower dataset.min_chars, or use dataset.selection: article if the first messages are not a human's",
    )
