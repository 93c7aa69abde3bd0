"""Public prompt sets in their own file formats, written here as their authors write them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import prompts
from diffalign.evaluation.prompt_sets import LOADERS, Point
from diffalign.evaluation.prompts import read_prompt_set, read_prompts

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    'A robot. The words "Fly, now" on it.\tOutdoor Scenes\tComplex\t\n'
    '"Quoted" from the start\tArts\tComplex\t\n'
)
COUNTING = {
    "tag": "counting",
    "include": [{"class": "bench", "count": 2}],
    "exclude": [{"class": "bench", "count": 3}],
    "prompt": "a photo of two benches",
}
POSITION = {"class": "bench", "count": 1, "position": ["left of", 0]}  # of itself
POINTS = {"Testpoints": ["Style", "Attribute - Color"], "Testpoint Description": ["ink wash", "a red hat"]}
POINTS_ZH = {"考点": ["风格", "属性-数量", "关系-3-D"], "考点对应描述": ["水墨画", "两只熊猫", "前后"]}


def csv_json(content: dict) -> str:
    return '"' + json.dumps(content, ensure_ascii=False).replace('"', '""') + '"'


def test_parti_is_tabs_without_quoting(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI, encoding="utf-8")
    found = read_prompt_set(f"parti:{tmp_path / 'PartiPrompts.tsv'}")
    assert found.prompts == ["bond", 'A robot. The words "Fly, now" on it.', '"Quoted" from the start']
    assert found.tasks == ["Abstract", "Outdoor Scenes", "Arts"]


def test_drawbench_is_a_csv_of_prompts_and_categories(tmp_path):
    (tmp_path / "d.csv").write_text('Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\n')
    found = read_prompt_set(f"drawbench:{tmp_path / 'd.csv'}")
    assert (found.prompts, found.tasks) == (["A red car.", "One cat, two dogs."], ["Colors", "Counting"])


def test_hpdv2_has_a_list_for_each_style_and_a_test_file_of_pairs(tmp_path):
    (tmp_path / "anime.json").write_text('["a girl", "a hyena"]')
    (tmp_path / "concept-art.json").write_text('["a goddess"]')
    found = read_prompt_set(f"hpdv2:{tmp_path}")
    assert (found.prompts, found.tasks) == (["a girl", "a hyena", "a goddess"], ["anime", "anime", "concept-art"])
    pair = {"prompt": "a wave", "image_path": ["1.jpg", "2.jpg"], "rank": [1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([pair, pair]))
    assert read_prompts(f"hpdv2:{tmp_path / 'test.json'}") == ["a wave"]


def test_pickapic_captions_come_once(tmp_path):
    pq.write_table(
        pa.table({"caption": ["a cat", "a cat", None, "a dog"], "label_0": [1, 0, 1, 0.5]}), tmp_path / "t.parquet"
    )
    assert read_prompts(f"pickapic:{tmp_path}") == ["a cat", "a dog"]


def test_geneval_keeps_what_must_be_in_the_picture(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(COUNTING) + "\n")
    found = read_prompt_set(f"geneval:{tmp_path / 'm.jsonl'}")
    assert (found.prompts, found.tasks, found.items) == (["a photo of two benches"], ["counting"], [COUNTING])


def test_dpg_has_a_prompt_in_each_file_in_the_order_of_numbers(tmp_path):
    for name, text in (("10", "ten\nlines"), ("2", "two"), ("COCOval_1", "a name")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_prompts(f"dpg:{tmp_path}") == ["two", "ten lines", "a name"]


def test_compbench_takes_its_validation_files(tmp_path):
    for name, text in (("color_val", "a red car\na blue hat\n"), ("color_train", "no"), ("3d_spatial_val", "near\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    found = read_prompt_set(f"t2i-compbench:{tmp_path}")
    assert dict(zip(found.prompts, found.tasks, strict=True)) == {
        "a red car": "color",
        "a blue hat": "color",
        "near": "3d_spatial",
    }
    assert read_prompt_set(f"t2i-compbench:{tmp_path / 'color_train.txt'}").prompts == ["no"]
    (tmp_path / "shape_val.txt").write_text("a red car\n")  # again, under a later task
    again = read_prompt_set(f"t2i-compbench:{tmp_path}")
    assert again.tasks[again.prompts.index("a red car")] == "color" and "shape" not in again.tasks


def test_unigenbench_has_points_in_english_and_chinese(tmp_path):
    (tmp_path / "en.csv").write_text(f'index,prompt_en,sub_dims_en\n0,"Ink, a hat.",{csv_json(POINTS)}\n')
    (tmp_path / "zh.csv").write_text(f"index,prompt_zh,sub_dims_zh\n0,熊猫,{csv_json(POINTS_ZH)}\n", encoding="utf-8")
    found = read_prompt_set(f"unigenbench:{tmp_path / 'en.csv'}")
    assert found.items == [("Ink, a hat.", [Point("Style", "ink wash"), Point("Attribute - Color", "a red hat")])]
    assert [p.dimension for p in read_prompt_set(f"unigenbench:{tmp_path / 'zh.csv'}").items[0][1]] == [
        "风格",
        "属性 - 数量",
        "关系 - 3-D",
    ]


def test_a_limit_takes_all_tasks_in_turn(tmp_path):
    rows = "".join(f"{task} {i}\t{task}\tBasic\t\n" for task in ("A", "B", "C") for i in range(5))
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\tChallenge\tNote\n" + rows)
    assert read_prompt_set(f"parti:{tmp_path / 'p.tsv'}", limit=4).prompts == ["A 0", "A 1", "B 0", "C 0"]


def test_the_built_in_sets_have_tasks():
    assert set(read_prompt_set("shapes:heldout").tasks) == {"single", "pair", "count"}
    assert read_prompt_set(["a cat"]).tasks is None


def test_more_built_in_prompts_than_there_are_is_one_sentence(monkeypatch):
    def few(count, seed, **options):
        raise ValueError("the shapes world has fewer; ask for fewer.")

    monkeypatch.setattr(prompts, "sample_captions", few)  # counting them all takes a minute
    with pytest.raises(ConfigError, match="ask for fewer"):
        read_prompts("shapes:heldout", limit=20_000)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("parti", "Text\tCategory\nx\ty\n", "row 1: expected the column Prompt"),
        ("drawbench", "Prompts,Category\n,Colors\n", "row 1, Prompts: expected a text"),
        ("hpdv2", "{}", "expected a JSON list"),
        ("pickapic", "no parquet", "Parquet with the column 'caption'"),
        ("geneval", '{"prompt": "x"}\n', "line 1: expected an object with tag"),
        ("geneval", json.dumps(COUNTING | {"include": [{"class": "bench"}]}), "line 1: expected parts with class and"),
        ("geneval", json.dumps(COUNTING | {"exclude": ["bench"]}), "line 1: expected parts with class and count"),
        ("geneval", json.dumps(COUNTING | {"include": [POSITION]}), "number of an earlier part"),
        ("parti", "Prompt\tCategory\n" + "x" * 200_000 + "\ty\n", "as a table"),
        ("dpg", "x", "folder of .txt"),
        ("unigenbench", 'index,prompt_en,sub_dims_en\n0,x,"{}"\n', "row 1: expected as many Testpoints"),
    ],
)
def test_files_of_another_form_are_refused_by_place(tmp_path, name, text, word):
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError, match=word):
        read_prompt_set(f"{name}:{tmp_path / 'f'}")


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_file_says_what_the_set_takes(name):
    with pytest.raises(ConfigError, match=f"{name}: takes"):
        read_prompts(f"{name}:/nowhere")
