"""The main job on bases of every form, what it records, and what it refuses, with nothing written."""

import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from common import CORE, TEXTS, make_model, make_tokenizer, save_base
from safetensors.torch import load_file, save_file

import hf_offline_compress.compressor as compressor
import hf_offline_compress.solve.groups as solving
from hf_offline_compress import CompressionError, Grouping, Objective, Recipe, Rule, compress, make_plan
from hf_offline_compress.artifact.building import reconstructed
from hf_offline_compress.card.writing import END
from hf_offline_compress.measure.statistics import Statistics
from hf_offline_compress.runtime.layers_compressed import FusedLinear, TiedHead
from hf_offline_compress.solve.problems import problem_of
from hf_offline_compress.solvers import solve, solve_all
from hf_offline_compress.structures import Autoencoder, LowRank, Stored, Training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-bert", "bert", "BertForMaskedLM")


def quick(base, recipe="svd", **options):
    options = {"ratio": 2.0, "calibration": TEXTS, "progress": False, **options}
    return compress(base, recipe, **options)


def test_folder_and_model_in_memory_give_the_same(base):
    from_folder = quick(base, "calibrated-svd")
    model = make_model("bert", "BertForMaskedLM")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_memory = quick(model, "calibrated-svd", tokenizer=make_tokenizer("bert"))
    for name, tensor in from_folder.model.state_dict().items():
        assert tensor.equal(in_memory.model.state_dict()[name]), name
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ == "BertForMaskedLM"


def test_the_compressed_model_keeps_head_labels_and_options(tmp_path):
    base = save_base(
        tmp_path / "b",
        "bert",
        "BertForSequenceClassification",
        id2label={0: "no", 1: "so", 2: "yes"},
        label2id={"no": 0, "so": 1, "yes": 2},
    )
    result = quick(base)
    assert result.model.config.id2label == {0: "no", 1: "so", 2: "yes"}
    assert type(result.model).__name__ == "CompressedBertForSequenceClassification"
    assert not result.model.training


def test_auto_class_chooses_the_head(base):
    assert type(quick(base, auto_class="AutoModel").model).__name__ == "CompressedBertModel"
    with pytest.raises(CompressionError, match="no weights for classifier.bias, classifier.weight"):
        quick(base, auto_class="AutoModelForTokenClassification")
    with pytest.raises(CompressionError, match="no 'AutoModelForPoetry' for BERT"):
        quick(base, auto_class="AutoModelForPoetry")


def test_errors_are_those_of_the_weights(base):
    result = quick(base, "calibrated-svd", modules="linears")
    dense = make_model("bert", "BertForMaskedLM").state_dict()
    for group in result.report.groups:
        (name,) = group.members
        weight, stored = dense[f"bert.{name}.weight"], result.model.bert.get_submodule(name).dense_weight()
        assert group.relative_error == pytest.approx(float((weight - stored).norm() / weight.norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(weight, stored, dim=1).mean()
        assert group.cosine_distance == pytest.approx(float(1 - cosine), abs=1e-5)
        assert 0 < group.calibrated_error < 1


@pytest.mark.parametrize("recipe", ["svd", "allocated-svd", "quantized", "balanced"])
def test_layers_of_zeros_are_compressed_and_reported_in_numbers(recipe):
    model = make_model("bert", "BertModel")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.zero_()
        model.encoder.layer[0].intermediate.dense.weight[8:] = 0
    report = compress(model, recipe, calibration=None, progress=False).report
    (nothing,) = (group for group in report.groups if group.members == ("encoder.layer.1.output.dense",))
    assert nothing.cosine_distance == nothing.relative_error == 0
    json.dumps(report.to_dict(), allow_nan=False)


def test_calibration_lowers_the_error_on_real_inputs(base):
    texts, modules = TEXTS, "linears"
    calibrated = quick(base, "calibrated-svd", modules=modules, calibration=texts)
    plain = quick(base, "svd", modules=modules)
    words = make_tokenizer("bert")(texts, return_tensors="pt", padding=True)
    dense = make_model("bert", "BertForMaskedLM").bert
    keep = words["attention_mask"].bool()
    with torch.no_grad():
        hidden = dense(**words)[0][keep]
        errors = [float((r.model.bert(**words)[0][keep] - hidden).norm()) for r in (calibrated, plain)]
    assert errors[0] < errors[1]


def test_without_text_the_objective_is_data_free(base):
    free, plain = quick(base, "calibrated-svd", calibration=None), quick(base, "svd")
    assert free.report.calibration is None
    assert not any(group.objective["calibrated"] for group in free.report.groups)
    state = plain.model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in free.model.state_dict().items())


def test_the_report_says_what_is_needed_to_do_it_again(base):
    report = quick(base, "calibrated-svd", seed=7).report
    assert report.base == {
        "name": "tiny-bert",
        "revision": None,
        "weight_bytes": (base / "model.safetensors").stat().st_size,
    }
    assert report.calibration["source"] == "caller" and report.calibration["masked"] == 0.15
    assert len(report.calibration["sha256"]) == 64 and report.calibration["tokens"] > 300
    assert report.seed == report.calibration["seed"] == 7
    assert {"torch", "transformers", "hf-offline-compress"} <= set(report.versions)
    assert set(report.seconds) == {"load", "calibrate", "solve", "build"}
    again = quick(
        base, Recipe(**{f: getattr(compressor.load_recipe("calibrated-svd"), f) for f in ("name", "rules")}), seed=7
    )
    assert again.report.groups[0].relative_error == report.groups[0].relative_error


@pytest.mark.parametrize("recipe", ["calibrated-svd", "ae"])
def test_same_seed_same_bytes(base, recipe, tmp_path):
    for name in ("a", "b"):
        quick(base, recipe, modules="key", seed=3).save(tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_full_size_is_exact():
    """Rank min(rows, columns) is reached where the ratio allows it: one wide matrix."""
    model = make_model("gpt2", "GPT2Model", n_inner=4)
    recipe = Recipe("r", (Rule(LowRank(), ratio=1.01),), modules=(r"h\.\d\.mlp\..*",))
    with pytest.raises(CompressionError, match="would not shrink|matches no"):
        quick(model, Recipe("r", (Rule(LowRank(), ratio=40.0),), modules=(r"h\.\d\.mlp\..*",)), ratio=None)
    result = quick(model, recipe, ratio=None)
    assert all(group.size <= 4 for group in result.report.groups)


def test_gpt2_parts_may_differ():
    model = make_model("gpt2", "GPT2LMHeadModel")
    result = quick(model, modules="key,word_embeddings", ratio=1.5)
    attention = result.model.transformer.h[0].attn.c_attn
    assert isinstance(attention, FusedLinear)
    assert [type(part).__name__ for part in attention.values()] == ["Linear", "LowRankLinear", "Linear"]
    x = torch.randn(2, 32)
    dense = model.transformer.h[0].attn.c_attn(x)
    got = attention(x)
    torch.testing.assert_close(got[:, :32], dense[:, :32])
    torch.testing.assert_close(got[:, 64:], dense[:, 64:])
    assert not torch.allclose(got[:, 32:64], dense[:, 32:64])
    assert isinstance(result.model.lm_head, TiedHead)


def test_half_precision_bases_stay_half(tmp_path):
    make_model("bert", "BertForMaskedLM").half().save_pretrained(tmp_path / "half")
    make_tokenizer("bert").save_pretrained(tmp_path / "half")
    result = quick(tmp_path / "half", "calibrated-svd", ratio=4)
    assert result.model.dtype == torch.float16 and result.report.dtype == "float16"
    untouched = load_file(tmp_path / "half/model.safetensors")["bert.embeddings.LayerNorm.weight"]
    assert result.model.bert.embeddings.LayerNorm.weight.equal(untouched)
    assert quick(tmp_path / "half", ratio=4, dtype="float32").model.dtype == torch.float32


def test_storage_is_narrower_on_disk_only(base, tmp_path):
    result = quick(base, ratio=4, storage="float16")
    result.save(tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["bert.encoder.layer.0.attention.self.query.latents"].dtype == torch.float16
    assert stored["bert.encoder.layer.0.attention.self.query.bias"].dtype == torch.float32
    assert result.model.bert.encoder.layer[0].attention.self.query.latents.dtype == torch.float32


def test_pickled_weights_are_read_safely(tmp_path):
    folder = save_base(tmp_path / "old", "bert", "BertModel")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert quick(folder).report.groups

    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        quick(folder)


def test_companions_come_along(base, tmp_path):
    source = tmp_path / "sentences"
    shutil.copytree(base, source)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../secret"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    torch.save({"weight": torch.ones(2, 2)}, source / "1_Pooling/pytorch_model.bin")
    (source / "generation_config.json").write_text('{"max_length": 7}')
    (source / "optimizer.pt").write_bytes(b"state")
    (source / ".env").write_text("TOKEN=hf_secret")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "name_or_path": "/home/somebody/model"}))
    out = quick(source).save(tmp_path / "out")
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "1_Pooling/model.safetensors", "generation_config.json"} <= names
    assert not names & {"optimizer.pt", ".env", "1_Pooling/pytorch_model.bin", "pytorch_model.bin"}
    assert load_file(out / "1_Pooling/model.safetensors")["weight"].equal(torch.ones(2, 2))
    assert b"somebody" not in (out / "tokenizer_config.json").read_bytes()


def test_tokenizers_learn_how_many_positions_there_are(tmp_path):
    for model_type, head, positions in (("roberta", "RobertaModel", 38), ("gpt2", "GPT2Model", 40)):
        result = quick(make_model(model_type, head), tokenizer=make_tokenizer(model_type))
        assert result.tokenizer.model_max_length == positions


@pytest.mark.parametrize(
    "change,options,message",
    [
        ("", {"recipe": "wavelets"}, "no recipe 'wavelets'"),
        ("", {"modules": "heads"}, "'heads' is unknown"),
        ("", {"ratio": 1.0}, "must be above 1"),
        ("", {"ratio": 1e6}, "Nothing would shrink"),
        ("", {"dtype": "int8"}, "dtype 'int8' is not supported"),
        ("", {"storage": "int5"}, "storage 'int5' is unknown"),
        ("", {"recipe": "calibrated-svd", "calibration": "absent.txt"}, "no calibration file 'absent.txt'"),
        ("", {"recipe": "calibrated-svd", "calibration": ["", "  "]}, "no usable line"),
        (
            "",
            {"recipe": "calibrated-svd", "calibration": ["漢字 仮名 交じり 文"]},
            "does not know most of.*pass a calibration of your own",
        ),
        ("no weights", {}, "has no weights: none of model.safetensors"),
        ("no config", {}, "has no config.json"),
        ("broken config", {}, "config.json of .* cannot be read as JSON"),
        ("nan", {}, "NaN or infinite values in bert.embeddings.LayerNorm.bias"),
        ("t5", {}, "'t5' is not supported; supported are bert, roberta, gpt2"),
        ("no tokenizer", {"recipe": "calibrated-svd"}, "need the model's tokenizer"),
    ],
)
def test_what_is_refused(base, tmp_path, monkeypatch, change, options, message):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = folder / "config.json"
    if change == "no weights":
        (folder / "model.safetensors").unlink()
    elif change == "no config":
        config.unlink()
    elif change == "broken config":
        config.write_text("{")
    elif change == "nan":
        state = load_file(folder / "model.safetensors")
        state["bert.embeddings.LayerNorm.bias"][3] = float("nan")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "t5":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "t5"}))
    elif change == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
        for file in folder.glob("vocab*"):
            file.unlink()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CompressionError, match=message):
        quick(folder, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_that_is_no_place(tmp_path):
    with pytest.raises(CompressionError, match="no folder './absent'"):
        quick("./absent")
    with pytest.raises(
        CompressionError, match="no folder 'nobody/nothing', and no repository of that name in the local cache"
    ):
        quick("nobody/nothing")


def test_what_is_compressed_already(base, tmp_path):
    result = quick(base)
    result.save(tmp_path / "out")
    for again in (tmp_path / "out", result.model):
        with pytest.raises(CompressionError, match="compressed already"):
            quick(again)


def test_calibrating_a_model_without_tokenizer():
    with pytest.raises(CompressionError, match="pass tokenizer="):
        quick(make_model("bert", "BertModel"), "calibrated-svd")


def test_targets(base, tmp_path):
    result = quick(base)
    target = tmp_path / "deep" / "out"
    result.save(target)
    result.save(target, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, overwrite, message in (
        (target, False, "is not empty"),
        (tmp_path / "other", True, "was not written by this package"),
        (tmp_path / "file", True, "is a file"),
    ):
        with pytest.raises(CompressionError, match=message):
            result.save(path, overwrite=overwrite)
    assert (tmp_path / "other/diary.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file", "other"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_overwriting_keeps_what_users_put_there(base, tmp_path):
    """Their files, the notes in the card and evaluations: those of other weights by another name."""
    out, result = tmp_path / "out", compress(base, "svd", modules="key", progress=False)
    other = compress(base, "svd", modules="query", progress=False)
    result.save(out)
    (out / "README.md").write_text((out / "README.md").read_text().replace(END, f"My notes.\n{END}"))
    (out / "plots").mkdir()
    (out / "plots/mine.svg").write_text("mine")
    (out / "evaluation.json").write_text(numbers := '{"format_version": 1, "evaluations": [], "benchmark": null}')
    (out / "old_compressed.py").write_text("")
    result.save(out, overwrite=True)
    assert (out / "evaluation.json").read_text() == numbers
    other.save(out, overwrite=True)
    assert (out / "evaluation.previous.json").read_text() == numbers and not (out / "evaluation.json").exists()
    assert (out / "plots/mine.svg").read_text() == "mine" and not (out / "old_compressed.py").exists()
    card = (out / "README.md").read_text()
    assert card.count("My notes.") == 1 and "query" in card and "`key_0`" not in card
    (out / "README.md").write_text("Mine alone.")
    result.save(out, overwrite=True)
    assert (out / "README.md").read_text() == "Mine alone."
    with pytest.raises(CompressionError, match="is, or lies in, the output folder"):
        replace(result, source=out / "plots").save(out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("limit", [100, 3_000, 20_000])
def test_a_disk_that_gets_full_while_saving(base, tmp_path, limit, overwrite):
    """The first file that is too large is the weights', the code or one of the small ones."""
    result = compress(base, "svd", modules="key", progress=False)
    if overwrite:
        result.save(tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(CompressionError, match="There is no space left to write '.*out'.*free some"):
            result.save(tmp_path / "out", overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if overwrite:
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == overwrite


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_while_saving_leaves_what_was_there(base, tmp_path, monkeypatch, overwrite):
    result = quick(base)
    target = tmp_path / "out"
    if overwrite:
        result.save(target)
        (target / "mark").write_text("old")

    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_offline_compress.artifact.writing.copy_companions", fail)
    with pytest.raises(KeyboardInterrupt):
        result.save(target, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert not overwrite or (target / "mark").read_text() == "old"


def test_rules_of_different_objectives(base):
    sensitive, calibrated = Objective(l2=1, calibrated=True, sensitive=True), Objective(l2=1, calibrated=True)
    rules = (Rule(LowRank(), sensitive, modules=("query",)), Rule(LowRank(), calibrated))
    recipe = Recipe("mixed", rules, modules=("linears", "word_embeddings", "position_embeddings"))
    objectives = {group.kind: group.objective for group in quick(base, recipe).report.groups}
    assert objectives["query"]["sensitive"] and not objectives["key"]["sensitive"] and objectives["key"]["calibrated"]
    assert not objectives["position_embeddings"]["calibrated"]


@pytest.mark.parametrize("identity_block", [False, True])
def test_by_gain_never_stores_more_than_dense(base, identity_block):
    sensitive = Objective(l2=1, calibrated=True, sensitive=True)
    recipe = Recipe(
        "greedy", (Rule(LowRank(identity_block=identity_block), sensitive, ratio=1.2),), allocation="by_gain"
    )
    report = quick(base, recipe, ratio=None).report
    assert all(group.ratio > 1 for group in report.groups) and report.totals["ratio"] >= 1.2


@pytest.mark.parametrize("model_type,head", [c for c in CORE if "DoubleHeads" not in c[1]])
def test_all_modules_of_every_head_by_gain(model_type, head):
    """Poolers, positions and heads too: errors of all of them are in the unit of the model's own output."""
    result = quick(make_model(model_type, head), "allocated-svd", modules=".+", tokenizer=make_tokenizer(model_type))
    kinds = {group.kind: group for group in result.report.groups}
    assert kinds["position_embeddings"].calibrated_error > 0
    assert ("pooler" in kinds) == any("pooler" in name for name, _ in result.model.named_modules())
    assert 2 <= result.report.totals["ratio"] < 2.2


def test_what_the_output_does_not_depend_on():
    model = make_model("gpt2", "GPT2DoubleHeadsModel", summary_proj_to_labels=False)
    with pytest.raises(CompressionError, match="does not depend on multiple_choice_head.summary"):
        quick(model, "allocated-svd", modules="linears,head", tokenizer=make_tokenizer("gpt2"))


def test_solver_and_structure_must_agree(base, monkeypatch):
    class Forgetful(LowRank):
        def decoder_tensors(self, size, shape):
            return {**super().decoder_tensors(size, shape), "bias": Stored((shape.columns,))}

    with pytest.raises(RuntimeError, match="tensors other than planned"):
        quick(base, Recipe("r", (Rule(Forgetful()),)))


@pytest.mark.parametrize(
    "recipe", ["fwsvd", "codebook", "quantized", "pruning", "kronecker", "tucker", "calibrated-ae"]
)
@pytest.mark.parametrize("model_type,head", [("roberta", "RobertaForMaskedLM"), ("gpt2", "GPT2LMHeadModel")])
def test_presets_work_on_every_family(recipe, model_type, head):
    result = quick(make_model(model_type, head), recipe, ratio=4.0, tokenizer=make_tokenizer(model_type))
    assert result.report.totals["ratio"] >= 4
    assert all(0 < group.relative_error < 1.1 for group in result.report.groups)


def test_importance_weighs_rows(base):
    weighted, plain = (quick(base, r, modules="key", ratio=3.0) for r in ("fwsvd", "svd"))
    assert weighted.report.groups[0].calibrated_error < 1 and plain.report.groups[0].calibrated_error is None
    assert weighted.report.groups[0].relative_error > plain.report.groups[0].relative_error
    assert weighted.report.calibration["tokens"] > 0


def test_validation_text_chooses_and_is_recorded(base):
    result = quick(base, "ae", modules="key", ratio=3.0, validation=[" ".join(TEXTS)] * 3)
    assert result.report.validation["source"] == "caller"
    assert all(group.notes["validation"] > 1 for group in result.report.groups)
    assert quick(base).report.validation is None


def test_validation_needs_a_language_model(tmp_path):
    body = save_base(tmp_path / "body", "bert", "BertModel")
    with pytest.raises(CompressionError, match="perplexity, and BertModel is not a language model"):
        quick(body, "ae", validation=TEXTS)
    with pytest.raises(CompressionError, match="There is no validation file 'nowhere.txt'"):
        quick(body, "ae", validation="nowhere.txt")


def test_a_missing_library_is_said_before_any_work(base, monkeypatch):
    import hf_offline_compress.structures.tucker as tucker

    monkeypatch.setattr(tucker, "find_spec", lambda name: None)
    with pytest.raises(CompressionError, match="needs tensorly, which is not installed; the extra 'tucker' has it"):
        quick(base, "tucker")


def test_moments_last_until_all_that_need_them_are_solved(base):
    """Query and value are trained together, across layers; key, by another rule, needs the same inputs later."""
    few = Autoencoder(training=Training(epochs=1))
    rules = (
        Rule(few, Objective(l2=1.0, calibrated=True), modules=("query", "value")),
        Rule(LowRank(), Objective(l2=1.0, calibrated=True), modules=("key",)),
    )
    result = quick(base, Recipe("mixed", rules, modules=("query", "key", "value")))
    assert all(group.calibrated_error is not None for group in result.report.groups)


def test_every_member_brings_the_metric_of_its_own_inputs(base, monkeypatch):
    """What members share is solved for all of their inputs, where the structure can tell them apart."""
    seen = []
    monkeypatch.setattr(solving, "solve_all", lambda problems: (seen.extend(problems), solve_all(problems))[1])
    quick(base, "codebook", modules="intermediate", grouping="concatenated", ratio=4.0)
    (problem,) = seen
    assert len(problem.member_moments) == 3 and not problem.member_moments[0].equal(problem.member_moments[2])
    torch.testing.assert_close(torch.stack(problem.member_moments).mean(dim=0), problem.input_moments)


def test_a_base_that_cuts_its_sequences_is_compressed_like_any_other(tmp_path):
    """`chunk_size_feed_forward` changes nothing but memory, and stays as the base has it."""
    weights = []
    for size in (0, 2):
        model = make_model("bert", "BertForMaskedLM", chunk_size_feed_forward=size)
        result = compress(model, "allocated-svd", calibration=TEXTS, tokenizer=make_tokenizer("bert"), progress=False)
        assert result.model.config.chunk_size_feed_forward == size
        assert model.bert.encoder.layer[0].chunk_size_feed_forward == size
        result.save(tmp_path / str(size))
        weights.append((tmp_path / str(size) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("grad", [True, False])
def test_members_that_are_asked_for_one_by_one_leave_the_mode_of_gradients(grad):
    """Whoever stops asking half-way, too; and what is decoded has no history."""
    model = make_model("bert", "BertModel")
    state = model.state_dict()
    recipe = Recipe("shared", (Rule(LowRank(), grouping=Grouping(None), ratio=2.0),), modules=("query",))
    plan = make_plan(model.config.to_dict(), recipe, architecture="BertModel")
    group = plan.groups[0]
    factors = solve(problem_of(group, state, plan, Statistics()))
    with torch.set_grad_enabled(grad):
        weights = reconstructed(group, factors)
        for _ in range(len(group.matrices) - 1):
            assert not next(weights).requires_grad and torch.is_grad_enabled() is grad
        weights.close()
        assert torch.is_grad_enabled() is grad


def test_a_plan_is_made_once(base, monkeypatch):
    made, make = [], compressor.make_plan
    monkeypatch.setattr(compressor, "make_plan", lambda *args, **options: made.append(args) or make(*args, **options))
    quick(base)
    assert len(made) == 1
