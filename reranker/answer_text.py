r"""One plain notation for the ways to write an answer: LaTeX, Markdown and Unicode become the same characters.

    **\boxed{\dfrac{1}{2}}**.   ->   \frac{1}{2}
    $\left[0,\,∞\right)$        ->   [0,\infty)
    5\text{ cm}²                ->   5 cm ^2

Only the notation changes here. What an answer means is for `reranker.answer_forms`.
"""

import re
import unicodedata

ROW = "\u23ce"
SET_OPENS, SET_CLOSES = "\u2983", "\u2984"
"""Stand for LaTeX's line break, and for its braces of a set, which differ from those that only group."""

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{MIDDLE DOT}": "*",
        "\N{BULLET OPERATOR}": "*",
        "\N{DOT OPERATOR}": "*",
        "\N{DIVISION SIGN}": "/",
        "\N{FRACTION SLASH}": "/",
        "\N{SQUARE ROOT}": "\\sqrt ",
        "\N{GREEK SMALL LETTER PI}": "\\pi ",
        "\N{INFINITY}": "\\infty ",
        "\N{PLUS-MINUS SIGN}": "\\pm ",
        "\N{EMPTY SET}": "\\emptyset ",
        "\N{UNION}": "\\cup ",
        "\N{ELEMENT OF}": "\\in ",
        "\N{LESS-THAN OR EQUAL TO}": "<=",
        "\N{LESS-THAN OR SLANTED EQUAL TO}": "<=",
        "\N{GREATER-THAN OR EQUAL TO}": ">=",
        "\N{GREATER-THAN OR SLANTED EQUAL TO}": ">=",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{DOUBLE LOW-9 QUOTATION MARK}": '"',
    }
)
_COMMANDS = (
    (r"\\\\", ROW),
    (r"(?<=\d)\\,(?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ","),  # between thousands
    (r"\\\$", " dollars "),
    (r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|limits)(?![A-Za-z])|\\[,;:!]", " "),
    (r"\\(?:quad|qquad)(?![A-Za-z])|\\ |~", " "),
    (r"\\[()\[\]]", " "),
    (r"\\\{|\\lbrace(?![A-Za-z])", SET_OPENS),
    (r"\\\}|\\rbrace(?![A-Za-z])", SET_CLOSES),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])", "<="),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])", ">="),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\langle(?![A-Za-z])", "⟨"),
    (r"\\rangle(?![A-Za-z])", "⟩"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty"),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),
    (
        r"\\text(?:bf|it|rm|sf|tt|normal)?\s*(?=\{)|\\(?:mathrm|mathbf|mathit|mbox|emph|operatorname)\s*(?=\{)",
        r"\\text",
    ),
)
"""Pattern -> replacement, applied in this order."""

_ENDS = " \t\n.,;:"


def plain(answer: str) -> str:
    """The answer in the plain notation, without delimiters, boxes, emphasis, quotation marks and a final full stop."""
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕-⅞])", " ", answer)
    text = re.sub(f"[{''.join(_SUPERSCRIPTS)}]+", _exponent, text)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    if text.count("$") - text.count("\\$") == 1:  # no pair of delimiters, so it is money
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(\\\$|[€£¥₹])\s*([\d.,]+(?: (?:thousand|million|billion|trillion))?)", r"\2 \1", text)
    for pattern, replacement in _COMMANDS:
        text = re.sub(pattern, replacement, text)
    text = _without_wrapper(_without_wrapper(text, "\\text"), "\\boxed")
    return _without_emphasis(text)


def _exponent(superscripts: re.Match[str]) -> str:
    return "^{" + "".join(_SUPERSCRIPTS[character] for character in superscripts[0]) + "}"


def _without_wrapper(text: str, command: str) -> str:
    """Replaces each `command{content}` by its content between spaces; the braces may be nested."""
    while (start := text.find(f"{command}{{")) >= 0:
        opens = start + len(command)
        depth = 0
        for index in range(opens, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                text = f"{text[:start]} {text[opens + 1 : index]} {text[index + 1 :]}"
                break
        else:
            return text[:start] + text[opens + 1 :]
    return text


def _without_emphasis(text: str) -> str:
    """Removes what stands round an answer, from outside to inside, until nothing more does."""
    while True:
        bare = text.rstrip(_ENDS).lstrip()
        for mark in ("**", "__", "*", "`", '"', "'"):
            if len(bare) > 2 * len(mark) and bare.startswith(mark) and bare.endswith(mark):
                bare = bare[len(mark) : -len(mark)]
        if bare == text:
            return text
        text = bare
