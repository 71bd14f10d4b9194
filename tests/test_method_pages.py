"""Every method has a page in `docs/methods/`, and what it states is true: settings, defaults, counts, the entry."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from nola_vision.adapters.methods import PEFT, Adapter, Method, NearestNeighbor, registry
from nola_vision.models.building import method_targets

PAGES = Path(__file__).parent.parent / "docs" / "methods"
BUILT_IN = [one for one in registry.METHODS.values() if one.__module__.startswith("nola_vision.")]


def page_of(method: type[Method]) -> Path:
    return PAGES / (method.__module__.rpartition(".")[2].replace("_", "-") + ".md")


def table(text: str) -> dict[str, Any]:
    """The defaults by setting that a page lists."""
    rows = re.findall(r"^\| `(\w+)` \|\s*(.*?)\s*\| ", text, re.M)
    return {name: yaml.safe_load(default) for name, default in rows}


@pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: method.__name__)
def test_the_page_of_a_method_lists_its_settings(method: type[Method]) -> None:
    text = page_of(method).read_text()
    title, question, *_ = text.split("\n\n")
    assert title.startswith("# ") and "?" in question
    assert f"({page_of(method).name})" in (PAGES / "README.md").read_text()
    shared = dataclasses.fields(Adapter) if issubclass(method, Adapter) else ()
    own = {field.name: field.default for field in dataclasses.fields(method)}
    for field in shared:
        if field.name != "targets" and own[field.name] == field.default:
            del own[field.name]
    expected = {name: list(default) if isinstance(default, tuple) else default for name, default in own.items()}
    if method is PEFT:
        expected |= {"config": None, "settings": {}}  # the first has no default, the second a new one each time
    if method is not NearestNeighbor:  # without settings, on a page with others
        assert table(text) == expected


def test_the_settings_of_every_adapter_are_listed() -> None:
    listed = table((PAGES / "README.md").read_text())
    expected = {field.name: field.default for field in dataclasses.fields(Adapter)}
    assert listed | {"targets": expected["targets"]} == expected


ADAPTERS = [method for method in BUILT_IN if issubclass(method, Adapter)]


@pytest.mark.parametrize("method", ADAPTERS, ids=lambda method: method.__name__)
def test_the_number_of_values_is_that_of_the_page(method: type[Adapter]) -> None:
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    groups = method().groups(method_targets(backbone, method(), 100))
    count = sum(torch.Size(shape).numel() for group in groups for shape in group.shapes.values())
    assert f"With the defaults on ViT-B/16 an adapter has {count:,} values." in page_of(method).read_text()
    assert re.search(rf"\({page_of(method).name}\) \|.*\| {count:,} \|", (PAGES / "README.md").read_text())


def test_the_entries_of_the_pages_are_understood() -> None:
    named = set()
    for path in sorted(PAGES.glob("*.md")):
        for text in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S):
            for entry in yaml.safe_load(text).values():
                method = registry.check(registry.from_dict(entry))
                named.add(type(method))
    assert named == set(BUILT_IN)
