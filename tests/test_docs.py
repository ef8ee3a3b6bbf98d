"""Every example in the docs runs, and everything public is documented."""

import contextlib
import dataclasses
import gc
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import sys
import textwrap
import types

import pytest

import rinsx as rx


ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE)
# What functions return: nobody makes them by hand, so the example is that of the function.
RECORDS = {
    "rinsx.Recursion",
    "rinsx.Trace",
    "rinsx.flops.Cost",
    "rinsx.flops.Parameters",
    "rinsx.flops.Plan",
    "rinsx.flops.PlanRow",
    "rinsx.flops.Solution",
    "rinsx.nn.Rotary",
    "rinsx.train.NonFiniteLoss",
    "rinsx.train.Run",
    "rinsx.train.Totals",
    "rinsx.transfer.Embeddings",
    "rinsx.transfer.Probe",
    "rinsx.transfer.Recall",
    "rinsx.cache.Cache",
    "rinsx.generate.Generation",
    "rinsx.generate.Speculation",
    "rinsx.generate.Token",
}


def public():
    """Everything public by its path: modules, and the functions and classes in them."""
    modules = {"rinsx": rx}
    for info in pkgutil.iter_modules(rx.__path__):
        if not info.name.startswith("_"):
            modules[f"rinsx.{info.name}"] = importlib.import_module(f"rinsx.{info.name}")
    found = dict(modules)
    for path, module in modules.items():
        for name in getattr(module, "__all__", None) or _reexports(module):
            # A table of values, such as the presets, is shown by a page of the docs.
            if callable(value := getattr(module, name)):
                found[f"{path}.{name}"] = value
    return found


def _reexports(module):
    """The public names of a module without `__all__`; those that it imports from elsewhere are none of its own."""
    own = lambda value: getattr(value, "__module__", "").partition(".")[0] == "rinsx"
    return [name for name, value in vars(module).items() if not name.startswith("_") and own(value)]


PUBLIC = public()


def docstrings(value):
    """The docstring of an object, and those of what a class defines."""
    found = [value.__doc__ or ""]
    if inspect.isclass(value):
        for member in vars(value).values():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) or isinstance(member, property):
                found.append(member.__doc__ or "")
    return [inspect.cleandoc(text) for text in found]


def fences(text):
    """The examples of a text, each preceded by as many empty lines as there are lines above it in the text."""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield "\n" * line + textwrap.dedent(match["code"])


def execute(codes, name, monkeypatch):
    """Runs examples one after the other, as one script."""
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    with contextlib.redirect_stdout(io.StringIO()):
        for code in codes:
            exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_pages_run(page, monkeypatch):
    execute(fences(page.read_text("utf-8")), str(page), monkeypatch)
    # What a page leaves open is found here, not in whichever test the collector happens to run.
    monkeypatch.undo()
    gc.collect()


@pytest.mark.parametrize("path", [path for path, value in PUBLIC.items() if "```python" in "".join(docstrings(value))])
def test_examples_of_docstrings_run(path, monkeypatch):
    codes = [code for text in docstrings(PUBLIC[path]) for code in fences(text)]
    assert codes
    execute(codes, f"<the docstring of {path}>", monkeypatch)


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_has_a_docstring_with_an_example(path):
    value = PUBLIC[path]
    texts = docstrings(value)
    # A dataclass without a docstring is given its signature for one.
    assert texts[0] and not texts[0].startswith(f"{getattr(value, '__name__', '')}(")
    plain = inspect.ismodule(value) or path in RECORDS or path.rpartition(".")[2].startswith("Abstract")
    assert plain or any("```python" in text for text in texts)


def test_records_are_records():
    assert RECORDS <= PUBLIC.keys()
    plain = lambda value: dataclasses.is_dataclass(value) or issubclass(value, tuple | Exception)
    assert all(plain(PUBLIC[path]) for path in RECORDS)


def test_what_is_public_stands_in_the_api_pages():
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert sorted(entries) == sorted(PUBLIC.keys() - {"rinsx"})


@pytest.mark.parametrize("path", PUBLIC)
def test_arguments_that_are_documented_apart_stand_in_the_api_pages(path):
    """The docs are made from the source, unread by Python: they miss an `__init__.__doc__` that is assigned."""
    value = PUBLIC[path]
    text = inspect.cleandoc((vars(value).get("__init__") if inspect.isclass(value) else None).__doc__ or "")
    if "**Arguments:**" in text and "**Arguments:**" not in inspect.getsource(value):
        entry = f"::: {path}\n\n{text}\n"
        assert any(entry in page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))


def test_the_examples_are_found():
    text = "a\n\n    ```python\n    x = 1\n    ```\n\n```python\ny = 2\n```\n```text\nz\n```\n"
    assert list(fences(text)) == ["\n\n\nx = 1\n", "\n\n\n\n\n\n\ny = 2\n"]
