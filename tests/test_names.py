from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import moeprof

PACKAGES = [
    name
    for name in ("moeprof", *(m.name for m in pkgutil.walk_packages(moeprof.__path__, "moeprof.")))
    if name == "moeprof" or hasattr(importlib.import_module(name), "__path__")
]


def submodules(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    return [module.name for module in pkgutil.iter_modules(path) if module.name != "__main__"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_equals_a_submodule(package):
    module = importlib.import_module(package)
    for name in submodules(package):
        importlib.import_module(f"{package}.{name}")
    public = getattr(module, "__all__", [n for n in dir(module) if not n.startswith("_")])
    for name in public:
        value = getattr(module, name)
        if name in submodules(package):
            assert value is sys.modules[f"{package}.{name}"], (
                f"{package}.{name} is a submodule and a public name"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_promised_name_is_there(package):
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None


def test_the_public_functions_are_callable():
    for name in ("check", "open", "record", "register", "report"):
        assert callable(getattr(moeprof, name))
    assert issubclass(moeprof.MoeprofError, Exception)
    assert moeprof.replay.__name__ == "moeprof.replay"
    assert set(moeprof.__all__) <= set(dir(moeprof))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'reprot'"):
        moeprof.reprot  # noqa: B018


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "pandas", "numpy", "pyarrow", "matplotlib", "jinja2", "numba"}


def test_importing_the_package_imports_nothing_heavy():
    loaded = loaded_after("import moeprof")
    assert not loaded & (HEAVY | {"click"})


def test_importing_the_command_line_imports_nothing_heavy():
    assert not loaded_after("import moeprof.cli") & HEAVY


@pytest.mark.parametrize("module", ["moeprof.trace.reader", "moeprof.replay", "moeprof.reporting"])
def test_reading_and_reporting_need_no_torch(module):
    assert not loaded_after(f"import {module}") & {"torch", "transformers", "click"}
