"""``python -m rewards.serve`` and ``Remote``: the same scores as here, and whatever is wrong is refused in words."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from rewards import Reward, RewardError, RewardSum, checked, load, serve
from rewards.common.command import run_until_stopped
from rewards.models import remote
from rewards.models.remote import TENSORS, Remote
from rewards.serving.batching import Limits
from rewards.serving.server import Server

TOKEN = "a-token-for-tests"


class Mean:
    """Mean brightness plus the prompt's length and what the metadata says; remembers the batches that it was given."""

    differentiable = True

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        self.batches.append(len(prompts))
        assert self.gate.wait(20)
        if "bug" in prompts:
            raise ZeroDivisionError("somebody else's bug")
        if "stop" in prompts:
            raise RewardError("this prompt is refused", row=list(prompts).index("stop"))
        scores = images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])
        return scores if metadata is None else scores + torch.tensor([float(row["add"]) for row in metadata])


@contextmanager
def served(rewards: Mapping[str, Reward], token: str | None = None, **limits: Any) -> Iterator[tuple[Server, str]]:
    server = Server(rewards, port=0, token=token, limits=Limits(**limits))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def pictures(count: int, seed: int = 0, side: int = 8) -> Tensor:
    """Pictures of 8 bits a channel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).float() / 255


def png(side: int = 4) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def call(url: str, body: Any, path: str = "/score", method: str = "POST", **headers: str) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def item(**changes: Any) -> dict[str, Any]:
    return {"image": png(), "prompt": "x"} | changes


def raw(url: str, text: bytes, until: float = 10) -> bytes:
    """What comes back to bytes on a socket, until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=until) as connection:
        connection.sendall(text)
        found = b""
        while part := connection.recv(4096):
            found += part
        return found


def test_remote_scores_are_local_scores() -> None:
    rewards: dict[str, Reward] = {"mean": Mean(), "jpeg": load("JPEGCompressibility")}
    images, prompts = pictures(9, side=16), [f"{'é' * n} ☃" for n in range(9)]
    rows = [{"add": n, "nested": {"text": "ü"}} for n in range(9)]
    with served(rewards, max_batch=4, batch_size=3) as (_, url):  # Remote must split, the server too
        for name, reward in rewards.items():
            client = Remote(url, reward=name)
            assert client.needs_prompt == (name == "mean") and client.concurrent and not client.differentiable
            for metadata in (None, rows):
                local = checked(reward, name, images, prompts, metadata)
                assert torch.equal(checked(client, name, images, prompts, metadata), local)
        floats = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        client = Remote(url, reward="mean")
        assert torch.equal(client.score(images=floats, prompts=["", ""]), floats.mean((1, 2, 3)))
        total = RewardSum({"here": Mean(), "there": client}, {"there": 2.0})
        parts = total.components(images=images, prompts=prompts)
        assert torch.equal(parts["here"], parts["there"])
        assert isinstance(client, Reward)
        with pytest.raises(RewardError, match=r"reward is None; .* has jpeg, mean"):
            Remote(url)
        with pytest.raises(RewardError, match="reward is 'other'"):
            load("Remote", {"url": url, "reward": "other"})


def test_many_clients_share_batches_and_none_is_lost() -> None:
    reward = Mean()
    with served({"mean": reward}, batch_size=16, linger=0.05) as (_, url):
        client = Remote(url)
        images = pictures(64)

        def ask(number: int) -> float:
            return client.score(images=images[number : number + 1], prompts=["x" * number]).item()

        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64)))
    local = [checked(Mean(), "mean", images[n : n + 1], ["x" * n]).item() for n in range(64)]
    assert found == local
    assert sum(reward.batches) == 64 and max(reward.batches) > 1 and max(reward.batches) <= 16


def test_one_bad_prompt_fails_its_own_call_only() -> None:
    reward = Mean()
    with served({"mean": reward}, linger=0.1, batch_size=8) as (_, url):
        client = Remote(url, retries=0)
        images = pictures(2)

        def ask(texts: list[str]) -> object:
            try:
                return client.score(images=images, prompts=texts).tolist()
            except RewardError as error:
                return error

        with ThreadPoolExecutor(3) as pool:
            good, refused, bug = pool.map(ask, [["a", "b"], ["c", "stop"], ["bug", "d"]])
    assert isinstance(good, list)
    assert isinstance(refused, RewardError) and refused.row == 1
    assert f"reward 'mean' at {url} answered 422 this prompt is refused" in str(refused)
    assert isinstance(bug, RewardError) and "500 reward 'mean' failed: ZeroDivisionError: somebody" in str(bug)
    assert reward.batches[0] > 2  # they were together at first


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.delenv(remote.TOKEN, raising=False)
    with served({"mean": Mean()}, token=TOKEN) as (_, url):
        assert call(url, b"", "/health", "GET")[0] == 200
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer ÿ"}):
            assert call(url, b"", "/rewards", "GET", **wrong)[0] == 401
            assert call(url, {"reward": "mean", "items": [item()]}, **wrong)[0] == 401
        with pytest.raises(RewardError, match="401 wrong or no token"):
            Remote(url, retries=0)
        assert Remote(url, token=TOKEN).score(images=pictures(1), prompts=[""]).shape == (1,)
        monkeypatch.setenv(remote.TOKEN, TOKEN)
        assert Remote(url).reward == "mean"
        monkeypatch.delenv(remote.TOKEN)
    for host in ("0.0.0.0", "::", "", "192.0.2.1"):
        with pytest.raises(RewardError, match="can be reached by others"):
            Server({}, host, 0)
    with pytest.raises(RewardError, match="too simple"):
        Server({}, "127.0.0.1", 0, "short")
    assert serve.main(["--reward", "nowhere.Heavy", "--host", "0.0.0.0"]) == 2  # before the reward is loaded
    assert "can be reached by others" in capsys.readouterr().err
    assert serve.main(["--reward", "Shapes", "--token_file", str(tmp_path / "none")]) == 2
    assert "--token_file" in capsys.readouterr().err
    assert serve.main(["--reward", "Shapes", "--max_waiting", "1"]) == 2
    assert "some never fit" in capsys.readouterr().err


def bomb() -> str:
    """A PNG of a few bytes that says it is 30000 x 30000."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def test_what_is_wrong_is_refused_in_words_and_the_server_goes_on() -> None:
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    limits = {"max_batch": 3, "max_pixels": 100, "max_body": 5000}
    with served({"mean": Mean()}, **limits) as (_, url):
        good = {"reward": "mean", "items": [item()]}
        broken = base64.b64encode(base64.b64decode(png())[:50]).decode()
        for body, status, message in [
            (b"{", 400, "body: Invalid JSON"),
            (b"[" * 4000, 400, "body: Invalid JSON"),
            (b"\xff", 400, "body: Invalid JSON"),
            ([], 400, "body: Input should be an object; expected {"),
            (good | {"more": 1}, 400, "more: Extra inputs are not permitted; expected {"),
            (good | {"reward": "other"}, 400, "no reward 'other' here; there are mean"),
            (good | {"reward": []}, 400, "reward: Input should be a valid string"),
            (good | {"items": []}, 400, "0 items; expected 1 to 3"),
            (good | {"items": [item()] * 4}, 413, "4 items; expected 1 to 3"),
            (good | {"items": [item(), "x"]}, 400, "items.1: Input should be an object"),
            (good | {"items": [item(prompt=3)]}, 400, "items.0.prompt: Input should be a valid string"),
            (good | {"items": [item(metadata=[])]}, 400, "items.0.metadata: Input should be"),
            (good | {"items": [item(image="???")]}, 400, "image 0 cannot be read"),
            (good | {"items": [item(), item(image=broken)]}, 400, "image 1 cannot be read"),
            (good | {"items": [item(image=base64.b64encode(gif.getvalue()).decode())]}, 400, "cannot be read"),
            (good | {"items": [item(image=bomb())]}, 400, "cannot be read"),
            (good | {"items": [item(image=png(11))]}, 400, "11 x 11 pixels; at most 100"),
            (good | {"items": [item(image=png(8)), item(image=png(8))]}, 400, "at most 36"),
            (b" " * 6000, 413, "6000 bytes or more; at most 5000"),
        ]:
            assert call(url, body)[0] == status, body
            assert message in call(url, body)[1]["error"], body
            assert call(url, good)[0] == 200
        assert call(url, good, "/other")[0] == call(url, b"", "/other", "GET")[0] == 404
        assert call(url, good, method="PUT") == (405, {"error": "Method Not Allowed"})
        assert call(url, good, **{"Content-Type": "text/plain"})[0] == 415
        assert call(url, good | {"items": [item(), "x"]})[1]["image"] == 1
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        assert b" 413 " in raw(url, head + b"Content-Length: 1000000000\r\n\r\n")
        chunks = b"1000\r\n" + b" " * 4096 + b"\r\n"
        assert b"5001 bytes or more" not in raw(
            url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        )
        assert b" 413 " in raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 2)  # and no end of it
        assert b" 400 " in raw(url, head + b"\r\n")
        assert b" 400 " in raw(url, head + b"Content-Length: -1\r\n\r\n")
        assert b" 400 " in raw(url, b"nonsense\r\n\r\n")
        with pytest.raises(RewardError, match="100 pixels; one image has 121"):
            Remote(url).score(images=pictures(1, side=11), prompts=[""])
        with pytest.raises(RewardError, match="5000 bytes; one image and its texts have"):
            Remote(url).score(images=pictures(1), prompts=["x" * 5000])
        with pytest.raises(RewardError, match="metadata must be JSON"):
            Remote(url).score(images=pictures(1), prompts=[""], metadata=[{"add": object()}])
        assert call(url, good)[1] == {"scores": [pytest.approx(1 + 1 / 3)]}


def test_a_large_body_is_refused_and_its_client_reads_why() -> None:
    """Also a client that sends all of it before it looks."""
    with served({"mean": Mean()}) as (_, url):
        before = memory()
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", "/score")
        for name, value in {"Content-Type": "application/json", "Content-Length": str(10**9)}.items():
            connection.putheader(name, value)
        connection.endheaders()
        for _ in range(50):
            connection.send(bytes(4 << 20))
        response = connection.getresponse()
        assert response.status == 413 and "1000000000 bytes or more" in json.loads(response.read())["error"]
        connection.close()
        assert memory() - before < 100 << 20
        assert call(url, {"reward": "mean", "items": [item()]})[0] == 200


def memory() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def quiet(server: Server) -> None:
    """Wait until no connection and no call is left at the server."""
    state, deadline = server._server.server_state, time.monotonic() + 10
    while state.connections or state.tasks:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:  # a byte that was under way when the server closed
        return b""


def test_a_slow_client_is_cut_off() -> None:
    before = threading.active_count()
    with served({"mean": Mean()}, read_timeout=0.6, max_connections=2) as (server, url):
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        health = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        for first, trickle, expected in [(head, b" ", b"HTTP/1.1 408"), (b"GET /health HTTP/1.1\r\nX: ", b"x", b"")]:
            with socket.create_connection((host, int(port)), timeout=10) as slow:
                slow.sendall(first)
                with socket.create_connection((host, int(port)), timeout=10) as silent:
                    assert b"too many connections" in raw(url, health)  # both places are taken
                    sent = 0
                    while not select.select([slow], [], [], 0.1)[0]:  # every byte comes in time, all of them do not
                        slow.sendall(trickle)
                        sent += 1
                        assert sent < 30
                    assert last(slow)[:12] == expected
                    assert last(silent) == b""
            quiet(server)
            assert b" 200 " in raw(url, health)
        with socket.create_connection((host, int(port)), timeout=10) as idle:  # the second call of a connection
            idle.sendall(health.replace(b"close", b"keep-alive"))
            found = idle.recv(4096)
            idle.sendall(b"GET /h")
            while part := last(idle):
                found += part
            assert found.count(b" 200 ") == 1
        with socket.create_connection((host, int(port)), timeout=10) as gone:  # in the midst of its body
            gone.sendall(head + b"{")
        quiet(server)
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline


def test_tensors_are_taken() -> None:
    """Of a safetensors file only what is asked for in its metadata, and only pictures."""
    images = {"a": pictures(1)[0], "b": (pictures(1)[0] * 255).byte()}
    good = {"reward": "mean", "items": [{"image": name, "prompt": "xy"} for name in images]}
    expected = (2 + images["a"].mean()).item()
    with served({"mean": Mean()}, max_pixels=200) as (_, url):

        def ask(asked: Any, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
            return call(url, save(dict(tensors), {"call": json.dumps(asked)}), **{"Content-Type": TENSORS})

        assert ask(good, images) == (200, {"scores": [expected, expected]})
        zeros = torch.zeros
        for wrong, message in [
            ({"b": images["b"]}, "image 0 cannot be read: there is no tensor 'a'"),
            (images | {"b": zeros(3, 9, 17)}, r"F32 of shape [3, 9, 17]; expected U8 or F32, (3, H, W), H x W <= 136"),
            (images | {"b": zeros(3, 8, 8).double()}, "F64 of shape"),
            (images | {"b": zeros(1, 8, 8)}, "F32 of shape [1, 8, 8]"),
            (images | {"b": zeros(3, 0, 8)}, "F32 of shape [3, 0, 8]"),
            (images | {"b": zeros(8, 8)}, "F32 of shape [8, 8]"),
        ]:
            status, answer = ask(good, wrong)
            assert status == 400 and message in answer["error"], message
            assert answer["image"] == (0 if "'a'" in message else 1)
        status, answer = ask(good, images | {"b": images["a"] + 1})
        assert status == 422 and "in row 1; expected [0, 1]" in answer["error"]
        whole = save(images, {"call": json.dumps(good)})
        for body in (b"", b"{}", whole[:-1], b"\xff" * 8 + whole[8:], save(images), save(images, {"other": "{}"})):
            status, answer = call(url, body, **{"Content-Type": TENSORS})
            assert status == 400 and "no safetensors file with the metadata" in answer["error"]
        assert ask({}, images)[0] == 400
        assert ask(good, images)[0] == 200


def test_remote_splits_what_is_too_much_for_one_call() -> None:
    """By bytes of pictures, then of texts; the row of an error stays that of the batch."""
    reward = Mean()
    with served({"mean": reward}, max_body=2000, linger=0.0) as (_, url):
        client = Remote(url)
        images, prompts = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)), ["é" * 10] * 5
        assert torch.equal(client.score(images=images, prompts=prompts), Mean().score(images=images, prompts=prompts))
        assert reward.batches == [2, 2, 1]  # of 768 bytes each
        reward.batches.clear()
        client.score(images=pictures(4), prompts=["x" * 250] * 4)
        assert reward.batches == [2, 2]
        with pytest.raises(RewardError, match="answered 422 this prompt is refused") as caught:
            client.score(images=pictures(5), prompts=["x" * 250] * 4 + ["stop"])
        assert caught.value.row == 4


def test_without_fastapi_the_client_works_and_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("fastapi", "starlette", "uvicorn")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rewards.serving.server", "rewards.serving.batching", "rewards.models.remote", "rewards.serve"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert importlib.import_module("rewards.models.remote").Remote
    assert importlib.import_module("rewards.serve").main(["--reward", "Shapes"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the server needs ") and line.endswith("pip install 't2i-align[serve]'")


def test_back_pressure_and_time_out() -> None:
    reward = Mean()
    body = {"reward": "mean", "items": [item()] * 2}
    with served({"mean": reward}, max_batch=2, max_waiting=2, batch_size=2, score_timeout=1.0) as (server, url):
        reward.gate.clear()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(call, url, body)
            while not reward.batches:
                time.sleep(0.005)
            second = pool.submit(call, url, body)
            while server.batchers["mean"].waiting < 2:
                time.sleep(0.005)
            status, answer = call(url, body)
            assert status == 503 and "2 images are waiting for it; try again" in answer["error"]
            assert call(url, b"", "/health", "GET")[1]["waiting"] == {"mean": 2}
            with pytest.raises(RewardError, match="failed 1 times, last with 503 reward 'mean' is busy"):
                Remote(url, retries=0).score(images=pictures(2), prompts=["", ""])
            assert first.result()[0] == second.result()[0] == 504
            reward.gate.set()
        while server.batchers["mean"].waiting:  # what nobody waits for any longer still has to pass
            time.sleep(0.005)
        assert call(url, body)[0] == 200
        assert reward.batches == [2, 2]  # the second call had been given up, and was not scored


def test_remote_tries_again_only_where_that_can_help(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    answers: list[object] = []

    def once(self: Remote, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, tuple)
        return answer

    with served({"mean": Mean()}) as (_, url):
        client = Remote(url, retries=2)
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "_once", once)
            answers[:] = [(503, b"{}"), ConnectionResetError("gone"), (200, b'{"scores": [4]}')]
            assert client.score(images=pictures(1), prompts=[""]).tolist() == [4.0]
            assert waits == [0.25, 0.5]
            answers[:] = [(503, b"busy")] * 3
            with pytest.raises(RewardError, match="failed 3 times, last with 503 busy"):
                client.score(images=pictures(1), prompts=[""])
            for answer, message in [
                ((500, b'{"error": "broke"}'), "answered 500 broke"),
                ((422, b'{"error": "no", "image": 0}'), "answered 422 no"),
                ((200, b'{"scores": [1, 2]}'), "expected 1 scores"),
                ((200, b'{"scores": ["1"]}'), "expected 1 scores"),
                ((200, b"<html>"), "answered 200 <html>"),
                ((302, b""), "answered 302"),
                (TimeoutError(), "did not answer within 120 s"),
                (OSError("no such host"), "cannot be asked: OSError: no such host"),
            ]:
                waits.clear()
                answers[:] = [answer]
                with pytest.raises(RewardError, match=message):
                    client.score(images=pictures(1), prompts=[""])
                assert waits == [] and answers == []
            answers[:] = [(200, b'{"scores": [NaN]}')]
            with pytest.raises(RewardError, match="'there' returned nan for row 0"):
                checked(client, "there", pictures(1), [""])
    waits.clear()
    with pytest.raises(RewardError, match="failed 3 times, last with ConnectionRefusedError"):
        client.score(images=pictures(1), prompts=[""])
    assert waits == [0.25, 0.5]
    for bad in ("127.0.0.1:80", "ftp://host", "http://", "http://me:secret@host"):
        with pytest.raises(RewardError, match="expected http://host:port"):
            Remote(bad)


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"did not answer within 0.2 s"):
            Remote(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_any_signal_ends_a_server_as_ctrl_c_does(number: signal.Signals) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody calls")

    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
    begin = time.monotonic()
    run_until_stopped(lambda: server.run([listening]), lambda: setattr(server, "should_exit", True))
    assert time.monotonic() - begin < 5
    assert before == {each: signal.getsignal(each) for each in before}
