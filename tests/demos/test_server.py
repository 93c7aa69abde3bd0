"""The served page: its endpoints, what it serves and what it refuses. A real server on this machine, no browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from diffalign.demo import ui, ui_compare  # noqa: E402
from diffalign.demo.engine import Ask, Engine, Limits  # noqa: E402
from diffalign.demo.models import parse_model  # noqa: E402
from diffalign.demo.runs import Runs  # noqa: E402
from diffalign.demo.session import Session  # noqa: E402
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
    demo.page, demo.url = page, ui.launch(page, demo)
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


def event(page, module: str, name: str):
    """A private event of the page: Gradio hands it the settings as values by component."""
    found = [fn for fn in page.fns.values() if fn.fn and (fn.fn.__module__, fn.fn.__name__) == (module, name)]
    return found[0].fn, {part.elem_id or part.label: part for part in found[0].inputs}


def test_a_training_run_is_read_and_two_of_its_checkpoints_are_drawn(server, weights):
    run = server.runs.root / "run"
    shutil.copytree(weights["lora"], run)
    (run / "validation").mkdir()
    Image.new("RGB", (8, 8)).save(run / "validation" / "step-7.png")
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    (run / "config.yaml").write_text(f"model: {weights['base']}\n")
    read, _ = event(server.page, "diffalign.demo.ui_runs", "read")
    run_choice, verdict, curves, steps, grid, settings, first, second, details = read(None)  # the newest
    assert run_choice.value == "run" and details.visible
    assert "still going" in verdict and "loss from 0.5" in curves and "<img" in grid and "model:" in settings
    assert (steps.value, first.value, second.value) == ("7", "start", "final")
    compare, parts = event(server.page, "diffalign.demo.ui_runs", "compare")
    values = {part: part.value for part in parts.values()}
    values |= {parts["run"]: "run", parts["checkpoint-first"]: "start", parts["checkpoint-second"]: "final"}
    values |= {parts["Steps"]: 1, parts["prompts"]: "a cat\n\n a  cat "}
    *_, (status, sheet) = compare(values, SimpleNamespace(session_hash="page"))
    assert "2 of 2 pictures" in status and "start, seed 0: a cat" in sheet and "final, seed 0: a cat" in sheet
    with pytest.raises(gradio.Error, match="two different checkpoints"):
        list(compare(values | {parts["checkpoint-second"]: "start"}, SimpleNamespace(session_hash="page")))
    with pytest.raises(gradio.Error, match="Fill in a number for Steps"):
        list(compare(values | {parts["Steps"]: None}, SimpleNamespace(session_hash="page")))


def test_a_folder_without_runs_says_so_and_the_tab_stays_as_it_was_left(tmp_path, server):
    page = ui.build(ui.Demo(server.engine, server.votes, Runs(tmp_path / "<none>"), tmp_path / "exports"))
    read, _ = event(page, "diffalign.demo.ui_runs", "read")
    found = read(None)
    assert "No training run was found in &lt;none&gt;" in found[1] and not found[-1].visible
    opened, _ = event(page, "diffalign.demo.ui_runs", "open_tab")
    assert "No training run" in opened(None, "")[1] and "No training run" not in str(opened(None, "read before"))


def test_models_and_prompt_files_are_added_on_the_page(server, weights, tmp_path):
    add, _ = event(server.page, "diffalign.demo.ui", "add")
    choices, emptied = add(f"more={weights['other']}", ["base"])
    assert choices.value == ["base", "more"] and ("more", "more") in choices.choices and emptied == ""
    with pytest.raises(gradio.Error, match="no file or folder"):
        add("/nowhere", ["base"])
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    read, _ = event(server.page, "diffalign.demo.ui", "read")
    assert read(str(tmp_path / "p.txt")).splitlines() == [f"prompt {i}" for i in range(16)]


def test_clients_cannot_vote_for_each_other(server):
    mine, yours = Client(server.url, verbose=False), Client(server.url, verbose=False)
    pair = mine.predict(["a cat"], ["base", "lora"], **SETTINGS, api_name="/pair")
    with pytest.raises(AppError, match="not waiting for your vote"):
        yours.predict(pair["id"], "left", api_name="/vote")
    mine.predict(pair["id"], "left", api_name="/vote")


def test_mistakes_come_back_as_one_sentence(server, monkeypatch):
    client = Client(server.url, verbose=False)
    for arguments, message in (
        ((["x" * 2000], ["base"], [0]), "1000 letters"),
        ((["a"], ["nothing"], [0]), "no model called"),
        ((["a"], ["base"], [0], 500), "1 to 5 steps"),
        (("a red circle", ["base"], [0]), "Expected a list"),
        ((["a"], ["base"], ["no number"]), "whole numbers"),
    ):
        with pytest.raises(AppError, match=message) as caught:
            client.predict(*arguments, api_name="/compare")
        assert "Traceback" not in str(caught.value)
    monkeypatch.setattr(server.engine, "compare", lambda *args: 1 / 0)
    with pytest.raises(AppError, match="Something went wrong on the server"):  # our own failure: no inside on the page
        client.predict(["a"], ["base"], [0], api_name="/compare")


def test_win_rates_are_against_the_first_model_that_was_drawn(server):
    session = Session("page")
    for model, score in (("lora", 1.0), ("other", 2.0)):
        session.tally.add(0, "a cat", model, {"red": score})
    engine = SimpleNamespace(labels=["base", "lora", "other"])
    table, chart = ui_compare._tables(SimpleNamespace(engine=engine), session)
    assert "other" in table and "against lora" in table and "base" not in table + chart


def test_a_job_stopped_before_its_first_picture_leaves_no_slider():
    accordion, *_ = ui_compare._choices((Ask(("a",), (0,), ("base", "lora")), []), "", "")
    assert accordion.visible is False


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
