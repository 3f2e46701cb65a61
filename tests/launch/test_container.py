"""The container, and the versions that it and the pods of TPUs install."""

import importlib.metadata
import json
import os
import re

import pytest
from launchers import ROOT
from packaging.requirements import Requirement


def pins_of(extra: str) -> dict[str, str]:
    """Name and version of each line."""
    text = (ROOT / "launch" / f"requirements-{extra}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines) and lines == sorted(
        lines, key=str.lower
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    return pins


def test_both_sets_of_versions_agree():
    cuda, tpu = pins_of("cuda"), pins_of("tpu")
    assert {name: cuda[name] for name in tpu if name in cuda} == {name: tpu[name] for name in tpu if name in cuda}
    assert set(tpu) - set(cuda) == {"libtpu"}
    assert all(name.startswith(("nvidia-", "jax-cuda13-")) for name in set(cuda) - set(tpu))


@pytest.mark.parametrize(
    "extra, together, inside",
    [("cuda", ("jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin"), "cuda13"), ("tpu", ("jax", "jaxlib"), "tpu")],
)
def test_the_versions_are_what_the_package_needs(extra, together, inside):
    pins = pins_of(extra)
    assert len({pins[name] for name in together}) == 1
    needed = [Requirement(text) for text in importlib.metadata.requires("uae_jax")]
    needed = [
        one for one in needed if one.marker is None or one.marker.evaluate({"python_version": "3.12", "extra": extra})
    ]
    assert {"jax", "flax", "transformers"} <= {one.name for one in needed} and any(
        inside in one.extras for one in needed
    )
    for one in needed:
        assert one.specifier.contains(pins[re.sub(r"[-_.]+", "-", one.name).lower()]), one


def test_the_container_is_made_of_files_that_exist():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    steps = [
        line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
    ]
    assert steps[0][0] == "FROM" and re.fullmatch(r"python:3\.12\.\d+-slim-bookworm", steps[0][1])
    assert {name for name, _ in steps} <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert {"uae_jax", "configs", "launch", "setup.py", "README.md"} <= set(copied)
    assert all((ROOT / source).exists() and source.split("/")[0] not in ignored for source in copied)
    entry = json.loads(steps[-1][1])
    assert (
        steps[-1][0] == "ENTRYPOINT"
        and entry == ["launch/on_cards.sh", "python", "-m", "uae_jax.main"]
        and os.access(ROOT / entry[0], os.X_OK)
    )
    assert "--gpus all" in text and "--shm-size=" in text and steps[-2] == ["USER", "uae"]
