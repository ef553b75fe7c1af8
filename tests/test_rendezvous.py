"""Ranks of one start find one another in a store where earlier starts have left their greetings."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from balcap_mega.errors import UserError
from balcap_mega.parallel.rendezvous import agree_on_name


def test_each_start_agrees_on_a_name_of_its_own():
    store, names = HashStore(), []
    store.set("greeting/2", "of a rank that died before it was answered")
    for _ in range(3):
        with ThreadPoolExecutor(3) as ranks:
            [name] = set(ranks.map(lambda rank: agree_on_name(store, rank, 3, seconds=20), (0, 1, 2)))
        names.append(name)
    assert len(set(names)) == 3


def test_ranks_that_do_not_come_are_named():
    store = HashStore()
    with ThreadPoolExecutor(2) as ranks:
        came = ranks.submit(agree_on_name, store, 2, 4, 20)
        with pytest.raises(UserError, match=r"ranks 1, 3 did not come to the rendezvous for 0\.5 s"):
            agree_on_name(store, 0, 4, seconds=0.5)
        assert came.result()
