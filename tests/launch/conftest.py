"""A host with cards, by stubs."""

import os

import pytest
from launchers import fake


@pytest.fixture
def host(tmp_path):
    """A host with two cards, by stubs of nvidia-smi and df; returns the environment that shows it to the scripts."""

    def make(*cards: str, free: int = 4096) -> dict[str, str]:
        (tmp_path / "cards").write_text("\n".join(cards))
        # as a driver before 510, it refuses a field that it does not know
        fake(
            tmp_path / "bin",
            "nvidia-smi",
            f"""
case "$*" in *compute_cap*)
    if grep -q '^[0-4]' {tmp_path}/cards; then echo 'Field "compute_cap" is not a valid field'; exit 2; fi ;; esac
cat {tmp_path}/cards""",
        )
        fake(
            tmp_path / "bin",
            "df",
            f"echo Filesystem 1024-blocks Used Available Capacity Mounted; echo shm 1 1 {free * 1024} 1% $2",
        )
        (tmp_path / "routes").write_text("Iface\tDestination\tGateway\neth0\t0000FEA9\t0\neth0\t00000000\t010011AC\n")
        (tmp_path / "infiniband").mkdir(exist_ok=True)
        return {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "",
            "UAE_SHM": "/dev/shm",
            "XLA_FLAGS": "",
            "UAE_ROUTES": str(tmp_path / "routes"),
            "UAE_INFINIBAND": str(tmp_path / "infiniband"),
            "UAE_DRIVER_MOUNT": str(tmp_path / "mount"),
        }

    return make
