"""The shape of the package: imports go down, few names are exported, and `import ensembler` loads no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ensembler

ROOT = Path(ensembler.__file__).parent
KERNELS = ROOT.parent / "kernels" / "ensembler_kernels"

# From the bottom up; a module may import its own layer and those below. Folders stand for all their modules.
LAYERS = (
    {"errors", "launch", "files", "yaml_file", "auto_classes", ""},
    {"vocab", "rules", "config", "quantization", "safetensors_files", "extras", "tokenization"},
    {"patch", "adapters"},
    {"engine", "planning", "preflight", "folder"},
    {"inspection"},
    {"modeling", "generation"},
    {"decoding"},
    {"evaluation", "serving", "vision", "demo"},
    {"cli", "__main__"},
)
UPWARDS = {("generation.py", "ensembler.decoding.decoder.Decoder")}  # generate of transformers calls down to the model
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path, *, always: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; `always`: only those outside functions and TYPE_CHECKING."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if always and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if always and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def part(path: Path) -> str:
    """The file or folder directly below the package."""
    return path.relative_to(ROOT).with_suffix("").parts[0].replace("__init__", "")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = part(path)
    assert here in LEVEL, f"{here} has no layer in this test"
    if not here:
        return  # the front door names modules lazily
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "ensembler":
            continue
        if (str(path.relative_to(ROOT)), name) in UPWARDS:
            continue
        there = rest.split(".")[0]
        there = there if there in LEVEL else ""
        assert LEVEL[there] <= LEVEL[here], f"{path.relative_to(ROOT)} imports {name}"
        private = [piece for piece in rest.split(".") if piece.startswith("_") and not piece.startswith("__")]
        assert not private, f"{path.relative_to(ROOT)} imports the private {name}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_ensembler(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] in ("ensembler", "transformers")]


def test_the_outer_kernels_folder_is_bare() -> None:
    """An __init__.py there would hide Hugging Face's package `kernels`, which transformers looks for."""
    assert not (KERNELS.parent / "__init__.py").exists()


def test_no_cycles() -> None:
    graph = {}
    for path in modules():
        dotted = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[dotted] = {name for name in imported(path, always=True) if name.startswith("ensembler")}
    known = set(graph)
    edges = {
        name: {target if target in known else target.rpartition(".")[0] for target in targets} & known - {name}
        for name, targets in graph.items()
    }
    edges["ensembler"] = set()
    while leaves := [name for name, targets in edges.items() if not targets & set(edges)]:
        for name in leaves:
            del edges[name]
    assert not edges, edges


def test_what_evaluates_and_serves_is_imported_in_one_direction() -> None:
    """Imports within functions count: what is imported late is needed all the same."""
    found = {
        (part(path), name.split(".")[1])
        for path in modules()
        for name in imported(path)
        if name.startswith("ensembler.") and part(path)
    }
    layer = {"evaluation", "serving", "vision", "demo"}
    peers = {(here, there) for here, there in found if here != there and {here, there} <= layer}
    assert ("vision", "evaluation") in peers
    assert not {(here, there) for here, there in peers if (there, here) in peers}


def test_file_names_are_unique_and_no_file_is_long() -> None:
    paths = [path for path in modules() if path.name != "__init__.py"]
    assert len({path.name for path in paths}) == len(paths)
    assert {path: lines for path in paths if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400} == {}


def test_docstrings_begin_with_no_question_word() -> None:
    """A verb and its object are easier to read."""
    words = ["what", "which", "who", "where", "when", "how", "why", "whether", "is", "are", "can", "does"]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    folders = [ROOT, *(ROOT.parent / name for name in ("kernels", "benchmarks", "examples", "docs"))]
    found = [
        f"{path}: {text}"
        for path in (path for folder in folders for path in folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if text.split()[0].lower().strip(":,") in words
    ]
    assert not found


def test_exported_names() -> None:
    expected = ["EnsembleCache", "EnsembleConfig", "EnsembleForCausalLM", "EnsembleForImageClassification"]
    expected += ["EnsemblerError", "MemberConfig", "register_rule", "score"]
    assert ensembler.__all__ == expected == sorted(expected)
    for name in expected:
        assert getattr(ensembler, name).__name__ == name
    assert set(expected) <= set(dir(ensembler))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = ensembler.nothing_of_the_kind


def test_exported_kernels() -> None:
    import ensembler_kernels

    assert ensembler_kernels.__all__ == sorted(ensembler_kernels.__all__)
    assert "combine" in ensembler_kernels.__all__


@pytest.mark.parametrize(
    "code",
    [
        "import ensembler",
        "import ensembler; dir(ensembler); ensembler.__version__",
        "import ensembler.errors, ensembler.rules, ensembler.vocab, ensembler.safetensors_files",
        "import ensembler.patch.patch_plan",
        "import ensembler.cli.main",
        "from ensembler import EnsemblerError",
        "import sys, runpy; sys.argv = ['ensembler', '--help']\n"
        "try: runpy.run_module('ensembler', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code",
        "import sys, runpy; sys.argv = ['ensembler', 'score', '--help']\n"
        "try: runpy.run_module('ensembler', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code",
    ],
)
def test_no_torch_is_loaded(code: str) -> None:
    check = "\nimport sys; print('LOADED', sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


USED = """
from transformers import AutoModelForCausalLM, AutoConfig, pipeline
from ensembler.demo import demo_folder
folder = str(demo_folder())
assert AutoConfig.from_pretrained(folder).model_type == "ensembler"
model = AutoModelForCausalLM.from_pretrained(folder, alpha=0.5)
(made,) = pipeline("text-generation", model=folder)("Ann has 5 pears.", max_new_tokens=2, do_sample=False)
print(type(model).__name__, model.alpha, len(made["generated_text"]) > len("Ann has 5 pears."))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import ensembler",
        "import transformers, ensembler",
        "from transformers import AutoModelForCausalLM\nimport ensembler",
    ],
    ids=["first", "after transformers", "after its Auto classes"],
)
def test_auto_classes_know_the_folder_after_import_ensembler_alone(first: str) -> None:
    """Also where `transformers`, or its Auto classes, were there before."""
    done = subprocess.run([sys.executable, "-c", first + USED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "EnsembleForCausalLM 0.5 True"


def test_auto_classes_know_image_classifiers_too(tmp_path: Path) -> None:
    """The members are asked for, so the class was found."""
    members = {role: {"model": "/no/such/model"} for role in ("source_ft", "source_pt", "target_pt")}
    content = {"model_type": "ensembler", "task": "image-classification", "rule": "eft", "members": members}
    (tmp_path / "config.json").write_text(json.dumps(content))
    code = "import ensembler\nfrom transformers import AutoModelForImageClassification as Auto\n"
    code += f"Auto.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ensembler.errors.MemberError: "), done.stderr
    assert "/no/such/model" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["adapters", "engine.members", "modeling", "vision.towers", "evaluation.grid_lm"])
def test_each_module_can_be_the_first_that_loads_the_auto_classes(name: str) -> None:
    """The registration runs in the middle of its imports."""
    code = f"import ensembler.{name}; from transformers import AutoConfig; AutoConfig.for_model('ensembler')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_error_tree() -> None:
    from ensembler import errors

    names = [
        name
        for name, value in vars(errors).items()
        if getattr(value, "__module__", "") == errors.__name__ and isinstance(value, type)
    ]
    assert all(issubclass(getattr(errors, name), errors.EnsemblerError) for name in names)
    assert {name for name in names if getattr(errors, name).exit_code == 2} == {
        name for name in names if issubclass(getattr(errors, name), errors.InputError)
    }
    drawn = errors.__doc__ or ""
    assert all(name in drawn for name in names)
