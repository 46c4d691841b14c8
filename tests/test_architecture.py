"""Who may import whom, and no flag that nothing reads."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "data", "losses", "sched", "core", "report")
SCRIPTS = {"train": 60, "evaluate": 9, "predict": 9, "export": 3}  # and how many flags each has at least


def imports(path):
    """(module, ) names that a file imports from this project, by absolute or relative import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or "")


def walls_broken(package, modules):
    """Imports that a file of `package` may not make."""
    outside = set(PACKAGES) | set(SCRIPTS)
    return [m for m in modules if m.startswith("..") or m.split(".")[0] in outside - {package}]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_no_other_package_and_no_script(package):
    for path in (ROOT / package).glob("**/*.py"):
        assert not walls_broken(package, imports(path)), path


def test_the_wall_test_would_see_a_hole():
    assert walls_broken("data", ["numpy", ".audio", "model.ast"]) == ["model.ast"]
    assert walls_broken("core", ["..data", "train"]) == ["..data", "train"]


def test_rooms_keep_to_their_own():
    """The `never` column of the house: no files in the model, no tensors in the manifest, no args anywhere."""
    for path in [p for package in PACKAGES for p in (ROOT / package).glob("**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bargs\.", text), f"{path} reads args"
        assert "import argparse" not in text, path
    for name in ("ast", "frontend", "groups"):
        assert "open(" not in (ROOT / "model" / f"{name}.py").read_text(), name
    for name in ("manifest", "splits", "scan", "audio", "named", "xenocanto", "stream"):
        assert "import torch" not in (ROOT / "data" / f"{name}.py").read_text(), name
    for path in (ROOT / "report").glob("*.py"):
        assert "import torch" not in path.read_text(), path


def flags_of(script):
    """Names that a script's parser defines, of flags and of arguments without a name, and the source."""
    source = (ROOT / f"{script}.py").read_text()
    names = {m.replace("-", "_") for m in re.findall(r"add\(\"(?:--)?([a-z-]+)\"", source)}
    return names, source


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    names, source = flags_of(script)
    assert len(names) >= SCRIPTS[script]
    dead = [name for name in names if not re.search(rf"args\.{name}\b|given.get\(\"{name}\"", source)]
    indirect = {"dim", "depth", "heads"}  # read by name in ast_config
    assert set(dead) - indirect == set()
    if script == "train":
        assert re.search(r'for name in \("dim", "depth", "heads"\)', source)


def test_a_dead_flag_would_be_seen():
    names, source = flags_of("train")
    assert not re.search(r"args\.no_such_flag\b", source) and "warmup_epochs" in names


def test_recipes_set_only_flags_that_exist():
    import train
    names, _ = flags_of("train")
    for recipe in train.RECIPES.values():
        assert set(recipe) <= names
    assert train.FREE_ON_RESUME <= names


def test_only_the_schedule_writes_a_learning_rate():
    away = {"tests", ".venv", "experiments"}  # one study shows what goes wrong where another does
    writers = [path.name for path in ROOT.glob("**/*.py") if not away & set(path.parts)
               and re.search(r"\[\"lr\"\]\s*=", path.read_text(encoding="utf-8"))]
    assert writers == ["__init__.py"]
    assert re.search(r"\[\"lr\"\]\s*=", (ROOT / "sched" / "__init__.py").read_text())
