"""Names of topologies."""

import pytest

from uae_jax.planning.cards import TARGETS, target_text
from uae_jax.planning.chips import CHIPS, GIB, parse_topology


@pytest.mark.parametrize(
    "name, kind, chip, devices",
    [
        ("v6e:8x8", "tpu", "v6e", 64),
        ("v5e:4x8", "tpu", "v5e", 32),
        ("v5p:4x4x4", "tpu", "v5p", 64),
        ("v4:2x2x4", "tpu", "v4", 16),
        ("7x:2x2x4", "tpu", "7x", 32),
        ("2xv5e:8x8", "tpu", "v5e", 128),
        ("4x7x:2x2x4", "tpu", "7x", 128),
        ("gpu:8xH200", "gpu", "H200", 8),
        ("gpu:1xH100", "gpu", "H100", 1),
        ("gpu:2x8xA100-80", "gpu", "A100-80", 16),
        ("gpu:1xRTX4090", "gpu", "RTX4090", 1),
        ("cpu:8", "cpu", "cpu", 8),
    ],
)
def test_a_topology_is_a_kind_of_chip_and_a_number_of_devices(name, kind, chip, devices):
    found = parse_topology(name)
    assert (found.kind, found.chip.name, found.devices) == (kind, chip, devices)


@pytest.mark.parametrize(
    "name",
    [
        "v6e",
        "v9:8x8",
        "v6e:64",
        "v6e:0x8",
        "v5p:4x0x4",
        "gpu:8xV100",
        "gpu:0xH100",
        "gpu:H200",
        "cpu:0",
        "cpu:x",
        "H200:2x2",
        "0xv5e:8x8",
        "2xcpu:8",
        "xv5e:8x8",
        "",
    ],
)
def test_other_names_are_refused_with_what_may_be_given(name):
    with pytest.raises(ValueError, match="v6e:8x8|known are H100, H200"):
        parse_topology(name)


def test_a_slice_of_64_chips_holds_what_its_vendor_says():
    assert [64 * CHIPS[name].memory / GIB for name in ("v5e", "v6e", "v5p")] == [1024, 2048, 6080]


def test_cards_of_several_hosts_and_several_slices_are_groups():
    one, hosts, slices = (parse_topology(name) for name in ("gpu:8xH100", "gpu:2x8xH100", "2xv5e:4x8"))
    assert (one.groups, hosts.groups, slices.groups) == (1, 2, 2) and slices.slice_name == "4x8"
    assert hosts.chip == one.chip and hosts.links == one.links == one.chip.link_bandwidth
    # every chip of a pod of 256 has its part of the pod's 6.4 and 25.6 Tbit/s
    assert [CHIPS[name].network_bandwidth * 256 * 8 / 1e12 for name in ("v5e", "v6e")] == [6.4, 25.6]


@pytest.mark.parametrize(
    "name, links",
    [
        # links of the corner of a grid, and of a chip of a torus, of those that a chip has
        ("v5e:8x8", 2 / 4),
        ("v6e:4x8", 2 / 4),
        ("v6e:8x16", 3 / 4),
        ("v5e:16x16", 4 / 4),
        ("2xv5e:16x16", 4 / 4),
        ("v5e:1x4", 1 / 4),
        ("v5p:4x4x4", 6 / 6),
        ("v5p:4x4x8", 6 / 6),
        ("v4:2x2x4", 3 / 6),
        ("v5p:2x2x1", 2 / 6),
        ("7x:2x2x2", 3 / 6),
        ("v5e:1x1", 4 / 4),
    ],
)
def test_the_chip_with_the_fewest_links_bounds_a_slice(name, links):
    topology = parse_topology(name)
    assert topology.links == pytest.approx(links * topology.chip.link_bandwidth)


def test_every_card_is_described_for_the_compiler():
    cards = [chip for chip in CHIPS.values() if chip.name in TARGETS]
    assert len(cards) == len(TARGETS) == 11
    for chip in cards:
        text = target_text(chip.name, chip.memory, chip.memory_bandwidth, chip.device_kind)
        assert (
            f"device_memory_size: {int(chip.memory)} " in text
            and f'device_description_str: "{chip.device_kind}"' in text
        )
        assert text.count("{") == text.count("}")
        generation = TARGETS[chip.name].generation
        assert generation.shared >= generation.shared_block and chip.memory < 200 * GIB
