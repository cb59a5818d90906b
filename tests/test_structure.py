"""Structure of the code: imports point one way, and importing a model stays cheap."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = sorted(
    path
    for folder in ("models", "util", "tools", "benchmarks", "demo", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)
FILES += [ROOT / f"{script}.py" for script in SCRIPTS]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def imports_of(module: str) -> set[str]:
    """The project's modules that ``module`` imports anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a submodule, or something in the module.
            names = [
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            ]
        else:
            continue
        found.update(name for name in names if name in MODULES)
    return found - {module}


def circle_from(module: str, path: tuple[str, ...] = ()) -> list[str]:
    """A way along imports that comes back to where it has been."""
    if module in path:
        return [*path[path.index(module) :], module]
    for other in imports_of(module):
        if other not in done and (circle := circle_from(other, (*path, module))):
            return circle
    done.add(module)
    return []


done: set[str] = set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_by_way_of_others(module):
    assert not circle_from(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_from_scripts_to_models_to_util(module):
    room = module.split(".")[0]
    top = {"tools", "benchmarks", "experiments", *SCRIPTS}
    above = {"util": {"models", *top}, "models": top}
    wrong = {name for name in imports_of(module) if name.split(".")[0] in above.get(room, ())}
    assert not wrong


def test_no_two_functions_or_classes_have_the_same_name():
    owners: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                owners.setdefault(node.name, []).append(module)
    every_script_has = {"main", "get_args_parser", "check_args"}
    shared = {name: modules for name, modules in owners.items() if len(modules) > 1}
    assert {name: shared[name] for name in shared if name not in every_script_has} == {}


LOADED = """
import sys
import models.tokenbridge, models.vae, util.data.sources
print(sorted({*sys.modules} & {*sys.argv[1:]}))
import main_tokenbridge
print(sorted({*sys.modules} & {"torchvision", "torch._dynamo", "matplotlib", "torch_fidelity"}))
"""


def test_models_and_the_training_script_load_what_they_need_only():
    """Importing a model loads neither metrics, plots nor downloads; --help none that is slow."""
    heavy = ["torch_fidelity", "scipy.stats", "matplotlib", "tensorboard", "datasets"]
    heavy += ["torchvision", "tools.download"]
    heavy += ["util.metrics.plots", "util.metrics.compute"]
    command = [sys.executable, "-c", LOADED, *heavy]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["[]", "[]"]
