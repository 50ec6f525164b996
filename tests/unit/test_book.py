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


def test_what_there_is_to_train_on() -> None:
    assert [part.name for part in book.fiction()] == [
        "BOOK 1796. The Parent's Assistant, by Maria Edgeworth",
        "BOOK 1811. Sense and Sensibility, by Jane Austen",
        "BOOK 1816. Emma, by Jane Austen",
        "BOOK 1818. Persuasion, by Jane Austen",
        "BOOK 1865. Alice's Adventures in Wonderland, by Lewis Carroll",
        "BOOK 1908. The Man Who Was Thursday, by G. K. Chesterton",
        "BOOK 1909. The Ball and the Cross, by G. K. Chesterton",
        "BOOK 1914. The Wisdom of Father Brown, by G. K. Chesterton",
    ]
    assert book.fiction()[2].text.startswith("VOLUME I\n\nCHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich,")
    assert book.prose(["fiction"]) == book.fiction() and book.prose(["addresses"]) == book.addresses()
    assert book.prose(["fiction", "addresses"]) == book.addresses() + book.fiction()
    for part in book.prose(["addresses", "fiction"]):
        assert "  " not in part.text and part.text == part.text.strip()
        assert "gutenberg" not in part.text.lower(), "a notice of where it was got from is no prose"


def test_nothing_of_what_is_measured_on_is_there_to_train_on() -> None:
    def stretches(parts: list[book.Chapter]) -> set[tuple[str, ...]]:
        words = [part.text.lower().split() for part in parts]
        return {tuple(each[at : at + 13]) for each in words for at in range(len(each) - 12)}

    assert not stretches(book.chapters()) & stretches(book.prose(["addresses", "fiction"]))


def test_it_counts_in_the_fingerprint_of_what_reads_it() -> None:
    files = {path.name for path in data_files(Path(book.__file__))}
    assert files == {"addresses.txt", "fiction.txt", "moby-dick.txt", "LICENSE.md"}
