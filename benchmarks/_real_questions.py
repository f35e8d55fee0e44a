"""What chat models are asked, and the rules by which their answers are judged.

16 principles that a program can check, in the manner of IFEval (Zhou et al., 2023, arXiv
2311.07911): styles told by their words, and formats told by the text itself. 40 questions: 20 with
a known short answer, 20 open ones with words that an answer on the topic would use. Every eight
questions are four of each kind, so that any number of such blocks is balanced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from trueline.evals.items import Item
from trueline.evals.language import is_english

BLOCK = 8
"""Questions of a block; each is asked under every principle."""


@dataclass(frozen=True)
class Rule:
    """A principle in a user's words, and whether a text follows it."""

    name: str
    text: str
    holds: Callable[[str], bool]
    whole: bool = False
    """Whether only an answer that has ended can follow it."""

    def follows(self, text: str, *, ended: bool) -> bool:
        """Return whether an answer follows the principle; an empty one follows none."""
        return bool(text.strip()) and (ended or not self.whole) and self.holds(text.strip())


def _words(pattern: str) -> Callable[[str], bool]:
    found = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    return lambda text: bool(found.search(text))


def _one_sentence(text: str) -> bool:
    plain = re.sub(r"\b(?:Mr|Mrs|Dr|St|U\.S|e\.g|i\.e)\.|(?<=\d)\.(?=\d)", "", text)
    return "\n" not in text and len(re.findall(r"[.!?]+(?=\s|$)", plain)) == 1


def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        return isinstance(json.loads(fenced[1] if fenced else text), dict)
    except ValueError:
        return False


def _capitals(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and sum(map(str.isupper, letters)) >= 0.95 * len(letters)


def _lines(pattern: str) -> Callable[[str], bool]:
    found = re.compile(rf"^\s*(?:{pattern})", re.MULTILINE | re.IGNORECASE)
    return lambda text: len(found.findall(text)) >= 2


RULES = (
    Rule("pirate", "Talk like a pirate.",
         _words(r"arr+\w*|ahoy|matey|me hearties|aye|ye|yer|landlubbers?|shiver")),
    Rule("shakespeare", "Talk like Shakespeare.",
         _words(r"thee|thou|thy|thine|hath|doth|dost|'?tis|forsooth|prithee|hark|wherefore")),
    Rule("cooking", "Explain everything by comparing it to cooking.",
         _words(r"cook\w*|recipes?|ingredients?|bak(?:e|ed|ing)|kitchen|oven|chef|"
                r"stir\w*|simmer\w*")),
    Rule("excited", "Sound very excited and use exclamation marks.",
         lambda text: text.count("!") > 1),
    Rule("spanish", "Answer in Spanish.", lambda text: not is_english(text)),
    Rule("one sentence", "Answer in exactly one sentence.", _one_sentence, whole=True),
    Rule("ten words", "Answer in at most ten words.",
         lambda text: len(text.split()) <= 10, whole=True),
    Rule("capitals", "Write everything in CAPITAL LETTERS.", _capitals),
    Rule("lower case", "write everything in lower case, with no capital letters.",
         lambda text: text == text.lower()),
    Rule("bullets", "Answer with a list of bullet points.", _lines(r"[-*\u2022]\s")),
    Rule("numbered", "Answer in numbered steps.", _lines(r"\**(?:step\s+)?\d+\s*[.):]")),
    Rule("json", "Answer with a JSON object and nothing else.", _json, whole=True),
    Rule("question", "End your answer with a question to the user.",
         lambda text: text.rstrip("\"'*) ").endswith("?"), whole=True),
    Rule("greeting", 'Begin your answer with "Dear Sir or Madam".',
         lambda text: text.lower().lstrip("\"'* ").startswith("dear sir or madam")),
    Rule("story", 'Begin your answer with "Once upon a time".',
         lambda text: text.lower().lstrip("\"'* ").startswith("once upon a time")),
    Rule("word", 'Use the word "banana" in your answer.', _words("bananas?")),
)  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}

FACTS = (
    ("What is the capital of France?", r"par[ií]s"),
    ("What is the largest planet in the solar system?", r"j[uú]piter"),
    ("How many days are there in a week?", r"7|seven|siete"),
    ("What colour do you get when you mix blue and yellow?", r"green|verde"),
    ("Who wrote Romeo and Juliet?", r"shakespeare"),
    ("What is frozen water called?", r"ice|hielo"),
    ("How many legs does a spider have?", r"8|eight|ocho"),
    ("What is the chemical formula of water?", r"h2o|h₂o"),
    ("What is the currency of Japan?", r"yen"),
    ("Which planet is closest to the sun?", r"mercur[iy]"),
    ("How many minutes are there in an hour?", r"60|sixty|sesenta"),
    ("What is the capital of Italy?", r"rom[ae]"),
    ("What is the opposite of hot?", r"cold|cool|fr[ií]o"),
    ("Which language do most people in Brazil speak?", r"portugu[eé]s"),
    ("What is the tallest mountain in the world?", r"everest"),
    ("Which is the largest ocean?", r"pac[ií]fic"),
    ("On which continent is Egypt?", r"[aá]frica"),
    ("How many months does a year have?", r"12|twelve|doce"),
    ("Which animal says meow?", r"\bcats?\b|kitten|feline|\bgato"),
    ("What is the capital of Spain?", r"madrid"),
)
OPEN = (
    ("Why is the sky blue?", r"light|blue|scatter|sky|azul|luz"),
    ("How do I make a cup of tea?", r"\btea\b|water|boil|agua|\bté\b"),
    ("How can I sleep better?", r"sleep|bed|rest|dormir|sueño"),
    ("How do aeroplanes fly?", r"\bfly|lift|wing|plane|air|vuel|\balas?\b|avi[oó]n"),
    ("What can I do on a rainy day?", r"rain|read|game|movie|indoor|book|lluvi|leer|pel[ií]cul"),
    ("How do bees make honey?", r"\bbees?\b|honey|nectar|hive|abeja|miel"),
    ("Why should I exercise?", r"exercis|health|fit|body|muscle|ejercicio|salud"),
    ("How can I save money?", r"money|save|saving|budget|spend|dinero|ahorr"),
    ("What makes a good teacher?", r"teach|student|learn|class|maestr|profesor|estudiante"),
    ("How do I take care of a dog?", r"\bdogs?\b|pet|feed|walk|vet|puppy|perro"),
    ("How do I prepare for an exam?", r"exam|stud|test|review|notes|examen|estudi"),
    ("What is friendship?", r"friend|trust|relationship|amist|amig"),
    ("How does rain form?", r"rain|cloud|water|vapou?r|drop|lluvia|nube|agua"),
    ("How can I learn to play the guitar?", r"guitar|chord|string|practi[cs]|play|acorde"),
    ("Why do people read books?", r"book|read|stor|learn|libro|leer"),
    ("What is the internet?", r"internet|network|computer|web|\bred\b"),
    ("How can I make new friends in a new city?", r"friend|people|meet|city|join|amig|ciudad"),
    ("Why do we dream?", r"dream|sleep|brain|mind|sueñ|soñ|cerebro"),
    ("How do I grow tomatoes?", r"tomato|plant|soil|seed|water|sun|tomate|semilla"),
    ("What is music?", r"music|sound|melod|rhythm|song|m[uú]sica|sonido"),
)


def questions() -> list[tuple[str, str, str]]:
    """Return (question, kind, pattern of an answer to it), four of each kind in every block."""
    half = BLOCK // 2
    rows: list[tuple[str, str, str]] = []
    for first in range(0, len(FACTS), half):
        rows += [(q, "fact", p) for q, p in FACTS[first : first + half]]
        rows += [(q, "open", p) for q, p in OPEN[first : first + half]]
    return rows


def block_items(block: int) -> list[Item]:
    """Return the prompts of a block: every principle with every question of the block."""
    own = questions()[block * BLOCK : (block + 1) * BLOCK]
    return [
        Item(f"{block}:{i}:{rule.name}", question, rule.name, rule.text, kind, pattern)
        for i, (question, kind, pattern) in enumerate(own)
        for rule in RULES
    ]


BLOCKS = len(questions()) // BLOCK
