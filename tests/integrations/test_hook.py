"""IMWA inside stock detectron2 trainers, bit for bit on the CPU."""

import json

import pytest
import torch

pytestmark = pytest.mark.detectron2


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def trained(project, folder, *, hook=None, resume=False, **settings):
    trainer = project.make_trainer(folder, **settings)
    if hook is not None:
        hook.register(trainer)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def member_alone(project, folder, member):
    """A stock run on the data order and generators of one member of an E = 1 run."""
    trainer = project.make_trainer(folder)
    if member:
        seed = project.member_seed(0, member, 0)
        project.seed_all_rng(seed)
        trainer._trainer.reset_data_loader(lambda: trainer.build_train_loader(trainer.cfg))
    trainer.train()
    return trainer


def test_one_member_is_the_stock_trainer(project, tmp_path):
    stock = trained(project, tmp_path / "stock")
    hook = project.IMWAHook(project.ITERATIONS, members=1, episodes=3)
    assert_equal(weights(trained(project, tmp_path / "imwa", hook=hook)), weights(stock))


def test_one_episode_is_the_mean_of_stock_runs(project, tmp_path):
    members = [weights(member_alone(project, tmp_path / str(m), m)) for m in range(2)]
    hook = project.IMWAHook(project.ITERATIONS, members=2, episodes=1)
    averaged = weights(trained(project, tmp_path / "imwa", hook=hook))
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            mean = torch.stack([member[name].double() for member in members]).mean(0)
            assert torch.equal(tensor, mean.to(tensor.dtype)), name


def test_members_that_never_part_are_the_stock_trainer(project, tmp_path):
    stock = trained(project, tmp_path / "stock")
    whole = project.ITERATIONS
    hook = project.IMWAHook(whole, members=2, episodes=3, start=whole)
    late = trained(project, tmp_path / "imwa", hook=hook)
    assert late.max_iter == whole
    assert_equal(weights(late), weights(stock))


def test_episodes_have_the_lengths_that_are_given(project):
    schedule = project.IMWAHook(12, members=2, episodes=3, lengths=[2, 3, 7]).schedule
    assert [schedule.bounds(e) for e in range(3)] == [(0, 2), (2, 5), (5, 12)]


@pytest.mark.parametrize(
    ("members", "stop", "workers", "start"),
    [
        *((1, 4, 0, 0), (1, 6, 0, 0), (1, 6, 1, 0)),
        *((2, stop, 0, 0) for stop in (3, 4, 6, 8, 12, 17)),
        (2, 6, 1, 0),
        *((2, stop, 0, 4) for stop in (2, 4, 5, 6)),
    ],
)
def test_a_resumed_run_equals_one_never_stopped(project, tmp_path, members, stop, workers, start):
    settings = {"DATALOADER__NUM_WORKERS": workers, "SOLVER__CHECKPOINT_PERIOD": 1}

    def hook():
        return project.IMWAHook(project.ITERATIONS, members=members, episodes=3, start=start)

    whole = trained(project, tmp_path / "whole", hook=hook(), **settings)

    stopped = project.make_trainer(tmp_path / "stopped", **settings)
    hook().register(stopped)
    stopped.register_hooks([project.StopAfter(stop)])
    with pytest.raises(project.StoppedError):
        stopped.train()
    resumed = trained(project, tmp_path / "stopped", hook=hook(), resume=True, **settings)

    assert resumed.start_iter == stop
    assert_equal(weights(resumed), weights(whole))


def test_evaluation_does_not_disturb_members(project, tmp_path):
    """A member's randomness is a function of its part, whatever the project evaluates between."""
    settings = {"TEST__EVAL_PERIOD": 2}
    quiet, busy = (
        trained(project, tmp_path / name, hook=project.IMWAHook(12, members=2, episodes=3), **more)
        for name, more in (("quiet", {}), ("busy", settings))
    )
    assert_equal(weights(quiet), weights(busy))


def test_steps_see_the_members_own_clock_and_files_the_global_one(project, tmp_path):
    hook = project.IMWAHook(project.ITERATIONS, members=2, episodes=3)
    trainer = trained(project, tmp_path / "run", hook=hook, TEST__EVAL_PERIOD=6)

    assert trainer.clock == [(hook.schedule.position(g).t, 12) for g in range(24)]
    assert (trainer.iter, trainer.max_iter) == (24, 24)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["iteration"] for row in rows) == [17, 19, 23, 24]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [19, 23]
    assert [row["iteration"] for row in rows if "toy/weight" in row] == [17, 24]
    assert {"model_0000004.pth", "model_0000019.pth", "model_final.pth"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    history = {g: lr for lr, g in trainer.storage.history("lr").values()}
    assert sorted(history) == list(range(24))


def test_members_follow_the_schedule_of_a_stock_run(project, tmp_path):
    stock = trained(project, tmp_path / "stock")
    rates = {t: lr for lr, t in stock.storage.history("lr").values()}
    hook = project.IMWAHook(project.ITERATIONS, members=3, episodes=4)
    trainer = trained(project, tmp_path / "imwa", hook=hook)
    for lr, g in trainer.storage.history("lr").values():
        assert lr == rates[hook.schedule.position(int(g)).t]


def test_metrics_written_by_another_thread_keep_their_step(project, tmp_path):
    trainer = project.make_trainer(tmp_path)
    trainer._trainer.async_write_metrics = True
    project.IMWAHook(project.ITERATIONS, members=2, episodes=3).register(trainer)
    trainer.train()
    trainer._trainer.concurrent_executor.shutdown(wait=True)
    losses = trainer.storage.history("total_loss").values()
    assert [int(g) for _, g in losses] == list(range(24))


def test_a_simple_trainer_with_a_teacher(project, tmp_path):
    trainer = project.TeacherStudentTrainer()
    trainer.register_hooks([hook := project.IMWAHook(6, members=2, episodes=2, teacher="ema")])
    trainer.train(0, 12)
    student, teacher = trainer.model.weight.clone(), trainer.ema.weight.clone()

    members = []
    schedule = hook.schedule
    state = None
    reference = project.TeacherStudentTrainer()
    for episode in range(2):
        ends = []
        for _ in range(2):
            if state is not None:
                reference.set_weights(state)
            begin, end = schedule.bounds(episode)
            for t in range(begin, end):
                reference.iter = t
                reference.run_step()
            ends.append(reference.get_weights())
            members.append(ends[-1])
            if state is None:
                reference.set_weights(reference.initial)
        state = [torch.stack(pair).double().mean(0).float() for pair in zip(*ends, strict=True)]
    assert torch.equal(student, state[0])
    assert torch.equal(teacher, state[1])


def test_loss_normalizer_belongs_to_the_member_and_is_resumed(project):
    modules = {"student": project.Dense()}
    attributes = project.PlainAttributes(modules, project.Dense, "loss_normalizer")
    assert attributes.state_dict() == {}
    modules["student"].loss_normalizer = 3.5
    saved = attributes.state_dict()
    modules["student"].loss_normalizer = 7.0
    attributes.load_state_dict(saved)
    assert modules["student"].loss_normalizer == 3.5
    attributes.load_state_dict({})
    assert not hasattr(modules["student"], "loss_normalizer")


def test_wrong_places_in_the_hook_list_are_named(project, tmp_path):
    trainer = project.make_trainer(tmp_path)
    trainer.register_hooks([project.IMWAHook(project.ITERATIONS, members=2)])
    trainer.max_iter = 24
    with pytest.raises(ValueError, match=r"PeriodicCheckpointer must follow it.*IMWAHook.register"):
        trainer.train()


def test_wrong_lengths_are_refused(project, tmp_path):
    with pytest.raises(ValueError, match=r"iterations = 5 is not allowed .* 12 steps"):
        project.IMWAHook(5, members=2).register(project.make_trainer(tmp_path))
    trainer = project.TeacherStudentTrainer()
    trainer.register_hooks([project.IMWAHook(6, members=2)])
    with pytest.raises(ValueError, match="set to 6 steps, but 2 members of 6 iterations are 12"):
        trainer.train(0, 6)


def test_a_trainer_set_to_the_steps_of_all_members_is_refused(project, tmp_path):
    trainer = project.make_trainer(tmp_path, iterations=24)
    with pytest.raises(ValueError, match=r"learning rates are planned for 24 steps.*of 12"):
        project.IMWAHook(12, members=2).register(trainer)


def test_a_checkpoint_without_members_is_refused(project, tmp_path):
    trained(project, tmp_path)
    with pytest.raises(ValueError, match="its checkpoint holds no state of IMWAHook"):
        trained(project, tmp_path, hook=project.IMWAHook(12, members=2, episodes=3), resume=True)


def test_an_unknown_teacher_is_refused(project):
    trainer = project.TeacherStudentTrainer()
    trainer.register_hooks([project.IMWAHook(6, members=2, teacher="emma")])
    with pytest.raises(ValueError, match="teacher = 'emma' is not allowed"):
        trainer.train(0, 12)
