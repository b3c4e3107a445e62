"""Stateless seeds: equal for equal uses, different for different ones, the same on every machine."""

from hypothesis import given
from hypothesis import strategies as st

from fedmoe.engine.seeds import derive, generator


def test_seed_is_a_fixed_function() -> None:
    assert derive(0, "sampling", 1) == 30200732842496090


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["order", "init", "init/1"]), st.integers(0, 99)), unique=True
    )
)
def test_different_uses_have_different_seeds(uses: list[tuple[int, str, int]]) -> None:
    seeds = [derive(seed, stream, index) for seed, stream, index in uses]
    assert len(set(seeds)) == len(uses)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_index_is_not_concatenated() -> None:
    assert derive(0, "order", 1, 23) != derive(0, "order", 12, 3)


def test_generator_is_seeded_by_the_use() -> None:
    assert generator(3, "order", 1, 2).initial_seed() == derive(3, "order", 1, 2)
