"""What is refused before experts run: shapes, dtypes, devices, and gradients that would be lost."""

from __future__ import annotations

import pytest
import torch

from moeprof.errors import UsageError
from moeprof.live.dispatch_checks import check_dispatch, refuse_gradients

ROWS = torch.zeros(6, 8)
IDS = torch.zeros(6, 2, dtype=torch.int64)
WEIGHTS = torch.zeros(6, 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_a_dispatch_passes(dtype, num_tokens):
    check_dispatch(ROWS[:num_tokens], IDS[:num_tokens].to(dtype), WEIGHTS[:num_tokens], d_model=8)
    check_dispatch(
        ROWS.bfloat16(),
        IDS.to(dtype),
        WEIGHTS,
        d_model=8,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("hidden", "ids", "weights"),
    [
        (ROWS, IDS, torch.zeros(12, 1)),  # As many weights, of other tokens.
        (torch.zeros(9, 8), IDS, WEIGHTS),
        (torch.zeros(5, 8), IDS, WEIGHTS),
        (torch.zeros(6, 7), IDS, WEIGHTS),
        (torch.zeros(8), IDS, WEIGHTS),
        (torch.zeros(1, 6, 8), IDS, WEIGHTS),
        (ROWS, IDS[:, 0], WEIGHTS[:, 0]),
        (ROWS, IDS[None], WEIGHTS[None]),
        (ROWS, IDS, WEIGHTS[:, :1]),  # Would be broadcast.
        (ROWS, IDS, torch.tensor(1.0)),
        (ROWS, torch.tensor(0), torch.tensor(1.0)),
    ],
)
def test_shapes_that_are_no_dispatch_are_refused(hidden, ids, weights):
    with pytest.raises(UsageError, match="are no dispatch over experts of width 8") as raised:
        check_dispatch(hidden, ids, weights, d_model=8)
    assert str(tuple(hidden.shape)) in str(raised.value)
    assert raised.value.hint


def test_rows_that_are_only_moved_need_no_weights():
    check_dispatch(ROWS, IDS, None, d_model=8)
    with pytest.raises(UsageError, match=r"rows \(9, 8\) and ids \(6, 2\) are no dispatch"):
        check_dispatch(torch.zeros(9, 8), IDS, None, d_model=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_ids_are_integers(dtype):
    with pytest.raises(UsageError, match=f"ids of experts are {dtype}"):
        check_dispatch(ROWS, IDS.to(dtype), WEIGHTS, d_model=8)


def test_rows_and_weights_are_floating_point():
    with pytest.raises(UsageError, match=r"rows are torch\.int64, expected floating point"):
        check_dispatch(ROWS.long(), IDS, WEIGHTS, d_model=8)
    with pytest.raises(UsageError, match=r"weights are torch\.bool"):
        check_dispatch(ROWS, IDS, WEIGHTS.bool(), d_model=8)


def test_rows_have_the_dtype_of_the_experts_where_it_is_asked():
    with pytest.raises(UsageError, match=r"rows are torch\.float32, the experts torch\.bfloat16"):
        check_dispatch(ROWS, IDS, WEIGHTS, d_model=8, dtype=torch.bfloat16)


def test_a_dispatch_elsewhere_is_refused():
    elsewhere = WEIGHTS.to("meta")
    with pytest.raises(UsageError, match="lies on meta, its rows on cpu"):
        check_dispatch(ROWS, IDS, elsewhere, d_model=8)
    with pytest.raises(UsageError, match="lies on cpu, its experts on meta"):
        check_dispatch(ROWS, IDS, WEIGHTS, d_model=8, device=torch.device("meta"))


def test_gradients_that_would_be_lost_are_refused():
    wanted = torch.zeros(2, requires_grad=True)
    with pytest.raises(UsageError, match="an expert buffer is for inference only") as raised:
        refuse_gradients(ROWS, wanted, what="an expert buffer")
    assert "torch.no_grad()" in raised.value.hint
    with pytest.raises(UsageError, match="inference only"):
        refuse_gradients(wanted * 2, what="an expert buffer")  # No leaf, but on the way to one.


def test_without_gradients_nothing_is_refused():
    wanted = torch.zeros(2, requires_grad=True)
    refuse_gradients(ROWS, IDS, what="an expert buffer")
    refuse_gradients(what="an expert buffer")
    refuse_gradients(wanted.detach(), what="an expert buffer")
    with torch.no_grad():
        refuse_gradients(wanted, what="an expert buffer")
    with torch.inference_mode():
        refuse_gradients(wanted, what="an expert buffer")
