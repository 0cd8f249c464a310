"""Make the example data: `graded.jsonl`, questions of known difficulty, and `reviews.jsonl`, labelled short texts.

Contract: the same seed gives the same bytes. Every answer is computed along with its question, and `steps` counts the
operations that lead to it. Unrelated sentences pad the easy questions, so a question's length says little about its steps
(Spearman's ρ 0.18 at seed 0). Without them, a score of length would pass for one of difficulty.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEPS = range(1, 7)
PER_KIND_AND_STEP = 8
REVIEWS_PER_LABEL = 80


class Puzzle(NamedTuple):
    facts: list[str]
    question: str
    answer: str


def count(rng: random.Random, steps: int) -> Puzzle:
    """Ask for the number of things in a box after things are added and taken."""
    box = rng.choice(["box", "basket", "drawer", "jar", "crate"])
    things = rng.choice(["marbles", "pencils", "shells", "coins", "buttons", "apples", "keys", "stamps"])
    number = rng.randint(6, 30)
    facts = [f"The {box} holds {number} {things}."]
    for _ in range(steps):
        n = rng.randint(2, 19)
        moves: list[tuple[str, int]] = [(f"Then {n} more {things} are put in.", number + n)]
        if number > n + 3:
            moves.append((f"Then {n} {things} are taken out.", number - n))
        if number <= 40:
            moves.append((f"Then the number of {things} is doubled.", number * 2))
        if number % 2 == 0 and number >= 12:
            moves.append((f"Then half of the {things} are given away.", number // 2))
        fact, number = rng.choice(moves)
        facts.append(fact)
    return Puzzle(facts, f"How many {things} does the {box} hold now?", str(number))


def clock(rng: random.Random, steps: int) -> Puzzle:
    """Ask for the end or the beginning of an event that consists of parts of known duration."""
    event = rng.choice(["lesson", "tour", "rehearsal", "trip", "workshop", "match"])
    minutes = [5 * rng.randint(2, 15) for _ in range(steps)]
    time = 5 * rng.randint(6 * 12, 15 * 12)
    if rng.random() < 0.5:
        facts = [f"The {event} begins at {_hours(time)}."]
        facts += [f"{'First' if i == 0 else 'Next'} comes a part of {n} minutes." for i, n in enumerate(minutes)]
        return Puzzle(facts, f"At what time does the {event} end?", _hours(time + sum(minutes)))
    time += sum(minutes)
    facts = [f"The {event} ends at {_hours(time)}."]
    facts += [f"{'Its last' if i == 0 else 'The previous'} part takes {n} minutes." for i, n in enumerate(minutes)]
    return Puzzle(facts, f"At what time does the {event} begin?", _hours(time - sum(minutes)))


def weekday(rng: random.Random, steps: int) -> Puzzle:
    """Ask for the weekday of an event, which is some days before or after other events."""
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    events = rng.sample(["picnic", "concert", "exam", "wedding", "meeting", "party", "race", "market"], steps + 1)
    day = rng.randrange(7)
    facts = [f"The {events[0]} is on a {days[day]}."]
    for known, new in itertools.pairwise(events):
        n, sign = rng.randint(1, 6), rng.choice([1, -1])
        day = (day + sign * n) % 7
        facts.append(f"The {new} is {n} {'day' if n == 1 else 'days'} {'after' if sign > 0 else 'before'} the {known}.")
    return Puzzle(facts, f"On which day of the week is the {events[-1]}?", days[day])


def ranking(rng: random.Random, steps: int) -> Puzzle:
    """Ask for an end of a ranking, given comparisons of neighbours in any order and direction."""
    more, less, most, least = rng.choice(
        [
            ("taller", "shorter", "tallest", "shortest"),
            ("older", "younger", "oldest", "youngest"),
            ("faster", "slower", "fastest", "slowest"),
            ("heavier", "lighter", "heaviest", "lightest"),
        ]
    )
    people = rng.sample(["Ana", "Ben", "Carla", "David", "Elif", "Felix", "Greta", "Hugo", "Ines", "Jonas"], steps + 1)
    facts = [
        f"{high} is {more} than {low}." if rng.random() < 0.5 else f"{low} is {less} than {high}."
        for high, low in itertools.pairwise(people)
    ]
    rng.shuffle(facts)
    if rng.random() < 0.5:
        return Puzzle(facts, f"Who is the {most}?", people[0])
    return Puzzle(facts, f"Who is the {least}?", people[-1])


def letters(rng: random.Random, steps: int) -> Puzzle:
    """Ask for a word after changes to its letters."""
    word = rng.choice(
        [
            "planet",
            "garden",
            "silver",
            "window",
            "basket",
            "orange",
            "pocket",
            "winter",
            "castle",
            "forest",
            "marble",
            "dragon",
        ]
    )
    facts = [f'Write down the word "{word}".']
    last = ""
    for _ in range(steps):
        moves: dict[str, str] = {
            "Reverse it.": word[::-1],
            "Swap its first and last letters.": word[-1] + word[1:-1] + word[0],
            "Double its last letter.": word + word[-1],
        }
        if len(word) > 4:
            moves["Remove its first letter."] = word[1:]
            moves["Remove its last letter."] = word[:-1]
        # Some moves undo themselves if they are repeated, and would then not be a step.
        moves = {move: result for move, result in moves.items() if move != last and result != word}
        last = rng.choice(list(moves))
        word = moves[last]
        facts.append(last)
    return Puzzle(facts, "What is written down now?", word)


KINDS: dict[str, Callable[[random.Random, int], Puzzle]] = {
    "count": count,
    "clock": clock,
    "weekday": weekday,
    "ranking": ranking,
    "letters": letters,
}
FILLER = [
    "The sky is grey today.",
    "A cat sleeps by the door.",
    "Somebody is whistling outside.",
    "The window is open.",
    "The floor was swept in the morning.",
    "A kettle hums in the kitchen.",
    "Rain is expected later.",
    "The lamp has a green shade.",
    "Music comes from the house next door.",
    "There is a map on the wall.",
    "The street is quiet.",
    "Tea is on the table.",
]


def graded(seed: int) -> Iterator[dict[str, Any]]:
    """Yield shuffled rows with `id`, `question`, `answer`, `steps` (1 to 6) and `kind`."""
    rng = random.Random(f"graded {seed}")
    rows = []
    seen: set[tuple[str, ...]] = set()
    for kind, make in KINDS.items():
        for steps in STEPS:
            for number in range(PER_KIND_AND_STEP):
                puzzle = make(rng, steps)
                while tuple(sorted(puzzle.facts)) in seen:
                    puzzle = make(rng, steps)
                seen.add(tuple(sorted(puzzle.facts)))
                rows.append(
                    {
                        "id": f"{kind}-{steps}-{number + 1}",
                        "question": _padded(rng, puzzle, steps),
                        "answer": puzzle.answer,
                        "steps": steps,
                        "kind": kind,
                    }
                )
    rng.shuffle(rows)
    yield from rows


def _padded(rng: random.Random, puzzle: Puzzle, steps: int) -> str:
    sentences = list(puzzle.facts)
    for filler in rng.sample(FILLER, rng.randint(max(0, 5 - steps), 8 - steps)):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    return " ".join([*sentences, puzzle.question])


PRODUCTS = [
    "kettle",
    "backpack",
    "lamp",
    "keyboard",
    "umbrella",
    "headset",
    "blender",
    "tent",
    "notebook",
    "chair",
    "speaker",
    "jacket",
    "bicycle pump",
    "coffee mill",
    "desk fan",
    "camera",
    "suitcase",
    "toaster",
    "watch",
    "pillow",
]
OPENINGS = [
    "I bought this {product} {when}.",
    "This {product} was a present from {giver}.",
    "I have used the {product} for {time}.",
    "My old {product} broke, so I ordered this one.",
    "We took the {product} along on {trip}.",
    "I was looking for a {product} for {place}.",
    "{giver_capital} recommended this {product} to me.",
    "After {time} with this {product} I can say what it is like.",
]
SLOTS = {
    "when": ["last spring", "two weeks ago", "in a sale", "for my studies", "on a whim"],
    "giver": ["my sister", "a colleague", "my parents", "an old friend"],
    "time": ["a month", "half a year", "a few days", "nearly two years", "one long winter"],
    "trip": ["a weekend by the sea", "our tour through the hills", "a long train journey", "a visit to my aunt"],
    "place": ["the office", "our small kitchen", "the garden house", "my daughter's room"],
}
GOOD = [
    "It does exactly what it should.",
    "The material feels solid and is easy to clean.",
    "Setting it up took no time at all.",
    "Even after heavy use nothing has come loose.",
    "The colours are as warm as in the picture.",
    "It is quiet and quick.",
    "Customer service answered within the hour.",
    "Every detail seems well thought out.",
    "It is lighter than I had hoped.",
    "The handle fits my hand perfectly.",
    "It arrived early and well packed.",
    "For the price I have seen nothing finer.",
]
BAD = [
    "It stopped working without any warning.",
    "The material feels thin and smells of glue.",
    "Setting it up cost me a whole evening.",
    "A screw came loose on the very first day.",
    "The colours look nothing like the picture.",
    "It is loud and painfully slow.",
    "Customer service never wrote back.",
    "Hardly anything about it seems thought through.",
    "It is far heavier than promised.",
    "The handle cuts into my hand.",
    "It arrived late, with a crack in the side.",
    "For that price I had expected much more.",
]
VERDICTS = {
    "positive": [
        "I would buy it again.",
        "A clear recommendation.",
        "I am very happy with it.",
        "It has earned its place.",
        "Well done.",
    ],
    "negative": [
        "I am sending it back.",
        "I cannot recommend it.",
        "What a waste of money.",
        "Never again.",
        "I regret the purchase.",
    ],
}
TOO_ALIKE = 0.4


def reviews(seed: int) -> Iterator[dict[str, Any]]:
    """Yield shuffled rows with `id`, `text` and `label`; no two have a share `TOO_ALIKE` of their word triples in common."""
    rng = random.Random(f"reviews {seed}")
    rows: list[dict[str, Any]] = []
    taken: list[set[tuple[str, ...]]] = []
    for label in ("negative", "positive") * REVIEWS_PER_LABEL:
        while True:
            text = _review(rng, label)
            words = text.lower().split()
            triples = set(zip(words, words[1:], words[2:], strict=False))
            if all(len(triples & other) < TOO_ALIKE * len(triples | other) for other in taken):
                break
        taken.append(triples)
        rows.append({"text": text, "label": label})
    rng.shuffle(rows)
    for number, row in enumerate(rows, 1):
        yield {"id": f"r{number:03d}", **row}


def _review(rng: random.Random, label: str) -> str:
    chosen = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    chosen["giver_capital"] = chosen["giver"][0].upper() + chosen["giver"][1:]
    opening = rng.choice(OPENINGS).format(product=rng.choice(PRODUCTS), **chosen)
    same, other = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
    middle = rng.sample(same, rng.randint(1, 2))
    ending = [rng.choice(VERDICTS[label])] if rng.random() < 0.6 else []
    if len(middle) == 2 and rng.random() < 0.3:
        # One sentence against the label, outweighed by the two sentences for it.
        against = rng.choice(other)
        middle.insert(0, f"True, {against[0].lower()}{against[1:]}" if not against.startswith("I ") else against)
    return " ".join([opening, *middle, *ending])


def _hours(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write into")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("graded.jsonl", graded(given.seed)), ("reviews.jsonl", reviews(given.seed))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
