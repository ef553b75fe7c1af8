"""How long a text is, in words, in any script: the unit of the length gate and of b-CapScore."""

import math
import unicodedata
from functools import lru_cache

PARTS = 60  # of a word; whole numbers of them, so that a caption of twice its reference is exactly that
# What a letter is worth in the scripts that put no blanks between words: a word of Chinese has one and a half of them,
# of Japanese two, of Thai three, roughly. Only the ratio of a caption to its reference counts, from which that cancels;
# it keeps texts of two languages comparable.
PARTS_A_LETTER = {
    "CJK": 40, "KANGXI": 40, "IDEOGRAPHIC": 40, "BOPOMOFO": 30, "HIRAGANA": 30, "KATAKANA": 20,
    "HALFWIDTH KATAKANA": 20, "YI": 30, "THAI": 20, "LAO": 20, "KHMER": 24, "MYANMAR": 24, "TIBETAN": 24, "TAI": 20,
    "NEW TAI": 20, "BALINESE": 24, "JAVANESE": 24,
}  # fmt: skip
# Between words all the same, though `str.split` takes them for part of one: spaces without width and their like, marks
# of direction, letters that show nothing.
UNSEEN_BLANKS = "\u200b\u2060\ufeff\u180e\u200e\u200f\u034f\u115f\u1160\u3164\uffa0\u2800" + "".join(
    chr(code) for code in (*range(0x202A, 0x202F), *range(0x2061, 0x2070), *range(0xE0000, 0xE0080))
)
JOINERS = "\u200c\u200d"  # shape the letters of Persian and of Indian scripts; elsewhere they are such a blank
MOST_JOINS = 2  # of a compound: "black-and-white"
WORDS_A_COMPOUND = 6  # a text of English has fewer compounds than one in so many words
LONGEST_WORD = 24  # letters; what is longer is words written together,
LETTERS_WRITTEN_TOGETHER = 6  # each of about so many letters

_BLANKS = str.maketrans(dict.fromkeys(UNSEEN_BLANKS, " "))


def count_words(text: str) -> float:
    """The number of words in `text`: of what stands between blanks, as in English, but for two things.

    - Scripts that put no blanks between words (Chinese, Japanese, Thai, Khmer …) count by their letters, vowel signs
      and tone marks left out, at `PARTS_A_LETTER`.
    - Joining words does not make a text shorter. A compound of two or three ("close-up", "black-and-white") is one word
      as long as no more than one in six words is such; of more compounds, and of a longer chain, every part counts. It
      makes no difference what joins them: hyphens (soft ones too), underscores, slashes, dots or dashes. A space
      without width is a blank.
    """
    if text.isascii() and text.replace(" ", "").isalpha():
        tokens = text.split()
        return (PARTS * len(tokens) + sum(_excess(len(token)) for token in tokens)) / PARTS
    tokens = unicodedata.normalize("NFC", text).translate(_BLANKS).split()
    lengths, joins = zip(*map(_measure, tokens)) if tokens else ((), ())
    chains = sum(count for count in joins if count > MOST_JOINS)
    compounds = sorted((count for count in joins if 0 < count <= MOST_JOINS), reverse=True)
    too_many = sum(compounds[math.ceil(len(tokens) / WORDS_A_COMPOUND) :])
    return (sum(lengths) + PARTS * (chains + too_many)) / PARTS


def _measure(token: str) -> tuple[int, int]:
    """(length, joins): the `PARTS` of what stands between two blanks, and how many more words are joined to it."""
    unspaced, words, joins, separator = 0, [""], 0, ""
    for index, character in enumerate(token):
        kind = _kind(character)
        if isinstance(kind, int):
            unspaced, separator = unspaced + kind, " "
        elif kind == "letter":
            if separator and words[-1]:
                joins += not _is_one_word(words[-1], separator, token[index:])
                words.append("")
            words[-1] += character
            separator = ""
        elif kind == "other" and not (character in JOINERS and words[-1] and ord(words[-1][-1]) > 0x590):
            separator += character
    excess = sum(_excess(len(word)) for word in words)
    if unspaced:
        return unspaced + excess + PARTS * (joins + 1 if words[0] else 0), 0
    return PARTS + excess, joins


def _is_one_word(before: str, separator: str, after: str) -> bool:
    """Whether a separator stands within a word: 10:30, 1,000, U.S., don't, l'arbre."""
    if before[-1].isdigit() and after[0].isdigit():
        return len(separator) == 1
    if separator in ("'", "\u2019"):
        return len(before) <= 2 or sum(map(str.isalpha, after)) <= 2
    return separator == "." and len(before) == 1 and not after[1:2].isalpha()


def _excess(letters: int) -> int:
    return PARTS * max(0, letters - LONGEST_WORD) // LETTERS_WRITTEN_TOGETHER


@lru_cache(maxsize=2**14)
def _kind(character: str) -> str | int:
    """`letter` (digits too), `mark` (of a letter) or `other`; what it is worth if its script has no blanks."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return "other"
    name = unicodedata.name(character, "")
    worth = next((worth for script, worth in PARTS_A_LETTER.items() if name.startswith(f"{script} ")), None)
    return "letter" if worth is None or category == "Nd" else worth
