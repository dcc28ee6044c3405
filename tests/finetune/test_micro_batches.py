"""Steps: every protein once an epoch, each once over the processes, none above the budget but alone."""

from hypothesis import given
from hypothesis import strategies as st

from megaprot.finetune.micro_batches import Order, share, training_tokens

LENGTHS = st.lists(st.integers(3, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 120), st.booleans())
def test_processes_share_a_step(lengths: list[int], world_size: int, max_tokens: int, is_padding_free: bool) -> None:
    members = list(range(100, 100 + len(lengths)))
    table = [0] * 100 + lengths
    shares = [share(members, table, max_tokens, is_padding_free, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    real = [batch for batches in shares for batch in batches if not batch.is_blank]
    assert sorted(member for batch in real for member in batch.members) == members
    for batch in real:
        own = [table[member] for member in batch.members]
        tokens = sum(own) if is_padding_free else max(own) * len(own)
        assert tokens <= max_tokens or len(own) == 1
    if is_padding_free and len(lengths) >= world_size and len(set(lengths)) == 1 and lengths[0] * 2 <= max_tokens:
        assert not any(batches[0].is_blank for batches in shares[:1])


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 5))
def test_each_epoch_is_a_permutation(num_examples: int, batch_size: int, seed: int) -> None:
    order = Order(num_examples, batch_size, seed)
    epochs = []
    for epoch in range(2):
        steps = [order.members(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        assert {len(one) for one in steps[:-1]} <= {batch_size}
        epochs.append([member for one in steps for member in one])
        assert sorted(epochs[-1]) == list(range(num_examples))
    assert order.members(0) == Order(num_examples, batch_size, seed).members(0)
    assert num_examples < 6 or epochs[0] != epochs[1]


def test_the_budget_is_the_devices_unless_told() -> None:
    assert training_tokens(77, "cpu") == 77
    assert training_tokens(0, "cuda") > training_tokens(0, "cpu") > 0
