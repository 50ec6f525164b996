"""The prose that retrofits are trained on is whole, and none of it is what is measured on."""

from pathlib import Path

from kvbench import book
from kvbench.dms import prose
from kvbench.provenance import data_files


def test_what_there_is_to_train_on() -> None:
    assert [each.name for each in prose.fiction()] == [
        "BOOK 1796. The Parent's Assistant, by Maria Edgeworth",
        "BOOK 1811. Sense and Sensibility, by Jane Austen",
        "BOOK 1816. Emma, by Jane Austen",
        "BOOK 1818. Persuasion, by Jane Austen",
        "BOOK 1865. Alice's Adventures in Wonderland, by Lewis Carroll",
        "BOOK 1908. The Man Who Was Thursday, by G. K. Chesterton",
        "BOOK 1909. The Ball and the Cross, by G. K. Chesterton",
        "BOOK 1914. The Wisdom of Father Brown, by G. K. Chesterton",
    ]
    assert prose.fiction()[2].text.startswith("VOLUME I\n\nCHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich,")
    assert prose.texts(["fiction"]) == prose.fiction() and prose.texts(["addresses"]) == prose.addresses()
    assert prose.texts(["fiction", "addresses"]) == prose.addresses() + prose.fiction()
    for part in prose.texts(["addresses", "fiction"]):
        assert "  " not in part.text and part.text == part.text.strip()
        assert "gutenberg" not in part.text.lower(), "a notice of where it was got from is no prose"


def test_nothing_of_what_is_measured_on_is_there_to_train_on() -> None:
    def stretches(parts: list[book.Chapter]) -> set[tuple[str, ...]]:
        words = [part.text.lower().split() for part in parts]
        return {tuple(each[at : at + 13]) for each in words for at in range(len(each) - 12)}

    assert not stretches(book.chapters()) & stretches(prose.texts(["addresses", "fiction"]))


def test_it_counts_in_the_fingerprint_of_what_reads_it() -> None:
    assert {path.name for path in data_files(Path(prose.__file__))} == {"addresses.txt", "fiction.txt", "LICENSE.md"}
