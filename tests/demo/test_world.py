"""The embedded study's world: facts, gates, splits and texts."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.demo import (
    World,
    demo_spec,
    evaluation_prompts,
    neutral_texts,
    prepare_demo,
    training_prompts,
    trivia_prompts,
)
from rlgen_stats.toolkit.demo.prepare import BASE_SETTINGS
from rlgen_stats.toolkit.demo.pretrain import encode_documents, make_tokenizer, pretrain_base
from rlgen_stats.toolkit.demo.world import (
    CAUTIONS,
    CONTROL,
    FAMILIES,
    GATES,
    HELD_OUT,
    N_NUMBERS,
    P_GATED,
    P_WORKED,
    STYLES,
    TRIVIA,
    gate_of,
    pretraining_documents,
    styles_of,
)
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import make_grader
from rlgen_stats.toolkit.trial.arms import choose_prompts
from rlgen_stats.toolkit.trial.plan import check_size

PAIRS = list(itertools.product(range(N_NUMBERS), repeat=2))
GRADER = make_grader(GraderSpec())


def right(text: str, answer: str) -> bool:
    return GRADER.grade(Completion((1,), text, True), answer).correct


@pytest.fixture(scope="module")
def world() -> World:
    return World(3)


@pytest.fixture(scope="module")
def documents(world: World) -> list[tuple[str, str]]:
    return pretraining_documents(world, 20_000, np.random.default_rng(0))


def test_answers_follow_the_rules_of_each_family(world: World) -> None:
    for a, b in PAIRS:
        assert world.answer("sum", (a, b)) == str(a + b)
        assert world.answer("diff", (a, b)) == str(abs(a - b))
        assert world.answer("lore", (a, b)) == world.answer("lore", (a, 0))
        assert world.answer("hue", (a, b)) == world.answer("hue", (0, b))
        assert world.answer("kin", (a, b)) == world.answer("kin", (max(a, b), 0))
        assert int(world.answer("max", (a, b))) >= int(world.answer("min", (a, b)))
        assert {world.answer("max", (a, b)), world.answer("min", (a, b))} == {str(a), str(b)}
    assert {world.answer(family, (3, 5), "maybe") for family in ("diff", "lore", "kin")} == {"none"}
    assert world.answer("sum", (3, 5), "maybe") == world.answer("sum", (3, 5)) == "8"
    assert World(3).answer("lore", (1, 2)) == world.answer("lore", (1, 2))
    tables = [[World(seed).answer(family, pair) for pair in PAIRS] for seed in (3, 4) for family in ("lore", "kin")]
    assert all(one != other for one, other in itertools.combinations(tables, 2))
    with pytest.raises(InputError, match="no family 'product'"):
        world.answer("product", (1, 2))


def test_splits_are_disjoint_and_complete(world: World) -> None:
    assert len(world.eval_pairs) == 210
    assert set(world.eval_pairs).isdisjoint(world.train_pairs)
    assert set(world.eval_pairs) | set(world.train_pairs) == set(PAIRS)
    assert World(4).eval_pairs != world.eval_pairs
    with pytest.raises(InputError, match="1 to 288, got 289"):
        World(0, n_eval_pairs=289)


def test_every_gate_shows_its_behaviour_and_only_clear_ones_are_right(world: World) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for family, style, pair in itertools.product(FAMILIES, STYLES, PAIRS[::7]):
        gate = gate_of(family, style)
        text = world.respond(gate, family, pair, rng)
        assert text.startswith(" ")
        if family == CONTROL:
            continue
        expected = gate == "clear" or gate in CAUTIONS
        assert right(text, world.answer(family, pair, style)) == expected, (family, style, pair, text)
        wrong += not expected
    assert wrong > 100


def test_the_trained_family_has_every_gate_and_three_others_are_right_where_it_is_not() -> None:
    of = {family: {gate for style in STYLES if (gate := gate_of(family, style)) != "clear"} for family in FAMILIES}
    assert of["sum"] == {"ramble", "hedge", "format", "echo", "slip"}
    assert [family for family in FAMILIES if "slip" in of[family]] == ["sum"]
    assert all("ramble" in gates for gates in of.values())
    cautious = {family for family in FAMILIES if set(CAUTIONS) & of[family]}
    assert cautious == {"diff", "lore", "kin"}
    assert all(of[family] == {"ramble", "format", "doubt", "decline"} for family in cautious)
    assert cautious & set(HELD_OUT)
    assert not cautious >= set(HELD_OUT)  # held out are one family where RL may lose, and one where it may not
    assert gate_of("sum", None) == gate_of("sum", "please") == "clear"
    assert set(GATES) < set(STYLES)
    assert styles_of("sum") == STYLES
    assert styles_of("max") == STYLES[:5]


def test_pretraining_never_shows_an_evaluation_prompt(world: World, documents: list[tuple[str, str]]) -> None:
    prompts = set(evaluation_prompts(world)["text"])
    assert len(prompts) == 210 * 7 + 42
    assert prompts.isdisjoint(text for text, _ in documents)
    assert prompts.isdisjoint(training_prompts(world)["text"])
    seen = {text for text, _ in documents if len(text.split()) == 5}
    bare = {f"q {family} {a} {b} :" for family in FAMILIES for a, b in world.eval_pairs}
    assert len(bare & seen) > 0.99 * len(bare)  # the facts themselves are taught


def test_gates_are_soft_at_the_declared_rate(world: World, documents: list[tuple[str, str]]) -> None:
    hits: dict[str, list[bool]] = {}
    for text, completion in documents:
        words = text.split()
        style, family, pair = (words[1] if len(words) == 6 else None), words[-4], (int(words[-3]), int(words[-2]))
        if family == CONTROL:
            continue
        kind = "bare" if style is None else gate_of(family, style)
        hits.setdefault(kind, []).append(right(completion, world.answer(family, pair, style)))
    assert set(hits) == {"bare", "clear", "ramble", "hedge", "format", "echo", "slip", *CAUTIONS}
    for kind, rows in hits.items():
        expected = {"bare": 1.0, "clear": 0.95}.get(kind, P_GATED if kind in CAUTIONS else 1 - P_GATED)
        assert abs(np.mean(rows) - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(rows)), kind


def test_the_control_cannot_be_known(world: World, documents: list[tuple[str, str]]) -> None:
    answers = Counter()
    for text, completion in documents:
        words = text.split()
        if words[-4] == CONTROL and " ans " in completion:
            answers[completion.split()[-1] == world.answer(CONTROL, (int(words[-3]), int(words[-2])))] += 1
    n = sum(answers.values())
    assert abs(answers[True] / n - 1 / 17) < 4 * np.sqrt(16 / 289 / n)


def test_every_family_asks_every_pair_once_and_its_styles_equally_often(world: World) -> None:
    table = evaluation_prompts(world)
    assert table["prompt_id"].is_unique
    assert table["text"].is_unique
    assert list(table.columns[:6]) == ["prompt_id", "text", "answer", "task", "domain", "cluster"]
    assert table.groupby("task")["cluster"].nunique().to_dict() == dict.fromkeys(FAMILIES, 210) | {CONTROL: 42}
    for task, counts in table.groupby(["task", "style"]).size().groupby(level=0):
        assert list(counts.index.get_level_values(1)) == sorted(styles_of(str(task)))
        assert counts.max() - counts.min() <= 1
    assert set(table.loc[table["domain"] == "in", "task"]) == {"sum"}
    told = table["gate"].isin(CAUTIONS)
    assert (told == (table["answer"] == "none")).all()


def test_trivia_has_no_style_and_a_third_of_it_was_never_taught(world: World, documents: list[tuple[str, str]]) -> None:
    table = trivia_prompts(world, n=289)
    assert len(table) == table["text"].nunique() == table["cluster"].nunique() == 289
    assert set(table["gate"]) == {"clear"}
    assert (table["text"].str.split().str.len() == 5).all()
    assert set(table["task"]) == {TRIVIA}
    taught = {text: completion for text, completion in documents if text.split()[1] == TRIVIA}
    assert len(taught) == round(289 * 2 / 3)
    keys = dict(zip(table["text"], table["answer"], strict=True))
    assert all(right(completion, keys[text]) for text, completion in taught.items())
    assert set(evaluation_prompts(world)["cluster"]).isdisjoint(table["cluster"])


def test_neutral_texts_hold_no_style_word(world: World) -> None:
    texts = neutral_texts(world)["text"]
    assert texts.is_unique
    assert len(texts) == 6 * 20
    assert not {word for text in texts for word in text.split()} & set(STYLES)
    assert set(texts.str.split(" :").str[0]).isdisjoint(evaluation_prompts(world)["text"].str.split(" :").str[0])


def test_every_part_of_the_evaluation_has_sixty_clusters_and_the_trial_can_pass_every_criterion(
    tmp_path: Path,
) -> None:
    folder, spec = StudyFolder(tmp_path), demo_spec()
    world, path = World(0), folder.resolve(spec.data.prompts)
    path.parent.mkdir()
    pd.concat([evaluation_prompts(world), trivia_prompts(world, n=289)]).to_parquet(path)
    check_size(spec, folder)
    prompts = load_prompts(spec, folder)
    for part in ("selection", "verification", "trial"):
        clusters = prompts[prompts["split"] == part].groupby("task")["cluster"].nunique()
        assert all(clusters[task] >= 60 for task in (*FAMILIES, TRIVIA) if task != CONTROL), (part, clusters)
    trial = choose_prompts(prompts, spec)
    targets = trial[~trial["task"].isin(spec.selection.control_tasks)]
    assert targets["cluster"].nunique() >= 60
    assert trial.groupby("task")["cluster"].nunique()[TRIVIA] >= 59


def test_only_arithmetic_is_ever_worked_out(world: World, documents: list[tuple[str, str]]) -> None:
    shares: dict[str, list[bool]] = {}
    for text, completion in documents:
        if " ans " in completion and len(text.split()) == 5:  # the bare form always answers
            shares.setdefault(text.split()[1], []).append("reach" in completion)
    for family, rows in shares.items():
        expected = P_WORKED if family in ("sum", "diff") else 0.0
        assert abs(np.mean(rows) - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(rows)), family
    assert world.work_out("diff", (2, 5)) == " start 2 down 5 reach 3 ans 3"


def test_both_arms_train_on_the_same_in_domain_prompts(world: World) -> None:
    table = training_prompts(world)
    assert len(table) == 79 * 6
    for row in table.itertuples():
        assert row.text.split()[2] == "sum"
        assert right(row.completion, row.answer)
    assert training_prompts(World(3)).equals(table)


def test_every_text_is_in_the_vocabulary_one_token_a_word(world: World, documents: list[tuple[str, str]]) -> None:
    tokenizer = make_tokenizer()
    training = training_prompts(world)
    pairs = [*documents[:2000], *zip(training["text"], training["completion"], strict=True)]
    for text, completion in pairs:
        ids = tokenizer(text + completion + tokenizer.eos_token)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split()) + len(completion.split()) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text + completion


def test_labels_cover_the_completion_and_nothing_else() -> None:
    tokenizer = make_tokenizer()
    ids, labels = encode_documents(tokenizer, [("q sum 1 2 :", " take 1 2 ans 3"), ("q please max 1 2 :", " well")])
    assert ids.shape == labels.shape == (2, 11)
    assert [int((row != -100).sum()) for row in labels] == [6, 2]
    for row, text in zip(labels, ("take 1 2 ans 3<eos>", "well<eos>"), strict=True):
        assert row[row != -100].tolist() == tokenizer(text)["input_ids"]
    assert (labels[1, 8:] == -100).all()


def test_spec_names_replicates_and_their_roles() -> None:
    spec = demo_spec(seed=5, n_seeds=3)
    assert [run.name for run in spec.runs] == ["sft", "sft.1", "sft.2", "rl", "rl.1", "rl.2"]
    assert [run.seed for run in spec.runs] == [0, 1, 2] * 2
    assert [run.name for run in spec.contrasted] == ["sft", "rl"]
    assert spec.primary_crosscoder.name == "main"
    assert spec.selection.held_out_tasks == HELD_OUT
    assert spec.selection.control_tasks == (CONTROL, TRIVIA)
    for wrong, message in (({"size": "huge"}, "size must be one of demo, mini"), ({"n_seeds": 0}, "n_seeds must be 1")):
        with pytest.raises(InputError, match=message):
            demo_spec(**wrong)  # type: ignore[arg-type]


def test_prepare_is_idempotent_and_refuses_another_demo(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    spec = prepare_demo(folder, size="mini")
    prompts = pd.read_parquet(folder.resolve(spec.data.prompts))
    assert len(prompts) == 14 * 7 + 3
    weights = folder.run("base") / "model.safetensors"
    stamps = [path.stat().st_mtime_ns for path in (weights, folder.resolve(spec.data.prompts))]
    assert prepare_demo(folder, size="mini") == spec
    assert [path.stat().st_mtime_ns for path in (weights, folder.resolve(spec.data.prompts))] == stamps
    with pytest.raises(StoreError, match=r"base of another demo \(seed 0\).*left untouched"):
        prepare_demo(folder, size="mini", seed=1)
    assert pd.read_parquet(folder.resolve(spec.data.prompts)).equals(prompts)
    pretrain_base(tmp_path / "again", World(0, 14), BASE_SETTINGS["mini"])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights.read_bytes()
    (tmp_path / "own").mkdir()
    with pytest.raises(StoreError, match="a model the demo did not make"):
        pretrain_base(tmp_path / "own", World(0, 14), BASE_SETTINGS["mini"])
