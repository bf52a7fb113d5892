"""The report of `evaluate`: every number is there, base beside compressed; HTML that parses; whole or not at all."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from common import save_pair

from hf_offline_compress import CompressionError, evaluate_folder
from hf_offline_compress.card.inputs import CardInputs
from hf_offline_compress.errors import UnsavedError
from hf_offline_compress.evaluate import reporting
from hf_offline_compress.evaluate.reporting import Bars, as_html, as_markdown, check_report, report_blocks

KEPT = Path(__file__).resolve().parents[1] / "model_cards/minilm-tiny"
LINES = ["the cat sat on the mat", "a dog ran home over the hills"]


class Parsed(HTMLParser):
    """Texts, attributes of bars, and tags that are open."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.bars = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "rect"):
            self.open.append(tag)
        if tag == "rect" and "y" in dict(attributes):
            self.bars.append(float(dict(attributes)["width"]))

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text):
    parser = Parsed()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture
def inputs():
    config, report, evaluation = (
        json.loads((KEPT / f"{name}.json").read_text("utf-8"))
        for name in ("config", "compression_report", "evaluation")
    )
    return CardInputs("a|b <i>", config, report, evaluation, {"model.safetensors": 5_678_150})


def test_both_forms_have_every_metric_of_base_and_compressed_model(inputs):
    blocks = report_blocks(inputs)
    markdown, page = as_markdown(blocks), parsed(as_html(blocks))
    shown = " ".join(page.texts)
    metrics = [each for evaluation in inputs.evaluations for each in evaluation["metrics"]]
    assert len(metrics) >= 3 and len(page.bars) == 2 * (len(metrics) + 1)
    for each in metrics:
        assert each["name"] in markdown and each["name"] in shown
        for model in ("base", "compressed"):
            assert f"{each[model]:.4f}" in markdown and f"{each[model]:.4f}" in shown
    assert "5,678,150" in markdown and "5,678,150" in page.texts
    assert "Evaluation of a|b <i>" in page.texts and r"# Evaluation of a\|b &lt;i>" in markdown


def test_bars_are_as_long_as_their_numbers(inputs):
    block = reporting.Block(
        "figure", bars=(Bars("bytes", (200.0, 50.0), ("200", "50")), Bars("x", (None, 3.0), ("–", "3")))
    )
    lengths = parsed(as_html([reporting.Block("title", "t"), block])).bars
    assert lengths == [reporting.BAR, reporting.BAR / 4, 1.0, reporting.BAR]
    lines = as_markdown([block]).splitlines()
    assert [line.count("█") for line in lines if "█" in line] == [24, 6, 24]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("reports"))


def test_a_report_is_written_with_all_evaluations_and_replaced(pair, tmp_path):
    base, folder = pair
    options = {"base": base, "progress": False}
    evaluate_folder(folder, text=LINES, report=tmp_path / "r.html", **options)
    first = (tmp_path / "r.html").read_text("utf-8")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    evaluate_folder(folder, text=tmp_path / "lines.txt", report=tmp_path / "r.html", **options)
    second = (tmp_path / "r.html").read_text("utf-8")
    assert "lines.txt" in second and "lines.txt" not in first and len(parsed(second).bars) == 6
    assert str(tmp_path) not in second and str(base.parent) not in second
    evaluate_folder(folder, text=LINES[:1], report=tmp_path / "r.md", write=False, **options)
    assert "1 examples" in (tmp_path / "r.md").read_text("utf-8")
    assert "1 examples" not in (folder / "evaluation.json").read_text("utf-8")


@pytest.mark.parametrize(
    "name,message",
    [
        ("r.pdf", "must end in .html, .md"),
        ("nowhere/r.html", "is not a folder that you may write to"),
        ("mine.md", "is there and is not a report"),
        ("folder.md", "is there and is not a report"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(pair, tmp_path, name, message):
    (tmp_path / "mine.md").write_text("# Mine\n")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(CompressionError, match=message):
        evaluate_folder(pair[1], base="nowhere", text=LINES, report=tmp_path / name, progress=False)
    assert (tmp_path / "mine.md").read_text() == "# Mine\n"


def test_a_report_that_fails_leaves_the_earlier_one_and_the_numbers(pair, tmp_path, monkeypatch):
    file = tmp_path / "r.md"
    file.write_text(f"{reporting.MARK}\nearlier\n")
    assert check_report(file) == file

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "write_whole", full)
    with pytest.raises(UnsavedError, match=r"not added to r\.md") as caught:
        evaluate_folder(pair[1], base=pair[0], text=LINES, report=file, progress=False)
    assert caught.value.result[0].metrics and file.read_text().endswith("earlier\n")
