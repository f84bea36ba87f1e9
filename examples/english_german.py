"""A grammar that makes English sentences and their German translations, for training a small translator.

German is a good test of attention: verbs stand second, last or first as the clause has it, participles
and infinitives go to the end, articles and adjectives take gender and case from a noun that follows them,
and numbers are read with their last two digits swapped.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple


class Noun(NamedTuple):
    """English and German, singular and plural; gender m, f or n."""

    english: str
    englishes: str
    german: str
    germans: str
    gender: str


class Verb(NamedTuple):
    """English base, third person and past; German infinitive, first and third person, participle."""

    english: str
    sees: str
    saw: str
    german: str
    ich: str
    er: str
    participle: str


def _table(kind: type, text: str) -> list:
    return [kind(*(cell.strip().replace("_", " ") for cell in line.split())) for line in text.strip().splitlines()]


PEOPLE: list[Noun] = _table(
    Noun,
    """
    man men Mann Männer m
    woman women Frau Frauen f
    child children Kind Kinder n
    teacher teachers Lehrer Lehrer m
    friend friends Freund Freunde m
    doctor doctors Arzt Ärzte m
    girl girls Mädchen Mädchen n
    daughter daughters Tochter Töchter f
    son sons Sohn Söhne m
    sister sisters Schwester Schwestern f
    brother brothers Bruder Brüder m
    baker bakers Bäcker Bäcker m
    aunt aunts Tante Tanten f
    gardener gardeners Gärtner Gärtner m
    singer singers Sängerin Sängerinnen f
    queen queens Königin Königinnen f
    """,
)

THINGS: list[Noun] = _table(
    Noun,
    """
    cat cats Katze Katzen f
    dog dogs Hund Hunde m
    horse horses Pferd Pferde n
    bird birds Vogel Vögel m
    mouse mice Maus Mäuse f
    cow cows Kuh Kühe f
    book books Buch Bücher n
    letter letters Brief Briefe m
    newspaper newspapers Zeitung Zeitungen f
    table tables Tisch Tische m
    chair chairs Stuhl Stühle m
    lamp lamps Lampe Lampen f
    picture pictures Bild Bilder n
    key keys Schlüssel Schlüssel m
    clock clocks Uhr Uhren f
    knife knives Messer Messer n
    apple apples Apfel Äpfel m
    pear pears Birne Birnen f
    egg eggs Ei Eier n
    cake cakes Kuchen Kuchen m
    cup cups Tasse Tassen f
    glass glasses Glas Gläser n
    bicycle bicycles Fahrrad Fahrräder n
    car cars Auto Autos n
    ship ships Schiff Schiffe n
    suitcase suitcases Koffer Koffer m
    bag bags Tasche Taschen f
    coat coats Mantel Mäntel m
    shirt shirts Hemd Hemden n
    flower flowers Blume Blumen f
    tree trees Baum Bäume m
    ball balls Ball Bälle m
    """,
)

PLACES: list[Noun] = _table(
    Noun,
    """
    garden gardens Garten Gärten m
    house houses Haus Häuser n
    school schools Schule Schulen f
    church churches Kirche Kirchen f
    forest forests Wald Wälder m
    kitchen kitchens Küche Küchen f
    village villages Dorf Dörfer n
    town towns Stadt Städte f
    station stations Bahnhof Bahnhöfe m
    castle castles Schloss Schlösser n
    bridge bridges Brücke Brücken f
    museum museums Museum Museen n
    """,
)

#: Those that people may be, and those that things may be; some are both.
HUMAN = {
    "small": "klein", "big": "groß", "old": "alt", "young": "jung", "beautiful": "schön", "good": "gut",
    "bad": "schlecht", "slow": "langsam", "fast": "schnell", "loud": "laut", "strong": "stark", "weak": "schwach",
    "friendly": "freundlich", "rich": "reich", "poor": "arm", "tired": "müd", "famous": "berühmt", "happy": "glücklich",
}  # fmt: skip
MATERIAL = {
    "small": "klein", "big": "groß", "old": "alt", "new": "neu", "beautiful": "schön", "good": "gut",
    "bad": "schlecht", "red": "rot", "blue": "blau", "green": "grün", "black": "schwarz", "white": "weiß",
    "heavy": "schwer", "light": "leicht", "cheap": "billig", "clean": "sauber", "dirty": "schmutzig",
    "strange": "seltsam",
}  # fmt: skip

TRANSITIVE: list[Verb] = _table(
    Verb,
    """
    see sees saw sehen sehe sieht gesehen
    hear hears heard hören höre hört gehört
    find finds found finden finde findet gefunden
    buy buys bought kaufen kaufe kauft gekauft
    sell sells sold verkaufen verkaufe verkauft verkauft
    need needs needed brauchen brauche braucht gebraucht
    love loves loved lieben liebe liebt geliebt
    know knows knew kennen kenne kennt gekannt
    forget forgets forgot vergessen vergesse vergisst vergessen
    carry carries carried tragen trage trägt getragen
    take takes took nehmen nehme nimmt genommen
    bring brings brought bringen bringe bringt gebracht
    paint paints painted malen male malt gemalt
    draw draws drew zeichnen zeichne zeichnet gezeichnet
    wash washes washed waschen wasche wäscht gewaschen
    lose loses lost verlieren verliere verliert verloren
    hide hides hid verstecken verstecke versteckt versteckt
    count counts counted zählen zähle zählt gezählt
    steal steals stole stehlen stehle stiehlt gestohlen
    seek seeks sought suchen suche sucht gesucht
    """,
)

INTRANSITIVE: list[Verb] = _table(
    Verb,
    """
    sleep sleeps slept schlafen schlafe schläft geschlafen
    sing sings sang singen singe singt gesungen
    dance dances danced tanzen tanze tanzt getanzt
    wait waits waited warten warte wartet gewartet
    work works worked arbeiten arbeite arbeitet gearbeitet
    laugh laughs laughed lachen lache lacht gelacht
    play plays played spielen spiele spielt gespielt
    cook cooks cooked kochen koche kocht gekocht
    smoke smokes smoked rauchen rauche raucht geraucht
    write writes wrote schreiben schreibe schreibt geschrieben
    """,
)

#: English, its third person, and German: first and third person, plural.
MODALS = (
    ("can", "can", "kann", "kann", "können"),
    ("must", "must", "muss", "muss", "müssen"),
    ("want to", "wants to", "will", "will", "wollen"),
    ("should", "should", "soll", "soll", "sollen"),
    ("may", "may", "darf", "darf", "dürfen"),
    ("will", "will", "werde", "wird", "werden"),
)

#: English, German, English and German as an object, person.
PRONOUNS = (
    ("I", "ich", "me", "mich", "1s"),
    ("he", "er", "him", "ihn", "3s"),
    ("she", "sie", "her", "sie", "3s"),
    ("we", "wir", "us", "uns", "p"),
    ("they", "sie", "them", "sie", "p"),
)

#: Determiners: English and German stem; how adjectives behind them are declined.
POSSESSIVES = (("my", "mein"), ("our", "unser"), ("his", "sein"), ("her", "ihr"))

TIMES = {
    "present": (("today", "heute"), ("now", "jetzt"), ("often", "oft"), ("every day", "jeden Tag")),
    "past": (("yesterday", "gestern"), ("on Monday", "am Montag"), ("last week", "letzte Woche")),
    "future": (("tomorrow", "morgen"), ("on Sunday", "am Sonntag"), ("today", "heute")),
}

PREPOSITIONS = (("in", "in"), ("behind", "hinter"), ("in front of", "vor"), ("next to", "neben"))

ONES = ["null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"]
ENGLISH_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TEENS = {13: "dreizehn", 14: "vierzehn", 15: "fünfzehn", 16: "sechzehn", 17: "siebzehn", 18: "achtzehn", 19: "neunzehn"}
TENS = ["", "zehn", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
ENGLISH_TENS = ["", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def english_number(n: int) -> str:
    """1 to 999,999 in British English, where hundreds are joined with 'and'."""
    if n >= 1000:
        rest = n % 1000
        joint = "" if rest == 0 else " and " if rest < 100 else " "
        return f"{english_number(n // 1000)} thousand{joint}{english_number(rest) if rest else ''}"
    if n >= 100:
        return f"{ENGLISH_ONES[n // 100]} hundred" + (f" and {english_number(n % 100)}" if n % 100 else "")
    if n >= 20:
        return ENGLISH_TENS[n // 10] + (f"-{ENGLISH_ONES[n % 10]}" if n % 10 else "")
    return ENGLISH_ONES[n]


def german_number(n: int) -> str:
    """1 to 999,999 as one German word, as it stands before a plural noun."""
    if n >= 1000:
        return f"{german_number(n // 1000)}tausend{german_number(n % 1000) if n % 1000 else ''}"
    if n >= 100:
        return f"{ONES[n // 100]}hundert{german_number(n % 100) if n % 100 else ''}"
    if n >= 20:
        return (f"{ONES[n % 10]}und" if n % 10 else "") + TENS[n // 10]
    return TEENS[n] if n in TEENS else ONES[n]


def _article(kind: str, stem: str, case: str, gender: str) -> str:
    """gender is m, f, n or p (plural of any)."""
    if kind == "definite":
        return {"m": "der" if case == "nominative" else "den", "f": "die", "n": "das", "p": "die"}[gender]
    ending = {"m": "" if case == "nominative" else "en", "f": "e", "n": "", "p": "e"}[gender]
    return stem + ending


def _adjective(word: str, kind: str, case: str, gender: str) -> str:
    if kind == "none":  # plural without an article, or behind a number
        return word + "e"
    if gender == "p" or (gender == "m" and case == "accusative"):
        return word + "en"
    if kind == "definite" or gender == "f":
        return word + "e"
    return word + {"m": "er", "n": "es"}[gender]


class Phrase(NamedTuple):
    """A noun phrase: English, German, person, and whether it is indefinite, for 'kein'."""

    english: str
    german: str
    person: str
    indefinite: bool = False
    negated: str = ""


def joined(*parts: str) -> str:
    """Words with spaces between them; empty parts are left out."""
    return " ".join(filter(None, parts))


def noun_phrase(rng: random.Random, nouns: list[Noun], case: str) -> Phrase:
    noun = rng.choice(nouns)
    words_for = HUMAN if nouns is PEOPLE else MATERIAL
    adjectives = rng.sample(sorted(words_for), rng.choice((0, 0, 1, 1, 2)))
    kind = rng.choice(("definite", "definite", "indefinite", "possessive", "number", "bare"))
    plural = kind in ("number", "bare") or (kind != "indefinite" and rng.random() < 0.3)
    gender = "p" if plural else noun.gender
    english_noun, german_noun = (noun.englishes, noun.germans) if plural else (noun.english, noun.german)
    declined = {"number": "none", "bare": "none", "definite": "definite"}.get(kind, "mixed")
    german_adjectives = [_adjective(words_for[a], declined, case, gender) for a in adjectives]
    negated = ""
    if kind == "definite":
        first, erst = "the", _article(kind, "", case, gender)
    elif kind == "possessive":
        first, stem = rng.choice(POSSESSIVES)
        erst = _article(kind, stem, case, gender)
    elif kind == "indefinite":
        words = [*adjectives, english_noun]
        first, erst = "an" if words[0][0] in "aeiou" else "a", _article(kind, "ein", case, gender)
    elif kind == "number":
        n = rng.choice((rng.randint(2, 12), rng.randint(13, 99), rng.randint(100, 999), rng.randint(1000, 999999)))
        n += n % 100 == 1  # grammarians differ on what follows one hundred and one
        first, erst = english_number(n), german_number(n)
    else:
        first = erst = ""
    if kind in ("indefinite", "bare"):
        kein = [_adjective(words_for[a], "mixed", case, gender) for a in adjectives]
        negated = joined(_article("indefinite", "kein", case, gender), *kein, german_noun)
    german = joined(erst, *german_adjectives, german_noun)
    english = joined(first, *adjectives, english_noun)
    return Phrase(english, german, "p" if plural else "3s", bool(negated), negated)


def subject(rng: random.Random) -> Phrase:
    if rng.random() < 0.35:
        english, german, _, _, person = rng.choice(PRONOUNS)
        return Phrase(english, german, person)
    return noun_phrase(rng, PEOPLE, "nominative")


def place(rng: random.Random) -> tuple[str, str]:
    noun, (english, german) = rng.choice(PLACES), rng.choice(PREPOSITIONS)
    before = f"{german} {'der' if noun.gender == 'f' else 'dem'}".replace("in dem", "im")
    return f"{english} the {noun.english}", f"{before} {noun.german}"


class Clause(NamedTuple):
    """English as a statement and as a question; German in its parts, for each order to put together."""

    english: str
    question: str
    subject: str
    finite: str
    middle: str
    last: str
    time: tuple[str, str] | None


def clause(rng: random.Random) -> Clause:
    who = subject(rng)
    transitive = rng.random() < 0.75
    verb = rng.choice(TRANSITIVE if transitive else INTRANSITIVE)
    tense = rng.choice(("present", "present", "past", "modal", "modal"))
    negative = rng.random() < 0.2
    singular = who.person == "3s"

    what = Phrase("", "", "")
    if transitive:
        if rng.random() < 0.2:
            _, _, english, german, person = rng.choice(PRONOUNS)
            what = Phrase(english, german, person)
        else:
            what = noun_phrase(rng, THINGS, "accusative")
    where = ("", "")
    if not negative and rng.random() < 0.3:
        where = place(rng)

    last = ""
    time_of = tense
    base = verb.english
    if tense == "present":
        auxiliary = "does" if singular else "do"
        said = f"{auxiliary} not {base}" if negative else verb.sees if singular else base
        finite = {"1s": verb.ich, "3s": verb.er, "p": verb.german}[who.person]
    elif tense == "past":
        auxiliary = "did"
        said = f"did not {base}" if negative else verb.saw
        finite, last = {"1s": "habe", "3s": "hat", "p": "haben"}[who.person], verb.participle
    else:
        modal, modal_3s, first, third, plural = rng.choice(MODALS)
        time_of = "future" if modal == "will" else "present"
        finite, last = {"1s": first, "3s": third, "p": plural}[who.person], verb.german
        if modal == "want to":  # the one that is not an auxiliary
            auxiliary = "does" if singular else "do"
            said = f"{auxiliary} not want to {base}" if negative else f"{modal_3s if singular else modal} {base}"
            base = f"want to {base}"
        else:
            auxiliary = modal
            if modal == "must" and negative:  # a false friend: "must not" forbids, "muss nicht" does not
                finite = {"1s": "darf", "3s": "darf", "p": "dürfen"}[who.person]
            said = f"{modal} not {base}" if negative else f"{modal} {base}"
        said = said.replace("can not", "cannot")
    time = rng.choice(TIMES[time_of]) if not negative and rng.random() < 0.4 else None

    object_german = what.negated if negative and what.indefinite else what.german
    nicht = "nicht" if negative and not what.indefinite else ""
    pronoun = what.person and what.german in {p[3] for p in PRONOUNS}
    adverb = time[1] if time else ""
    # An object pronoun goes before the adverb, a noun behind it.
    order = (object_german, adverb) if pronoun else (adverb, object_german)
    middle = joined(*order, where[1], nicht)
    behind = joined(what.english, where[0])
    not_word = "not" if negative else ""
    return Clause(
        joined(who.english, said, behind), joined(auxiliary, who.english, not_word, base, behind),
        who.german, finite, middle, last, time,
    )  # fmt: skip


def pair(rng: random.Random) -> tuple[str, str]:
    """One English sentence and its translation."""
    c = clause(rng)
    kind = rng.random()
    end = "."
    moved = c.middle
    if c.time:
        moved = " ".join(f" {c.middle} ".replace(f" {c.time[1]} ", " ", 1).split())
    if kind < 0.45:  # a statement; a time at its end
        english = f"{c.english} {c.time[0]}" if c.time else c.english
        german = f"{c.subject} {c.finite} {c.middle} {c.last}"
    elif kind < 0.6 and c.time:  # the time first: then the German verb comes before the subject
        english = f"{c.time[0]} {c.english}"
        german = f"{c.time[1]} {c.finite} {c.subject} {moved} {c.last}"
    elif kind < 0.75:  # a question
        word, frage = rng.choice((("", ""), ("why", "warum"), ("when", "wann")))
        english, german, end = f"{word} {c.question}", f"{frage} {c.finite} {c.subject} {moved} {c.last}", "?"
    else:  # a subordinate clause: the German verb goes last
        word, wort = rng.choice((("because", "weil"), ("that", "dass"), ("if", "wenn")))
        s = clause(rng)
        time = f" {s.time[0]}" if s.time else ""
        tail = f"{s.subject} {s.middle} {s.last} {s.finite}"
        if word == "that":
            know, wissen = rng.choice((("I know", "ich weiß"), ("he says", "er sagt"), ("they believe", "sie glauben")))
            english, german = f"{know} that {s.english}{time}", f"{wissen} , dass {tail}"
        else:
            english = f"{c.english} {word} {s.english}{time}"
            german = f"{c.subject} {c.finite} {moved} {c.last} , {wort} {tail}"
    return spelled(english + end), spelled(german + end)


def spelled(text: str) -> str:
    """Spaces set right and the first letter a capital."""
    text = re.sub(r" ([.,?])", r"\1", " ".join(text.split()))
    return text[0].upper() + text[1:]


def held_out(english: str) -> bool:
    """Whether a sentence belongs to the tenth that is never trained on."""
    return zlib.crc32(english.encode()) % 10 == 0


def pairs(seed: int, *, test: bool) -> Iterator[tuple[str, str]]:
    """Endless pairs of one side of the split."""
    rng = random.Random(seed)
    while True:
        english, german = pair(rng)
        if held_out(english) == test:
            yield english, german


# ---- Tokens ----

#: What long German numbers are made of; a piece that continues a word begins with "##".
PIECES = re.compile(
    "|".join(sorted({*ONES[1:], *TEENS.values(), *TENS[2:], "und", "hundert", "tausend"}, key=len, reverse=True))
)


#: Words that keep their capital within a sentence.
CAPITALS = {"I", *(word for noun in (*PEOPLE, *THINGS, *PLACES) for word in (noun.german, noun.germans))}


def tokens(text: str) -> list[str]:
    """Words, punctuation and the pieces of numbers; the first letter is as it would be within a sentence."""
    found: list[str] = []
    words = re.findall(r"[^\W\d_]+|[.,?-]|\S", text)
    if words and words[0] not in CAPITALS:
        words[0] = words[0][0].lower() + words[0][1:]
    for word in words:
        parts = PIECES.findall(word)
        if len(parts) > 1 and "".join(parts) == word.lower():
            found.extend([parts[0], *(f"##{p}" for p in parts[1:])])
        else:
            found.append(word)
    return found


def text_of(words: list[str]) -> str:
    """The sentence that `tokens` took apart."""
    text = " ".join(words).replace(" ##", "").replace(" - ", "-")
    return spelled(text) if text else ""
