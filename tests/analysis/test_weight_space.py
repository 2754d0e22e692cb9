import numpy as np
import pytest

from ssod_imwa.analysis.weight_space import (
    interpolation_figure,
    landscape_figure,
    landscape_map,
    members_figure,
    tau_figure,
)

STEPS = np.array([-1.0, 0, 1])
UNITS = {"loss": "test loss", "top1": "test accuracy (%)"}


def lines(axis):
    return {x.get_label(): np.asarray(x.get_ydata(), float).tolist() for x in axis.get_lines()}


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_a_landscape_shows_each_direction_and_their_mean():
    found = [
        {"loss": np.array([2.0, 1, 4]), "top1": np.array([10.0, 80, 20])},
        {"loss": np.array([4.0, 1, 2]), "top1": np.array([30.0, 80, 40])},
    ]
    figure = landscape_figure(STEPS, found, units=UNITS)
    loss, accuracy = figure.axes
    assert lines(loss)["mean"] == [3, 1, 3]
    assert lines(accuracy)["mean"] == [20, 80, 30]
    assert lines(loss)["each of 2 directions"] == [2, 1, 4]
    assert legend(loss) == ["each of 2 directions", "mean"]
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == tuple(UNITS.values())
    assert "ε" in loss.get_xlabel()
    assert loss.get_yscale() == "linear"


@pytest.mark.parametrize(("top", "scale"), [(40.0, "linear"), (4000.0, "log")])
def test_losses_of_several_magnitudes_have_a_log_axis(top, scale):
    found = [{"loss": np.array([1.0, 1.0, top])}]
    assert landscape_figure(STEPS, found, units={"loss": "x"}).axes[0].get_yscale() == scale


def test_the_first_direction_of_a_map_goes_to_the_right(tmp_path):
    # Accuracy rises along direction 1 only: contours are upright lines.
    values = np.array([[0.0] * 3, [50.0] * 3, [100.0] * 3])
    figure = landscape_map(STEPS, {"loss": 1 + 999 * values, "top1": values}, units=UNITS)
    axis = figure.axes[1]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (
        "step ε along direction 1",
        "step ε along direction 2",
    )
    (contours,) = axis.collections
    paths = [path for path in contours.get_paths() if len(path.vertices)]
    first = paths[0].vertices  # the lowest values
    assert first[:, 0].max() < 0  # on the left
    assert (first[:, 1].min(), first[:, 1].max()) == (-1, 1)
    labels = [axis.get_ylabel() for axis in figure.axes[2:]]
    assert labels == list(UNITS.values())  # the color bars
    figure.savefig(tmp_path / "a.png", dpi=20)


def test_an_interpolation_goes_from_a_to_b():
    shares = [0, 0.5, 1]
    found = {"loss": np.array([1.0, 0.5, 2]), "top1": np.array([70.0, 80, 60])}
    again = {name: values + 1 for name, values in found.items()}
    figure = interpolation_figure(shares, found, names=("one", "two"), recomputed=again)
    metrics, loss = figure.axes
    assert lines(metrics) == {
        "top-1": [70, 80, 60],
        "top-1, batch norms re-estimated": [71, 81, 61],
    }
    assert lines(loss)["loss"] == [1, 0.5, 2]
    assert (metrics.get_ylabel(), loss.get_ylabel()) == ("test metrics (%)", "test cross-entropy")
    assert metrics.get_xlabel() == "λ"
    assert figure.get_suptitle() == "(1 − λ) A + λ B:  A = one,  B = two"
    plain = interpolation_figure(shares, found, names=("one", "two"))
    assert list(lines(plain.axes[0])) == ["top-1"]


def test_members_show_the_gain_over_the_better_one():
    figure = members_figure(
        [1.0, 2.0],
        np.array([[10.0, 50], [20.0, 40]]),
        np.array([25.0, 45]),
        {"whole": np.array([3.0, 5]), "stem": np.array([1.0, 2])},
        metric="top1",
    )
    left, middle, right = figure.axes
    assert lines(left) == {"member 1": [10, 50], "member 2": [20, 40], "average": [25, 45]}
    assert [bar.get_height() for bar in middle.containers[0]] == [5, -5]
    assert lines(right) == {"whole": [3, 5], "stem": [1, 2]}
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "top-1 (%)",
        "gain in top-1 over the best member (points)",
        "distance of members ‖θ₁ − θ₂‖",
    ]
    assert left.get_xlabel() == "epochs of each member"


def test_a_single_snapshot_has_a_bar():
    figure = members_figure(
        [3.0], np.array([[1.0], [2.0]]), np.array([3.0]), {"whole": np.array([1.0])}, metric="few"
    )
    assert [bar.get_height() for bar in figure.axes[1].containers[0]] == [1]
    assert figure.axes[0].get_ylabel() == "few (%)"


def test_a_sweep_marks_the_best_tau(tmp_path):
    taus = [0, 1, 2]
    found = {"top1": np.array([50.0, 70, 60]), "few": np.array([10.0, 30, 50]), "h_mean": taus}
    sweeps = {"adjusted": (taus, found), "normalized": (taus, found), "third": (taus, found)}
    figure = tau_figure(sweeps, constant={"nearest class mean": 65.0})
    assert [axis.get_title() for axis in figure.axes] == ["adjusted", "normalized", "third"]
    axis = figure.axes[0]
    assert legend(axis) == ["top-1", "few", "best τ = 1: 70.0 %", "nearest class mean: 65.0 %"]
    assert lines(axis)["few"] == [10, 30, 50]
    best = next(x for x in axis.get_lines() if x.get_label().startswith("best"))
    assert list(best.get_xdata()) == [1, 1]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("τ", "accuracy (%)")
    figure.savefig(tmp_path / "a.png", dpi=20)
