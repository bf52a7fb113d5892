"""What the documents show works: the README's blocks are run as they stand, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_offline_compress.recipe import KINDS, SHORTHANDS, preset_names, recipe_from_dict

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = ("make ", "pip install", "git ")


def blocks(document, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


def test_the_readme_from_top_to_bottom(tmp_path):
    """Consecutive blocks of one language share a process, as a reader's shell or interpreter would."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    scripts: list[list[str]] = []
    for language, code in blocks(ROOT / "README.md", "python", "bash"):
        if code.startswith(NOT_RUN):
            continue
        if scripts and scripts[-1][0] == language:
            scripts[-1][1] += f"\n{code}"
        else:
            scripts.append([language, code])
    assert {language for language, _ in scripts} == {"python", "bash"}
    (tmp_path / "reader").mkdir()
    for language, code in scripts:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        run = subprocess.run(
            command,
            cwd=tmp_path / "reader",
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert run.returncode == 0, f"{code}\n{run.stderr[-2000:]}"


def test_recipes_in_the_documents_load():
    shown = [code for document in DOCUMENTS for _, code in blocks(document, "yaml")]
    recipes = [content for code in shown if "rules" in (content := yaml.safe_load(code))]
    assert len(recipes) >= 3
    for content in recipes:
        recipe_from_dict(content)


def test_presets_and_kinds_are_documented():
    readme, recipes = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs/recipes.md").read_text("utf-8")
    assert all(f"`{name}`" in readme for name in preset_names())
    assert all(f"`{name}`" in recipes for name in (*KINDS, *SHORTHANDS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text("utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
