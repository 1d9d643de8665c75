"""The first cause among the failures of a launch, and the page that shows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric.strategies.launchers import report
from lightning.fabric.strategies.launchers.report import Failure

ECHO = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4242"
_texts = st.sampled_from(["", "ValueError: broken", ECHO])
_failures = st.lists(
    st.builds(Failure, rank=st.integers(0, 9), when=st.floats(0, 9), exit_code=st.integers(-9, 9), traceback=_texts)
)


@given(_failures)
def test_the_cause_is_the_earliest_failure_that_is_no_echo(failures):
    cause = report.first_cause(failures)
    candidates = [f for f in failures if not f.is_echo] or failures
    assert cause is None if not failures else cause in candidates
    assert all(cause is not None and cause.when <= other.when for other in candidates)


@pytest.mark.parametrize(
    "text",
    [
        "Connection closed by peer [127.0.0.1]:4242",
        "Read error [127.0.0.1]:52645: Connection reset by peer",
        "Timed out waiting 3000ms for recv operation to complete",
        "Broken pipe",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.2: ncclRemoteError",
        "recvValue failed on SocketImpl(fd=3, addr=[localhost]:1): failed to recv, got 0 bytes",
    ],
)
def test_the_loss_of_a_peer_is_an_echo(text):
    assert Failure(0, 0.0, traceback=f"Traceback ...\nRuntimeError: {text}").is_echo


def test_an_error_file_holds_type_message_and_traceback(tmp_path):
    def fail():
        raise KeyError("missing")

    try:
        fail()
    except KeyError as error:
        report.write_error(tmp_path, 3, error)
    report.write_error(tmp_path, 3, ValueError("raised afterwards"))
    (failure,) = report.read_errors(tmp_path)
    assert (failure.rank, failure.exception, failure.message, failure.exit_code) == (3, "KeyError", "'missing'", 1)
    assert "in fail\n" in failure.traceback
    assert failure.when > 0


def test_the_page_ends_with_rank_exception_and_exit_code():
    cause = Failure(1, 1.0, 1, "ValueError", "broken\nand more", "Traceback\nValueError: broken\nand more\n")
    page = report.page([Failure(0, 0.5, 1, "RuntimeError", "Connection closed by peer", ECHO), cause])
    assert page.splitlines()[:3] == ["---- rank 1 failed ----", "Traceback", "ValueError: broken"]
    assert page.splitlines()[-3:] == [
        "As a consequence:",
        "  rank 0 raised RuntimeError: Connection closed by peer (exit code 1)",
        "First cause: rank 1 raised ValueError: broken (exit code 1)",
    ]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (-9, "rank 1 was killed by signal SIGKILL, perhaps out of memory (exit code 137)"),
        (-11, "rank 1 was killed by signal SIGSEGV (exit code 139)"),
        (-40, "rank 1 was killed by signal 40 (exit code 168)"),
        (3, "rank 1 ended without an exception (exit code 3)"),
    ],
)
def test_a_death_without_exception_is_named(code, sentence):
    assert str(Failure(1, 0.0, code)) == sentence


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(7), 7),
        (SystemExit("message"), 1),
    ],
)
def test_exit_codes_are_those_of_the_interpreter(error, code):
    assert report.exit_code_of(error) == code
