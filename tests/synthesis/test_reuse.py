"""Ranking a table again, exporting it, and uploading it."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data import load_preferences, select_pairs, write_pickapic
from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.card import push_table
from diffalign.synthesis.config import RerankConfig, parse
from diffalign.synthesis.export import export_folder, export_webdataset
from diffalign.synthesis.rerank import rerank
from diffalign.synthesis.run import generate
from tests.synthesis.conftest import JUDGES, table_bytes


def reranked(table, folder, **changes):
    config = parse(RerankConfig, {"table": str(table), "output_dir": str(folder), **changes})
    return rerank(config), list(load_preferences(folder))


# --- ranking again -----------------------------------------------------------------------------------------------


def test_other_weights_need_no_model(clean, tmp_path):
    models = [{"model": "red"}, {"model": "spread", "votes": False}]  # names of stored scores, of no models
    report, rows = reranked(clean[0].output_dir, tmp_path / "t", reward_models=models)
    before = list(load_preferences(clean[0].output_dir))
    assert [row.image_bytes for row in rows] == [row.image_bytes for row in before]
    assert [row.scores for row in rows] == [row.scores for row in before]
    for row in rows:
        red = row.scores["red"]
        assert row.rank == [1 + sum(other > own for other in red) for own in red]
    assert report["reward_models"]["red"]["identity"]["id"].endswith("judges:red")
    assert not report["reward_models"]["spread"]["votes"]


def test_another_model_is_asked_about_the_stored_pictures(clean, tmp_path):
    models = [{"name": "green", "model": JUDGES + "GreenJudge"}, {"model": "red"}]
    _, rows = reranked(clean[0].output_dir, tmp_path / "t", reward_models=models)
    green = [np.asarray(image)[..., 1].mean() for image in rows[0].images]
    best = int(np.argmax(green))
    assert rows[0].scores["green"][best] == pytest.approx(0.9, abs=0.1)
    assert "comparisons" in datasets.load_dataset(str(tmp_path / "t"), split="train").column_names


def test_rows_set_aside_come_back_when_somebody_can_judge_them(settings, tmp_path):
    models = [{"name": "blind", "model": JUDGES + "blind_to_dogs"}]
    config = settings(reward_models=models)
    assert generate(config)["rows"] == 3
    models = [{"name": "blind", "model": JUDGES + "red"}]
    _, rows = reranked(config.output_dir, tmp_path / "t", reward_models=models, rescore=["blind"])
    assert {row.prompt for row in rows} == {"a cat", "a dog", "a bird", "two dogs", "a red fish"}


def test_delta_learning_ranks_by_pipelines(clean, tmp_path):
    weights = {"one": 0.0, "two": 1.0}
    _, rows = reranked(
        clean[0].output_dir, tmp_path / "t", rank_by="pipelines", reward_models=[], pipeline_weights=weights
    )
    assert all(row.rank == [2, 2, 1] for row in rows)
    with pytest.raises(ConfigError, match="'two', which has no weight"):
        reranked(
            clean[0].output_dir, tmp_path / "u", rank_by="pipelines", reward_models=[], pipeline_weights={"one": 1.0}
        )


# --- other programs ----------------------------------------------------------------------------------------------


def official_pairs(folder):
    """What a script made for Pick-a-Pic v2 does: official column names, bytes, 0.5 for a tie."""
    for file in sorted(Path(folder).glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            first, second = (Image.open(io.BytesIO(row[f"jpg_{i}"])).convert("RGB") for i in (0, 1))
            yield row["caption"], first, second, row["label_0"], row["label_1"]


def test_pickapic_scripts_read_the_export_with_order_and_ties_right(clean, tmp_path):
    dataset = load_preferences(clean[0].output_dir)
    examples, _ = select_pairs(dataset, pairs="all", ties="soft")
    write_pickapic(dataset, examples, tmp_path / "pap")
    expected = {}
    for row in dataset:
        for i in range(3):
            for j in range(i + 1, 3):
                label = 0.5 if row.rank[i] == row.rank[j] else float(row.rank[i] < row.rank[j])
                expected[row.prompt, row.images[i].tobytes(), row.images[j].tobytes()] = label
    seen = {(c, a.tobytes(), b.tobytes()): label for c, a, b, label, _ in official_pairs(tmp_path / "pap")}
    assert seen == expected
    assert all(first + second == 1.0 for *_, first, second in official_pairs(tmp_path / "pap"))


def test_an_image_folder_loads_again(clean, tmp_path):
    dataset = load_preferences(clean[0].output_dir)
    export_folder(dataset, tmp_path / "folder")
    again = load_preferences(tmp_path / "folder")
    for ours, theirs in zip(dataset, again, strict=True):
        assert (ours.prompt, ours.image_bytes, ours.rank, ours.scores, ours.sources) == (
            theirs.prompt, theirs.image_bytes, theirs.rank, theirs.scores, theirs.sources
        )  # fmt: skip
    with pytest.raises(DataError, match="there already"):
        export_folder(dataset, tmp_path / "folder")


def test_webdataset_is_read_by_datasets(clean, tmp_path):
    dataset = load_preferences(clean[0].output_dir)
    files = export_webdataset(dataset, tmp_path / "wds", shard_rows=3)
    assert [path.name for path in files] == ["train-00000.tar", "train-00001.tar"]
    rows = datasets.load_dataset("webdataset", data_files=[str(path) for path in files], split="train")
    for row, ours in zip(rows, dataset, strict=True):
        assert row["json"]["prompt"] == ours.prompt and row["json"]["rank"] == ours.rank
        assert row["2.png"].tobytes() == ours.images[2].tobytes()


# --- the hub -----------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    files: dict[str, bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            reply = {"url": f"{self.server.url}/datasets/me/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            reply = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path == "/api/validate-yaml":
            reply = {"errors": [], "warnings": []}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            reply = {"commitUrl": f"{self.server.url}/datasets/me/table/commit/1", "commitOid": "1"}
        self._reply(reply)

    def do_GET(self):
        self._reply({"id": "me/table", "sha": "0", "siblings": []})

    def _reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    yield server
    server.shutdown()


def test_a_pushed_table_is_the_table_and_nothing_else(clean, hub):
    folder = Path(clean[0].output_dir)
    assert push_table(folder, "me/table") == f"{hub.url}/datasets/me/table/commit/1"
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    own = table_bytes(folder)
    assert {name: hub.files.get(name) for name in own} == own
    assert not any(name.startswith((".work", "shards", "settings")) for name in hub.files)


def test_pushing_says_what_is_wrong(clean, hub, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no finished table"):
        push_table(tmp_path, "me/table")
    with pytest.raises(ConfigError, match="owner/name"):
        push_table(Path(clean[0].output_dir), "me/table/x")
    monkeypatch.setattr("diffalign.synthesis.card.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push_table(Path(clean[0].output_dir), "me/table")
