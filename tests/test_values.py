"""Numbers that half precision does not hold: kept wider, within the budget, and said; or refused by name."""

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

import hf_offline_compress.solve.groups as solving
from hf_offline_compress import CompressionError, compress
from hf_offline_compress.runtime.storing_compressed import holding, holds
from hf_offline_compress.solvers import solve_all

LAYER = "bert.encoder.layer.1"


def changed(change):
    model = make_model("bert", "BertForMaskedLM")
    with torch.no_grad():
        change(dict(model.named_parameters()))
    return model


def big_bias(weights):
    weights[f"{LAYER}.output.LayerNorm.bias"][3] = 1e5


def big_norm(weights):
    weights[f"{LAYER}.attention.output.LayerNorm.weight"][:] *= 1e5


def big_weight(weights):
    weights[f"{LAYER}.intermediate.dense.weight"][3, 5] = 1e6


def tiny_embeddings(weights):
    for name in ("word", "position", "token_type"):
        weights[f"bert.embeddings.{name}_embeddings.weight"] *= 1e-9


def quick(model, recipe="small", **options):
    options = {"tokenizer": make_tokenizer("bert"), "calibration": TEXTS, "progress": False, **options}
    return compress(model, recipe, **options)


@pytest.mark.parametrize(
    "recipe,change",
    [("balanced", big_bias), ("balanced", big_norm), ("small", big_weight), ("small", tiny_embeddings)],
)
def test_what_half_precision_does_not_hold_is_kept_wider(change, recipe, tmp_path, caplog):
    model = changed(change)
    result = quick(model, recipe, total_ratio=3)
    result.save(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    parameters = sum(p.numel() for p in model.parameters())
    assert 0.9 * parameters * 4 / 3 < file.stat().st_size <= parameters * 4 / 3
    loaded = type(result.model).from_pretrained(tmp_path / "out")
    state = result.model.state_dict()
    assert all(
        t.isfinite().all() and t.equal(state[n]) for n, t in loaded.state_dict().items() if t.is_floating_point()
    )
    tensors = load_file(file).values()
    assert result.report.totals["stored_bytes"] == sum(t.numel() * t.itemsize for t in tensors)
    stored = {t.dtype for t in tensors}
    assert torch.float16 in stored and stored & {torch.bfloat16, torch.float32}
    assert "half precision cannot represent their values" in caplog.text
    ids = torch.tensor([[2, 40, 50, 60, 3]])
    with torch.no_grad():
        error = (loaded(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert error < 0.7


@pytest.mark.parametrize("change,name", [(big_bias, "output.LayerNorm.bias"), (tiny_embeddings, "position_embeddings")])
def test_what_the_dtype_of_the_model_does_not_hold_is_refused(change, name):
    with pytest.raises(CompressionError, match=rf"float16 cannot represent the values of .*{name}.*dtype='float32'"):
        quick(changed(change), "svd", ratio=4, dtype="float16", modules="query")


def test_which_dtype_holds_what():
    assert holding(torch.tensor([1e5, 1.0]), torch.float16) == torch.bfloat16
    assert holding(torch.full((4,), 1e-9), torch.float16) == torch.bfloat16
    assert holding(torch.randn(9, 9), torch.float16) == torch.float16
    assert holding(torch.zeros(3, 3), torch.float16) == torch.float16
    assert holding(torch.tensor([3.4e38]), torch.float16) == torch.float32
    rows = torch.randn(3, 8)
    rows[1] *= 1e-9
    assert not holds(rows, torch.float16) and holds(rows.flatten(), torch.float16)


@pytest.mark.parametrize("broken", ["saved", "in memory"])
def test_what_was_saved_is_loaded_again(broken, tmp_path, monkeypatch):
    """A save that loses something, or a model that says nothing, leaves nothing behind."""
    result = quick(make_model("bert", "BertForMaskedLM"), "svd", ratio=2)
    if broken == "saved":
        save = type(result.model).save_pretrained

        def lossy(model, folder, **options):
            save(model, folder, **options)
            file = folder / "model.safetensors"
            state = load_file(file)
            save_file({n: t * 0.9 for n, t in state.items()}, file, metadata={"format": "pt"})

        monkeypatch.setattr(type(result.model), "save_pretrained", lossy)
    else:
        result.model.bert.embeddings.LayerNorm.bias.data.fill_(torch.nan)
    message = "differ from those of the model in memory" if broken == "saved" else "gives NaN or infinite values"
    with pytest.raises(CompressionError, match=message):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_solver_gives_is_finite(value, monkeypatch):
    def broken(problems):
        found = solve_all(problems)
        found[0].decoder["weight"][0, 0] = value
        return found

    monkeypatch.setattr(solving, "solve_all", broken)
    with pytest.raises(CompressionError, match=r"Solving 'query_0' \(low_rank\) gave NaN or infinite values"):
        quick(make_model("bert", "BertForMaskedLM"), "svd", ratio=4, modules="query", calibration=None)
