"""The extension checks what memory safety rests on, whatever it is handed."""

import importlib
import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.kernels import native
from tests.extension import INSTRUCTION_SETS

pytestmark = pytest.mark.skipif(native.module is None, reason=native.missing)

ONES = np.ones(3, np.float32)
PAGE = np.zeros(64, np.float32)
READ_ONLY = np.ones(3, np.float32)
READ_ONLY.flags.writeable = False
MISALIGNED = np.zeros(13, np.uint8)[1:].view(np.float32)


def extension() -> Any:
    return importlib.import_module("fedmoe.kernels._native")


@pytest.mark.parametrize(
    ("out", "updates", "weights", "message"),
    [
        (ONES, [], [], "got 0"),
        (ONES, [ONES], [1.0, 2.0], "1 updates, but 2 weights"),
        (ONES, [np.ones(3)], [1.0], "updates[0] is float64, expected float32, float16 or bfloat16"),
        (ONES, [ONES, np.ones(3, np.float16)], [1.0, 1.0], "updates[1] is float16, updates[0] is float32"),
        (ONES, [np.ones(6, np.float32)[::2]], [1.0], "updates[0] has stride 2, expected 1"),
        (ONES, [np.ones(3, np.float32)[::-1]], [1.0], "updates[0] has stride -1, expected 1"),
        (ONES, [MISALIGNED], [1.0], "updates[0] begins at an address that is not a multiple of its 4 bytes"),
        (MISALIGNED, [ONES], [1.0], "out begins at an address that is not a multiple of its 4 bytes"),
        (ONES, [np.ones((3, 3), np.float32)], [1.0], "updates[0] has 2 dimensions, expected 1"),
        (ONES, [np.float32(1.0).reshape(())], [1.0], "updates[0] has 0 dimensions, expected 1"),
        (np.ones(2, np.float32), [ONES], [1.0], "out has 2 elements, expected 3"),
        (np.ones(3, np.int32), [ONES], [1.0], "out is int32, expected float32"),
        (PAGE[1:4], [PAGE[0:3]], [1.0], "out overlaps updates[0] partly"),
        (PAGE[0:3].view(np.float16)[:3], [PAGE[0:3]], [1.0], "out overlaps updates[0] partly"),
    ],
)
def test_buffers_that_do_not_fit_are_named(out: Any, updates: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        extension().weighted_mean(out, updates, weights)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("weighted_mean", (PAGE[:3], [ONES], [1.0], 0), "threads is 0"),
        ("accumulate", (ONES.copy(), [ONES], [1.0]), "sums is float32, expected float64"),
        ("accumulate", (np.ones(2), [ONES], [1.0]), "sums has 2 elements, expected 3"),
        ("accumulate", (PAGE[:6].view(np.float64), [PAGE[:3]], [1.0]), "sums overlaps updates[0]"),
        ("trimmed_mean", (PAGE[:3], [ONES] * 4, 2), "trim is 2, must leave some of 4 updates"),
        ("squared_norms", ([ONES], np.ones(2, np.float32)), "center has 2 elements, expected 3"),
        ("squared_norms", ([ONES], np.ones(3, np.float16)), "center is float16, updates[0] is float32"),
        ("squared_distances", (np.ones(3), [ONES, ONES]), "out has 3 elements, expected 4"),
        ("use_instruction_set", ("MMX",), "this processor has no instruction set 'MMX', only: "),
    ],
)
def test_every_function_checks(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(extension(), name)(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (None, [ONES], [1.0]),
        (ONES, [None], [1.0]),
        (ONES, None, [1.0]),
        (ONES, [ONES], None),
        (READ_ONLY, [ONES], [1.0]),
    ],
)
def test_what_is_no_buffer_is_a_type_error(arguments: Any) -> None:
    with pytest.raises(TypeError):
        extension().weighted_mean(*arguments)


def test_a_size_beyond_all_memory_is_refused() -> None:
    huge = torch.empty(1).expand(2**60)  # stride 0
    with pytest.raises(ValueError, match="stride 0, expected 1"):
        extension().weighted_mean(torch.empty(3), [huge], [1.0])


def buffers() -> st.SearchStrategy[Any]:
    """Of all kinds: views of one memory at drawn places, dtypes, strides and dimensions; and what is no buffer."""
    dtypes = st.sampled_from([np.float32, np.float16, np.float64, np.int32, np.bool_, np.complex64, np.uint16])

    def view(dtype: Any, start: int, stop: int, step: int, shape: int) -> Any:
        flat = MEMORY.view(np.uint8)[: MEMORY.nbytes].view(dtype)[start:stop:step]
        return flat.reshape(1, -1) if shape == 1 else flat[:1].reshape(()) if shape == 2 and flat.size else flat

    ends, steps = st.integers(0, 40), st.sampled_from([1, 1, 1, 2, -1])
    places = st.builds(view, dtypes, ends, ends, steps, st.sampled_from([0, 0, 0, 0, 1, 2]))
    likely = st.builds(lambda start: MEMORY.view(np.float32)[start : start + 8], st.integers(0, 40))
    return st.one_of(
        likely, likely, likely, places, st.sampled_from([None, 3, "x", torch.ones(8).bfloat16(), b"12345678"])
    )


MEMORY = np.zeros(64, np.float64)


@pytest.mark.parametrize(
    "name", ["weighted_mean", "accumulate", "median", "trimmed_mean", "squared_norms", "squared_distances"]
)
@settings(deadline=None, max_examples=int(os.environ.get("FEDMOE_FUZZ", "60")), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(name: str, data: Any) -> None:
    """Whatever comes is taken or refused, and nothing is written beside the output."""
    updates = data.draw(st.one_of(st.lists(buffers(), max_size=5), st.none()))
    out = data.draw(buffers())
    numbers = st.one_of(st.floats(), st.integers(-1, 2**70), st.none())
    rest: dict[str, tuple[Any, ...]] = {
        "weighted_mean": (data.draw(st.lists(numbers, max_size=5)),),
        "accumulate": (data.draw(st.lists(numbers, max_size=5)),),
        "trimmed_mean": (data.draw(st.integers(-1, 2**65)),),
    }
    threads = data.draw(st.sampled_from([1, 2, 3, 0, -1, 2**40, None, 1.5]))
    arguments = (updates, out, threads) if name == "squared_norms" else (out, updates, *rest.get(name, ()), threads)
    MEMORY[:] = 1.0
    own = np.zeros(MEMORY.nbytes, bool)
    if name != "squared_norms" and isinstance(out, np.ndarray) and out.size:
        first = out.__array_interface__["data"][0] - MEMORY.__array_interface__["data"][0]
        reach = (out.size - 1) * out.strides[-1] if out.ndim else 0
        own[first + min(0, reach) : first + max(0, reach) + out.itemsize] = True
    before = MEMORY.view(np.uint8).copy()
    try:
        getattr(extension(), name)(*arguments)
    except (ValueError, TypeError, OverflowError):
        assert np.array_equal(MEMORY.view(np.uint8), before)
    assert np.array_equal(MEMORY.view(np.uint8)[~own], before[~own])


def test_best_instruction_set_is_taken() -> None:
    assert extension().instruction_set() == INSTRUCTION_SETS[0] and INSTRUCTION_SETS[-1] == "portable"
