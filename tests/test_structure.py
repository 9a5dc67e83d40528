"""The rules of the house that no linter knows: import order, sizes, docstrings."""

import ast
import functools
import re
from pathlib import Path

import pytest

from trm_jax.methods import MAKERS

ROOT = Path(__file__).parents[1]
# A folder may import from its own level (itself only) and from the levels before it.
LEVELS = (
    ("types",),
    ("models", "losses", "memory", "data"),
    ("pretrained", "methods", "evaluate", "visualize"),
    ("train",),
)
# losses/cosine.py is arithmetic that every part of level one may use.
SHARED = {name: {"trm_jax.losses.cosine"} for name in ("memory", "models")}
FILES = sorted((ROOT / "trm_jax").rglob("*.py"))
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _name(path):
    return str(path.relative_to(ROOT))


@functools.cache
def _tree(path):
    return ast.parse(path.read_text())


def _imports(path):
    """Full names of all imported modules and of what is imported from them."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _level(folder):
    return next(number for number, names in enumerate(LEVELS) if folder in names)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_follow_the_order(path):
    own = path.relative_to(ROOT / "trm_jax").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in _imports(path):
        if not name.startswith("trm_jax."):
            continue
        other = name.split(".")[1]
        allowed = (
            other == own
            or _level(other) < _level(own)
            or any(name.startswith(prefix) for prefix in SHARED.get(own, ()))
        )
        assert allowed, f"{own} imports {name}"


def test_methods_do_not_know_each_other():
    folder = ROOT / "trm_jax" / "methods"
    methods = set(MAKERS)
    assert {"trm_ml", "dualcoop", "contrastive"} <= methods
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue
        imported = {
            name.split(".")[2] for name in _imports(path) if name.startswith("trm_jax.methods.")
        }
        assert not imported & methods, path.stem


def test_the_loop_and_the_step_name_no_method():
    methods = {path.stem for path in (ROOT / "trm_jax" / "methods").glob("*.py")} - {"__init__"}
    assert set(MAKERS) < methods
    for name in ("loop", "step", "accumulate", "state", "sharding", "checkpoints", "bad_samples"):
        text = (ROOT / "trm_jax" / "train" / f"{name}.py").read_text()
        assert not [method for method in methods if re.search(rf"\b{method}\b", text)], name


def test_only_models_and_the_state_import_flax():
    users = {
        _name(path)
        for path in FILES
        if any(name.split(".")[0] == "flax" for name in _imports(path))
    }
    allowed = {u for u in users if u.startswith("trm_jax/models/")} | {"trm_jax/train/state.py"}
    assert users == allowed


# These read and write what TFDS makes, without TensorFlow, and import it on first use.
TFDS_USERS = {"trm_jax/data/prepare_records.py", "trm_jax/data/sources/records.py"}


def test_no_foreign_framework_is_imported():
    for path in (*FILES, *LAUNCHERS, *CONFIGS):
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & {"torch", "torchvision", "tensorflow"}, path
        assert "tensorflow_datasets" not in roots or _name(path) in TFDS_USERS, path


def test_tfds_is_imported_on_first_use():
    for name in TFDS_USERS:
        top = [node for node in _tree(ROOT / name).body if isinstance(node, ast.Import)]
        assert not [a.name for node in top for a in node.names if "tensorflow" in a.name], name


def test_configs_import_only_ml_collections_and_common():
    for path in CONFIGS:
        assert {name.split(".")[0] for name in _imports(path)} <= {"ml_collections", "configs"}, (
            path
        )
        shared = {n for n in _imports(path) if n.startswith("configs")}
        assert shared <= {"configs.common", "configs.common_mask", "configs.common_napreg"}, path


def test_config_fields_have_no_hidden_defaults():
    for path in FILES:
        # A tokenizer's config is the JSON of a file, not a run's config.
        if path.name != "tokenizers.py":
            assert "config.get(" not in path.read_text(), _name(path)


# One literal: the tree of all config fields.
LONG = {("configs/common.py", "base")}
LIMITS = {"trm_jax/train/loop.py": 200, "trm_jax/train/step.py": 80, "configs/common.py": 400}


@pytest.mark.parametrize("path", (*FILES, *LAUNCHERS, *CONFIGS), ids=_name)
def test_files_and_functions_are_short(path):
    limit = LIMITS.get(_name(path), 100 if path in CONFIGS else 400)
    assert len(path.read_text().splitlines()) <= limit
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef) and (_name(path), node.name) not in LONG:
            assert _length(node) <= 60, f"{node.name} has {_length(node)} lines"


def _length(function):
    """Lines without the docstring and without the functions inside, which count themselves."""
    inner = [n for n in ast.walk(function) if isinstance(n, ast.FunctionDef) and n is not function]
    hidden = set()
    for node in inner:
        hidden |= set(range(node.lineno, node.end_lineno + 1))
    if ast.get_docstring(function):
        hidden |= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
    return len(set(range(function.lineno, function.end_lineno + 1)) - hidden)


@pytest.mark.parametrize("path", (*FILES, *LAUNCHERS, *CONFIGS), ids=_name)
def test_public_names_have_docstrings(path):
    tree = _tree(path)
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            continue
        for method in node.body:
            # Flax calls `setup`; nobody else does.
            if isinstance(method, ast.FunctionDef) and not re.match("_|setup$", method.name):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"


def test_each_file_of_the_package_is_tested_beside_its_mirror():
    folders = {path.relative_to(ROOT / "trm_jax").parts[0] for path in FILES}
    folders = {name for name in folders if not name.endswith(".py")}
    assert {name for name in folders if (ROOT / "tests" / name).is_dir()} == folders
