"""Language: is a text English? Enough to keep an English rule from judging other languages.

By script (share of letters outside Latin) and by function words: small sets of words that are
frequent in one language and absent from English. It does not say which other language it is.
"""

from __future__ import annotations

import re
import unicodedata


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENGLISH = _words("""
    the be to of and a in that have i it for not on with he as you do at this but his by from they
    we say her she or an will my one all would there their what so up out if about who get which go
    me when make can like no just him know is are was were am been has had does did how your its our
    them these those some any cannot sorry please here yes should could
""")
ROMANCE = _words("""
    el la los las una que en es por con para lo del se puedo puede pero su muy esto ayudar siento
    os um uma não nao com isso posso você voce desculpe muito também
    le les des et est pas ne je vous dans pour sur qui ce cette avec mais suis peux désolé
    il di che non per sono questo mi dispiace della nel gli anche più
""")
GERMANIC = _words("""
    der die das und ist nicht ich sie ein eine zu den mit auf für fur kann dir dem wie aber leider
    het een van niet ik dat je voor maar kan zijn met ook jag inte och det som jeg ikke på til
""")
FURTHER = _words("""
    nie jest się mogę że na jsem není bir ve bu için değil olarak saya tidak dan yang untuk dengan
    ini không tôi và là của có ole ei ja että nem egy az hogy
""")
OTHERS = (ROMANCE | GERMANIC | FURTHER) - ENGLISH
SHARED = _words("die fur per mi se es la en je os um le lo les il di na et az ja das van")
"""Words that also stand in English names and formulas: they count half."""

_ADDRESS = re.compile(r"\bwww\.\S+|\b\w+\.(?:com|org|net|de|es|la)\b")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def is_english(text: str) -> bool:
    """Return whether a text can be judged as English; texts without words count as English."""
    words = (word for word in text.split() if not ("@" in word[1:-1] or "/" in word[1:-1]))
    text = _ADDRESS.sub(" ", " ".join(words))
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return True
    latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if latin < 0.7 * len(letters):
        return False
    found = [word.lower() for word in _WORD.findall(text)]
    english = sum(word.split("'")[0] in ENGLISH for word in found)
    other = sum(0.5 if word in SHARED else 1.0 for word in found if word in OTHERS)
    if other >= 2 or (other >= 1 and len(found) <= 4):
        return english >= other
    # No function word known at all, and letters that English does not use.
    accented = sum(not c.isascii() for c in letters)
    return not (english == 0 and accented >= 2 and len(found) >= 3)
