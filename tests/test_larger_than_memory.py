"""Bases that are read layer by layer: the bytes of a base held whole, one layer at a time, and what cannot be done so."""

import re
import shutil
import weakref
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from common import TEXTS, content, make_model, make_tokenizer

from hf_offline_compress import CompressionError, compress, compressor, load_recipe, make_plan
from hf_offline_compress.base.shards import Shards
from hf_offline_compress.foundation.processes import Processes
from hf_offline_compress.foundation.spilled import Spilled
from hf_offline_compress.measure.passes import LayerPasses, Passes, Run
from hf_offline_compress.request.effort import EFFORTS
from hf_offline_compress.solve.disk_space import _statistics, bytes_beside
from hf_offline_compress.solve.limit import check_alone, tell_peak

# What every statistic is for: moments at inputs and outputs, and counts of tokens.
MIXED = """
name: mine
modules: [all]
rules:
- {modules: [query, key], structure: low_rank, objective: sensitive, ratio: 4}
- {modules: [word_embeddings], structure: trellis, objective: sensitive, ratio: 8}
- {structure: quantized, objective: calibrated, ratio: 5}
"""


def save_shards(folder, model_type, head, **overrides):
    """Write a base in half precision, in several files, and return its folder."""
    make_model(model_type, head, **overrides).half().save_pretrained(folder, max_shard_size="20kB")
    make_tokenizer(model_type).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("base") / "bert", "bert", "BertForMaskedLM", layers=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    file.write_text(MIXED)
    return file


def both(base, recipe, folder, **options):
    """Return what a base held whole and one read layer by layer become."""
    found = []
    for name, bound in (("whole", None), ("layers", "8GB")):
        result = compress(base, recipe, calibration=TEXTS, progress=False, max_memory=bound, **options)
        found.append(content(result.save(folder / name)))
    return found


@pytest.mark.parametrize(
    ("model_type", "head", "depth"),
    [
        ("bert", "BertForMaskedLM", 2),
        ("gpt2", "GPT2LMHeadModel", 2),
        ("llama", "LlamaForCausalLM", 2),
        ("llama", "LlamaForCausalLM", 1),
    ],
)
def test_the_same_bytes(model_type, head, depth, tmp_path):
    base = save_shards(tmp_path / "base", model_type, head, layers=depth)
    whole, layers = both(base, "small", tmp_path, effort="fast", total_ratio=4)
    assert whole == layers


def test_the_same_bytes_by_all_statistics(base, mixed, tmp_path):
    whole, layers = both(base, mixed, tmp_path, auto_class="AutoModel")
    assert whole == layers


@pytest.mark.parametrize("resume", [False, True])
def test_no_more_is_read_than_one_layer_and_what_lies_outside(resume, tmp_path, monkeypatch):
    base = save_shards(tmp_path / "base", "gpt2", "GPT2LMHeadModel", n_layer=6)
    alive, most, passes = {}, 0, []
    read, begun = Shards.__getitem__, LayerPasses.__init__

    def counted(shards, name):
        nonlocal most
        tensor = read(shards, name)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
            most = max(most, sum(alive.values()))
        return tensor

    def noted(self, *args):
        begun(self, *args)
        passes.append(self)

    monkeypatch.setattr(Shards, "__getitem__", counted)
    monkeypatch.setattr(LayerPasses, "__init__", noted)
    options = {"target": tmp_path / "out", "resume": resume, "max_memory": "8GB", "progress": False}
    compress(base, "balanced", effort="fast", calibration=TEXTS, **options)
    sizes = {
        name: tensor.numel() * 4
        for name, tensor in make_model("gpt2", "GPT2LMHeadModel", layers=6).state_dict().items()
    }
    layer = sum(sizes[name] for name in passes[0].of_layers[0])
    outside = sum(sizes[name] for name in passes[0].outside) - sizes["lm_head.weight"]
    assert 0 < most <= outside + layer < 0.6 * sum(sizes.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "small"}, r"effort 'default' cannot be combined.*--effort fast"),
        ({"recipe": "small", "effort": "best"}, r"effort 'best' cannot be combined.*--effort fast"),
        ({"recipe": "small", "effort": "fast", "max_loss": 0.1}, r"max_loss \(--max-loss\) cannot be combined"),
        ({"recipe": "ae", "validation": TEXTS}, "validation text .* cannot be combined"),
        ({"recipe": "svd", "vocabulary": TEXTS}, "a smaller vocabulary cannot be combined"),
        ({"recipe": "fwsvd", "auto_class": "AutoModelForMaskedLM"}, "an importance cannot be combined"),
        ({"recipe": "svd", "device": "cuda"}, "the device 'cuda' cannot be combined|There is no device"),
        ({"recipe": "svd", "max_memory": "lots"}, "The size 'lots' is unknown"),
    ],
)
def test_what_needs_the_whole_model_is_refused(base, options, sentence, monkeypatch):
    monkeypatch.setattr("hf_offline_compress.compressor.resolve_base", None)  # before the base is even looked for
    with pytest.raises(CompressionError, match=sentence):
        compress(base, **{"progress": False, "max_memory": "8GB", **options})


def test_the_cpu_has_several_names(base):
    whole, by_layers = (
        compress(base, "svd", ratio=4, calibration=None, device=device, max_memory=limit, progress=False)
        for device, limit in ((None, None), ("cpu:0", "8GB"))
    )
    assert all(t.equal(by_layers.model.state_dict()[name]) for name, t in whole.model.state_dict().items())


def test_too_little_names_what_would_do(base, mixed, tmp_path, monkeypatch):
    options = {"calibration": TEXTS, "target": tmp_path / "out", "resume": True, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr("hf_offline_compress.compressor.measure", None)  # no work is done
        with pytest.raises(CompressionError, match=r"is 0\.05 GB, but recipe 'mine' needs about") as told:
            compress(base, mixed, max_memory="50MB", **options)
    assert not list(tmp_path.iterdir())
    enough = re.search(r"pass (\S+GB)\.", str(told.value))
    assert compress(base, mixed, max_memory=enough[1], **options).model.compressed_modules()


@pytest.fixture
def expected(monkeypatch):
    """Return what a disk is expected to hold beside results, with as much text as there is."""
    found = []

    def noted(*args, known=compressor.bytes_beside, **options):
        found.append(known(*args, **options))
        return found[-1]

    monkeypatch.setattr(compressor, "bytes_beside", noted)
    monkeypatch.setitem(EFFORTS, "default", replace(EFFORTS["default"], tokens=512))
    return found


def test_nameless_files_are_no_larger_than_expected(base, mixed, expected, monkeypatch):
    sizes, most, write = WeakKeyDictionary(), 0, Spilled.__setitem__

    def counted(store, key, tensor):
        nonlocal most
        write(store, key, tensor)
        sizes[store] = store._end
        most = max(most, sum(sizes.values()))

    def cleared(store, known=Spilled.clear):
        known(store)
        sizes.pop(store, None)

    monkeypatch.setattr(Spilled, "__hash__", object.__hash__)
    monkeypatch.setattr(Spilled, "__eq__", object.__eq__)
    monkeypatch.setattr(Spilled, "__setitem__", counted)
    monkeypatch.setattr(Spilled, "clear", cleared)
    compress(base, mixed, calibration=TEXTS, max_memory="8GB", progress=False)
    assert 0.5 * expected[0] < most <= expected[0]


@pytest.mark.parametrize("max_memory", [None, "8GB"])
def test_what_is_kept_is_no_larger_than_expected(base, mixed, tmp_path, expected, monkeypatch, max_memory):
    """But for names and reports; what lies there already is not asked for again."""
    monkeypatch.setattr(compressor, "build_model", None)
    options = {"calibration": TEXTS, "target": tmp_path / "out", "resume": True, "progress": False}
    for _ in range(2):
        with pytest.raises(TypeError):
            compress(base, mixed, max_memory=max_memory, **options)
    kept = [file.stat().st_size for file in (tmp_path / "out.partial").iterdir()]
    assert 0.3 * expected[0] < sum(kept) <= expected[0] + 8_000 * len(kept)
    assert expected[-1] == max(0, expected[0] - sum(kept))


@pytest.mark.parametrize("effort", EFFORTS)
def test_each_time_that_groups_are_solved_is_kept_once(effort):
    config = make_model("bert", "BertForMaskedLM").config.to_dict()
    recipe = load_recipe("tiny").override(total_ratio=4, effort=effort)
    plan = make_plan(config, recipe, architecture="BertForMaskedLM")
    times = 1 + EFFORTS[effort].rounds + (effort != "fast")
    statistics = 4 * sum(_statistics(plan).values())
    assert bytes_beside(plan, None, resume=True, by_layers=False) == times * plan.stored_bytes + statistics


@pytest.mark.parametrize("options", [{"resume": True}, {"max_memory": "8GB"}])
def test_a_disk_without_room_for_what_is_kept_is_refused(base, mixed, tmp_path, monkeypatch, options):
    needed = compress(base, mixed, calibration=None, progress=False).report.totals["stored_bytes"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000 + 2 * needed))
    for name in ("load_model", "open_model"):
        monkeypatch.setattr(compressor, name, None)  # no work is done
    with pytest.raises(CompressionError, match=r"out' needs .* MB, .* MB of it for what is kept until it is saved"):
        compress(base, mixed, calibration=TEXTS, target=tmp_path / "out", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_run_that_took_more_says_so(caplog):
    tell_peak(2**60)
    assert not caplog.records
    tell_peak(10**6)
    assert re.search(r"Memory reached \d+\.\d\d GB, more than the max_memory of 0\.00 GB", caplog.text)


def test_what_cannot_be_read_layer_by_layer_is_refused(tmp_path):
    base = save_shards(tmp_path / "albert", "albert", "AlbertForMaskedLM")
    with pytest.raises(CompressionError, match="AlbertForMaskedLM cannot be run layer by layer"):
        compress(base, "gptq", calibration=TEXTS, max_memory="8GB", progress=False)
    assert compress(base, "quantized", max_memory="8GB", progress=False).model.compressed_modules()  # no text is run
    model = make_model("bert", "BertModel")
    with pytest.raises(CompressionError, match="this one is in memory"):
        compress(model, "svd", max_memory="8GB", progress=False)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(CompressionError, match="are pickled"):
        compress(tmp_path / "pickled", "svd", max_memory="8GB", progress=False)
    with pytest.raises(CompressionError, match="is for one process"):
        check_alone(Processes(0, 2))


def test_what_is_computed_between_layers_is_noticed(base):
    class Between(torch.nn.Module):
        def forward(self, hidden, *args, **options):
            return hidden + 1

    from hf_offline_compress.architectures.stock import layout_of_model
    from hf_offline_compress.base.checkpoint import open_model, resolve_base
    from hf_offline_compress.measure.sharing import Sums

    model, shards = open_model(resolve_base(base), "BertForMaskedLM", torch.float32)
    layout = layout_of_model(model)
    passes = LayerPasses(model, shards, layout.prefix, layout.matrices, None)
    model.bert.encoder.layer.insert(1, Between())
    with pytest.raises(CompressionError, match="something is computed between them"):
        passes.go(Run([torch.tensor([[5, 6, 7]])], Sums(), lambda place, ids: model(input_ids=ids)))
    assert Passes.counting and all(parameter.is_meta for parameter in model.parameters())


def test_tensors_come_back_from_their_file(tmp_path):
    spilled = Spilled(tmp_path)
    given = {"a": torch.randn(3, 4), ("b", 1): torch.arange(5, dtype=torch.int16), "c": torch.randn(2, 2).bfloat16().T}
    for key, tensor in given.items():
        spilled[key] = tensor
    assert not list(tmp_path.iterdir())  # whatever ends the process, nothing stays
    assert list(spilled) == list(given)
    assert all(torch.equal(spilled[key], tensor) and spilled[key] is not tensor for key, tensor in given.items())
    held = spilled["a"]
    assert spilled["a"] is held  # what is in use is not read twice
    spilled["a"] = held + 1
    assert torch.equal(spilled["a"], given["a"] + 1)
    del spilled["a"]
    assert "a" not in spilled and len(spilled) == 2


def test_what_a_mark_lists_stays_until_the_next_one(tmp_path):
    file, size = tmp_path / "kept", 4 * 1000
    spilled = Spilled(file=file)
    numbers = torch.arange(6000.0).view(6, 1000)
    spilled["a"], spilled["b"] = numbers[:2]
    mark = spilled.mark()
    spilled["a"], spilled["c"] = numbers[2:4]
    del spilled["b"]
    spilled["d"] = numbers[4]
    again = Spilled(file=file, mark=mark)  # as after a cut
    assert list(again) == ["a", "b"] and torch.equal(torch.stack(list(again.values())), numbers[:2])
    again["d"] = numbers[5]
    assert torch.equal(Spilled(file=file, mark=again.mark())["d"], numbers[5])
    length = file.stat().st_size
    for _ in range(3):  # room that was marked as free is taken again
        again["a"] = again["a"] + 1
        again.mark()
    assert file.stat().st_size <= length + size and torch.equal(again["a"], numbers[0] + 3)
    again.clear()
    assert not again and file.stat().st_size == 0
