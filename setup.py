"""What pyproject.toml cannot say: configurations inside of the package, and a README whose pictures work elsewhere."""

import pathlib
import re

from setuptools import find_packages, setup

REPOSITORY = "https://github.com/uae-jax/uae_jax"


def long_description() -> str:
    """The README with absolute links: to raw images, and to pages of the repository."""
    text = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)([^)]+\.(?:png|gif|svg|jpg))\)", rf"]({REPOSITORY}/raw/main/\1)", text)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", text)


setup(
    packages=[*find_packages(include=["uae_jax", "uae_jax.*"]), "uae_jax.configs"],
    package_dir={"uae_jax.configs": "configs"},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
