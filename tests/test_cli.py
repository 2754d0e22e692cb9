import pytest

from ssod_imwa.cli import run_main
from ssod_imwa.errors import DataError


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_exit_status_is_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: returned)
    assert stop.value.code == status


def test_a_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(raising(DataError("no such data")))
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: no such data\n")


def test_an_interruption_is_status_130(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(raising(KeyboardInterrupt()))
    assert stop.value.code == 130


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))
