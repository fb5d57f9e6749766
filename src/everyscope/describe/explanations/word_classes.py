"""Classes of words and signs: English function words by list, other words by ending and case, numbers and signs by form.

The lists are closed classes of English grammar; a word on none of them is classed by its form, which is all that another
language's words have here.
"""

import re

CLOSED = {
    "article": "a an the",
    "demonstrative": "this that these those",
    "subject pronoun": "i he she we they",
    "object pronoun": "me him us them",
    "other pronoun": "you it one who whom whoever someone anyone everyone somebody anybody everybody nobody something "
    "anything everything nothing myself yourself himself herself itself ourselves themselves each other",
    "possessive": "my your his her its our their mine yours hers ours theirs whose",
    "question word": "what which when where why how whatever whichever whenever wherever however",
    "preposition": "of in to for on with at by from about into over after through between out against during without "
    "under around among within along across behind beyond upon toward towards near off above below beside "
    "despite since until onto per via amid",
    "coordinating conjunction": "and or but nor yet so",
    "subordinating conjunction": "if because although though while whereas unless whether as than once before lest",
    "form of be": "be is are was were been being am 's 're i'm he's she's it's that's we're they're you're there's "
    "isn't aren't wasn't weren't",
    "form of have": "have has had having i've we've they've you've hasn't haven't hadn't",
    "form of do": "do does did doing done don't doesn't didn't",
    "modal verb": "can could may might must shall should will would can't cannot couldn't won't wouldn't shouldn't "
    "ought i'll we'll he'll she'll they'll it'll you'll i'd we'd he'd she'd they'd you'd",
    "negation": "not no never none neither n't",
    "quantifier": "all some any many much more most few fewer less least several both every enough another such half",
    "number word": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety hundred thousand million billion trillion first second third fourth fifth dozen dozens "
    "hundreds thousands millions",
    "day or month": "monday tuesday wednesday thursday friday saturday sunday january february march april june july "
    "august september october november december",
    "word of time": "now then today yesterday tomorrow year years month months week weeks day days hour hours minute "
    "minutes morning night afternoon evening ago later earlier recently already still soon again always "
    "often sometimes ever",
    "adverb of degree": "very too also only just even quite rather almost nearly about really so well far",
    "verb of saying": "say says said saying tell tells told ask asks asked add adds added claim claims claimed argue argues "
    "argued explain explains explained announce announced report reports reported warn warned suggest "
    "suggests suggested believe believes believed think thinks thought know knows knew",
    "title": "mr mrs ms dr sir president minister prime professor senator judge king queen lord captain general chief director",
    "word of place": "here there where everywhere somewhere anywhere home away up down back north south east west",
}
"""English function words, and some content words that are as good as a list, by class."""
ENDINGS = (
    ("ing", "word in -ing"),
    ("ed", "word in -ed"),
    ("ly", "word in -ly"),
    ("tion", "word in -tion"),
    ("sion", "word in -tion"),
    ("ment", "word in -ment"),
    ("ness", "word in -ness"),
    ("ity", "word in -ity"),
    ("ism", "word in -ism"),
    ("ist", "word in -ist"),
    ("able", "word in -able"),
    ("ible", "word in -able"),
    ("ful", "word in -ful"),
    ("less", "word in -less"),
    ("ous", "word in -ous"),
    ("ive", "word in -ive"),
    ("ical", "word in -al"),
    ("al", "word in -al"),
    ("ic", "word in -ic"),
    ("ance", "word in -ance"),
    ("ence", "word in -ance"),
    ("ship", "word in -ship"),
    ("ers", "word in -ers"),
    ("er", "word in -er"),
    ("or", "word in -er"),
    ("est", "word in -est"),
    ("'s", "word in -'s"),
    ("ies", "word in -ies"),
    ("es", "word in -es"),
    ("s", "word in -s"),
    ("y", "word in -y"),
    ("e", "word in -e"),
)
"""Ends of words, longer ones before those that they end in, and their classes."""
SHORTEST_STEM = 3
"""Letters before an ending, at least: `king` is no word in -ing [characters]."""
SIGNS = {
    ".": "full stop",
    "?": "question or exclamation mark",
    "!": "question or exclamation mark",
    ",": "comma",
    ";": "semicolon or colon",
    ":": "semicolon or colon",
    "\n": "line break",
    "-": "dash",
    "–": "dash",
    "—": "dash",
    **dict.fromkeys('"“”«»', "double quote"),
    **dict.fromkeys("'‘’`", "single quote"),
    **dict.fromkeys("([{", "opening bracket"),
    **dict.fromkeys(")]}", "closing bracket"),
    **dict.fromkeys("$£€¥%", "sign of money or per cent"),
}
OTHER_SIGN, OTHER_WORD, SHORT_WORD = "other sign", "other word", "other short word"
NAME, CAPITALS, CAPITALISED_FIRST = "capitalised word inside a sentence", "word in capitals", "other word that begins a sentence"
YEAR, NUMBER, LARGE_NUMBER, NO_UNIT = "year", "number", "number with a comma or point", "white space"
NOMINAL = {word: name for name, words in CLOSED.items() for word in words.split()}
CLASSES = tuple(
    dict.fromkeys(
        [
            *CLOSED,
            *(name for _, name in ENDINGS),
            *SIGNS.values(),
            *(OTHER_SIGN, OTHER_WORD, SHORT_WORD, NAME, CAPITALS, CAPITALISED_FIRST, YEAR, NUMBER, LARGE_NUMBER, NO_UNIT),
        ]
    )
)
"""Every class, in order."""
ENDING_NAMES = ("no ending", *dict.fromkeys(name for _, name in ENDINGS))
SENTENCE_ENDS = frozenset({".", "?", "!", "\n", ":"})
"""Units behind which a sentence begins."""


def class_of(spelt: str, begins_sentence: bool) -> str:
    """Which of CLASSES a unit is."""
    word = spelt.lower().replace("’", "'")
    if word in NOMINAL:
        return NOMINAL[word]
    if word[0].isdigit():
        if re.fullmatch(r"(1[5-9]|20)\d\d[.,]*", word):
            return YEAR
        return NUMBER if word.rstrip(".,").isdigit() else LARGE_NUMBER
    if word[0] == "\n":
        return "line break"
    if not (word[0].isalpha() or word[0] == "_"):
        return SIGNS.get(word, OTHER_SIGN)
    if len(word) > 1 and spelt.isupper():
        return CAPITALS
    if spelt[0].isupper():
        return CAPITALISED_FIRST if begins_sentence else NAME
    ending = ending_of(word)
    return ending if ending != ENDING_NAMES[0] else OTHER_WORD if len(word) > SHORTEST_STEM else SHORT_WORD


def ending_of(word: str) -> str:
    """Which of ENDING_NAMES a word in lower case has, whatever class it is of."""
    for ending, name in ENDINGS:
        if word.endswith(ending) and len(word) >= len(ending) + SHORTEST_STEM:
            return name
    return ENDING_NAMES[0]
