"""The stream protocol: one JSON object a line, on standard input or on a loopback socket.

Samples come as ``{"accelerometer": [0.1, 9.8, 0.3], "gyroscope": [0, 0, 1]}``. Without ``"time"`` a line is the next
step, and modalities that it does not name are missing. With ``"time": 17`` (a step's number) the samples of one step
may come in several lines and late, see `Alignment`; ``null`` says that a sample will not come. Commands are
``{"restart": true}`` (a new sequence starts) and ``{"finish": true}`` (answer what waits, as at the end of a sequence).

Answers are ``{"time": 17, "label": "pendulum", "outputs": {"pendulum": 0.93, ...}, "missing": []}``; a line that cannot
be used is answered with ``{"error": "...", "line": 3}`` and changes nothing.
"""

import io
import json
import math
import socketserver
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cmamba_jax.deploy.streaming import Answer, StreamingSession
from cmamba_jax.errors import UserError

MAX_LINE = 1 << 20
"""Bytes of the longest line that is read whole; memory stays bounded whatever is sent."""

_WORDS = ("time", "restart", "finish")


def check_names(session: StreamingSession) -> None:
    """Raises UserError where a modality has the name of a word of the protocol."""
    if taken := [name for name in session.alignment.modalities if name in _WORDS]:
        raise UserError(f"modality {taken[0]!r} has the name of a word of the stream protocol; rename the modality")


def reply(session: StreamingSession, lines: Iterable[bytes], *, finish: bool = True) -> Iterator[str]:
    """Answers lines one by one; every yielded text is one line.

    Args:
        session: of one stream.
        lines: without limit; see the module for their content.
        finish: the end of the lines is the end of the sequence; else the session can go on later.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        late = sum(session.alignment.late.values())
        try:
            answers = _obey(session, _parse(line))
        except UserError as error:
            yield _to_line({"error": str(error), "line": number})
            continue
        for answer in answers:
            yield _to_line(to_record(session, answer))
        if sum(session.alignment.late.values()) > late:
            yield _to_line({"error": "late: this step has been answered; the sample was left out", "line": number})
    for answer in session.finish() if finish else ():
        yield _to_line(to_record(session, answer))


def to_record(session: StreamingSession, answer: Answer) -> dict[str, Any]:
    """An answer as JSON values."""
    info = session.run.info
    names = info.label_names or tuple(f"output_{k}" for k in range(info.task.n_outputs))
    record: dict[str, Any] = {"time": answer.time}
    if answer.labels:
        record["label"] = answer.labels[0]
    outputs = (value if math.isfinite(value) else None for value in answer.outputs[0].tolist())
    return record | {"outputs": dict(zip(names, outputs, strict=True)), "missing": answer.missing}


def read_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Lines of a binary file; of one that is longer than `MAX_LINE` only the start, which is no JSON then."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


class Server(socketserver.ThreadingTCPServer):
    """Serves streams on 127.0.0.1, each connection its own.

    Args:
        port: 0 takes a free one, see `server_address`.
        make_session: called once a connection.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, make_session: Callable[[], StreamingSession]):
        self.make_session = make_session
        try:
            super().__init__(("127.0.0.1", port), _Connection)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be opened ({error}); choose another, or 0 for a free one") from error


class _Connection(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        session = self.server.make_session()
        try:
            for line in reply(session, read_lines(self.rfile)):
                self.wfile.write(line.encode())
        except ConnectionError:
            pass  # The other side has gone.


def _obey(session: StreamingSession, message: dict[str, Any]) -> list[Answer]:
    for word in ("restart", "finish"):
        if word in message:
            if message != {word: True}:
                raise UserError(f"expected {{{word!r}: true}} alone in its line".replace("'", '"'))
            if word == "finish":
                return session.finish()
            session.restart()
            return []
    for name, values in message.items():
        if name != "time" and not isinstance(values, list | int | float | None):
            raise UserError(f"modality {name!r}: expected a list of numbers, or null, got {values!r:.80}")
    if "time" not in message:
        answer = session.push(message)
        return [] if answer is None else [answer]
    time = message.pop("time")
    if not isinstance(time, int) or isinstance(time, bool) or abs(time) >= 2**53:
        raise UserError(f"time: expected an integer, the number of the step, got {time!r:.80}")
    if not message:
        raise UserError("expected a modality beside the time")
    return session.feed(time, message)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise UserError(f"a line of more than {MAX_LINE} bytes; send one step a line")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({error})") from None
    if not isinstance(message, dict):
        raise UserError('expected an object such as {"modality": [numbers]}')
    return message


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
