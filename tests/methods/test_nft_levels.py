"""DiffusionNFT's noise levels: shared in a group, stratified over an image, and the loss of weighted matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import largest_gap, nudged, stage_of, varied

from uae_jax.methods.method import gradients_of, make_rollout

GROUP, LEVELS = 2, 4


@pytest.fixture(scope="module")
def stage(whole):
    own = dict(levels=LEVELS, stratified=True, shared_levels=True, time_scheme="uniform", time_shift=1.0, kl_weight=0.1)
    stage = stage_of(whole, "und_for_gen", method="nft", batch_size=4, group_size=GROUP, nft=own)
    stage.adapter = {"transformer_lora": nudged(stage.trained["transformer_lora"], size=0.05)}
    stage.rollout = jax.jit(lambda params: make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key))(
        stage.adapter
    )
    return stage


def test_levels_are_shared_in_a_group_and_one_of_each_stratum(stage):
    samples = jax.device_get(stage.rollout["samples"])
    sigma, noise = samples["sigma"].reshape(4, GROUP, LEVELS), samples["noise"].reshape(4, GROUP, LEVELS, -1)
    np.testing.assert_array_equal(sigma[:, 0], sigma[:, 1])
    np.testing.assert_array_equal(noise[:, 0], noise[:, 1])
    assert len(np.unique(sigma[:, 0])) == 4 * LEVELS and len(np.unique(noise[:, 0, :, 0])) == 4 * LEVELS
    strata = np.floor(sigma[:, 0] * LEVELS).astype(int)
    np.testing.assert_array_equal(np.sort(strata), np.tile(np.arange(LEVELS), (4, 1)))


def test_weighted_matching_learns_in_the_direction_of_the_contrast(stage):
    """Both are advantage-weighted errors of the same drawings: other weights, gradients that agree."""
    pieces = {name: stage.rollout[name] for name in ("samples", "shared")}

    def gradient(**own):
        method = varied(stage.method, nft=own)
        found = jax.jit(lambda p: gradients_of(method.loss, p, stage.frozen, pieces, stage.key, 1))(stage.adapter)
        return found[0]

    contrast, matching = gradient(kl_weight=0.0), gradient(kl_weight=0.0, objective="awm")
    flat = [jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(one)]) for one in (contrast, matching)]
    cosine = float(flat[0] @ flat[1] / jnp.linalg.norm(flat[0]) / jnp.linalg.norm(flat[1]))
    assert 0.8 < cosine < 1 - 1e-6 and largest_gap(contrast, matching) > 1e-3
