"""Shape identities of the founding paper and of an independent profile of fairseq's 15B model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moeprof.errors import UsageError
from moeprof.replay import capacity
from moeprof.replay.capacity import (
    PAPER_LM,
    PAPER_LM_SMALL,
    PAPER_MT,
    MoeShape,
    device_bytes,
    elementwise_blocks,
    expert_devices,
    may_drop,
    slots_per_expert,
    static_dispatches,
    tile_rows,
)
from moeprof.trace import schema

GIB = 2**30
MIB = 2**20


def lm_dispatch(num_tokens, shape=PAPER_LM):
    return static_dispatches(shape.moe, num_tokens=num_tokens, value=0.05)


def test_waste_factors_of_the_paper():
    assert lm_dispatch([2048]).waste_factor_without_ceiling == pytest.approx(12.8)
    assert lm_dispatch([2048]).slots.tolist() == [[103]]
    assert lm_dispatch([2048]).waste_factor == 12.875
    mt = static_dispatches(PAPER_MT.moe, num_tokens=[1234], value=1.0)
    assert mt.waste_factor == mt.waste_factor_without_ceiling == 64
    toy = static_dispatches(MoeShape(num_experts=3, top_k=1), num_tokens=[6], value=0.5)
    assert toy.slots.tolist() == [[3]]


def test_capacity_factor_is_its_own_waste_without_the_ceiling():
    shape = MoeShape(num_experts=64, top_k=2)
    found = static_dispatches(shape, num_tokens=[100], rule="capacity_factor", value=1.25)
    assert found.slots.tolist() == [[math.ceil(1.25 * 2 * 100 / 64)]]
    assert found.waste_factor_without_ceiling == pytest.approx(1.25)
    assert found.waste_factor == 64 * 4 / 200


def test_slots_are_rounded_as_models_round_them():
    for fraction in (0.05, 0.07, 0.25, 1.0):
        for tokens in range(1, 300):
            found = slots_per_expert(
                "token_fraction", fraction, num_tokens=tokens, num_experts=8, top_k=2
            )
            assert int(found) == math.ceil(fraction * tokens)


def test_published_profile_of_the_small_language_model():
    dispatch = lm_dispatch([2048] * 4, PAPER_LM_SMALL)
    assert elementwise_blocks(int(dispatch.mask_elements[0, 0])) == 421_888
    assert dispatch.rows_per_expert.tolist() == [412]
    assert elementwise_blocks(412 * 3072) == 4944
    assert round(dispatch.combine_bytes[0, 0] / MIB) == 412
    assert dispatch.dispatched_bytes[0, 0] == 77.25 * MIB
    assert dispatch.needed_bytes[0, 0] == 6 * MIB
    assert dispatch.local_experts == 128
    forwards, ranks = 5, 4
    assert forwards * ranks * PAPER_LM_SMALL.num_moe_layers * dispatch.local_experts == 15_360
    num_calls, num_bytes = PAPER_LM_SMALL.batched_products(dispatch, sequence_length=2048)
    assert forwards * num_calls == 180
    assert forwards * num_bytes / GIB == pytest.approx(29.94, abs=0.005)


def test_parameters_and_static_bytes_of_the_paper():
    assert PAPER_LM.num_params / 1e9 == pytest.approx(51.83, abs=0.005)
    assert PAPER_MT.num_params / 1e9 == pytest.approx(54.500, abs=0.001)
    assert round(PAPER_LM_SMALL.num_params / 1e9) == 15
    assert PAPER_LM.device_bytes(devices=8) / GIB == pytest.approx(12.49, abs=0.005)
    assert PAPER_MT.device_bytes(devices=8) / GIB == pytest.approx(17.49, abs=0.005)
    assert PAPER_MT.static_bytes.total == 2 * PAPER_MT.num_params == PAPER_MT.device_bytes()


def test_expert_buffering_frees_what_the_paper_says():
    whole = PAPER_MT.device_bytes(devices=8)
    one = PAPER_MT.device_bytes(devices=8, cache_slots=1)
    ten = PAPER_MT.device_bytes(devices=8, cache_slots=10)
    assert (whole - one) / whole == pytest.approx(0.322, abs=0.0005)
    assert (whole - ten) / GIB == pytest.approx(2.25, abs=0.005)
    assert whole / one == pytest.approx(1.47, abs=0.005)
    assert whole / ten == pytest.approx(1.148, abs=0.0005)
    assert PAPER_MT.device_bytes(devices=8, cache_slots=16) == whole


def test_parameters_agree_with_the_torch_model():
    torch = pytest.importorskip("torch")
    from moeprof.live.paper_lm import PaperLm

    with torch.device("meta"):
        model = PaperLm(device="meta")
    assert sum(p.numel() for p in model.parameters()) == PAPER_LM.num_params


def test_crossing_rows_leave_out_those_of_local_experts():
    shape = MoeShape(num_experts=6, top_k=1)
    found = static_dispatches(shape, num_tokens=[10, 20, 0, 10], value=0.1)
    local = np.bincount(expert_devices(6, 4), minlength=4)
    assert local.sum() == 6 and local.max() - local.min() <= 1
    expected = sum(s * (6 - n) for s, n in zip([1, 2, 0, 1], local, strict=True))
    assert found.crossing_rows.tolist() == [expected]
    single = static_dispatches(shape, num_tokens=[40], value=0.1)
    assert single.crossing_rows.tolist() == [0]


def test_unknown_shapes_stay_unknown():
    found = static_dispatches(MoeShape(num_experts=4, top_k=1), num_tokens=[4], value=1.0)
    assert found.dispatched_bytes is None and found.needed_bytes is None
    assert found.shape.row_flops is None and found.shape.mask_element_flops is None


def test_tiles():
    assert tile_rows([0, 1, 128, 129]).tolist() == [0, 128, 128, 256]
    assert tile_rows(7, 4) == 8


def test_device_bytes_keep_what_is_not_an_expert_on_every_device():
    site = schema.Site(
        site=0, stack="decoder", layer=0, num_experts=10, top_k=1, first_slot=0, expert_bytes=7
    )
    static = schema.StaticBytes(embedding=100, experts=70)
    assert device_bytes(static, (site,)) == 170
    assert device_bytes(static, (site,), devices=4) == 100 + 3 * 7
    assert device_bytes(static, (site,), devices=4, cache_slots=2) == 100 + 2 * 7
    assert device_bytes(static, (site,), cache_slots=2, cached_stack="encoder") == 170


@pytest.mark.parametrize(
    ("rule", "value", "drops"),
    [
        ("token_fraction", 1.0, False),
        ("token_fraction", 0.99, True),
        ("capacity_factor", 4.0, False),
        ("capacity_factor", 3.9, True),
        ("fixed", 64, True),
    ],
)
def test_rules_that_can_drop(rule, value, drops):
    site = PAPER_MT.sites[0]
    site = replace(site, num_experts=8, capacity_rule=schema.CapacityRule(rule=rule, value=value))
    assert may_drop(site) is drops
    assert may_drop(replace(site, capacity_rule=None)) is False


@pytest.mark.parametrize(
    ("rule", "value"),
    [("fraction", 1.0), ("token_fraction", 0), ("token_fraction", True), ("fixed", math.nan)],
)
def test_bad_rules_are_refused(rule, value):
    with pytest.raises(UsageError):
        capacity.check_rule(rule, value)
