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


def test_models_and_sources_load_no_metrics_plots_downloads_or_datasets():
    heavy = [
        "torch_fidelity",
        "scipy.stats",
        "matplotlib",
        "tensorboard",
        "datasets",
        "torchvision",
    ]
    heavy += [
        "util.checkpoint.files",
        "util.checkpoint.hub",
        "tools.download",
        "util.metrics.plots",
        "util.metrics",
    ]
    heavy += ["util.metrics.plots", "util.metrics.compute"]
    code = "import sys, models.tokenbridge, models.vae; found = {*sys.modules}\n"
    code += "import util.data.sources; found |= {*sys.modules} & {'datasets'}\n"
    code += f"print(sorted(found & {{*{heavy}}}))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"
