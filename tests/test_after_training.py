"""A compressed model that Trainer has saved: every command takes the folder, and says what has become of it."""

import shutil

import pytest
from common import TEXTS, save_base
from test_damage import COMMAND, arguments, in_process  # noqa: F401 (a fixture)
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_offline_compress import CompressionError, compress, inspect_folder, write_card
from hf_offline_compress.card import parse_card
from hf_offline_compress.evaluate import evaluate_folder
from hf_offline_compress.verifying import check_files, folder_files, trainer_files

LINES = [" ".join(TEXTS[i : i + 4]) for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny", "bert", "BertForMaskedLM")


@pytest.fixture(scope="module")
def small(base, tmp_path_factory):
    return compress(base, "svd", progress=False).save(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """What `compress → Trainer → save_model` leaves, with an earlier step beside it."""
    folder = tmp_path_factory.mktemp("trained") / "trained"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(small), AutoTokenizer.from_pretrained(small)
    options = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **options),
        train_dataset=[tokenizer(text) for text in TEXTS[:8]],
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES))
    return file


@pytest.mark.parametrize("command", ["inspect", "card", "verify", "evaluate", "benchmark", "export"])
def test_every_command_takes_it(command, trained, base, text, in_process, tmp_path, capsys):  # noqa: F811
    given = arguments(command, trained, base, text, tmp_path / "dense")
    code = COMMAND.main(given, standalone_mode=False)
    said = capsys.readouterr().out
    assert not code, said
    if command == "inspect":
        assert "saved again after it was compressed" in said and "query_0" in said
    if command == "verify":
        assert "Trainer's files, including pickles, are left out of a push: checkpoint-1/" in said


def test_what_trainer_leaves_is_no_part_of_the_model(trained):
    assert {"training_args.bin", "checkpoint-1/model.safetensors"} <= set(trainer_files(trained))
    files = folder_files(trained)
    assert "model.safetensors" in files and "modeling_compressed.py" in files
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    assert inspect_folder(trained).weights == {"model.safetensors": (trained / "model.safetensors").stat().st_size}


def test_the_card_says_that_it_was_fine_tuned(trained, base):
    evaluate_folder(trained, base=base, text=LINES, measures=["agreement"], progress=False)
    card = write_card(trained, base_model="me/tiny", license="mit").read_text()
    assert card.count("It was fine-tuned after it was compressed.") == 3
    assert "not fine-tuned" not in card and "without fine-tuning" not in card
    assert "agreement with the base" in card and "| query_0 | low rank | 1 |" in card
    assert "## Sizes" not in card and "```text" not in card and "None" not in card and "\n\n\n" not in card
    assert 'AutoModelForMaskedLM.from_pretrained("trained")' in card
    data = parse_card(card).data
    assert (data.base_model, data.pipeline_tag, data.license) == ("me/tiny", "fill-mask", "mit")
    assert write_card(trained).read_text() == card


def test_a_folder_that_trainer_has_saved_into(small, tmp_path):
    """The report is that of the compression; what it says of errors is of the weights before."""
    folder = tmp_path / "small"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert "fine-tuned after it" not in write_card(folder).read_text()
    (folder / "verification.json").unlink()
    assert "saved again after it was compressed, and may have been fine-tuned." in write_card(folder).read_text()
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    card = write_card(folder).read_text()
    assert "It was fine-tuned after it was compressed. The errors below were measured before that." in card
    assert "not fine-tuned" not in card and "## Sizes" in card


def test_its_base_must_be_named(trained):
    with pytest.raises(
        CompressionError, match=r"has no compression_report.json to say what .*pass its base with --base"
    ):
        evaluate_folder(trained, text=LINES, progress=False)


def test_code_beside_an_earlier_step_must_be_ours_too(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "trained")
    assert check_files(folder).passed
    for content in (b"import os\n", (folder / "modeling_compressed.py").read_bytes() + b"\n"):
        (folder / "checkpoint-1/modeling_compressed.py").write_bytes(content)
        assert [check.name for check in check_files(folder).failed] == ["code"]
