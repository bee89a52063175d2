"""Names and counts as people read them: what a name may hold and no terminal, page or picture should be sent."""

import re
from unicodedata import normalize

LONE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8, and what no file can hold
# Controls of terminals (C0, DEL, C1), other ends of lines, marks that turn the direction of what follows.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write every character that acts rather than shows as Python does, as \x1b or \n: the text is one line."""
    return UNSEEN.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Write a count with its noun: "1 epoch", "2,000 steps"; `nouns` is a plural that is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


# What Markdown makes something of, anywhere in a line and at its beginning; `a_b` is a name.
_MARKUP = re.compile(r"[\\`*\[\]<|&~#$]|(?<![^\W_])_|_(?![^\W_])|^[-+>](?!\d)")


def in_markdown(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line, also within the cell of a table."""
    line = _MARKUP.sub(r"\\\g<0>", visible(text).strip())
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)  # the number of a list


def as_code(text: str) -> str:
    """Write text as Markdown's code, on one line: the fence is longer than any in it."""
    line = visible(text)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    room = " " if "`" in line else ""
    return f"{fence}{room}{line}{room}{fence}"


# What LaTeX makes something of: its signs, what could be an option of the command before it, and a dash after a dash.
_TO_TEX = re.compile(r"""[^ -~]|[\\{}$&#%_^~<>|`"\[\]*]|(?<=-)-""")
_TEX = {
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "`": r"\textasciigrave{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "{''}"},
    **{"[": "{[}", "]": "{]}", "*": "{*}", "-": "{}-"},
    **{"–": "--", "’": "'", "‘": "`", "“": "``", "”": "''", "…": r"\ldots{}"},
    **{"−": "$-$", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "∞": r"$\infty$", "√": r"$\surd$", "₂": "$_2$"},
    **{"λ": r"$\lambda$", "ω": r"$\omega$", "⅓": "1/3"},
}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327", "`'^~\"rvc", strict=True))


def in_latex(text: str) -> str:
    """Write text so that LaTeX shows it as it is, on one line and in ASCII, which each of its engines takes.

    A character that not all of them have is written as its number: [U+4E2D].
    """
    return _TO_TEX.sub(lambda found: _TEX.get(found[0]) or _letter(found[0]), normalize("NFC", visible(text)))


def _letter(character: str) -> str:
    letter, *marks = normalize("NFD", character)
    if letter.isascii() and len(marks) == 1 and marks[0] in _ACCENTS:
        return f"\\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}{{]}}"
