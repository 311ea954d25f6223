"""The commands: one sentence and exit code 2 for bad input, JSON, and a round trip."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.stores import open_activations
from tests.exchange.conftest import label_table, tensor_of, write_cache


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def world(tmp_path: Path, labels: Path) -> Path:
    write_cache(tmp_path / "cache", "safetensors", tensor_of("float16"))
    return tmp_path


def arguments(world: Path, *more: object) -> list[object]:
    return [
        "import",
        world / "cache",
        "--labels",
        world / "labels.parquet",
        "--into",
        world / "a.zarr",
        "--model",
        "rl@200",
        "--site",
        "block12",
        *more,
    ]


def test_import_and_export_speak_to_people_and_machines(world: Path) -> None:
    code, out, err = run(*arguments(world))
    assert code == 0
    assert "rl@200 at block12 has 1200 tokens of 30 prompts, width 6, float16, from 3 safetensors file(s)." in out
    assert "import rl@200: 1200/1200 tokens" in err
    code, out, err = run(*arguments(world, "--json", "--quiet"))
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["n_tokens"], facts["n_resumed"], facts["store"]) == (1200, 1200, str(world / "a.zarr"))
    where = ["--where", "segment=completion", "--where", "task=math,sciq", "--where", "domain=in"]
    code, out, err = run("export", world / "a.zarr", "--to", world / "out", *where, "--format", "npy", "--quiet")
    assert (code, err) == (0, "")
    assert "480 tokens of rl@200 at block12" in out
    table = label_table()
    keep = ((table.segment == "completion") & (table.domain == "in")).to_numpy()
    np.testing.assert_array_equal(np.load(world / "out" / "rl@200.npy"), tensor_of("float16").numpy()[keep])
    code, out, _ = run(
        "export",
        world / "a.zarr",
        "--to",
        world / "all",
        "--model",
        "rl@200",
        "--site",
        "block12",
        "--format",
        "npy",
        "--format",
        "safetensors",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["files"] == ["labels.parquet", "rl@200.npy", "rl@200.safetensors"]


def test_options_of_import_reach_it(world: Path) -> None:
    tensor = tensor_of("float32")
    tensor[0, 0] = float("nan")
    write_cache(world / "other", "safetensors", tensor)
    label_table().assign(text="a").to_csv(world / "labels.csv", index=False)
    code, _, err = run(
        "import",
        world / "other",
        "--labels",
        world / "labels.csv",
        "--into",
        world / "b.zarr",
        "--model",
        "rl@1",
        "--site",
        "x",
        "--tensor",
        "hidden",
        "--dtype",
        "bfloat16",
        "--allow-nonfinite",
        "--ignore",
        "text",
        "--quiet",
    )
    assert (code, err) == (0, "")
    stored = open_activations(world / "b.zarr").activation.values[0]
    np.testing.assert_array_equal(stored, tensor.bfloat16().float().numpy())


def test_bad_input_is_one_sentence_and_exit_code_2(world: Path) -> None:
    assert run(*arguments(world, "--quiet"))[0] == 0
    pd.DataFrame({"prompt": ["a"]}).to_csv(world / "bad.csv", index=False)
    store = world / "a.zarr"
    for given, message in (
        (arguments(world, "--labels", world / "bad.csv"), "bad.csv lacks the column(s) position, token_id, segment"),
        (arguments(world, "--tensor", "x"), "part-2.safetensors has no tensor 'x'; it has hidden: name one of them"),
        (arguments(world, "--dtype", "float32"), "rl@200/block12 holds shape (1200, 6) float16, expected"),
        (arguments(world, "--model", "rl"), "a model id looks like 'rl@200'"),
        (["export", world / "nowhere", "--to", world / "out"], "is not a Zarr v3 store (no such folder)"),
        (["export", store, "--to", world], "exists and is not empty"),
        (["export", store, "--to", world / "out", "--where", "segment"], "--where takes label=value or label=value,va"),
        (["export", store, "--to", world / "out", "--where", "segment=x"], "'x'"),
        (
            ["export", store, "--to", world / "out", "--where", "task=math", "--where", "task=sciq"],
            "--where names 'task' twice, expected each label once; write task=value,value",
        ),
        (
            ["export", store, "--to", world / "out", "--format", "pickle"],
            "arrays are exported as safetensors or npy, g",
        ),
    ):
        code, out, err = run(*given)
        assert code == 2, message
        assert message in err
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1
        assert "Traceback" not in err
        assert out == ""
