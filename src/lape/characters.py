"""Names and counts as people read them: what a name may hold and no terminal, table or picture should be sent."""

import re

LONE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8, and what no file can hold
# Controls of terminals (C0, DEL, C1), other ends of lines, marks that turn the direction of what follows.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write every character that acts rather than shows as Python does, as \x1b or \n: the text is one line."""
    return UNSEEN.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


def markdown_cell(content: object) -> str:
    """Write what may hold anything as one cell of a Markdown table."""
    return visible(str(content)).replace("\\", "\\\\").replace("|", "\\|")


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Write a count with its noun: "1 epoch", "2,000 steps"; `nouns` is a plural that is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"
