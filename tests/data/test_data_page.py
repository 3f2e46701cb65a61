"""docs/data.md followed literally: its Python makes every folder, and what it says is printed is printed."""

import pathlib
import re

from uae_jax.data.folder import open_folder
from uae_jax.data.formats import FORMATS
from uae_jax.stages.run_config import DataConfig

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_of_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, formats = {}, []
    for language, block in BLOCKS:
        if language == "python":
            exec(block, known)
        told = [line for line in block.splitlines() if line.startswith("data: ")]
        if language == "text" and told:
            opened = open_folder(re.match(r"data: (\S+)", told[0])[1])
            assert list(opened.lines) == told
            formats.append(opened.source.records.name)
        files = [line for line in block.splitlines() if line.startswith("data/")] if language == "text" else []
        assert all(pathlib.Path(file).is_file() for file in files)
    assert set(formats) == set(FORMATS)


def test_the_settings_of_the_page_exist():
    table = PAGE.partition("## Settings")[2].partition("## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[4:] if row.startswith("|")]
    fields = [field for cell in cells for field in re.findall(r"`(\w+)`", cell)]
    assert len(fields) > 10 and all(hasattr(DataConfig(), field) for field in fields)


def test_every_format_has_a_section():
    assert set(re.findall(r"^### `(\w+)`", PAGE, re.MULTILINE)) == set(FORMATS)
