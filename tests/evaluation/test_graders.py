"""GenEval's rule on hand-made boxes and drawn shapes; point answers read strictly; real detectors, a real server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, DataError
from diffalign.evaluation.compare import compare_judged
from diffalign.evaluation.graders import (
    GENEVAL_COLORS,
    Detection,
    GenEvalGrader,
    Grader,
    UniGenBenchGrader,
    is_right,
    load_grader,
    parse_points,
    relations,
)
from diffalign.evaluation.judges import ClipColors, Mask2FormerDetector, ServerPointJudge
from diffalign.evaluation.panel import Panel
from diffalign.evaluation.pictures import SamplingSettings
from diffalign.evaluation.prompt_sets import Point
from diffalign.shapes import parse
from diffalign.shapes.checker import read
from diffalign.shapes.renderer import render
from reward_models import RewardModelError

BLANK = Image.new("RGB", (100, 100))


def box(label, left, top, side=10, confidence=1.0, color=None):
    return Detection(label, confidence, (left, top, left + side, top + side), color=color)


def entry(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "x"}


def shapes_detector(image):
    """The checker of the shapes world as a detector that also tells colours."""
    return [
        Detection(t.shape or "?", 1.0, (t.x - t.half, t.y - t.half, t.x + t.half, t.y + t.half), color=t.color)
        for t in read(image)[1]
    ]


def test_counting_needs_a_surer_detection_than_other_tasks():
    found = [box("dog", 0, 0), box("dog", 50, 0, confidence=0.8)]
    two = {"class": "dog", "count": 2}
    assert is_right(entry("two_object", two), found, BLANK)
    assert not is_right(entry("counting", two, exclude=[{"class": "dog", "count": 3}]), found, BLANK)
    one = entry("counting", {"class": "dog", "count": 1}, exclude=[{"class": "dog", "count": 2}])
    assert is_right(one, found, BLANK)
    assert not is_right(one, [*found, box("dog", 80, 0, confidence=0.95)], BLANK)


def test_only_the_surest_are_asked_for_their_colour():
    found = [box("car", 0, 0, confidence=0.4, color="red"), box("car", 50, 0, confidence=0.9, color="blue")]
    assert not is_right(entry("colors", {"class": "car", "count": 1, "color": "red"}), found, BLANK)
    assert is_right(entry("colors", {"class": "car", "count": 1, "color": "blue"}), found, BLANK)
    two = entry("colors", {"class": "car", "count": 2, "color": "red"})
    assert not is_right(two, found, BLANK) and is_right(two, [found[0], box("car", 9, 9, color="red")], BLANK)
    with pytest.raises(DataError, match="tells no colours"):
        is_right(entry("colors", {"class": "car", "count": 1, "color": "red"}), [box("car", 0, 0)], BLANK)


def test_positions_look_at_centres_and_leave_out_what_is_too_near():
    assert relations(box("a", 0, 0), box("b", 50, 0)) == {"left of"}
    assert relations(box("a", 50, 50), box("b", 0, 0)) == {"right of", "below"}
    assert relations(box("a", 0, 0), box("b", 20, 80)) == {"above"}
    assert relations(box("a", 0, 0), box("b", 2, 0)) == set()  # offset 2 = 0.1 x (10 + 10)
    position = entry("position", {"class": "b", "count": 1}, {"class": "a", "count": 1, "position": ["left of", 0]})
    assert is_right(position, [box("a", 0, 0), box("b", 50, 0)], BLANK)
    assert not is_right(position, [box("a", 50, 0), box("b", 0, 0)], BLANK)
    third = {"class": "c", "count": 1, "position": ["left of", 1]}  # of the second part, not of the first
    parts = entry("position", {"class": "b", "count": 1}, {"class": "a", "count": 1}, third)
    assert is_right(parts, [box("b", 0, 0), box("a", 80, 0), box("c", 40, 0)], BLANK)
    assert not is_right(parts, [box("b", 80, 0), box("a", 0, 0), box("c", 40, 0)], BLANK)


def test_the_rule_agrees_with_the_checker_on_drawn_shapes():
    picture = render(parse("a red circle left of a blue square"), np.random.default_rng(0))
    things = [{"class": "square", "count": 1, "color": "blue"}]
    grader = GenEvalGrader(shapes_detector)
    items = [
        entry("position", *things, {"class": "circle", "count": 1, "color": "red", "position": [relation, 0]})
        for relation in ("left of", "right of")
    ]
    assert grader.grade([picture, picture], items) == [[1.0], [0.0]]
    assert grader.dimensions(items[0]) == ["position"] and isinstance(grader, Grader)


def test_a_graders_answers_are_compared_by_its_own_dimensions_and_by_the_tasks_of_the_prompts():
    """Six prompts of two points: the base is right on the first point, the aligned model on both; one is not judged."""
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    prompts = [f"prompt {i}" for i in range(6)]

    def judge(images, asked, points):
        right = ["[1, 1]" if image.getpixel((0, 0))[0] else "[1, 0]" for image in images]
        return [None if text == "prompt 5" else f"<score>{r}</score>" for text, r in zip(asked, right, strict=True)]

    panel = Panel(prompts, [], UniGenBenchGrader(judge), [(prompt, POINTS) for prompt in prompts])
    base, aligned = panel.judge([black] * 6), panel.judge([white] * 6)
    tasks = ["one", "two"] * 3
    found = compare_judged(prompts, [0], base, aligned, panel, sampling=SamplingSettings(), tasks=tasks)
    task = found.by_task["unigenbench"]
    assert (task.base.overall.mean, task.aligned.overall.mean, task.difference.mean) == (0.5, 1.0, 0.5)
    assert {name: d.value for name, d in task.base.dimensions.items()} == {"Style": 1.0, "Attribute": 0.0}
    assert task.base.missing == pytest.approx(1 / 6) and task.base.lower == pytest.approx(5 / 12)
    assert found.base_scores["unigenbench"][:5] == [0.5] * 5 and np.isnan(found.base_scores["unigenbench"][5])
    assert (found.results["unigenbench"].n, found.results["unigenbench"].difference.mean) == (5, 0.5)


def test_a_picture_the_detector_cannot_judge_is_missing():
    assert GenEvalGrader(lambda image: None).grade([BLANK], [entry("counting")]) == [None]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<analysis>['x','y','z']</analysis>\n<score>[1, 0, 1]</score>", [1, 0, 1]),
        ("<score>\n[1,0,\n1]</score>", [1, 0, 1]),
        ("<score>[1, 0]</score>", None),
        ("<score>[1, 0, 2]</score>", None),
        ("<score>[1, 0, True]</score>", None),
        ("<score>[1, 0, '1']</score>", None),
        ("<score>1, 0, 1</score>", [1, 0, 1]),
        ("<score>[1, 0, 1]", None),
        ("<score>[1,0,1]</score><score>[0,0,0]</score>", None),
        ("<score>[1, 0, open('x')]</score>", None),
        ("[1, 0, 1]", None),
        ("", None),
        ("<score>" + "[" * 5000 + "</score>", None),
    ],
)
def test_point_answers_are_read_strictly(answer, expected):
    assert parse_points(answer, 3) == expected


def test_the_built_detector_finds_things_and_refuses_classes_it_does_not_know(tmp_path):
    folder = save_tiny_mask2former(tmp_path)
    detector = Mask2FormerDetector(str(folder), device="cpu", confidence=0.0)
    found = detector(Image.linear_gradient("L").resize((48, 40)).convert("RGB"))
    assert found and {d.label for d in found} <= {"dog", "computer mouse"}
    for d in found:
        left, top, right, bottom = d.box
        assert 0 <= left < right <= 48 and 0 <= top < bottom <= 40 and d.mask.shape == (40, 48)
    with pytest.raises(ConfigError, match="does not know 'bench'"):
        GenEvalGrader(detector).grade([BLANK], [entry("counting", {"class": "bench", "count": 1})])
    assert GenEvalGrader(detector).identity["code_version"]


def test_colours_are_named_by_clip_on_the_thing_alone(tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip-colors.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("tiny-clip-colors").state_dict(), tmp_path / "w.pt")
    colors = ClipColors("tiny-clip-colors", str(tmp_path / "w.pt"), device="cpu")
    picture = Image.new("RGB", (64, 64), "red")
    mask = np.zeros((64, 64), bool)
    mask[10:30, 10:30] = True
    thing = Detection("car", 1.0, (10, 10, 30, 30), mask)
    seen = colors(picture, [thing, thing], "car")
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0] in GENEVAL_COLORS
    other = Image.composite(picture, Image.new("RGB", (64, 64), "blue"), Image.fromarray(mask))
    assert colors(other, [thing], "car") == seen[:1]  # what lies outside the thing changes nothing


POINTS = [Point("Style", "ink"), Point("Attribute - Color", "a red hat")]


@pytest.fixture
def server():
    """An OpenAI-compatible server: right answers, junk for a prompt that says so, faults for another."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "nowhere" in self.path:
                self.send_error(404)
                return
            asked.append(body)
            text = body["messages"][0]["content"][0]["text"]
            if "broken" in text:
                self.send_error(400)
                return
            answer = "I think so." if "junk" in text else "<analysis>['a','b']</analysis><score>[1, 0]</score>"
            data = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}/v1", asked
    service.shutdown()
    service.server_close()


def test_a_judge_behind_a_server_answers_points_and_its_failures_are_missing(server):
    address, asked = server
    grader = UniGenBenchGrader(ServerPointJudge(address, "m", retries=0))
    items = [(prompt, POINTS) for prompt in ("a hat", "junk", "broken")]
    assert grader.grade([BLANK] * 3, items) == [[1.0, 0.0], None, None]
    assert grader.dimensions(items[0]) == ["Style", "Attribute - Color"]
    question = next(body for body in asked if "a hat" in body["messages"][0]["content"][0]["text"])
    assert question["temperature"] == 0 and question["model"] == "m"
    text, picture = question["messages"][0]["content"]
    assert "2. Attribute - Color: a red hat" in text["text"] and picture["image_url"]["url"].startswith(
        "data:image/png"
    )
    # a picture that the server cannot take must not end an evaluation that only this one is left of
    assert UniGenBenchGrader(ServerPointJudge(address, "m", retries=0)).grade([BLANK], items[2:]) == [None]
    by_name = load_grader(f"{address}#m", "unigenbench:x")
    assert by_name.grade([BLANK], items[:1]) == [[1.0, 0.0]]


def test_a_judge_that_is_not_there_is_said_at_once(server):
    """Not after hours of drawing, with every answer missing."""
    address, _ = server
    for url in (f"{address}/nowhere", "http://127.0.0.1:9/v1"):
        with pytest.raises(RewardModelError, match="answers no question.*REWARD_MODEL_API_KEY"):
            ServerPointJudge(url, "m", retries=0)([BLANK], ["a hat"], [POINTS])


@pytest.mark.parametrize(
    ("name", "prompts", "word"),
    [
        ("mask2former", "shapes:heldout", "geneval:FILE"),
        ("http://x/v1", "unigenbench:x", "URL#MODEL"),
        ("nothing", "geneval:x", "package.module:name"),
        ("nowhere.at:all", "geneval:x", "cannot import"),
    ],
)
def test_graders_that_do_not_exist_are_refused(name, prompts, word):
    with pytest.raises(ConfigError, match=word):
        load_grader(name, prompts)


def save_tiny_mask2former(folder):
    import transformers as t

    swin = t.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5,
        id2label={0: "dog", 1: "mouse"}, label2id={"dog": 0, "mouse": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    t.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    t.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
