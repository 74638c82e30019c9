"""The timeline simulation, each rule by hand, then against an event-by-event oracle."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sti_runtime.profile import PPM, FixedTime, Sharing
from sti_runtime.timeline import LayerWork, Mode, Timeline, simulate

ALONE = Sharing()


def fixed(embed_io: int = 0, embed_compute: int = 0, head: int = 0) -> FixedTime:
    return FixedTime(embed_io_ns=embed_io, embed_compute_ns=embed_compute, head_ns=head, samples=1)


def work(reads: list[tuple[int, int]], compute: int) -> LayerWork:
    return LayerWork(reads, sum(length for length, _ in reads), compute)


def run(
    layers: list[LayerWork], costs: FixedTime, working: int, mode: Mode = "pipeline", sharing: Sharing = ALONE
) -> Timeline:
    timeline = simulate(layers, costs, working, mode, sharing=sharing)
    assert timeline is not None
    return timeline


def test_reads_overlap_compute_and_stalls_are_counted() -> None:
    layers = [work([(10, 4)], 10), work([(10, 3), (10, 3)], 10), work([(10, 20)], 10)]
    timeline = run(layers, fixed(embed_io=2, embed_compute=1, head=5), 1000)
    assert timeline.layers == ((2, 6, 6, 16), (6, 12, 16, 26), (12, 32, 32, 42))
    assert timeline.end_ns == 47
    assert timeline.stall_ns == 3 + 0 + 6


def test_preloaded_layers_use_no_io_and_start_after_the_embeddings() -> None:
    timeline = run([work([], 10), work([(10, 30)], 10)], fixed(embed_io=2, embed_compute=1), 10)
    assert timeline.layers == ((0, 0, 3, 13), (2, 32, 32, 42))
    assert timeline.stall_ns == 19


def test_a_read_waits_until_its_bytes_are_free() -> None:
    layers = [work([(10, 1)], 100), work([(10, 1)], 100), work([(10, 1)], 100)]
    assert [e.io_start_ns for e in run(layers, fixed(), 30).layers] == [0, 1, 2]
    assert [e.io_start_ns for e in run(layers, fixed(), 20).layers] == [0, 1, 101]
    assert [e.io_start_ns for e in run(layers, fixed(), 10).layers] == [0, 101, 202]
    assert run(layers, fixed(), 10).end_ns == 303


def test_waiting_is_per_read_not_per_layer() -> None:
    """The second layer's first read fits beside the first layer, its second does not."""
    layers = [work([(10, 1)], 100), work([(10, 1), (10, 1)], 100)]
    timeline = run(layers, fixed(), 20)
    assert timeline.layers[1] == (1, 102, 102, 202)


def test_a_layer_larger_than_the_working_buffer_never_ends() -> None:
    assert simulate([work([(10, 1), (10, 1)], 5)], fixed(), 19) is None
    assert simulate([work([(21, 1)], 5)], fixed(), 20) is None
    assert simulate([work([(10, 1), (10, 1)], 5)], fixed(), 20) is not None


def test_load_exec_computes_after_all_reads_and_needs_room_for_all() -> None:
    layers = [work([(10, 4)], 10), work([], 10), work([(10, 6)], 10)]
    timeline = run(layers, fixed(embed_io=1, embed_compute=2, head=3), 20, "load-exec")
    assert timeline.layers == ((1, 5, 11, 21), (0, 0, 21, 31), (5, 11, 31, 41))
    assert (timeline.end_ns, timeline.stall_ns) == (44, 8)
    assert simulate(layers, fixed(), 19, "load-exec") is None


def test_a_read_is_slower_while_a_layer_is_computed() -> None:
    """Layer 1 reads 6 ns alone: 4 ns at half speed beside layer 0, the other 4 while nothing is computed."""
    timeline = run([work([], 4), work([(10, 6)], 3)], fixed(), 10, sharing=Sharing(2 * PPM))
    assert timeline.layers == ((0, 0, 0, 4), (0, 8, 8, 11))
    assert timeline.stall_ns == 4


def test_a_read_of_a_layer_that_waits_for_it_is_not_slower() -> None:
    layers = [work([(10, 5)], 4), work([(10, 2)], 4), work([(10, 3), (10, 3)], 1)]
    timeline = run(layers, fixed(embed_io=1, embed_compute=2), 40, sharing=Sharing(3 * PPM))
    assert timeline.layers == ((1, 6, 6, 10), (6, 11, 11, 15), (11, 20, 20, 21))


def test_a_read_that_ends_within_a_ns_ends_with_it() -> None:
    timeline = run([work([], 100), work([(10, 3), (10, 3)], 1)], fixed(), 20, sharing=Sharing(1_100_000))
    assert timeline.layers[1] == (0, 8, 100, 101)


def test_what_a_layer_reads_prolongs_its_compute() -> None:
    layers = [work([(10, 1)], 4), work([], 4), work([(10, 1), (9, 1)], 4)]
    timeline = run(layers, fixed(), 40, sharing=Sharing(PPM, 1, 250))
    assert timeline.layers == ((0, 1, 1, 8), (0, 0, 8, 12), (1, 3, 12, 21))


def test_load_exec_reads_at_full_speed() -> None:
    layers = [work([(10, 4)], 10), work([(10, 6)], 10)]
    timeline = run(layers, fixed(), 20, "load-exec", Sharing(5 * PPM, 7, 10_000))
    assert timeline.layers == ((0, 4, 10, 20), (4, 10, 20, 30))


def oracle(
    layers: list[LayerWork], costs: FixedTime, working: int, sharing: Sharing
) -> tuple[int, list[int]] | None:
    """The same rules as time steps of 1 ns: an IO thread and a compute thread, state machines both."""
    queue = [(i, length, ns) for i, layer in enumerate(layers) for length, ns in layer.reads]
    pending = [len(layer.reads) for layer in layers]
    limit = (
        60 * len(layers)
        + 6 * sum(ns for _, _, ns in queue)
        + sum(layer.compute_ns for layer in layers)
        + costs.total_ns
        + 2
    )
    used = computed = 0
    reading: tuple[int, int] | None = None
    computing: int | None = None
    ends: list[int] = []
    for now in range(costs.embed_io_ns, limit):
        for _ in range(2 * len(queue) + 2 * len(layers) + 2):  # events of no length settle within this
            if computing is not None and now >= computing:
                used -= layers[computed].streamed_bytes
                computed, computing = computed + 1, None
                ends.append(now)
            if reading is not None and reading[1] <= 0:
                pending[reading[0]] -= 1
                reading = None
            if reading is None and queue and used + queue[0][1] <= working:
                layer, length, ns = queue.pop(0)
                used += length
                reading = (layer, ns * sharing.beside_ppm)
            free = computing is None and now >= costs.embed_io_ns + costs.embed_compute_ns
            if free and computed < len(layers) and pending[computed] == 0:
                added = sharing.layer_ns(layers[computed].streamed_bytes)
                computing = now + layers[computed].compute_ns + added
        if computed == len(layers):
            return ends[-1] + costs.head_ns, ends
        if reading is not None:
            reading = (reading[0], reading[1] - (sharing.beside_ppm if computing is None else PPM))
    return None


lengths_and_times = st.tuples(st.integers(1, 8), st.integers(0, 12))
works = st.lists(
    st.builds(work, st.lists(lengths_and_times, max_size=3), st.integers(0, 15)), min_size=1, max_size=4
)
slower = st.one_of(st.just(PPM), st.integers(PPM, 5 * PPM))
sharings = st.builds(Sharing, slower, st.integers(0, 9), st.one_of(st.just(0), st.integers(0, 3_000)))
fixed_times = st.builds(fixed, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))


@settings(max_examples=200, deadline=None)
@given(works, fixed_times, st.integers(1, 30), sharings)
def test_agrees_with_the_event_oracle(
    layers: list[LayerWork], costs: FixedTime, working: int, sharing: Sharing
) -> None:
    timeline = simulate(layers, costs, working, sharing=sharing)
    expected = oracle(layers, costs, working, sharing)
    if expected is None:
        assert timeline is None
    else:
        assert timeline is not None
        assert (timeline.end_ns, [e.compute_end_ns for e in timeline.layers]) == expected


@settings(max_examples=200, deadline=None)
@given(works, fixed_times, st.integers(1, 30), st.integers(0, 30), sharings)
def test_more_working_buffer_never_makes_any_event_later(
    layers: list[LayerWork], costs: FixedTime, working: int, more: int, sharing: Sharing
) -> None:
    small = simulate(layers, costs, working, sharing=sharing)
    large = simulate(layers, costs, working + more, sharing=sharing)
    if small is None:
        return
    assert large is not None
    for before, after in zip(small.layers, large.layers, strict=True):
        assert all(b <= a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["pipeline", "load-exec"])
def test_without_reads_it_is_compute_alone(mode: Mode) -> None:
    timeline = run([work([], 7), work([], 8)], fixed(1, 2, 4), 1, mode)
    assert (timeline.end_ns, timeline.stall_ns) == (1 + 2 + 7 + 8 + 4, 0)
