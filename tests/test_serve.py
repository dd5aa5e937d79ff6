"""``python -m rewards.serve`` and ``Remote``: the same scores as here, and whatever is wrong is refused in words."""

from __future__ import annotations

import base64
import io
import json
import select
import socket
import struct
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
from PIL import Image
from torch import Tensor

from rewards import Reward, RewardError, RewardSum, checked, load, remote, serve
from rewards.remote import Remote
from rewards.serve import Limits, Server

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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        away = (client.score(images=floats, prompts=["", ""]) - floats.mean((1, 2, 3))).abs()
        assert 0 < away.max() <= 1 / 510
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
    assert found == pytest.approx(local, abs=1e-5)
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
    assert "answered 422 this prompt is refused" in str(refused)
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
            (b"{", 400, "not JSON"),
            (b"[" * 4000, 400, "not JSON"),
            ([], 400, "expected {"),
            (good | {"more": 1}, 400, "expected {"),
            (good | {"reward": "other"}, 400, "no reward 'other' here; there are mean"),
            (good | {"reward": []}, 400, "no reward"),
            (good | {"items": []}, 400, "0 items; expected 1 to 3"),
            (good | {"items": [item()] * 4}, 413, "4 items; expected 1 to 3"),
            (good | {"items": [item(), "x"]}, 400, "item 1 is not"),
            (good | {"items": [item(prompt=3)]}, 400, "item 0 is not"),
            (good | {"items": [item(metadata=[])]}, 400, "item 0 is not"),
            (good | {"items": [item(image="???")]}, 400, "image 0 is not base64"),
            (good | {"items": [item(), item(image=broken)]}, 400, "image 1 cannot be read"),
            (good | {"items": [item(image=base64.b64encode(gif.getvalue()).decode())]}, 400, "cannot be read"),
            (good | {"items": [item(image=bomb())]}, 400, "cannot be read"),
            (good | {"items": [item(image=png(11))]}, 400, "11 x 11 pixels; at most 100"),
            (good | {"items": [item(image=png(8)), item(image=png(8))]}, 400, "at most 36"),
            (b" " * 6000, 413, "6000 bytes; at most 5000"),
        ]:
            assert call(url, body)[0] == status, body
            assert message in call(url, body)[1]["error"], body
            assert call(url, good)[0] == 200
        assert call(url, good, "/other")[0] == call(url, b"", "/other", "GET")[0] == 404
        assert call(url, good, **{"Content-Type": "text/plain"})[0] == 415
        head = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\n"
        assert b" 413 " in raw(url, head + b"Content-Length: 1000000000\r\n\r\n")
        assert b" 411 " in raw(url, head + b"\r\n")
        assert b" 411 " in raw(url, head + b"Content-Length: -1\r\n\r\n")
        assert b" 501 " in raw(url, b"PUT / HTTP/1.1\r\n\r\n") and b'{"error"' in raw(url, b"PUT / HTTP/1.1\r\n\r\n")
        with pytest.raises(RewardError, match="100 pixels a call; one image has 121"):
            Remote(url).score(images=pictures(1, side=11), prompts=[""])
        with pytest.raises(RewardError, match="5000 bytes a call; one image has"):
            Remote(url).score(images=pictures(1), prompts=["x" * 5000])
        with pytest.raises(RewardError, match="metadata must be JSON"):
            Remote(url).score(images=pictures(1), prompts=[""], metadata=[{"add": object()}])
        assert call(url, good)[1] == {"scores": [pytest.approx(1 + 1 / 3)]}


def test_a_slow_client_is_cut_off() -> None:
    with served({"mean": Mean()}, read_timeout=0.3, max_connections=2) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        start = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head)
            with socket.create_connection((host, int(port)), timeout=10) as silent:
                assert b"503 Busy" in raw(url, b"GET /health HTTP/1.1\r\n\r\n")  # both places are taken
                sent = 0
                while not select.select([slow], [], [], 0.1)[0]:  # every byte comes in time, all of them do not
                    slow.sendall(b" ")
                    sent += 1
                    assert sent < 30
                assert b" 408 " in slow.recv(4096)
                assert silent.recv(10) == b""
        assert time.monotonic() - start < 5
        deadline = time.monotonic() + 5
        while b"503" in raw(url, b"GET /health HTTP/1.1\r\n\r\n"):
            assert time.monotonic() < deadline


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
