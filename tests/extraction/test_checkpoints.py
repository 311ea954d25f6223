import ast
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlgen_stats.schemas.errors import ModelError, StoreError
from rlgen_stats.schemas.study import ModelsSpec, StudySpec
from rlgen_stats.stores import StudyFolder, open_activations, read_json, write_json
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.study_models import ModelRef, final_model, find_model, list_models, resolve_view
from rlgen_stats.toolkit.extraction import (
    check_tokenizers,
    checkpoints,
    extract_activations,
    locate_layers,
    measure_movement,
    sample_outcomes,
)
from rlgen_stats.toolkit.extraction.activations import forced_texts, read_texts
from rlgen_stats.toolkit.extraction.checkpoints import load_model, load_tokenizer, resolve_device
from tests.extraction.conftest import PROVENANCE, WORDS, save_model, tiny_model, word_tokenizer

Study = tuple[StudySpec, StudyFolder]


def test_models_are_base_then_runs_by_step(study: Study) -> None:
    refs = list_models(*study)
    assert [ref.model for ref in refs] == ["base@0", "sft@3", "sft@6", "rl@4", "rl@8"]
    assert [ref.arm for ref in refs] == ["base", "sft", "sft", "rl", "rl"]
    assert refs[1].path == study[1].root / "models/sft/step-3"
    assert refs[4].path == study[1].root / "own/rl-8"
    assert all(load_model(ref).num_parameters() for ref in refs)


def test_views_are_resolved(study: Study) -> None:
    assert resolve_view("rl@final", *study) == "rl@8"
    assert resolve_view("sft@final", *study) == "sft@6"
    assert resolve_view("sft@3", *study) == "sft@3"
    assert resolve_view("base@0", *study) == "base@0"
    assert resolve_view("base@repeat", *study) == "base.repeat@0"
    assert find_model("base.repeat@0", *study) == list_models(*study)[0]
    with pytest.raises(ModelError, match=r"no model is called 'rl@5'.*'rl@4', 'rl@8'"):
        resolve_view("rl@5", *study)
    with pytest.raises(ModelError, match=r"no run is called 'ppo'; the runs are \['sft', 'rl'\]"):
        final_model(*study, "ppo")


def test_runs_with_checkpoints_at_the_same_steps_are_told_apart(study: Study) -> None:
    spec, folder = study
    record = folder.run("sft") / "posttrain.json"
    write_json(record, {"steps": [8, 4]})
    assert [ref.model for ref in list_models(spec, folder)] == ["base@0", "sft@4", "sft@8", "rl@4", "rl@8"]
    for view, model in (("rl@4", "rl@4"), ("rl@final", "rl@8"), ("sft@final", "sft@8")):
        assert resolve_view(view, spec, folder) == model
        found = find_model(model, spec, folder)
        assert (found.run, found.model) == (model.split("@")[0], model)
    with pytest.raises((ModelError, ValueError)):
        resolve_view("rl@repeat", spec, folder)


def test_a_run_not_trained_yet_is_named(study: Study) -> None:
    spec, folder = study
    record = folder.run("sft") / "posttrain.json"
    record.unlink()
    with pytest.raises(ModelError, match=r"run 'sft' has no .*posttrain.json.*run the posttrain stage"):
        list_models(spec, folder)
    write_json(record, {"steps": []})
    with pytest.raises(ModelError, match=r"must list the checkpoint 'steps', got \[\]"):
        list_models(spec, folder)
    record.write_text("{half")
    with pytest.raises(StoreError, match="not readable JSON"):
        list_models(spec, folder)


def test_a_loaded_model_is_frozen_and_equal_to_what_was_saved(study: Study) -> None:
    model = load_model(list_models(*study)[1])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, value in tiny_model(seed=1).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_blocks_named_in_the_study_are_the_loaded_models(study: Study) -> None:
    spec, folder = study
    how = spec.extraction.model_copy(update={"blocks": "model.layers"})
    for ref in list_models(spec.model_copy(update={"extraction": how}), folder):
        model = load_model(ref)
        model.other = torch.nn.ModuleList([torch.nn.Identity() for _ in model.model.layers])  # else ambiguous
        assert locate_layers(model) is model.model.layers


def test_tied_weights_are_not_called_missing(tmp_path: Path) -> None:
    save_model(tmp_path / "tied", tied=True)
    model = load_model(ref_to(tmp_path / "tied"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def ref_to(path: Path, base: Path | None = None, model: str = "rl@1") -> ModelRef:
    return ModelRef(model=model, run="rl", step=1, arm="rl", path=path, base=base)


def test_missing_folder_and_missing_weights_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rl@1: no folder .*nowhere"):
        load_model(ref_to(tmp_path / "nowhere"))
    save_model(tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights; expected one of \*\.safetensors, .*pytorch_model\.bin"):
        load_model(ref_to(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("files", "named", "command"),
    [
        (
            ["actor/model_world_size_2_rank_0.pt", "actor/huggingface/config.json"],
            ".",
            "python -m verl.model_merger merge --backend fsdp --local_dir {0}/actor --target_dir {0}/actor/merged",
        ),
        (
            ["actor/model_world_size_2_rank_0.pt", "actor/huggingface/config.json"],
            "actor/huggingface",
            "python -m verl.model_merger merge --backend fsdp --local_dir {0}/actor --target_dir {0}/actor/merged",
        ),
        (
            ["actor/dist_ckpt/__0_0.distcp", "actor/huggingface/config.json"],
            "actor",
            "python -m verl.model_merger merge --backend megatron --local_dir {0}/actor --target_dir {0}/actor/merged",
        ),
        (
            ["config.json", "zero_to_fp32.py", "global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
            ".",
            "python {0}/zero_to_fp32.py {0} {0}/merged",
        ),
        (
            ["config.json", "zero_to_fp32.py", "global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt"],
            "global_step9",
            "python {0}/zero_to_fp32.py {0} {0}/merged",
        ),
        (
            ["latest", "global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt"],
            ".",
            "python -m deepspeed.utils.zero_to_fp32 {0} {0}/merged",
        ),
        (
            ["config.json", "pytorch_model_fsdp_0/__0_0.distcp"],
            ".",
            "accelerate merge-weights {0}/pytorch_model_fsdp_0 {0}/merged",
        ),
    ],
)
def test_shards_of_a_training_are_answered_with_what_merges_them(
    tmp_path: Path, files: list[str], named: str, command: str
) -> None:
    root = tmp_path / "step"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    with pytest.raises(ModelError, match=r"^rl@1: .* has no weights but the shards of its training") as error:
        load_model(ref_to(root / named))
    assert str(error.value).endswith(f"name that folder: {command.format(root)}")
    save_model(root / named)  # merged in place
    assert load_model(ref_to(root / named)).num_parameters()


def test_a_checkpoint_that_lacks_parameters_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    file = save_model(tmp_path / "holed") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's parameters, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        load_model(ref_to(tmp_path / "holed"))


def test_a_checkpoint_with_more_than_its_config_says_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "more")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]})
    with pytest.raises(ModelError, match=r"tensors of .*more have no place in the model, e\.g\. model\.layers\.2"):
        load_model(ref_to(tmp_path / "more"))


def test_a_value_head_and_stored_masks_are_no_part_of_the_model(tmp_path: Path) -> None:
    file = save_model(tmp_path / "ppo") / "model.safetensors"
    extra = {"v_head.summary.weight": torch.ones(1, 32), "model.layers.0.attn.masked_bias": torch.ones(1)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    assert torch.equal(load_model(ref_to(tmp_path / "ppo")).lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    file = save_model(tmp_path / "diverged") / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"rl@1: .*NaN or infinite in model\.layers\.1\.mlp\.up_proj.*diverged"):
        load_model(ref_to(tmp_path / "diverged"))


def test_code_in_a_checkpoints_folder_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "code")
    config = read_json(folder / "config.json")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    names = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    write_json(folder / "config.json", config | {"model_type": "own", "auto_map": names})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ModelError, match=r"rl@1: .*code cannot be loaded"):
        load_model(ref_to(folder))
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        loaded_as(folder, folder, dtype="auto")
    assert not (tmp_path / "was_run").exists()


def test_remote_code_is_off_wherever_something_is_loaded_by_its_class_name() -> None:
    root = Path(checkpoints.__file__).resolve().parents[2]
    calls = [
        (file.name, call)
        for part in ("toolkit", "stores", "cli", "benchmarks")
        for file in (root / part).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(call.func.value).startswith("Auto")
    ]
    assert len(calls) >= 4
    for file, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{file}: {ast.unparse(call)}"


def test_truncated_weights_and_configs_are_model_errors(tmp_path: Path) -> None:
    file = save_model(tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"rl@1: .*cut cannot be loaded"):
        load_model(ref_to(tmp_path / "cut"))
    (save_model(tmp_path / "config") / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"rl@1: .*config cannot be loaded"):
        load_model(ref_to(tmp_path / "config"))


def test_sharded_checkpoints_load_and_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    tiny_model(seed=5).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = load_model(ref_to(tmp_path / "shards"))
    assert torch.equal(loaded.lm_head.weight, tiny_model(seed=5).lm_head.weight)
    sorted((tmp_path / "shards").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ModelError, match=r"rl@1: .*shards"):
        load_model(ref_to(tmp_path / "shards"))


def save_adapter(path: Path) -> Any:
    torch.manual_seed(9)
    wrapped = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(path)
    return wrapped.eval()


def test_an_adapter_is_merged_into_the_studys_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    wrapped = save_adapter(tmp_path / "lora")
    model = load_model(ref_to(tmp_path / "lora", base))
    ids = torch.tensor([[5, 9, 12, 4]])
    torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-2)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in tiny_model().named_parameters()}
    assert load_tokenizer(ref_to(tmp_path / "lora", base)).get_vocab() == word_tokenizer().get_vocab()
    with pytest.raises(ModelError, match="is an adapter and needs a base model"):
        load_model(ref_to(tmp_path / "lora"))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"rl@1: no folder .*base"):
        load_model(ref_to(tmp_path / "lora", base))


def test_an_adapter_that_finds_no_place_or_is_not_whole_is_refused(tmp_path: Path) -> None:
    """peft warns at most: such a model was analysed as its base, bit for bit."""
    base = save_model(tmp_path / "base")
    save_adapter(tmp_path / "lora")
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    for name, renamed, message in (
        (
            "renamed",
            lambda key: key.replace("model.layers", "model.language_model.layers"),
            "have no place in the base",
        ),
        ("part", lambda key: key if "layers.0" in key else None, "are missing"),
    ):
        shutil.copytree(tmp_path / "lora", tmp_path / name)
        kept = {new: values for key, values in weights.items() if (new := renamed(key))}
        save_file(kept, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"rl@1: \d+ tensors of adapter .*{name} {message}, e\.g\. .*layers"):
            load_model(ref_to(tmp_path / name, base))


def loaded_as(path: Path, base: Path, **how: Any) -> Any:
    return load_model(replace(ref_to(path, base), loading=ModelsSpec.model_validate(how)))


def test_auto_is_the_type_base_is_stored_in_for_every_model(tmp_path: Path) -> None:
    """A run stored in another type (verl and FSDP keep float32 weights) would differ from base by rounding alone."""
    base, run = tmp_path / "base", save_model(tmp_path / "run", seed=1)
    tiny_model().to(torch.bfloat16).save_pretrained(base)
    save_adapter(tmp_path / "lora")
    for path in (base, run, tmp_path / "lora"):
        assert loaded_as(path, base, dtype="auto").dtype == torch.bfloat16
        assert loaded_as(path, base).dtype == torch.float32
        assert loaded_as(path, base, dtype="float16").dtype == torch.float16
    assert loaded_as(base, run, dtype="auto").dtype == torch.float32
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"rl@1: .*base.config\.json cannot be read"):
        loaded_as(run, base, dtype="auto")


def test_values_beyond_a_half_type_are_refused(tmp_path: Path) -> None:
    file = save_model(tmp_path / "large") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = 70_000.0  # float16 ends at 65,504
    save_file(weights, file, metadata={"format": "pt"})
    assert loaded_as(tmp_path / "large", tmp_path / "large", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"infinite in model\.norm\.weight; .* or they are beyond torch\.float16"):
        loaded_as(tmp_path / "large", tmp_path / "large", dtype="float16")


def test_device_maps_and_attention_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **how: asked.append(how) or load(*a, **how))
    folder = save_model(tmp_path / "model")
    ids = torch.tensor([[5, 9, 12, 4]])
    plain = loaded_as(folder, folder)
    assert plain.config._attn_implementation == "sdpa"
    spread = loaded_as(folder, folder, device_map={"model": "cpu", "lm_head": "cpu"}, attn_implementation="eager")
    assert spread.config._attn_implementation == "eager"
    assert [how.get("device_map") for how in asked] == [None, {"model": "cpu", "lm_head": "cpu"}]
    assert all(how["trust_remote_code"] is False and how["local_files_only"] is True for how in asked)
    torch.testing.assert_close(spread(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"rl@1: .*cannot be loaded as a causal language model \(.*quick"):
        loaded_as(folder, folder, attn_implementation="quick")


def test_a_device_map_that_offloads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model")
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    monkeypatch.setattr(checkpoints, "_load_whole", lambda *_: model)
    with pytest.raises(ModelError, match=r"device map 'auto' leaves parts of .* on the CPU or the disk; expected"):
        loaded_as(folder, folder, device_map="auto")


def test_a_study_in_bfloat16_keeps_activations_and_sums_in_float32(study: Study) -> None:
    spec, folder = study
    spec = spec.model_copy(update={"models": ModelsSpec(dtype="bfloat16")})
    assert {ref.loading.dtype for ref in list_models(spec, folder)} == {"bfloat16"}
    sample_outcomes(spec, folder, provenance=PROVENANCE)
    extract_activations(spec, folder, provenance=PROVENANCE)
    activations = open_activations(folder.activations)["activation"]
    assert activations.dtype == np.float32
    low = activations.sel(model="base@0").values
    model, pad = tiny_model(), 0
    texts = forced_texts(spec, folder, ["base@0", "sft@6", "rl@8"], load_prompts(spec, folder))
    full = np.concatenate([read_texts(model, [text.ids], spec.extraction.layer, pad)[0] for text in texts])
    error = np.linalg.norm(low - full, axis=1) / np.linalg.norm(full, axis=1)
    assert 1e-4 < np.median(error) < 0.03  # rounded once in every operation, so neither equal nor far
    moved = measure_movement(spec, folder)
    assert moved["kl_from_base"].values[0] == 0.0


def test_an_adapter_with_resized_embeddings_loads_on_a_base_that_has_not_its_tokens(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    resized = tiny_model()
    resized.resize_token_embeddings(len(WORDS) + 2, mean_resizing=False)
    torch.manual_seed(9)
    how = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "init_lora_weights": False}
    wrapped = get_peft_model(resized, LoraConfig(r=2, **how)).eval()
    with torch.no_grad():  # trained
        wrapped.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    model, ids = load_model(ref_to(tmp_path / "lora", base)), torch.tensor([[5, 9, len(WORDS) + 1, 4]])
    torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == len(WORDS) + 2
    file = tmp_path / "lora/adapter_model.safetensors"
    save_file({key: values for key, values in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(ModelError, match=r"it resizes the embeddings and lacks some of them.*'lm_head': None"):
        load_model(ref_to(tmp_path / "lora", base))


def test_a_missing_tokenizer_is_the_bases(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    without = save_model(tmp_path / "without", tokenizer=False)
    assert load_tokenizer(ref_to(without, base)).get_vocab() == word_tokenizer().get_vocab()
    check_tokenizers([ref_to(base, base, "base@0"), ref_to(without, base)], ["what is 1"])
    with pytest.raises(ModelError, match=r"without has no tokenizer; expected one of tokenizer\.json"):
        load_tokenizer(without)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="'device' must be auto, cpu, cuda or cuda:N, got 'warp'"):
        resolve_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch sees no CUDA device"):
            resolve_device("cuda:0")
