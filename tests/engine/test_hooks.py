import pytest
import torch

from ssod_imwa.engine.evaluation import EvaluationHook, EvaluationInterruptedError, Evaluations


def weight_sum(model):
    return {"AP": float(sum(p.double().sum() for p in model.parameters()))}


def add_evaluation(trainer, evaluations=None, *, evaluate=weight_sum, stage="average", **options):
    evaluations = Evaluations() if evaluations is None else evaluations
    name = f"evaluate_{stage}"
    hook = EvaluationHook(name, evaluate, evaluations, stage=stage, **options)
    trainer.register_hooks([hook])
    return evaluations


@pytest.mark.parametrize(("period", "expected"), [(0, [4]), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4])])
def test_period_counts_episodes_and_the_last_is_always_evaluated(tiny, period, expected):
    trainer = tiny.trainer(5, episodes=5)
    evaluations = add_evaluation(trainer, period=period)
    trainer.train()
    students = [r for r in evaluations.records if r["model"] == "student"]
    assert [r["episode"] for r in students] == expected


def test_a_teacher_that_is_not_ready_is_not_evaluated(tiny):
    trainer = tiny.trainer(4, episodes=2, method=tiny.method(burn_in=4))
    evaluations = add_evaluation(trainer)
    trainer.train()
    assert [(r["episode"], r["model"]) for r in evaluations.records] == [
        (0, "student"),
        (1, "student"),
        (1, "teacher"),
    ]


def test_evaluation_does_not_change_training(tiny):
    plain, evaluated = tiny.trainer(4, episodes=4), tiny.trainer(4, episodes=4)
    add_evaluation(evaluated, evaluate=lambda model: {"x": torch.rand(1).item()})
    plain.train()
    evaluated.train()
    states = [t.method.student.state_dict() for t in (plain, evaluated)]
    assert tiny.same_state(*states)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_evaluation_lost_between_checkpoint_and_its_end_is_made_up_for(tiny, step):
    """Step 2 and 5 end an episode, 5 also the run; after step 3 nothing is due."""

    def build(save):
        trainer = tiny.trainer(6, episodes=2)
        trainer.register_hooks([save])
        return trainer, add_evaluation(trainer)

    save = tiny.SaveAt(step)
    straight, expected = build(save)
    straight.train()
    resumed, evaluations = build(tiny.SaveAt(None))
    resumed.load_state_dict(save.read())
    assert len(evaluations.records) == (2 if step > 2 else 0)
    resumed.train()
    assert evaluations.records == expected.records


def test_interrupted_evaluation_leaves_no_record_and_training_goes_on(tiny):
    def interrupted(model):
        raise EvaluationInterruptedError

    trainer = tiny.trainer(2)
    evaluations = add_evaluation(trainer, evaluate=interrupted)
    trainer.train()
    assert evaluations.records == []
    assert trainer.iter == 2


@pytest.mark.parametrize("options", [{"stage": "final"}, {"period": -1}])
def test_bad_evaluation_arguments_are_errors(tiny, options):
    with pytest.raises(ValueError, match="is not allowed"):
        add_evaluation(tiny.trainer(), **options)


def add_running(trainer, polling, evaluations):
    """Evaluations after every second own iteration; `polling` stands for one that can be left."""
    hook = EvaluationHook(
        "running",
        polling,
        evaluations,
        stage="running",
        period=2,
        evaluate_to_end=weight_sum,
    )
    trainer.register_hooks([hook])
    return evaluations


def interrupted(model):
    raise EvaluationInterruptedError


def test_a_member_that_is_about_to_be_swapped_out_is_evaluated_to_the_end(tiny):
    """Its weights are gone afterwards; inside its part the evaluation can be made up for."""
    trainer = tiny.trainer(4, members=2)
    evaluations = add_running(trainer, interrupted, Evaluations())
    trainer.train()
    assert [(r["member"], r["t"]) for r in evaluations.records if r["model"] == "student"] == [
        (0, 3),
        (1, 3),
    ]


def test_an_evaluation_that_is_made_up_for_is_not_interrupted_again(tiny):
    """Afterwards training goes on, and the weights of its step are gone."""
    save = tiny.SaveAt(1)
    first = tiny.trainer(3)
    lost = add_running(first, interrupted, Evaluations())
    first.register_hooks([save])
    first.train()
    assert lost.records == []
    resumed = tiny.trainer(3)
    evaluations = add_running(resumed, interrupted, Evaluations())
    resumed.load_state_dict(save.read())
    resumed.train()
    assert [(r["model"], r["t"]) for r in evaluations.records] == [("student", 1), ("teacher", 1)]


@pytest.mark.parametrize("period", [0, 1, 3, 4])
@pytest.mark.parametrize("stage", ["running", "member", "average"])
@pytest.mark.parametrize(("episodes", "members"), [(1, 1), (3, 2), (11, 1)])
def test_due_steps_are_those_at_which_an_evaluation_is_due(tiny, stage, period, episodes, members):
    trainer = tiny.trainer(11, episodes=episodes, members=members)
    average = EvaluationHook("average", weight_sum, Evaluations(), stage="average", period=2)
    hook = EvaluationHook(
        "hook", weight_sum, Evaluations(), stage=stage, period=period, instead=[average]
    )
    trainer.register_hooks([hook, average])
    positions = map(trainer.schedule.position, range(len(trainer.schedule)))
    assert hook.due_steps() == [p.global_step for p in positions if hook.is_due(p)]
