"""The README and the site: words, sentences, links, and a page for every setting, command and metric."""

import importlib.util
import pathlib
import re

import pytest

from uae_jax.training.meanings import FAMILIES, METRICS, known

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LOGS = sorted((ROOT / "dev").glob("*.md"))
REPOSITORY = "https://github.com/uae-jax/uae_jax/blob/main/"
WORDS, README_WORDS, MEAN, LONGEST = 12_000, 450, 18, 35


def site():
    """The module that makes the reference pages."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "dev" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(text: str) -> str:
    """A page without code, tables, headings and the targets of links."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\||#| {4}|<!--", line)]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    return re.sub(r"`[^`]*`", "Code", text)  # which may begin a sentence


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose; an item of a list begins one."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose(text)):
        found += re.split(r"(?<=[.!?:])\s+(?=[A-Z*\[])", " ".join(block.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_the_site_is_short():
    count = sum(len(prose(page.read_text()).split()) for page in PAGES)
    assert count <= WORDS, f"README and site have {count} words; move experiments to dev/"


def test_sentences_are_short():
    found = [(len(sentence.split()), page.name, sentence) for page in PAGES for sentence in sentences(page.read_text())]
    mean = sum(length for length, *_ in found) / len(found)
    assert len(found) > 300 and mean <= MEAN
    assert [entry for entry in found if entry[0] > LONGEST] == []


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", text)).strip().lower()) for text in headings
    }


def links(page: pathlib.Path) -> list[tuple[str, str]]:
    """(target, anchor) of the links of a page that lead into the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).replace(REPOSITORY, "ROOT/")
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text)
    return [(target, anchor) for target, anchor in found if not target.startswith(("http", "mailto:"))]


@pytest.mark.parametrize(
    "page", [*PAGES, *LOGS, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_link_leads_somewhere(page):
    made = site().PAGES
    for target, anchor in links(page):
        if target in made:
            continue
        place = ROOT / target.removeprefix("ROOT/") if target.startswith("ROOT/") else page.parent / target
        place = place.resolve() if target else page
        assert place.exists(), f"{page.name} links {target}"
        if page.parent == DOCS and not target.startswith("ROOT/"):
            assert place.is_relative_to(DOCS), f"{page.name} links {target}, which is not on the site"
        assert not anchor or place.suffix != ".md" or anchor in anchors(place), f"{page.name} links {target}#{anchor}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | set(site().PAGES)


def test_the_first_page_answers_the_first_questions():
    page = (DOCS / "index.md").read_text()
    for target in ("cards.md", "weights.md", "recipes.md#five", "data.md", "results.md", "trouble.md", "quickstart.md"):
        assert f"]({target}" in page


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    quoted = re.findall(r'^\| "([^"]+)" \|', (DOCS / "trouble.md").read_text(), re.MULTILINE)
    code = "".join(path.read_text() for path in (ROOT / "uae_jax").rglob("*.py"))
    assert len(quoted) >= 2 and [message for message in quoted if message not in code] == []


def test_the_reference_has_every_setting_command_and_metric():
    from uae_jax.settings import describe
    from uae_jax.stages.run_config import RunConfig

    made = {path: make() for path, make in site().PAGES.items()}
    settings = [line.partition(":")[0] for line in describe(RunConfig, RunConfig())[::2]]
    assert len(settings) > 150 and all(f"| `{name}` |" in made["reference/settings.md"] for name in settings)
    commands = made["reference/commands.md"]
    for name in ("main", "infer", "convert import", "convert check", "evaluate unified_bench", "plan", "precompute"):
        assert re.search(rf"^##+ {name}$", commands, re.MULTILINE)
    assert "--fits" in commands and "Model.reconstruct" in made["reference/api.md"]
    assert all(f"`{name}`" in made["reference/metrics.md"] for name in METRICS)


def test_metrics_of_an_open_list_are_known_by_their_beginning():
    assert known("loss") and known("eval/reward") and known("reward_clip") and not known("mystery")
    assert all(unit or meaning for unit, meaning in [*METRICS.values(), *FAMILIES.values()])
