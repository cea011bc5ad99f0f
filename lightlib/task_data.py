"""Sentences and questions for the tasks, filled from templates: the same ones on every machine and for ever."""

from __future__ import annotations

# `good/bad` in a word or template marks where the two sentences of a pair differ
WORDS = {
    "name": ["Mary", "Peter", "Anna", "David", "Laura", "Simon", "Helen", "Frank", "Alice", "Thomas", "Ruth", "Martin"],
    "man": ["Peter", "David", "Simon", "Frank", "Thomas", "Martin", "Robert", "George"],
    "woman": ["Mary", "Anna", "Laura", "Helen", "Alice", "Ruth", "Susan", "Emma"],
    "person": ["teacher", "doctor", "farmer", "student", "artist", "lawyer", "singer", "nurse", "driver", "painter"],
    "people": ["teachers", "doctors", "farmers", "students", "artists", "lawyers", "singers", "nurses", "drivers", "painters"],
    "place": ["park", "station", "market", "school", "museum", "library", "garden", "harbour"],
    "thing": ["book", "cup", "letter", "coin", "ticket", "bottle", "lamp", "hat", "knife", "pencil"],
    "things": ["books", "cups", "letters", "coins", "tickets", "bottles", "lamps", "hats", "knives", "pencils"],
    "box": ["drawer", "basket", "cupboard", "bag", "kitchen", "garage", "bedroom", "cellar", "suitcase"],
    "mood": ["tired", "happy", "late", "angry", "famous", "busy", "hungry", "ready"],
    "color": ["red", "green", "blue", "yellow", "black", "white", "brown", "orange"],
    "number": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "animal": ["dog", "cat", "horse", "rabbit", "goat", "parrot", "sheep", "donkey"],
    "city": ["Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Athens", "Dublin"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "near": ["next to", "behind", "in front of", "near", "with", "opposite"],
    "walks": ["walks/walk", "runs/run", "drives/drive", "goes/go", "comes/come", "returns/return", "hurries/hurry"],
    "walk": ["walk/walks", "run/runs", "drive/drives", "go/goes", "come/comes", "return/returns", "hurry/hurries"],
    "know": ["know", "admire", "visit", "remember", "help", "trust", "follow"],
    "knows": ["knows", "admires", "visits", "remembers", "helps", "trusts", "follows"],
    "one": ["book/books", "cup/cups", "letter/letters", "coin/coins", "ticket/tickets", "bottle/bottles", "hat/hats"],
    "many": ["books/book", "cups/cup", "letters/letter", "coins/coin", "tickets/ticket", "bottles/bottle", "hats/hat"],
    "hurt": ["hurt", "saw", "blamed", "introduced", "asked", "enjoyed", "taught", "prepared"],
    "subject": ["he/him", "she/her", "they/them", "we/us", "I/me"],
    "object": ["him/he", "them/they", "us/we", "me/I"],
    "did": ["ate/eaten the bread", "broke/broken the window", "wrote/written the letter", "took/taken the bus",
            "saw/seen the picture", "stole/stolen the car", "sang/sung the song", "drank/drunk the milk",
            "chose/chosen the colour", "drew/drawn the house", "began/begun the work", "gave/given it away"],
    "done": ["eaten/ate the bread", "broken/broke the window", "written/wrote the letter", "taken/took the bus",
             "seen/saw the picture", "stolen/stole the car", "sung/sang the song", "drunk/drank the milk",
             "chosen/chose the colour", "drawn/drew the house", "begun/began the work", "given/gave it away"],
    "ever": ["ever seen the sea", "ever been to Rome", "ever read the letter", "ever told a lie",
             "ever bought a hat", "ever met the king", "ever lost a game", "ever eaten fish"],
    "liquid": ["water", "milk", "money", "time", "rice", "sugar", "salt", "bread"],
    "vowel": ["apple", "egg", "orange", "onion", "umbrella", "island", "answer", "old_lamp", "empty_box", "angry_dog", "idea", "uncle"],
    "consonant": ["banana", "house", "letter", "dog", "hat", "garden", "ticket", "red_lamp", "heavy_box", "tired_horse", "plan", "sister"],
    "can": ["can", "must", "will", "should", "could", "might"],
    "act": ["walk/walked home", "read/reading the letter", "sing/sings a song", "buy/bought a house",
            "open/opened the door", "eat/eating the soup", "wait/waits outside", "write/wrote a book"],
    "job": ["teacher", "doctor", "farmer", "baker", "lawyer", "singer", "nurse", "driver", "painter"],
}  # fmt: skip

# both sentences of a pair open with the same word, whose probability cancels: no start token is needed
GRAMMAR = {
    "subject and verb": [
        "The {person} {walks} to the {place} every day.",
        "The {people} {walk} to the {place} every day.",
    ],
    "verb after a phrase": [
        "The {person} {near} the {people} is/are {mood}.",
        "The {people} {near} the {person} were/was {mood}.",
    ],
    "verb after a clause": [
        "The {person} that the {people} {know} was/were {mood}.",
        "The {people} that the {person} {knows} are/is {mood}.",
    ],
    "determiner and noun": [
        "When {name} found this {color} {one} we laughed.",
        "When {name} found these {color} {many} we laughed.",
    ],
    "reflexives": [
        "Yesterday {man} {hurt} himself/herself at the {place}.",
        "Yesterday {woman} {hurt} herself/himself at the {place}.",
        "Yesterday the {people} {hurt} themselves/himself at the {place}.",
        "Yesterday the {person} {near} {man} {hurt} himself/themselves.",
    ],
    "pronoun case": [
        "At the {place} {subject} met {name} and the {person}.",
        "At the {place} {name} met {object} and waved.",
    ],
    "irregular verbs": [
        "Yesterday {name} {did} and went to the {place}.",
        "The {person} says that {name} has {done}.",
    ],
    "negation and ever": [
        "In the end no/some {person} has {ever}.",
        "I think that nobody/everybody here has {ever}.",
        "I know that {name} has not/also {ever}.",
    ],
    "much and many": [
        "At the {place} {name} had too much/many {liquid}.",
        "At the {place} {name} had too many/much {color} {things}.",
    ],
    "a and an": [
        "When {name} came, we saw an/a {vowel} in the {place}.",
        "When {name} came, we saw a/an {consonant} in the {place}.",
    ],
    "auxiliary and verb": [
        "The {person} said that {name} {can} {act}.",
        "The {person} did not {act} with {name}.",
    ],
    "there is": [
        "Today there is/are one {color} {thing} in the {place}.",
        "Today there are/is {number} {color} {things} in the {place}.",
    ],
}

# a fact, told of three things; a question about one of them; the slot that answers it
QUESTIONS = [
    ("{name} put the {thing} in the {box}.", "Where did {name} put the {thing}?", "box"),
    ("The {thing} on the table is {color}.", "What color is the {thing}?", "color"),
    ("{name} bought {number} {things}.", "How many {things} did {name} buy?", "number"),
    ("{name} found the {animal}.", "Who found the {animal}?", "name"),
    ("{name} lives in {city}.", "Where does {name} live?", "city"),
    ("{name} works as a {job}.", "What is the job of {name}?", "job"),
    ("{name} will come on {day}.", "On which day will {name} come?", "day"),
    ("The {animal} sleeps in the {place}.", "Where does the {animal} sleep?", "place"),
]

EXAMPLES = """Text: The chair is grey. The door is pink. The wall is purple.
Question: What color is the door?
Answer: pink

Text: Jack gave the ball to Lucy. Emma gave the ring to Oliver. Jane gave the map to Henry.
Question: Who has the map?
Answer: Henry

Text: Lucy slept in the tent. Oliver slept in the barn. Jack slept in the attic.
Question: Where did Lucy sleep?
Answer: tent

"""


def grammar_pairs(each: int = 20) -> list[tuple[str, str, str]]:
    """(phenomenon, good sentence, bad sentence): `each` of every phenomenon, the phenomena taking turns."""
    rng, pairs = random.Random(0), []
    for i in range(each):
        for phenomenon, templates in GRAMMAR.items():
            template = templates[i % len(templates)]
            words = {slot: _some(rng, WORDS[slot], 1)[0] for slot in re.findall(r"{(\w+)}", template)}
            both = template.format(**words).replace("_", " ")
            good, bad = (re.sub(r"(\w+)/(\w+)", side, both) for side in (r"\1", r"\2"))
            pairs.append((phenomenon, good, bad))
    return pairs


def question_items(each: int = 10) -> list[tuple[str, str, str, list[str]]]:
    """(text, question, answer, candidates): three facts, one asked; the candidates fill the answer's slot in them."""
    rng, items = random.Random(0), []
    for i in range(each):
        for fact, question, slot in QUESTIONS:
            drawn = {name: _some(rng, WORDS[name], 3) for name in re.findall(r"{(\w+)}", fact)}
            facts = [{name: words[j] for name, words in drawn.items()} for j in range(3)]
            text, asked = " ".join(fact.format(**f) for f in facts), facts[i % 3]
            items.append((text, question.format(**asked), asked[slot], drawn[slot]))
    return items


def _some(rng: random.Random, words: list[str], k: int) -> list[str]:
    # of a seeded generator only random() is promised to give the same numbers in every Python
    return sorted(words, key=lambda _: rng.random())[:k]
