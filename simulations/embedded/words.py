"""The words and facts that the embedded tasks are made of: nouns by kind, opposites, verbs, capitals, sentences."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _paired(text: str) -> dict[str, str]:
    """The mapping spelled "key:value key:value"."""
    return dict(pair.split(":") for pair in text.split())


KINDS: dict[str, tuple[str, ...]] = {
    "animal": _listed("dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse duck frog camel"),
    "fruit": _listed("apple pear plum peach lemon melon cherry mango grape fig banana orange"),
    "colour": _listed("red blue green yellow black white pink brown grey purple"),
    "tool": _listed("hammer saw drill rake spade axe ladder brush file pump"),
    "garment": _listed("hat coat shirt scarf glove sock dress belt boot skirt"),
    "drink": _listed("tea coffee milk water juice wine beer soup"),
    "plant": _listed("rose tulip oak pine grass fern palm daisy moss ivy"),
    "vehicle": _listed("car bus train boat bike truck plane ship tram van"),
}
NOUNS: tuple[str, ...] = tuple(word for words in KINDS.values() for word in words)
KIND_OF: dict[str, str] = {word: kind for kind, words in KINDS.items() for word in words}

PLURALS: dict[str, str] = {
    **{
        word: word + "s"
        for kind in ("animal", "fruit", "tool", "garment", "vehicle")
        for word in KINDS[kind]
        if not word.endswith(("sh", "ch", "x", "f", "y", "s"))
    },
    "sheep": "sheep", "mouse": "mice", "fox": "foxes", "wolf": "wolves", "peach": "peaches", "cherry": "cherries",
    "brush": "brushes", "scarf": "scarves", "dress": "dresses", "bus": "buses", "box": "boxes", "child": "children",
    "foot": "feet", "tooth": "teeth", "leaf": "leaves", "knife": "knives", "city": "cities", "glass": "glasses",
}  # fmt: skip

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("high", "low"), ("hard", "soft"),
    ("wet", "dry"), ("rich", "poor"), ("open", "closed"), ("full", "empty"), ("light", "dark"), ("long", "short"),
    ("early", "late"), ("happy", "sad"), ("strong", "weak"), ("clean", "dirty"), ("near", "far"), ("loud", "quiet"),
    ("good", "bad"), ("wide", "narrow"), ("left", "right"), ("true", "false"), ("first", "last"), ("safe", "risky"),
    ("cheap", "dear"), ("thick", "thin"), ("deep", "shallow"), ("brave", "timid"),
)  # fmt: skip

PAST: dict[str, str] = _paired(
    "go:went see:saw eat:ate run:ran sing:sang swim:swam take:took give:gave write:wrote drive:drove speak:spoke "
    "break:broke fall:fell find:found buy:bought think:thought bring:brought teach:taught catch:caught sell:sold "
    "tell:told hold:held keep:kept sleep:slept feel:felt leave:left lose:lost win:won make:made send:sent "
    "build:built grow:grew know:knew throw:threw fly:flew draw:drew begin:began drink:drank ring:rang wear:wore "
    "walk:walked talk:talked call:called help:helped look:looked work:worked play:played open:opened wait:waited "
    "paint:painted"
)

CAPITALS: dict[str, str] = _paired(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Greece:Athens Austria:Vienna Norway:Oslo Poland:Warsaw "
    "Ireland:Dublin Portugal:Lisbon Japan:Tokyo China:Beijing Egypt:Cairo Kenya:Nairobi Peru:Lima Cuba:Havana"
)

NAMES: tuple[str, ...] = _listed("Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena")

NUMBER_WORDS: tuple[str, ...] = _listed("zero one two three four five six seven eight nine")

REVIEWED: tuple[str, ...] = _listed("film book meal hotel show song trip game")
PRAISE: tuple[str, ...] = _listed("great lovely superb charming wonderful clever")
BLAME: tuple[str, ...] = _listed("awful dull boring terrible poor weak")
DEGREES: tuple[str, ...] = ("", "very ", "really ", "quite ")


def with_article(noun: str) -> str:
    """`noun` with "a" or "an" before it."""
    return ("an " if noun[0] in "aeio" else "a ") + noun
