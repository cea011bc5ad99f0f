"""Sentences and questions for the tasks, filled from templates: the same on every machine, for ever."""

from __future__ import annotations

import random
import re

# good/bad: where the two sentences of a pair differ; an underscore is a space
LEXICON = """
name: Mary Peter Anna David Laura Simon Helen Frank Alice Thomas Ruth Martin
man: Peter David Simon Frank Thomas Martin Robert George
woman: Mary Anna Laura Helen Alice Ruth Susan Emma
person: teacher doctor farmer student artist lawyer singer nurse driver painter
people: teachers doctors farmers students artists lawyers singers nurses drivers painters
place: park station market school museum library garden harbour
thing: book cup letter coin ticket bottle lamp hat knife pencil
things: books cups letters coins tickets bottles lamps hats knives pencils
box: drawer basket cupboard bag kitchen garage bedroom cellar suitcase
mood: tired happy late angry famous busy hungry ready
color: red green blue yellow black white brown orange
count: 2 3 4 5 6 7 8 9 10
number: two three four five six seven eight nine ten
animal: dog cat horse rabbit goat parrot sheep donkey
city: Paris London Rome Madrid Berlin Vienna Athens Dublin
day: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
job: teacher doctor farmer baker lawyer singer nurse driver painter
near: next_to behind in_front_of near with opposite
walks: walks/walk runs/run drives/drive goes/go comes/come returns/return hurries/hurry
walk: walk/walks run/runs drive/drives go/goes come/comes return/returns hurry/hurries
know: know admire visit remember help trust follow
knows: knows admires visits remembers helps trusts follows
one: book/books cup/cups letter/letters coin/coins ticket/tickets bottle/bottles hat/hats
many: books/book cups/cup letters/letter coins/coin tickets/ticket bottles/bottle hats/hat
hurt: hurt saw blamed introduced asked enjoyed taught prepared
subject: he/him she/her they/them we/us I/me
object: him/he her/she them/they us/we me/I
did: ate/eaten_the_bread broke/broken_the_window wrote/written_the_letter took/taken_the_bus sang/sung_it \
    stole/stolen_a_car saw/seen_the_picture drank/drunk_the_milk chose/chosen_the_colour drew/drawn_a_house
done: eaten/ate_the_bread broken/broke_the_window written/wrote_the_letter taken/took_the_bus sung/sang_it \
    stolen/stole_a_car seen/saw_the_picture drunk/drank_the_milk chosen/chose_the_colour drawn/drew_a_house
ever: seen_the_sea been_to_Rome read_the_letter told_a_lie bought_a_hat met_the_king lost_a_game eaten_fish
liquid: water milk money time rice sugar salt bread
vowel: apple egg orange onion umbrella owl insect actor engineer old_lamp empty_box angry_dog
consonant: banana table letter dog hat bird ticket baker sailor red_lamp heavy_box tired_horse
can: can must will should could might
act: walk/walked_home read/reading_the_letter sing/sings_a_song buy/bought_a_house open/opened_the_door \
    eat/eating_the_soup wait/waits_outside write/wrote_a_book
"""
WORDS = {
    slot: [word.replace("_", " ") for word in words.split()]
    for slot, words in (line.split(":") for line in LEXICON.strip().splitlines())
}

SLOT = re.compile(r"{(\w+)}")

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
        "Yesterday {man}, who {knows} the {people}, {hurt} himself/themselves.",
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
        "In the end no/some {person} has ever {ever}.",
        "I think that nobody/everybody here has ever {ever}.",
        "I know that {name} has not/also ever {ever}.",
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

# a story, and a question for each slot that can be asked
STORIES = {
    "{name} lives in {city} and works as a {job}. On {day} {name} bought a {color} {thing}.": {
        "city": "Where does {name} live?",
        "job": "What is the job of {name}?",
        "day": "On which day did {name} buy the {thing}?",
        "color": "What color is the {thing}?",
        "thing": "What did {name} buy?",
        "name": "Who lives in {city}?",
    },
    "A {animal} slept near the {place}. It had {count} {color} {things} in a {box}. {name} took it home.": {
        "place": "Where did the {animal} sleep?",
        "count": "How many {things} did the {animal} have?",
        "color": "What color were the {things}?",
        "box": "Where were the {things}?",
        "name": "Who took the {animal} home?",
        "animal": "Which animal slept near the {place}?",
    },
    "The {job} gave {name} a {color} {thing} for {count} coins. It was {day}, and they met at the {place}.": {
        "count": "How many coins did {name} pay?",
        "day": "On which day did they meet?",
        "place": "Where did they meet?",
        "job": "Who gave {name} the {thing}?",
        "color": "What color was the {thing}?",
        "thing": "What did the {job} give to {name}?",
    },
}

# worked examples, for models that were never trained to chat; none of their words comes again
EXAMPLES = """Text: Oliver was in Oslo with his pink violin. It was June, and 12 cooks were at the hotel.
Question: Where was Oliver?
Answer: Oslo
Question: What color was the violin?
Answer: pink
Question: How many cooks were there?
Answer: 12

"""


def grammar_pairs(each: int = 20) -> list[tuple[str, str, str]]:
    """(phenomenon, good sentence, bad sentence), no two the same; the phenomena take turns."""
    rng, pairs = random.Random(0), {}
    for i in range(each):
        for phenomenon, templates in GRAMMAR.items():
            pair = None
            while pair is None or pair in pairs:
                pair = (phenomenon, *_pair(rng, templates[i % len(templates)]))
            pairs[pair] = None
    return list(pairs)


def question_items(each: int = 4) -> list[tuple[str, str, str, list[str]]]:
    """(text, question, answer, candidates): every question of every story `each` times, in turn.

    candidates: all the words that fill the story's slots, the answer among them.
    """
    rng, items = random.Random(0), []
    for i in range(each * 6):
        for story, asked in STORIES.items():
            slot, question = list(asked.items())[i % 6]
            words = {name: _some(rng, WORDS[name], 1)[0] for name in SLOT.findall(story)}
            items.append((story.format(**words), question.format(**words), words[slot], list(words.values())))
    return items


def _pair(rng: random.Random, template: str) -> list[str]:
    both = template.format(**{slot: _some(rng, WORDS[slot], 1)[0] for slot in SLOT.findall(template)})
    return [re.sub(r"(\w+)/(\w+)", side, both) for side in (r"\1", r"\2")]


def _some(rng: random.Random, words: list[str], k: int) -> list[str]:
    # of a seeded generator only random() is promised to give the same numbers in every Python
    return sorted(words, key=lambda _: rng.random())[:k]
