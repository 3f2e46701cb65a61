"""The tables of a compiled program: who runs it, and how much a token takes."""

import pytest
from test_hlo import CALLS

from benchmarks import gpu_program
from uae_jax.planning.chips import parse_topology
from uae_jax.planning.hlo import Module

CHIP = parse_topology("gpu:8xH100").chip


def test_costs_are_by_library_and_take_the_slower_of_operations_and_bytes():
    found = gpu_program.costs(Module(CALLS), CHIP, gpu_program.runner)
    assert set(found) == {"cuBLAS", "cuDNN attention", "XLA's own kernels", "NCCL"}
    product = found["cuBLAS"]
    assert product.launches == 36 and product.flops == 36 * 2 * 8 * 64 * 32
    assert product.seconds == pytest.approx(product.traffic / CHIP.memory_bandwidth)  # far below the peak
    assert found["NCCL"].seconds == pytest.approx(8 * 128 * 4 * 2 / CHIP.link_bandwidth)
    assert gpu_program.collectives(Module(CALLS)) == {("all-gather", "outside of loops"): (1, 8 * 128 * 4 * 2)}


def test_the_loop_over_tokens_is_the_one_that_runs_once_a_token():
    text = gpu_program.report("gen_for_und", Module(CALLS.replace('"n":"36"', '"n":"512"'), 512), CHIP, 512)
    assert (
        "| captions' loop over tokens | 1,536 |" in text
        and "A token: 3 launches" in text
        and "### gen_for_und on H100" in text
    )


def test_the_command_reads_files_and_names_what_it_cannot(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.hlo").write_text(CALLS)
    monkeypatch.setattr("sys.argv", ["gpu_program", str(tmp_path / "a.hlo"), "--topology=gpu:1xH100"])
    gpu_program.main()
    assert "| cuBLAS | 36 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gpu_program", str(tmp_path / "b.hlo"), "--topology=gpu:1xH100"])
    with pytest.raises(SystemExit, match="error: .*b.hlo"):
        gpu_program.main()
