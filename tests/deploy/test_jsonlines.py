import json
import socket
import threading

import numpy as np
import pytest

from cmamba_jax.deploy import StreamingSession, jsonlines
from cmamba_jax.errors import UserError


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture
def talk(run):
    """Sends lines to a new session and returns the replies."""

    def talk(*lines, max_delay=0, **options):
        session = StreamingSession(run, max_delay=max_delay)
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        return [json.loads(text) for text in jsonlines.reply(session, raw, **options)]

    return talk


def line(inputs, step, *names, **extra):
    return extra | {m: inputs[m][0, step].tolist() for m in names or inputs}


def test_answers_are_those_of_the_session(talk, run, make_inputs):
    inputs = make_inputs(1, 4)
    got = talk(line(inputs, 0), line(inputs, 1, "text"), b"\n", line(inputs, 2), {})
    masks = {"text": [[True] * 3 + [False]], "audio": [[True, False, True, False]]}
    expected = run.predict(inputs, masks=masks)[0]
    assert [r["time"] for r in got] == [0, 1, 2, 3]
    assert [r["missing"] for r in got] == [[], ["audio"], [], ["text", "audio"]]
    np.testing.assert_allclose(list(got[-1]["outputs"].values()), expected.outputs, rtol=1e-5)
    assert list(got[-1]["outputs"]) == ["a", "b", "c"] and got[-1]["label"] == expected.labels[0]


def test_samples_apart_and_late(talk, make_inputs):
    inputs = make_inputs(1, 4)
    together = talk(*(line(inputs, t) for t in range(4)))
    order = [(0, "text"), (1, "audio"), (0, "audio"), (2, "text"), (1, "text"), (3, "text"), (3, "audio"), (2, "audio")]
    assert talk(*(line(inputs, t, m, time=t) for t, m in order), max_delay=2) == together
    *_, late, last = talk(
        *(line(inputs, t, m, time=t) for t, m in order[:3]), {"time": 0, "text": [0, 0, 0]}, max_delay=2
    )
    assert late == {"error": "late: this step has been answered; the sample was left out", "line": 4}
    assert last["time"] == 1 and last["missing"] == ["text"]


MALFORMED = {
    "no JSON": b"nonsense",
    "half": b'{"text": [1, 2',
    "no UTF-8": b'{"text\xff": 1}',
    "deep": b"[" * 100_000,
    "long": b'{"text": "' + b"1" * jsonlines.MAX_LINE + b'"}',
    "list": b"[1, 2]",
    "number": b"3",
    "unknown": {"odor": [1]},
    "width": {"text": [1, 2]},
    "nested": {"text": {"a": 1}},
    "text": {"text": "abc"},
    "nan": b'{"text": [1, 2, NaN]}',
    "huge": b'{"text": [1, 2, 1e999]}',
    "bool time": {"time": True, "text": [1, 2, 3]},
    "float time": {"time": 1.5, "text": [1, 2, 3]},
    "time alone": {"time": 1},
    "far ahead": {"time": 10**9, "text": [1, 2, 3]},
    "long time": b'{"time": 1' + b"0" * 5000 + b', "text": [1, 2, 3]}',
    "restart and more": {"restart": True, "text": [1, 2, 3]},
    "finish 1": {"finish": "yes"},
}


@pytest.mark.parametrize("wrong", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_answered_and_changes_nothing(talk, make_inputs, wrong):
    inputs = make_inputs(1, 3)
    good = [line(inputs, t, time=t) for t in range(3)]
    got = talk(good[0], wrong, *good[1:])
    assert set(got[1]) == {"error", "line"} and got[1]["line"] == 2 and len(got[1]["error"]) < 300
    assert [got[0], *got[2:]] == talk(*good)


def test_restart_and_finish(talk, make_inputs):
    inputs = make_inputs(1, 2)
    first = talk(line(inputs, 0, time=7), line(inputs, 1, "text", time=8), {"finish": True})
    assert [r["time"] for r in first] == [7, 8]
    again = talk(line(inputs, 1), {"restart": True}, line(inputs, 0, time=7), line(inputs, 1, "text", time=8))
    assert again[1:] == first
    assert talk(line(inputs, 1, "text", time=8), finish=False) == []


def test_names_of_the_protocol(make_run, monkeypatch):
    session = StreamingSession(make_run())
    jsonlines.check_names(session)
    session.alignment.modalities = ("text", "time")
    with pytest.raises(UserError, match="rename the modality"):
        jsonlines.check_names(session)


def test_two_connections_are_two_streams(run, make_inputs):
    inputs = make_inputs(1, 5)
    expected = run.predict(inputs)[0].outputs
    with jsonlines.Server(0, lambda: StreamingSession(run)) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(UserError, match="cannot be opened"):
            jsonlines.Server(server.server_address[1], lambda: StreamingSession(run))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clients = [socket.create_connection(server.server_address, timeout=60) for _ in range(2)]
        files = [client.makefile("rw") for client in clients]
        for t in range(5):
            for file in files:
                file.write(json.dumps(line(inputs, t)) + "\n")
                file.flush()
                last = json.loads(file.readline())
        for file, client in zip(files, clients, strict=True):
            file.write("nonsense\n")
            file.flush()
            client.shutdown(socket.SHUT_WR)
            assert "error" in json.loads(file.readline()) and file.readline() == ""
            client.close()
        server.shutdown()
    np.testing.assert_allclose(list(last["outputs"].values()), expected, rtol=1e-5)
