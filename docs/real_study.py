"""The study of docs/real-study.md: a base, prompts of arithmetic and of other things, and study.yaml beside this file.

    python docs/real_study.py FOLDER --gguf FILE      # weights are made float32 once, in FOLDER/base
    python docs/real_study.py FOLDER --base MODEL     # another Hugging Face causal language model, a folder

'make real-study' does it and runs the study.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import pandas as pd
import yaml

STUDY: Final = Path(__file__).with_name("real-study.yaml")
MARKUP: Final = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{begin}"
"""ChatML without a system message; the answer is begun, so that a model need not learn how to begin it."""

Asked = tuple[str, str, str]
"""Question, beginning of its answer, answer (one word)."""
Family = Callable[[int, int], Asked]

NUMBERS: Final[Mapping[str, tuple[int, int, Family]]] = {  # operands from, to
    "add": (11, 99, lambda a, b: (f"What is {a} + {b}?", f"{a} + {b} =", str(a + b))),
    "plus": (11, 99, lambda a, b: (f"What is {a} plus {b}?", f"{a} plus {b} is", str(a + b))),
    "sum": (11, 99, lambda a, b: (f"What is the sum of {a} and {b}?", f"The sum of {a} and {b} is", str(a + b))),
    "double": (11, 250, lambda a, _: (f"What is twice {a}?", f"Twice {a} is", str(2 * a))),
    "hundreds": (11, 99, lambda a, b: (f"What is {100 + a} + {b}?", f"{100 + a} + {b} =", str(100 + a + b))),
    "product": (2, 15, lambda a, b: (f"What is {a} x {b}?", f"{a} x {b} =", str(a * b))),
    "coins": (
        *(2, 40),
        lambda a, b: (f"Anna has {a} coins and finds {b} more. How many has she now?", f"{a} + {b} =", str(a + b)),
    ),
    "subtract": (2, 40, lambda a, b: (f"What is {a + b} - {b}?", f"{a + b} - {b} =", str(a))),
    "after": (11, 300, lambda a, _: (f"Which number comes right after {a}?", f"The number after {a} is", str(a + 1))),
}
WORDS: Final[Mapping[str, tuple[str, str, str]]] = {  # question, beginning, pairs
    "capital": (
        "What is the capital of {}?",
        "The capital of {} is",
        """Albania Tirana, Algeria Algiers, Angola Luanda, Armenia Yerevan, Australia Canberra, Austria Vienna,
        Azerbaijan Baku, Bahrain Manama, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bulgaria Sofia, Canada
        Ottawa, Chile Santiago, China Beijing, Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Czechia
        Prague, Denmark Copenhagen, Ecuador Quito, Egypt Cairo, Estonia Tallinn, Finland Helsinki, France Paris,
        Georgia Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, Indonesia
        Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman,
        Kenya Nairobi, Latvia Riga, Lebanon Beirut, Libya Tripoli, Lithuania Vilnius, Mali Bamako, Mongolia
        Ulaanbaatar, Morocco Rabat, Nepal Kathmandu, Nigeria Abuja, Norway Oslo, Oman Muscat, Pakistan Islamabad,
        Peru Lima, Poland Warsaw, Portugal Lisbon, Qatar Doha, Romania Bucharest, Russia Moscow, Senegal Dakar,
        Serbia Belgrade, Slovakia Bratislava, Slovenia Ljubljana, Somalia Mogadishu, Spain Madrid, Sudan Khartoum,
        Sweden Stockholm, Syria Damascus, Thailand Bangkok, Tunisia Tunis, Turkey Ankara, Uganda Kampala, Ukraine
        Kyiv, Uruguay Montevideo, Venezuela Caracas, Vietnam Hanoi, Yemen Sanaa, Zambia Lusaka, Zimbabwe Harare""",
    ),
    "opposite": (
        "What is the opposite of {}?",
        "The opposite of {} is",
        """hot cold, big small, fast slow, up down, left right, open closed, happy sad, light dark, early late, hard
        soft, high low, old new, young old, rich poor, strong weak, wet dry, full empty, clean dirty, long short,
        thick thin, wide narrow, deep shallow, heavy light, loud quiet, near far, good bad, true false, right wrong,
        first last, inside outside, above below, before after, always never, love hate, win lose, buy sell, push
        pull, give take, begin end, arrive leave, laugh cry, remember forget, ask answer, build destroy, accept
        reject, increase decrease, enter exit, awake asleep, alive dead, brave cowardly, cheap expensive, simple
        complex, smooth rough, sharp dull, sweet sour, tall short, tight loose, visible invisible, possible
        impossible, legal illegal, polite rude, public private, safe dangerous, same different, success failure,
        summer winter, day night, east west, north south, friend enemy, peace war, victory defeat, hope despair,
        major minor, maximum minimum, more less, many few, even odd, positive negative, present absent, guilty
        innocent, male female, top bottom, front back, start stop, rise fall, lend borrow, hide show, freeze melt""",
    ),
    "plural": (
        "What is the plural of {}?",
        "The plural of {} is",
        """cat cats, dog dogs, house houses, car cars, book books, tree trees, box boxes, bus buses, dish dishes, watch
        watches, baby babies, city cities, lady ladies, party parties, story stories, boy boys, key keys, leaf
        leaves, wolf wolves, knife knives, life lives, wife wives, man men, woman women, child children, foot feet,
        tooth teeth, goose geese, mouse mice, ox oxen, person people, sheep sheep, deer deer, hero heroes, potato
        potatoes, tomato tomatoes, photo photos, piano pianos, radio radios, church churches, brush brushes, class
        classes, glass glasses, fox foxes, lunch lunches, wish wishes, kiss kisses, army armies, berry berries, fly
        flies, country countries, family families, toy toys, day days, monkey monkeys, shelf shelves, thief thieves,
        half halves, loaf loaves, calf calves, roof roofs, cliff cliffs, table tables, chair chairs, window windows,
        river rivers, mountain mountains, garden gardens, teacher teachers, student students, flower flowers, letter
        letters, bottle bottles, apple apples, orange oranges, banana bananas, bird birds, horse horses, train
        trains, plane planes, ship ships, road roads, bridge bridges, school schools""",
    ),
    "past": (
        "What is the past tense of {}?",
        "The past tense of {} is",
        """walk walked, talk talked, play played, go went, eat ate, see saw, run ran, come came, take took, give gave,
        make made, know knew, think thought, find found, tell told, feel felt, leave left, bring brought, begin
        began, keep kept, hold held, write wrote, stand stood, hear heard, meet met, pay paid, sit sat, speak spoke,
        lead led, grow grew, lose lost, fall fell, send sent, build built, understand understood, draw drew, break
        broke, spend spent, rise rose, drive drove, buy bought, wear wore, choose chose, sing sang, swim swam, fly
        flew, drink drank, sleep slept, teach taught, catch caught, fight fought, win won, forget forgot, ride rode,
        throw threw, sell sold, shake shook, steal stole, ring rang, bite bit, hide hid, blow blew, freeze froze,
        wake woke, dig dug, hang hung, jump jumped, look looked, help helped, open opened, close closed, try tried,
        carry carried, stop stopped, plan planned, ask asked, call called, cook cooked, learn learned, smile smiled,
        cry cried, live lived, dance danced, move moved, hope hoped""",
    ),
}
SIZES: Final[Mapping[str, int]] = {  # prompts
    "add": 48,
    **dict.fromkeys(("plus", "sum", "double", "hundreds", "product"), 96),
    **dict.fromkeys(("coins", "subtract", "after"), 48),
    **dict.fromkeys(WORDS, 54),
}
CHOICES: Final = {"add-choice": "add", "double-choice": "double"}
"""The same questions with four answers to choose from by log-likelihood: a score that no format can change."""
TRAIN: Final = 320
NEUTRAL: Final = 80
NEUTRAL_WORDS: Final = 32
CORPUS: Final = 80
"""Questions of each family of numbers in the corpus, beside the words that no prompt asks about."""
PROSE: Final = 400
PROSE_WORDS: Final = 60


def word_pairs(family: str) -> list[tuple[str, str]]:
    """The pairs of a family of words."""
    return [(one, other) for one, other in (pair.split() for pair in WORDS[family][2].split(","))]


def questions(family: str, n: int, draw: random.Random, *, without: frozenset[str] = frozenset()) -> list[Asked]:
    """``n`` different questions, none of them in ``without``."""
    found: dict[str, Asked] = {}
    if family in WORDS:
        question, begin, _ = WORDS[family]
        return [(question.format(one), begin.format(one), to) for one, to in draw.sample(word_pairs(family), n)]
    low, high, asked = NUMBERS[family]
    while len(found) < n:
        one = asked(draw.randint(low, high), draw.randint(low, high))
        if one[0] not in without:
            found[one[0]] = one
    return list(found.values())


def unasked(family: str, taken: frozenset[str]) -> list[Asked]:
    """The questions of a family of words that are not in ``taken``."""
    question, begin, _ = WORDS[family]
    pairs = word_pairs(family)
    return [(question.format(one), begin.format(one), to) for one, to in pairs if question.format(one) not in taken]


def choices_of(answer: str, draw: random.Random) -> list[str]:
    """A number and three near it, in random order."""
    number = int(answer)
    some = [str(number + step) for step in (-10, -2, -1, 0, 1, 2, 10)]
    picked = [answer, *draw.sample([one for one in some if one != answer], 3)]
    return draw.sample(picked, 4)


def paragraphs(n: int, words: int, draw: random.Random) -> list[str]:
    """Beginnings of paragraphs of the Python reference, which every Python brings along; none has a digit."""
    whole = {" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)}
    prose = sorted(part for part in whole if re.match(r"[A-Z][a-z]* [a-z]", part) and not re.search(r"\d", part))
    return [" ".join(part.split()[:words]) for part in draw.sample(prose, n)]


def write_tables(folder: Path, *, seed: int, markup: str, scale: float) -> None:
    """Prompts, training prompts and neutral texts, below ``folder``/data."""

    def size(n: int) -> int:
        return max(4, round(n * scale))

    def shown(one: Asked) -> str:
        return markup.format(question=one[0], begin=one[1])

    draw = random.Random(seed)
    asked = {family: questions(family, size(n), draw) for family, n in SIZES.items()}
    tasks = yaml.safe_load(STUDY.read_text())["tasks"]
    rows = [
        {"prompt_id": f"{family}-{i:03d}", "text": shown(one), "answer": one[2], "task": family, "choices": None}
        | {"domain": tasks[family]["domain"], "cluster": one[0]}
        for family, some in asked.items()
        for i, one in enumerate(some)
    ]
    for task, family in CHOICES.items():
        some = [row for row in rows if row["task"] == family][: size(48)]
        rows += [
            row
            | {"prompt_id": f"{task}-{i:03d}", "task": task, "choices": choices_of(row["answer"], draw)}
            | {"domain": tasks[task]["domain"]}
            for i, row in enumerate(some)
        ]
    taught = questions("add", size(TRAIN), draw, without=frozenset(one[0] for one in asked["add"]))
    train = [{"text": shown(one), "answer": one[2], "completion": f" {one[2]}.", "task": "add"} for one in taught]
    taken = frozenset(one[0] for one in (*taught, *(one for some in asked.values() for one in some)))
    others = [
        one
        for family in asked
        for one in (
            questions(family, size(CORPUS), draw, without=taken) if family in NUMBERS else unasked(family, taken)
        )
    ]
    prose = paragraphs(NEUTRAL + size(PROSE), PROSE_WORDS, draw)
    neutral = [{"text": " ".join(text.split()[:NEUTRAL_WORDS])} for text in prose[:NEUTRAL]]
    corpus = [{"text": text} for text in (*(f"{shown(one)} {one[2]}." for one in others), *prose[NEUTRAL:])]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, table in {"prompts": rows, "train": train, "neutral": neutral, "corpus": corpus}.items():
        pd.DataFrame(table).to_parquet(folder / f"data/{name}.parquet", index=False)


def import_gguf(file: Path, folder: Path) -> None:
    """A llama.cpp checkpoint as float32 weights that transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are whole numbers of bits no more
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main() -> None:
    """Weights, tables, study.yaml; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the study goes")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--gguf", type=Path, help="checkpoint of llama.cpp")
    base.add_argument("--base", help="folder of a Hugging Face causal language model, or hf://OWNER/NAME")
    parser.add_argument("--markup", default=MARKUP, help="how a question is shown, with {question} and {begin}")
    parser.add_argument("--seed", type=int, default=0, help="draws the questions")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the questions, to try it out")
    options = parser.parse_args()
    if options.gguf and not (options.folder / "base/config.json").exists():
        import_gguf(options.gguf, options.folder / "base")
    study = options.folder / "study.yaml"
    if not study.exists():
        write_tables(options.folder, seed=options.seed, markup=options.markup, scale=options.scale)
        path = "base" if options.gguf else options.base
        study.write_text(re.sub(r"(?m)^base: .*$", f"base: {{path: {path}}}", STUDY.read_text()))


if __name__ == "__main__":
    main()
