"""Names as people can read them: what a name may hold and no terminal, table or picture should be told as it is."""

import re

LONE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8, and what no file can hold
# Controls of terminals (C0, DEL, C1), other ends of lines, marks that turn the direction of what follows.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write every character that acts rather than shows as Python does, as \x1b or \n: the text is one line."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
