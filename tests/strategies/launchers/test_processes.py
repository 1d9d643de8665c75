"""Processes of a launch, stood in for by scripted ones: no look may miss how one ended."""

import pytest

from lightning.fabric.strategies.launchers.processes import RankProcesses


class Scripted:
    """Runs for some looks, then has ended with a code."""

    pid = 0

    def __init__(self, looks, code):
        self.codes = [None] * looks + [code]

    def poll(self):
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]


@pytest.mark.parametrize("looks", range(6))
@pytest.mark.parametrize("code", [0, 1, -9])
def test_whichever_look_sees_the_end_it_is_judged_by_its_code(tmp_path, looks, code):
    ranks = RankProcesses(tmp_path)
    ranks.add(0, Scripted(looks, code))
    ranks.add(1, Scripted(0, 0))
    assert ranks.wait(timeout=20) is (code == 0)


def test_a_launch_that_takes_too_long_has_not_ended_well(tmp_path):
    ranks = RankProcesses(tmp_path)
    ranks.add(0, Scripted(10**6, 0))
    assert ranks.wait(timeout=0.05) is False
