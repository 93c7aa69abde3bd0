"""The served page: its endpoints, what it serves and what it refuses. A real server on this machine, no browser."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

gradio = pytest.importorskip("gradio")
from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from diffalign.demo import ui  # noqa: E402
from diffalign.demo.engine import Engine, Limits  # noqa: E402
from diffalign.demo.models import parse_model  # noqa: E402
from diffalign.demo.runs import Runs  # noqa: E402
from diffalign.demo.votes import VoteBook  # noqa: E402
from tests.demos.conftest import only_cats, red  # noqa: E402

SETTINGS = {"steps": 2, "guidance": 2.0}
PUBLIC = {"models", "compare", "pair", "vote", "standings", "export"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, weights, pool):
    folder, base = tmp_path_factory.mktemp("server"), str(weights["base"])
    models = [parse_model(f"{name}={weights[name]}", base) for name in ("base", "lora")]
    engine = Engine(folder, models, scorers=[red, only_cats], pool=pool, limits=Limits(steps=5))
    demo = ui.Demo(engine, VoteBook(folder / "votes"), Runs(folder), folder / "exports", prompts=["a cat"])
    page = ui.build(demo)
    demo.url = ui.launch(page, demo)
    yield demo
    page.close()


def test_endpoints_are_those_that_are_documented(server):
    client = Client(server.url, verbose=False)
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name.strip("/") for name in named} == PUBLIC
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text()
    assert all(f"`/{name}`" in page for name in PUBLIC)
    assert [model["label"] for model in client.predict(api_name="/models")] == ["base", "lora"]


def test_compare_vote_and_export_by_program(server):
    client = Client(server.url, verbose=False)
    drawn = client.predict(["a cat"], ["base", "lora"], [0, 1], **SETTINGS, api_name="/compare")
    assert [(p["model"], p["seed"]) for p in drawn] == [("base", 0), ("base", 1), ("lora", 0), ("lora", 1)]
    assert drawn[0]["scores"]["only_cats"] == 1.0
    assert httpx.get(server.url + drawn[0]["url"]).content[:4] == b"\x89PNG"
    before = client.predict(api_name="/standings")["votes"]
    pair = client.predict(["a cat"], ["base", "lora"], **SETTINGS, api_name="/pair")
    assert set(pair) == {"id", "prompt", "left", "right"}
    answer = client.predict(pair["id"], "tie", api_name="/vote")
    assert {answer["left"], answer["right"]} == {"base", "lora"}
    standings = client.predict(api_name="/standings")
    assert standings["votes"] == before + 1 and standings["ratings"][0]["elo"]["low"] is not None
    (url,) = client.predict("pickapic", api_name="/export")
    assert httpx.get(server.url + url).content[:4] == b"PAR1"


def test_clients_cannot_vote_for_each_other(server):
    mine, yours = Client(server.url, verbose=False), Client(server.url, verbose=False)
    pair = mine.predict(["a cat"], ["base", "lora"], **SETTINGS, api_name="/pair")
    with pytest.raises(AppError, match="not waiting for your vote"):
        yours.predict(pair["id"], "left", api_name="/vote")
    mine.predict(pair["id"], "left", api_name="/vote")


def test_mistakes_come_back_as_one_sentence(server):
    client = Client(server.url, verbose=False)
    for arguments, message in (
        ((["x" * 2000], ["base"], [0]), "1000 letters"),
        ((["a"], ["nothing"], [0]), "no model called"),
        ((["a"], ["base"], [0], 500), "1 to 5 steps"),
    ):
        with pytest.raises(AppError, match=message) as caught:
            client.predict(*arguments, api_name="/compare")
        assert "Traceback" not in str(caught.value)
    with pytest.raises(AppError, match="Something went wrong on the server"):  # our own failure: no inside on the page
        client.predict(["a"], ["base"], ["no number"], api_name="/compare")


def test_only_the_demos_own_folder_is_served(server, weights):
    secret = server.engine.pictures.parent / "secret.txt"
    secret.write_text("secret")
    repository = Path(__file__).parents[2] / "pyproject.toml"
    for path in ("/etc/passwd", str(repository), str(secret), f"{server.engine.pictures}/../secret.txt"):
        assert httpx.get(f"{server.url}gradio_api/file={path}").status_code in (403, 404), path
    assert server.url.startswith("http://127.0.0.1:")
    large = {"files": ("big.txt", b"x" * 2_000_000)}
    assert httpx.post(f"{server.url}gradio_api/upload", files=large).status_code == 413


def test_a_password_is_asked_for(tmp_path, weights, pool):
    engine = Engine(tmp_path, [parse_model(f"base={weights['base']}")], scorers=[red], pool=pool)
    demo = ui.Demo(engine, VoteBook(tmp_path / "votes"), Runs(tmp_path), tmp_path / "exports", allow_add=False)
    page = ui.build(demo)
    url = ui.launch(page, demo, password="wren")
    try:
        assert httpx.get(f"{url}config").status_code == 401
        assert httpx.post(f"{url}login", data={"username": "diffalign", "password": "x"}).status_code == 400
        assert httpx.post(f"{url}login", data={"username": "diffalign", "password": "wren"}).status_code == 200
        assert not any(block.get("props", {}).get("value") == "Add" for block in page.config["components"])
    finally:
        page.close()
