"""Whole stages traced and lowered for NVIDIA GPUs on a host that has neither a card nor its libraries."""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from configs import presets
from uae_jax import sharding
from uae_jax.planning.system import abstract_system
from uae_jax.settings import frozen
from uae_jax.stages.program import Program, make_program
from uae_jax.stages.run_config import RunConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
HOPPER = "NVIDIA H200"
_kept_for = [
    "cpu"
]  # traces and shardings that JAX keeps name the devices of their mesh; the end of a module drops them


@contextlib.contextmanager
def cards(kind: str = HOPPER) -> Iterator[None]:
    """The faked CPU devices of every mesh are said to be cards of a kind, and cuDNN to be installed.

    Only what a program is traced for changes: nothing can be run inside.
    """

    def abstract(mesh: Mesh) -> AbstractMesh:
        device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, mesh.axis_types, abstract_device=device)

    with (
        mock.patch.object(Mesh, "abstract_mesh", property(abstract)),
        mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200),
    ):
        if kind != _kept_for[-1]:
            jax.clear_caches()
            _kept_for.append(kind)
        yield


def program_of(
    preset: str, stage: str, sizes: tuple[int, int, int], folder: pathlib.Path | None = None, **model: Any
) -> tuple[Program, Mesh]:
    """A stage of a preset on a mesh of faked devices.

    Args:
      preset: of `configs.presets`; stage: its name.
      sizes: of the axes data, fsdp, tensor.
      folder: of the model, where the preset has none.
      model: changed settings of `config.model`.
    """
    values = presets.preset(preset, STAGES).to_dict()
    values["mesh"] = dict(zip(sharding.AXES, sizes))
    values["model"] |= model | ({"folder": str(folder)} if folder else {})
    config = frozen(RunConfig, values)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: math.prod(sizes)])
    system = abstract_system(config)
    return make_program(config, system, system.parts, system.batch, stage, mesh), mesh


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What a stage became: the traced program, and its text for CUDA."""

    program: Program
    jaxpr: Any
    text: str

    def attention(self) -> dict[tuple[int, int, int], set[str]]:
        """(T, S, K) of every call of cuDNN's attention, and whether it is called `forward`, `backward` or both."""
        found: dict[tuple[int, int, int], set[str]] = {}
        call = re.compile(r"@__cudnn\$fmha(\w+)\(.*?: \(tensor<([\dx]+)xbf16>, tensor<([\dx]+)xbf16>")
        for kind, query, key in call.findall(self.text):
            (_, length, _, width), (_, size, _, _) = (map(int, side.split("x")) for side in (query, key))
            found.setdefault((length, size, width), set()).add("backward" if kind.endswith("Backward") else "forward")
        return found

    def donated(self) -> int:
        """Arguments whose memory the results take."""
        return len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", self.text))

    def float32_products(self) -> set[str]:
        """Where products of two float32 operands stand, as paths of modules."""
        return set(_float32_products(self.jaxpr.jaxpr, ""))


def _float32_products(jaxpr: Any, above: str) -> Iterator[str]:
    for equation in jaxpr.eqns:
        path = f"{above}/{equation.source_info.name_stack}"
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            if all(operand.aval.dtype == "float32" for operand in equation.invars):
                yield path
        for value in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _float32_products(getattr(value, "jaxpr", value), path)


def lower(preset: str, stage: str, sizes: tuple[int, int, int], kind: str = HOPPER, **more: Any) -> Lowered:
    """A stage lowered for cards of a kind; see `program_of`."""
    with cards(kind):
        program, mesh = program_of(preset, stage, sizes, **more)
        with sharding.in_use(mesh):
            traced = program.step.trace(*program.arguments)
            return Lowered(program, traced.jaxpr, traced.lower(lowering_platforms=("cuda",)).as_text())
