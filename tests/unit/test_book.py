"""The book that comes with kvbench is whole, and part of what a result was made by."""

from pathlib import Path

from kvbench import book
from kvbench.provenance import data_files


def test_its_chapters() -> None:
    chapters = book.chapters()
    assert [chapter.name.split(".")[0] for chapter in chapters] == [f"CHAPTER {n}" for n in range(1, 64)]
    assert chapters[0].name == "CHAPTER 1. Loomings."
    assert chapters[0].text.startswith("Call me Ishmael. Some years ago—never mind how long precisely—")
    assert 590_000 < sum(len(chapter.text) for chapter in chapters) < 630_000
    for chapter in chapters:
        assert "\nCHAPTER" not in chapter.text and "  " not in chapter.text
        assert chapter.text == chapter.text.strip()


def test_it_counts_in_the_fingerprint_of_what_reads_it() -> None:
    assert {path.name for path in data_files(Path(book.__file__))} == {"moby-dick.txt", "LICENSE.md"}
