"""The card that is published with trained weights, and the upload to a hub (a small real server on loopback)."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.pipelines.hub import model_licence
from diffalign.shapes import pipeline_folder
from diffalign.trainers.config import DPOConfig, SFTConfig, TrainingConfig
from diffalign.trainers.health import Alarm
from diffalign.trainers.model_card import push_to_hub, write_model_card

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def _card(folder: Path, config: TrainingConfig | None = None, **options) -> tuple[dict, str]:
    defaults = {"base_model": SDXL, "pipeline_class": "StableDiffusionXLPipeline"}
    path = write_model_card(folder, config=config or DPOConfig(hub_model_id="me/aligned"), **{**defaults, **options})
    text = path.read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert ModelCard.load(path).data.to_dict() == header
    return header, text


def test_the_header_is_what_the_hub_reads(tmp_path):
    header, _ = _card(tmp_path, dataset="someone/preferences", base_model_license="openrail++")
    assert header == {
        "base_model": SDXL,
        "base_model_relation": "adapter",
        "datasets": ["someone/preferences"],
        "library_name": "diffusers",
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "tags": ["diffalign", "dpo", "preference-alignment", "lora"],
    }
    header, _ = _card(tmp_path, DPOConfig(adapter="none"))
    assert header["base_model_relation"] == "finetune" and "lora" not in header["tags"]


def test_the_text_says_what_was_done(tmp_path):
    _, text = _card(
        tmp_path,
        DPOConfig(hub_model_id="me/aligned", beta=2000.0, validation_prompts=["a | b"]),
        examples=320,
        steps=200,
        metrics={"loss": 0.61, "rewards/accuracies": 0.71, "timesteps/0-249/loss": 1.0, "grad_norm": float("nan")},
        alarms=[Alarm("saturation", "nothing pulls any more.", 150)],
    )
    for part in (
        "# me/aligned",
        "trained with **Diffusion-DPO** (320 examples) for 200 optimizer steps",
        "beta 2000 in the convention",
        "| `rewards/accuracies` | 0.71 |",
        "| `grad_norm` | not finite |",
        "- step 150, saturation: nothing pulls any more.",
        "| `beta` | 2000.0 |",
        "| `validation_prompts` | a \\| b |",
        "arXiv:2311.12908",
        "whose licence applies",
    ):
        assert part in text, part
    assert "timesteps/0-249" not in text
    assert "No alarm fired" in _card(tmp_path, metrics={"loss": 0.6})[1]


def test_no_path_of_this_machine_is_published(tmp_path):
    base, data = tmp_path / "base", tmp_path / "data"
    base.mkdir()
    config = DPOConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), resume=str(tmp_path / "c"))
    header, text = _card(tmp_path / "final", config, base_model=str(base), dataset=str(data))
    assert str(tmp_path) not in text
    assert "base_model" not in header and "datasets" not in header
    assert "`base`" in text and "`data`" in text and "# run" in text


def test_the_code_to_load_is_for_the_kind_of_weights(tmp_path):
    _, lora = _card(tmp_path)
    assert f'StableDiffusionXLPipeline.from_pretrained("{SDXL}")\npipeline.load_lora_weights("me/aligned")' in lora
    _, full = _card(tmp_path, DPOConfig(adapter="none", hub_model_id="me/aligned"))
    assert 'StableDiffusionXLPipeline.from_pretrained("me/aligned")' in full and "load_lora_weights" not in full
    _, shapes = _card(tmp_path, DPOConfig(), base_model="shapes")
    assert 'load_pipeline("shapes")' in shapes and 'load_lora_weights("path/to/this/folder")' in shapes
    for text in (lora, full, shapes):
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_pictures_travel_with_the_card(tmp_path):
    picture = tmp_path / "step-000100.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    for _ in range(2):  # written again over itself
        _, text = _card(tmp_path / "final", images=[picture])
    assert "(images/step-000100.png)" in text
    assert (tmp_path / "final" / "images" / "step-000100.png").read_bytes() == picture.read_bytes()


def test_other_methods(tmp_path):
    header, text = _card(tmp_path, SFTConfig())
    assert "sft" in header["tags"] and "## Citation" not in text

    @dataclass(kw_only=True)
    class StrangeConfig(TrainingConfig):
        pass

    header, text = _card(tmp_path, StrangeConfig())
    assert "strange" in header["tags"] and "**Strange**" in text


BASE_CARD = b"---\nlicense: openrail++\n---\n# A base\n"


class _Hub(BaseHTTPRequestHandler):
    """The few endpoints of the hub that an upload of small files speaks to."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: _Server = self.server  # type: ignore[assignment]
        server.calls.append((self.path, self.headers.get("authorization"), body))
        if server.refuse:
            return self._answer(403, {"error": "you may not write here"})
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "tester"
            return self._answer(200, {"url": f"{server.url}/{owner}/{name}", "name": f"{owner}/{name}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self._answer(200, {"files": answer})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{server.url}/tester/aligned/commit/{'0' * 40}"
            return self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        return self._answer(200, {})  # validation of the card's header

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server: _Server = self.server  # type: ignore[assignment]
        if self.path == "/tester/base/resolve/main/README.md":
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(BASE_CARD)))
            self.end_headers()
            return self.wfile.write(BASE_CARD if self.command == "GET" else b"")
        server.calls.append((self.path, self.headers.get("authorization"), b""))
        self._answer(200, {"id": "tester/aligned", "sha": "0" * 40, "siblings": [], "private": True, "name": "tester"})

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls: list[tuple[str, str | None, bytes]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False


@pytest.fixture
def hub(monkeypatch):
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def _final(tmp_path: Path, config: DPOConfig) -> Path:
    folder = tmp_path / "final"
    _card(folder, config)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return folder


def test_push_makes_the_repository_and_uploads_every_file(hub, tmp_path):
    config = DPOConfig(hub_model_id="tester/aligned", hub_private=True)
    folder = _final(tmp_path, config)
    assert push_to_hub(folder, config).startswith(hub.url)
    assert hub.files["pytorch_lora_weights.safetensors"] == b"weights"
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    created = json.loads(next(body for path, _, body in hub.calls if path == "/api/repos/create"))
    assert created["name"] == "aligned" and (created.get("private") is True or created.get("visibility") == "private")
    assert all(authorization == "Bearer hf_test" for path, authorization, _ in hub.calls if "commit" in path)


def test_push_names_the_repository_after_the_folder(hub, tmp_path):
    config = DPOConfig(output_dir=str(tmp_path / "my-run"))
    push_to_hub(_final(tmp_path, config), config)
    assert any(path.startswith("/api/models/tester/my-run/commit/") for path, _, _ in hub.calls)


def test_the_licence_is_the_one_that_the_bases_card_states(hub, tmp_path, monkeypatch):
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert model_licence("tester/base", ask_hub=False) is None
    assert model_licence("tester/base") == "openrail++"
    assert model_licence("shapes") == "apache-2.0" == model_licence(str(pipeline_folder()))
    assert model_licence("tester/without-a-card") is None
    for content, expected in ((b"---\nlicense: mit\n---\n", "mit"), (b"# no header\n", None), (b"---\n{\n---\n", None)):
        (tmp_path / "README.md").write_bytes(content)
        assert model_licence(str(tmp_path)) == expected
    (tmp_path / "README.md").unlink()
    assert model_licence(str(tmp_path)) is None


def test_push_says_what_is_wrong(hub, tmp_path, monkeypatch):
    config = DPOConfig(hub_model_id="tester/aligned")
    with pytest.raises(ConfigError, match=r"no README.md"):
        push_to_hub(tmp_path, config)
    folder = _final(tmp_path, config)
    with pytest.raises(ConfigError, match="no repository name"):
        push_to_hub(folder, DPOConfig(hub_model_id="a/b/c"))
    hub.refuse = True
    with pytest.raises(ConfigError, match="hub refused"):
        push_to_hub(folder, config)
    monkeypatch.setattr("diffalign.trainers.model_card.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push_to_hub(folder, config)
