"""Which conversation a text is of: ShareGPT's file holds the parts of a long one as conversations of their own."""

import re

_PART = re.compile(r"(\w{7})_\d+")
"""``QWJhYvA_13``: seven characters for the whole, and a number for the part."""


def whole(conversation_id: str) -> str:
    """The id of the conversation that a part is of; an id of any other form is one's own."""
    found = _PART.fullmatch(conversation_id)
    return found[1] if found else conversation_id
