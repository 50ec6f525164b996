from hypothesis import given
from hypothesis import strategies as st

from kvbench.diff import LONGEST, common_prefix, compare_texts, split_words

TEXT = st.text(max_size=200)


def rebuilt(difference, kinds):
    return difference.prefix + "".join(part.text for part in difference.segments if part.kind in kinds)


@given(TEXT)
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text


def test_scripts_without_spaces_split_by_character():
    assert split_words("on 爰录音ok, 2") == ["on", " 爰", "录", "音", "ok", ",", " 2"]


@given(TEXT, TEXT)
def test_the_new_text_can_be_read_off_the_diff(base, text):
    assert rebuilt(compare_texts(base, text), ("both", "added")) == text


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12).map(" ".join), st.data())
def test_the_base_can_be_read_off_an_interleaved_diff(base, data):
    words = base.split(" ")
    words.insert(data.draw(st.integers(0, len(words))), "new")
    difference = compare_texts(base, " ".join(words))
    if any(part.kind == "both" for part in difference.segments):
        base_words = [w.strip() for w in split_words(rebuilt(difference, ("both", "removed")))]
        assert base_words == [w.strip() for w in split_words(base)]


@given(TEXT)
def test_a_text_equals_itself(text):
    difference = compare_texts(text, text)
    assert difference.equal and difference.shared == 1 and difference.prefix == text


def test_first_divergence_is_at_a_whole_word():
    difference = compare_texts("It is in the Seine, there.", "It is in the Seinfeld, there.")
    assert difference.prefix == "It is in the"
    assert [(part.kind, part.text) for part in difference.segments] == [
        ("removed", " Seine"),
        ("added", " Seinfeld"),
        ("both", ", there."),
    ]
    assert difference.words == 4


def test_unlike_texts_are_not_interleaved():
    difference = compare_texts("one two three four five", "uno dos tres four quinque sex septem octo")
    assert [part.kind for part in difference.segments] == ["added"]


def test_an_empty_text_differs_from_a_text():
    gone = compare_texts("something", "")
    assert not gone.equal and [part.kind for part in gone.segments] == ["removed"]
    assert not compare_texts("", "something").equal
    assert compare_texts("", "").shared == 1


def test_a_difference_in_space_alone_is_a_difference():
    assert not compare_texts("a b", "a\nb").equal


def test_beyond_the_longest_nothing_is_lost():
    text = "word " * (LONGEST + 50)
    difference = compare_texts("other " + text, text)
    assert rebuilt(difference, ("both", "added")) == text


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix(first, second):
    count = common_prefix(first, second)
    assert first[:count] == second[:count]
    assert count == min(len(first), len(second)) or first[count] != second[count]
