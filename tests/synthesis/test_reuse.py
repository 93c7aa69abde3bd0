"""Ranking a table again, exporting it, and uploading it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data import FEATURES, load_preferences, select_pairs, write_pickapic, write_preferences
from diffalign.data.schema import write_parquet
from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.card import push_table
from diffalign.synthesis.config import RerankConfig, parse
from diffalign.synthesis.export import export_folder, export_webdataset
from diffalign.synthesis.rerank import StoredRows, rerank
from diffalign.synthesis.run import generate
from diffalign.synthesis.store import SET_ASIDE
from tests.data.conftest import png
from tests.synthesis.conftest import JUDGES, table_bytes
from tests.synthesis.judges import red


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


def test_another_table_in_the_same_place_is_noticed(clean, own_clean, tmp_path):
    """As many rows, other pictures: what was made of the first must not be taken for what is made of the second."""
    models, source = [{"model": "red"}], Path(own_clean.output_dir)
    reranked(source, tmp_path / "t", reward_models=models)
    reranked(source, tmp_path / "t", reward_models=models)
    other = [{"model": "spread"}]
    reranked(clean[0].output_dir, tmp_path / "other", reward_models=other)
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "other", source)
    with pytest.raises(ConfigError, match="other settings .table_digest: "):
        reranked(source, tmp_path / "t", reward_models=models)


def test_another_foreign_table_in_the_same_place_is_noticed(tmp_path):
    for seeds in ((0, 1), (2, 3)):
        shutil.rmtree(tmp_path / "table", ignore_errors=True)
        images = [png(seed) for seed in seeds]
        write_preferences([{"prompt": "p", "images": images, "scores": {"red": [1.0, 2.0]}}], tmp_path / "table")
        if seeds == (0, 1):
            reranked(tmp_path / "table", tmp_path / "t", reward_models=["red"])
    with pytest.raises(ConfigError, match="other settings .table_digest: "):
        reranked(tmp_path / "table", tmp_path / "t", reward_models=["red"])


def test_rows_set_aside_are_read_anew_after_they_were_written_anew(tmp_path):
    prompts, digests = [], []
    write_preferences([{"prompt": "p", "images": [png(0), png(1)], "rank": [1, 2]}], tmp_path)
    for prompt in ("first", "second"):
        images = [{"bytes": png(seed), "path": None} for seed in (2, 3)]
        cells = {"prompt": prompt, "images": images, "problems": ["", ""], "reason": "missing scores"}
        write_parquet([dict.fromkeys(SET_ASIDE) | cells], tmp_path / "set_aside" / "0.parquet", SET_ASIDE)
        rows = StoredRows(str(tmp_path))
        prompts.append(rows[1].prompt)
        digests.append(rows.digest())
    assert prompts == ["first", "second"] and digests[0] != digests[1]


def test_rows_set_aside_name_no_pictures_of_elsewhere(tmp_path):
    write_preferences([{"prompt": "p", "images": [png(0), png(1)], "rank": [1, 2]}], tmp_path / "table")
    (tmp_path / "private.png").write_bytes(png(2))
    images = [{"bytes": None, "path": str(tmp_path / "private.png")}] * 2
    cells = {"prompt": "p", "images": images, "problems": ["", ""], "reason": "missing scores"}
    aside = tmp_path / "table" / "set_aside" / "0.parquet"
    write_parquet([dict.fromkeys(SET_ASIDE) | cells], aside, SET_ASIDE)
    with pytest.raises(DataError, match="private.png lies outside"):
        StoredRows(str(tmp_path / "table"))[1]


def test_a_model_is_asked_about_the_rows_that_lack_its_scores_alone(tmp_path):
    table = [
        {"prompt": "p", "images": [png(0), png(1)], "scores": {"red": [5.0, 7.0], "kept": [0.0, 1.0]}},
        {"prompt": "q", "images": [png(2), png(3)], "scores": {"kept": [0.0, 1.0], "late": [1.0, 0.0]}},
    ]
    for row in table:
        row["rank"] = [1, 2]
    write_preferences(table, tmp_path / "table")
    assert StoredRows(str(tmp_path / "table")).score_names() == ["red", "kept", "late"]
    models = [{"name": "red", "model": JUDGES + "red"}, {"name": "green", "model": JUDGES + "GreenJudge"}, "kept"]
    _, (first, second) = reranked(tmp_path / "table", tmp_path / "t", reward_models=models, prompts_per_shard=1)
    assert first.scores["red"] == [5.0, 7.0]
    assert second.scores["red"] == pytest.approx(red(second.images, []))
    assert second.scores["kept"] == [0.0, 1.0] and second.scores["late"] == [1.0, 0.0]


def test_a_table_ranked_again_says_who_drew_and_judged_it(clean, tmp_path, caplog):
    source = json.loads((Path(clean[0].output_dir) / "manifest.json").read_text())
    report, _ = reranked(clean[0].output_dir, tmp_path / "t", reward_models=["red"])
    assert (report["hold_outs"], report["reward_models"]["spread"]["votes"]) == (["spread"], False)
    reranked(tmp_path / "t", tmp_path / "u", reward_models=["spread"])
    for folder in (tmp_path / "t", tmp_path / "u"):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert all(manifest[key] == source[key] for key in ("pipelines", "seed", "reward_models"))
        card = (folder / "README.md").read_text()
        assert "| one | painter0 |" in card and "Diversity:" not in card
    assert not caplog.records


def test_scores_of_two_models_under_one_name_are_warned_of(clean, tmp_path, caplog):
    folder = tmp_path / "table"
    shutil.copytree(clean[0].output_dir, folder)
    first, *others = sorted(folder.glob("train-*.parquet"))
    rows = pq.read_table(first).to_pylist()
    for row in rows:
        row["scores"] = [entry for entry in row["scores"] if entry["name"] != "spread"]
    write_parquet(rows, first, FEATURES)
    reranked(folder, tmp_path / "t", reward_models=[{"name": "spread", "model": JUDGES + "red"}])
    assert "some rows keep scores of another model" in caplog.text and "rescore=[spread]" in caplog.text


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


def test_a_damaged_picture_ends_an_export_in_an_error_that_names_it(tmp_path):
    rows = [{"prompt": "p", "images": [png(0), png(1)], "rank": [1, 2]}]
    rows += [{"prompt": "q", "images": [png(0), b"garbage"], "rank": [1, 2]}]
    for export in (export_folder, export_webdataset):
        with pytest.raises(DataError, match=r"row 1, images\[1\]: not a readable image"):
            export(load_preferences(rows), tmp_path / export.__name__)


def test_prompts_with_every_kind_of_line_end_come_back_from_an_image_folder(tmp_path):
    prompt = "one\u2028two\u2029three\u0085four\r\nfive"
    export_folder(load_preferences([{"prompt": prompt, "images": [png(0), png(1)], "rank": [1, 2]}]), tmp_path)
    assert [row.prompt for row in load_preferences(tmp_path)] == [prompt]


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
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConfigError, match="the hub cannot be reached: .*The table is safe in"):
        push_table(Path(clean[0].output_dir), "me/table")
    monkeypatch.setattr("diffalign.synthesis.card.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push_table(Path(clean[0].output_dir), "me/table")
