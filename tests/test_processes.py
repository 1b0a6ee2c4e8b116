"""Several processes make the updates of one: the arithmetic, without starting any."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from helpers import settings
from helpers.trainer import UpdateShare


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 6), accumulation=st.integers(1, 4), world=st.integers(1, 5))
def test_all_shares_together_are_the_updates_of_one_process(rows, batch_size, accumulation, world):
    torch.manual_seed(3)
    size = batch_size * accumulation * world
    shares = [UpdateShare(SeedableRandomSampler(range(rows)), batch_size, accumulation, process, world)
              for process in range(world)]
    for epoch in (0, 1):
        one = SeedableRandomSampler(range(rows))
        one.set_epoch(epoch)
        order = list(one)
        batches = []
        for share in shares:
            share.set_epoch(epoch)
            batches.append(list(share))
            assert len(batches[-1]) == len(share) and all(1 <= len(batch) <= batch_size for batch in batches[-1])
        assert len({len(each) for each in batches}) == 1, "DDP waits for ever where one process has fewer batches"
        for number in range(-(-rows // size)):
            mine = slice(number * accumulation, (number + 1) * accumulation)
            together = [row for each in batches for batch in each[mine] for row in batch if row < rows]
            assert sorted(together) == sorted(order[number * size : (number + 1) * size])


@pytest.mark.parametrize(("world", "share"), [(1, (8, 2)), (2, (8, 1)), (4, (4, 1)), (8, (2, 1)), (16, (1, 1)),
                                              (3, None), (32, None)])
def test_accumulation_is_divided_first_then_the_batch(world, share):
    assert settings.divide(8, 2, world) == share


def test_processes_that_cannot_share_an_update_are_refused_with_the_nearest_that_can(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(settings.ParameterError, match=r"3 processes cannot share the 16 pictures .* start 4 instead "
                                                      r"\(of 1, 2, 4, 8, 16\), or set accumulation=3"):
        settings._share({"batch_size": 8, "accumulation": 2})
    assert settings._share({"batch_size": 8, "accumulation": 3}) == (8, 1)
    assert "3 processes share each update (batch_size=8 x accumulation=3): 8 x 1 each." in capsys.readouterr().out


def test_a_launcher_that_shards_weights_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(settings.ParameterError, match="FSDP shards weights .* without a launcher .* --multi_gpu"):
        settings._refuse_sharding()
