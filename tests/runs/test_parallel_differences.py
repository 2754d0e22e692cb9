"""Members that differ, or label for each other, trained at once instead of in turn."""

import tempfile
from pathlib import Path

import pytest
from support import assert_equal, final_weights, needs_fork, on_ranks, stopped_in

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.config.averaging import members_at_once
from ssod_imwa.runs import run

pytestmark = [needs_fork, pytest.mark.usefixtures("one_thread")]

BLOCK = {
    "SOLVER.BASE_LR": 0.002,
    "CLS.LABELER.THRESHOLD": 0.2,
    "CLS.SAMPLER.NAME": "class",
    "CLS.INPUT.CUTOUT": 4,
}


@pytest.mark.parametrize(
    "settings",
    [
        ("IMWA.MEMBER_OVERRIDES", [{}, BLOCK]),
        pytest.param(
            ("IMWA.MEMBER_OVERRIDES", [BLOCK, {}], "IMWA.START", 0.25, "IMWA.BN", "recompute"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("IMWA.CROSS_TEACH", "other"), marks=pytest.mark.slow),
        pytest.param(("IMWA.CROSS_TEACH", "agree", "IMWA.START", 0.25), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_what_one_trains_in_turn_and_resume_to_the_same(
    digits_fixmatch_config, tmp_path, settings
):
    common = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 3, "SOLVER.MAX_ITER", 8, "CLS.EMA_DECAY", 0.9)
    in_turn = digits_fixmatch_config(*common, *settings, output="in_turn")
    run.train(in_turn)
    at_once = digits_fixmatch_config(*common, *settings, "IMWA.PARALLEL", True, output="at_once")

    def train(*, resume_from=False):
        def work(rank):
            ranks = Ranks.of_run(members_at_once(at_once))
            return run.train(at_once, ranks, resume_from=resume_from)

        return on_ranks(2, work, Path(tempfile.mkdtemp(dir=tmp_path)))

    with stopped_in(6):  # inside the last episode
        assert train() == [143, 143]
    assert train(resume_from=True) == [0, 0]
    assert_equal(final_weights(in_turn), final_weights(at_once))
