"""What is refused: each with its status, OpenAI's shape of an error, the field, and both numbers where there are two."""

from __future__ import annotations

import base64
import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import PIL.Image
import pytest
from served import LIMITS, NAME, Live, audio, chat, image, serving, until

import errors
from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import ServerLimits
from opticnerve.serve.media import MediaOpener, MediaSources
from opticnerve.web.guard import LOCAL_NAMES, Keys, check_address


def refused(live: Live, status: int = 400, **body: Any) -> dict[str, Any]:
    answer = live.post(**body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "always"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "nick": "me"}]}, "messages.0.nick"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "look: <image>"}]}, "messages.0.content"),
    ],
)
def test_a_field_that_is_wrong_is_named(body: dict[str, Any], param: str, live: Live) -> None:
    error = refused(live, **body)
    assert error["param"] == param
    assert param.split(".")[-1] in error["message"] or body.get("messages")


@pytest.mark.parametrize(
    "body",
    [
        {"top_logprobs": 2}, {"stream_options": {"include_usage": True}}, {"stop": ["a"] * 5},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other(body: dict[str, Any], live: Live) -> None:
    assert next(iter(body)) in refused(live, **body)["message"]


def test_the_client_gets_its_own_exceptions(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        live.client().chat.completions.create(**chat("q") | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError) as e:
        live.client().chat.completions.create(**chat("q"), presence_penalty=3)
    assert e.value.param == "presence_penalty"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"{", 400), (b"", 400), (b"[]", 400), (b'"\xff"', 400), (b"[" * 100_000, 400), (b"1" * 5000, 400),
        (b'{"model": NaN}', 400), (json.dumps(chat("\ud800")).encode(), 400),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request(data: bytes, status: int, live: Live) -> None:
    answer = httpx.post(f"{live.url}/v1/chat/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_of_another_type(live: Live) -> None:
    # What a web page can send to a server on its visitor's machine without asking.
    answer = httpx.post(f"{live.url}/v1/chat/completions", content=json.dumps(chat("q")))
    assert answer.status_code == 400


def test_other_paths_and_methods(live: Live) -> None:
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("GET", "/nowhere", 404), ("GET", "/docs", 404)):
        answer = httpx.request(method, live.url + path)
        assert answer.status_code == status
        assert "message" in answer.json()["error"]


def test_a_body_that_is_too_big(live: Live) -> None:
    big = json.dumps(chat("a" * LIMITS.body_bytes)).encode()
    headers = {"content-type": "application/json"}
    whole = httpx.post(f"{live.url}/v1/chat/completions", content=big, headers=headers)
    pieces = httpx.post(f"{live.url}/v1/chat/completions", content=iter([big[:-1000], big[-1000:]]), headers=headers)
    for answer, number in ((whole, f"{len(big):,}"), (pieces, f"{LIMITS.body_bytes:,}")):
        assert answer.status_code == 413
        assert number in answer.json()["error"]["message"]


def test_pictures(live: Live) -> None:
    def about(url: str) -> str:
        part = {"type": "image_url", "image_url": {"url": url}}
        error = refused(live, **chat("q", part))
        assert error["param"] == "messages.0.content.0.image_url.url"
        return str(error["message"])

    whole = image(1)["image_url"]["url"]
    assert "no image" in about("data:image/png;base64,AAAA") or "not an image" in about("data:image/png;base64,AAAA")
    assert "damaged" in about(whole[: len(whole) // 2 // 4 * 4 + 2])
    assert "base64" in about("data:image/png,abc")
    assert "data URL" in about("picture.png")
    assert "data URL" in about("/etc/passwd")
    bomb = io.BytesIO()
    PIL.Image.new("1", (8200, 8200)).save(bomb, "PNG")
    assert "67,240,000 pixels" in about("data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode())
    assert "1,000,000" in about(url_of(1000, 1000))
    assert f"{LIMITS.pixels:,}" in about(url_of(1000, 1000))
    # The bound is for all pictures of a request together.
    one = {"type": "image_url", "image_url": {"url": url_of(150, 150)}}
    assert live.post(**chat("q", one), max_tokens=1).status_code == 200
    assert "45,000 pixels" in refused(live, **chat("q", one, one))["message"]


def url_of(width: int, height: int) -> str:
    data = io.BytesIO()
    PIL.Image.new("1", (width, height)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def test_too_many_media(live: Live) -> None:
    error = refused(live, **chat("q", *(image(i) for i in range(LIMITS.media + 1))))
    assert f"more than the {LIMITS.media} " in error["message"]
    assert error["param"] == "messages.0.content.3.image_url.url"


def test_sounds(live: Live) -> None:
    broken = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    assert refused(live, **chat("q", broken))["code"] == "invalid_audio"
    broken["input_audio"]["data"] = "no base64!"
    assert "base64" in refused(live, **chat("q", broken))["message"]
    broken["input_audio"]["format"] = "midi"
    assert refused(live, **chat("q", broken))["param"] == "messages.0.content.0.input_audio.format"
    opener = MediaOpener(live.service.processor, MediaSources(), ServerLimits(audio_seconds=0.5))
    with errors.refused("request", "1.0 seconds", "0.5", error=ApiError):
        opener.audio(audio(seconds=1)["input_audio"]["data"], "p")


def test_more_tokens_than_the_context(live: Live) -> None:
    prompt = live.client().chat.completions.create(**chat("q"), max_tokens=1).usage.prompt_tokens
    error = refused(live, max_tokens=512)
    assert error["code"] == "context_length_exceeded"
    assert str(prompt) in error["message"]
    assert "512" in error["message"]
    assert live.post(max_tokens=512 - prompt, stop=["e"]).status_code == 200
    long = refused(live, **chat("dog " * 600))
    assert long["param"] == "messages"
    assert "512" in long["message"]
    assert "letters" in refused(live, **chat("a" * 100_000))["message"]


def test_n_is_bounded_by_the_slots(live: Live) -> None:
    error = refused(live, n=LIMITS.slots + 1)
    assert error["param"] == "n"
    assert f"{LIMITS.slots}" in error["message"]


def test_refused_requests_leave_nothing_behind(live: Live) -> None:
    refused(live, temperature=3)
    assert until(lambda: live.service.middleware.admitted == 0 and live.metric("admitted_requests") == 0)
    assert live.metric("requests_total", status="400") > 0


def test_a_page_under_another_name_cannot_ask_a_server_without_keys(both: Any) -> None:
    with serving(both.model, both.processor, hosts=LOCAL_NAMES) as local:
        for host, status in (("evil.example", 403), ("localhost:1", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200)):
            assert httpx.get(f"{local.url}/v1/models", headers={"host": host}).status_code == status


class TestKeys:
    def test_a_server_with_keys(self, both: Any) -> None:
        with serving(both.model, both.processor, keys=["first-key", "second-key"]) as locked:
            for key, status in (
                (None, 401),
                ("wrong-key", 401),
                ("first-ke", 401),
                ("first-key", 200),
                ("second-key", 200),
            ):
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                for path in ("/v1/models", "/metrics", "/openapi.json"):
                    answer = httpx.get(locked.url + path, headers=headers)
                    assert answer.status_code == status
                    assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)
            assert httpx.get(f"{locked.url}/health").status_code == 200
            with pytest.raises(openai.AuthenticationError):
                locked.client().chat.completions.create(**chat("q"), max_tokens=1)
            client = locked.client(api_key="second-key")
            assert client.chat.completions.create(**chat("q"), max_tokens=1).model == NAME

    @pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Basic long-enough", b"Bearer long-enough2"])
    def test_what_is_no_key(self, header: bytes) -> None:
        keys = Keys(["long-enough"])
        assert keys.admits(b"bearer long-enough")
        assert not keys.admits(header)

    def test_weak_keys_are_refused(self) -> None:
        for key in ("short", " padded-key ", "schlüssel-schlüssel"):
            with errors.refused("out-of-range", "8 or more", len(key)):
                Keys([key])

    def test_an_address_that_others_reach_wants_a_key(self) -> None:
        assert check_address("127.0.0.1", Keys([]), no_auth=False)
        assert check_address("localhost", Keys([]), no_auth=False)
        for host in ("0.0.0.0", "::", "192.0.2.1"):
            with errors.refused("missing-field", host, "--no-auth"):
                check_address(host, Keys([]), no_auth=False)
            assert not check_address(host, Keys(["long-enough"]), no_auth=False)
            assert not check_address(host, Keys([]), no_auth=True)

    def test_addresses_that_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", none)
        with errors.refused("unknown-name", "'nowhere.example'"):
            check_address("nowhere.example", Keys([]), no_auth=True)


def test_limits_that_are_none() -> None:
    with errors.refused("out-of-range", "slots is 0"):
        ServerLimits(slots=0)
    with errors.refused("out-of-range", "grace seconds is -1"):
        ServerLimits(grace_seconds=-1)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "allowed").mkdir()
        PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "allowed" / "red one.png")
        PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "secret.png")
        (tmp_path / "allowed" / "link.png").symlink_to(tmp_path / "secret.png")
        (tmp_path / "allowed" / "big.png").write_bytes(b"0" * 300_000)
        return tmp_path

    def test_only_what_lies_in_an_allowed_folder(self, folder: Path, both: Any) -> None:
        inside = MediaOpener(both.processor, MediaSources(folders=(folder / "allowed",)), LIMITS)
        assert inside.image((folder / "allowed" / "red one.png").as_uri(), "p").getpixel((0, 0)) == (255, 0, 0)
        base = folder.as_uri()
        bad = [
            f"{base}/secret.png", f"{base}/allowed/../secret.png", f"{base}/allowed/%2e%2e/secret.png",
            f"{base}/allowed/link.png", f"{base}/allowed/nothing.png", f"{base}/allowed", "file:///etc/passwd",
            f"file://elsewhere{folder}/allowed/red%20one.png", "file:///dev/zero", "file:///%00",
        ]  # fmt: skip
        messages = set()
        for url in bad:
            with pytest.raises(ApiError) as e:
                MediaOpener(both.processor, inside.sources, LIMITS).image(url, "p")
            assert e.value.status == 400
            messages.add(e.value.message)
        assert len(messages) == 1, "whether a file exists must not show"
        with errors.refused("request", "300,000 bytes", error=ApiError):
            inside.image(f"{base}/allowed/big.png", "p")

    def test_files_are_off(self, folder: Path, live: Live) -> None:
        part = {"type": "image_url", "image_url": {"url": (folder / "secret.png").as_uri()}}
        assert "does not read that file" in refused(live, **chat("q", part))["message"]

    def test_folders_and_hosts_that_are_none(self, folder: Path) -> None:
        with errors.refused("missing-file", folder / "secret.png"):
            MediaSources(folders=(folder / "secret.png",))
        with errors.refused("wrong-type", "'https://example.org'", "HOST"):
            MediaSources(hosts=("https://example.org",))
