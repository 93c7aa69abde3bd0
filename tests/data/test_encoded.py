"""Rows as the training loop reads them, on the true pipeline classes at toy size."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.data import EncodedPreferences, load_preferences, select_pairs, write_preferences
from diffalign.data import rows as rows_module
from diffalign.data.cache import TensorCache
from diffalign.data.geometry import apply, plan
from diffalign.errors import ConfigError, DataError
from diffalign.pipelines import PipelineAdapter, adapter_for
from diffalign.trainers.config import PreferenceConfig
from tests.tiny import tiny_sd, tiny_sdxl

from .conftest import Rows, picture, png

Build = Callable[..., EncodedPreferences]


@pytest.fixture
def adapter() -> PipelineAdapter:
    return adapter_for(tiny_sdxl())


@pytest.fixture
def build(tmp_path: Path, adapter: PipelineAdapter) -> Build:
    """Builds from rows, a path or a dataset; settings by keyword."""

    def make(source: Any, *, adapter: PipelineAdapter = adapter, folder: str = "cache", **options: Any):
        keys = ("process_index", "num_processes", "barrier", "extra_prompts", "examples")
        outer = {key: options.pop(key) for key in keys if key in options}
        dataset = source if hasattr(source, "report") else load_preferences(source)
        config = PreferenceConfig(progress_bar=False, **options)
        return EncodedPreferences.build(dataset, adapter, config, folder=tmp_path / folder, **outer)

    return make


def count_calls(adapter: PipelineAdapter, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    calls = {"encode_images": 0, "encode_prompts": 0}
    for name in calls:
        original = getattr(adapter, name)

        def counted(batch: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += len(batch)
            return original(batch)

        monkeypatch.setattr(adapter, name, counted)
    return calls


def mixed_rows() -> Rows:
    """Two shapes, a list of three, a repeated prompt, and one picture in two rows."""
    return [
        {"prompt": "a", "images": [png(0), png(1)], "preference": [1, 0]},
        {"prompt": "b", "images": [png(2, 48, 24), png(3, 48, 24)], "preference": [0, 1]},
        {"prompt": "a", "images": [png(0), png(4), png(5)], "rank": [2, 1, 3]},
        {"prompt": "c", "images": [png(6, 40, 40), png(7, 32, 64)], "preference": [1, 0]},
    ]


def same(first: EncodedPreferences, second: EncodedPreferences, rows: int, *, flip: bool = False) -> bool:
    for row in range(rows):
        count = len(first.index.image_sizes(row))
        a, b = (encoded.example(row, range(count), flip=flip) for encoded in (first, second))
        pairs = [(a["moments"], b["moments"]), (a["size_ids"], b["size_ids"])]
        pairs += [(a["conditioning"][name], b["conditioning"][name]) for name in a["conditioning"]]
        if not all(torch.equal(x, y) for x, y in pairs):
            return False
    return True


def test_an_example_is_what_the_encoders_give(build: Build, adapter: PipelineAdapter) -> None:
    encoded = build(mixed_rows(), encode_batch_size=1, extra_prompts=["validation"])
    geometry = plan([(32, 32), (32, 32), (32, 32)], 32, multiple=16)
    pixels = apply(picture(5), geometry.placements[2], geometry.bucket)
    example = encoded.example(2, (1, 2))
    assert torch.equal(example["moments"][1], adapter.encode_images(pixels[None])[0])
    assert example["moments"].shape == (2, 8, 8, 8) and example["moments"].dtype == torch.float32
    assert example["size_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    for name, tensor in adapter.encode_prompts(["a"]).items():
        assert torch.equal(example["conditioning"][name], tensor[0])
    for name, tensor in adapter.unconditional().items():
        assert torch.equal(encoded.unconditional()[name], tensor[0])
    for name, tensor in adapter.encode_prompts(["validation"]).items():
        assert torch.equal(encoded.prompt("validation")[name], tensor[0])
    with pytest.raises(DataError, match="has no entry"):
        encoded.prompt("never seen")
    assert len(encoded) == 4 and all(type(row_id) is str for row_id in encoded.row_ids)


def test_buckets_are_latent_shapes_and_every_row_has_one(build: Build, adapter: PipelineAdapter) -> None:
    assert adapter.size_multiple == 16
    encoded = build(mixed_rows(), resolution=64)
    shapes = [encoded.bucket(row) for row in range(4)]
    assert shapes[0] == (16, 16) and shapes[1] == (20, 12)
    assert all(encoded.example(r, (0, 1))["moments"].shape[2:] == shapes[r] for r in range(4))
    assert build(mixed_rows(), resolution=64, aspect_buckets=False).bucket(1) == (16, 16)


def test_size_ids_are_each_images_own(build: Build) -> None:
    encoded = build(mixed_rows(), horizontal_flip=True, aspect_buckets=False)
    assert encoded.example(3, (1, 0))["size_ids"].tolist() == [[32, 64, 0, 16, 32, 32], [40, 40, 0, 0, 32, 32]]


def test_one_picture_twice_in_a_pair_has_one_encoding(build: Build) -> None:
    """Peers' slip 3, with every source of a difference switched on."""
    rows = [{"prompt": "p", "images": [png(1, 40, 90)] * 2, "preference": [0.5, 0.5]}]
    encoded = build(rows, random_crop=True, horizontal_flip=True)
    for flip in (False, True):
        example = encoded.example(0, (0, 1), flip=flip)
        assert torch.equal(example["moments"][0], example["moments"][1])
        assert torch.equal(example["size_ids"][0], example["size_ids"][1])


def test_flips_are_encoded_and_need_to_be_asked_for(build: Build, adapter: PipelineAdapter) -> None:
    rows = [{"prompt": "p", "images": [png(0, 32, 60), png(1, 32, 60)], "preference": [1, 0]}]
    encoded = build(rows, horizontal_flip=True, aspect_buckets=False, encode_batch_size=1)
    geometry = plan([(32, 60)] * 2, 32, multiple=16, aspect_buckets=False)
    pixels = apply(picture(1, 32, 60), geometry.placements[1], (32, 32), flip=True)
    assert torch.equal(encoded.example(0, (1,), flip=True)["moments"][0], adapter.encode_images(pixels[None])[0])
    assert not torch.equal(encoded.example(0, (1,))["moments"], encoded.example(0, (1,), flip=True)["moments"])
    with pytest.raises(ConfigError, match="horizontal_flip=true"):
        build(rows).example(0, (0, 1), flip=True)


def test_a_random_crop_is_keyed_by_seed_and_row_and_shared_in_it(build: Build) -> None:
    rows = [
        {"prompt": f"{i}", "images": [png(2 * i, 32, 96), png(2 * i + 1, 32, 96)], "rank": [1, 2]} for i in range(4)
    ]
    options: dict[str, Any] = {"random_crop": True, "aspect_buckets": False}
    first, again, other = (build(rows, seed=seed, **options) for seed in (0, 0, 1))

    def lefts(encoded: EncodedPreferences) -> list[list[float]]:
        return [encoded.example(row, (0, 1))["size_ids"][:, 3].tolist() for row in range(4)]

    assert lefts(first) == lefts(again) != lefts(other)
    assert all(a == b for a, b in lefts(first)) and len({a for a, _ in lefts(first)}) > 1
    reordered = build(rows[::-1], seed=0, **options)
    assert lefts(reordered) == lefts(first)[::-1]


def test_a_second_run_encodes_nothing(build: Build, adapter: PipelineAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(adapter, monkeypatch)
    first = build(mixed_rows())
    assert calls == {"encode_images": 8, "encode_prompts": 3}  # one of nine pictures and one of four prompts repeat
    second = build(mixed_rows())
    assert calls == {"encode_images": 8, "encode_prompts": 3} and same(first, second, 4)


def test_encoders_may_be_gone_when_the_cache_is_complete(build: Build, adapter: PipelineAdapter) -> None:
    first = build(mixed_rows())
    adapter.drop_encoders()
    assert same(first, build(mixed_rows()), 4)
    with pytest.raises(DataError, match="2 images are not in .* and the VAE is not loaded"):
        build([{"prompt": "a", "images": [png(50), png(51)], "rank": [1, 2]}])
    with pytest.raises(DataError, match="1 prompts are not in .* and the text encoders are not loaded"):
        build(mixed_rows(), extra_prompts=["new"])
    never_loaded = tiny_sdxl()
    never_loaded.vae = never_loaded.text_encoder = never_loaded.text_encoder_2 = None
    bare = adapter_for(never_loaded)
    assert same(first, build(mixed_rows(), adapter=bare), 4)
    with pytest.raises(DataError, match="the VAE: not loaded, and .* holds 0 caches of its latents"):
        build(mixed_rows(), adapter=bare, folder="elsewhere")


def test_another_encoder_has_another_cache(build: Build, adapter: PipelineAdapter) -> None:
    first = build(mixed_rows())
    other = build(mixed_rows(), adapter=adapter_for(tiny_sdxl(seed=1)))
    assert not same(first, other, 1) and same(first, build(mixed_rows()), 4)
    sd = build(mixed_rows(), adapter=adapter_for(tiny_sd()))
    assert set(sd.unconditional()) == {"prompt_embeds"} != set(first.unconditional())


def test_two_processes_give_what_one_gives(
    build: Build, tmp_path: Path, make_rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each encodes its share of whole batches, into its own shards."""
    monkeypatch.setattr(rows_module, "BLOCK", 2)
    write_preferences([*make_rows(5), *mixed_rows()], tmp_path / "table")
    dataset = load_preferences(tmp_path / "table")
    alone = build(dataset, folder="one", encode_batch_size=3, horizontal_flip=True)
    barrier, results = threading.Barrier(2), {}
    adapters = [adapter_for(tiny_sdxl()) for _ in range(2)]

    def work(index: int) -> None:
        results[index] = build(
            dataset,
            adapter=adapters[index],
            folder="two",
            encode_batch_size=3,
            horizontal_flip=True,
            process_index=index,
            num_processes=2,
            barrier=lambda: barrier.wait(60) and None,
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone.row_ids == results[0].row_ids == results[1].row_ids
    for encoded in results.values():
        assert same(alone, encoded, 9) and same(alone, encoded, 9, flip=True)
    assert len(list((tmp_path / "two").glob("latents-*/shard-*"))) == 2
    assert len(list((tmp_path / "two").glob("rows-*"))) == 5


def test_an_interrupted_run_goes_on_where_it_stopped(
    build: Build, adapter: PipelineAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(mixed_rows(), folder="whole", encode_batch_size=2)
    monkeypatch.setattr(TensorCache, "flush_seconds", -1.0)  # every batch is safe at once
    original, batches = adapter.encode_images, []

    def interrupted_once(pixels: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(pixels)

    monkeypatch.setattr(adapter, "encode_images", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        build(mixed_rows(), encode_batch_size=2)
    resumed = build(mixed_rows(), encode_batch_size=2)
    assert same(whole, resumed, 4)
    assert batches == [2] * 5  # eight pictures, and the one batch that was interrupted


def test_rows_are_not_read_again_when_the_table_is_unchanged(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_preferences(mixed_rows(), tmp_path / "table")
    first = build(tmp_path / "table")

    def refuse(*args: Any) -> None:
        raise AssertionError("rows were read again")

    with monkeypatch.context() as patch:
        patch.setattr(rows_module, "_read_block", refuse)
        assert same(first, build(tmp_path / "table"), 4)
    (stored,) = (tmp_path / "cache").glob("rows-*.npz")
    stored.write_bytes(stored.read_bytes()[:40])
    assert same(first, build(tmp_path / "table"), 4)


def test_only_what_is_compared_is_encoded(build: Build, adapter: PipelineAdapter, monkeypatch: Any) -> None:
    calls = count_calls(adapter, monkeypatch)
    dataset = load_preferences(mixed_rows())
    examples, _ = select_pairs(dataset.select([2]))
    encoded = build(dataset.select([2]), examples=examples)
    assert calls == {"encode_images": 2, "encode_prompts": 1}
    assert encoded.example(0, examples[0].candidates)["moments"].shape[0] == 2
    with pytest.raises(DataError, match="has no entry"):
        encoded.example(0, (0,))


def test_cached_precision_applies_to_latents(build: Build) -> None:
    full, half = build(mixed_rows()), build(mixed_rows(), cache_dtype="bf16")
    a, b = full.example(0, (0, 1)), half.example(0, (0, 1))
    assert torch.equal(a["moments"].bfloat16().float(), b["moments"]) and not torch.equal(a["moments"], b["moments"])
    assert torch.equal(a["conditioning"]["prompt_embeds"], b["conditioning"]["prompt_embeds"])


def test_long_prompts_are_cut_with_a_warning(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    rows = mixed_rows()
    rows[1]["prompt"] = "word " * 500
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        build(rows)
    assert "1 prompts are longer than the 77 tokens" in caplog.text and "first: word word" in caplog.text


def test_latents_that_are_not_finite_name_the_row(build: Build, adapter: PipelineAdapter) -> None:
    with torch.no_grad():
        adapter.pipeline.vae.quant_conv.bias[0] = float("inf")
    with pytest.raises(DataError, match=r"row 0, images\[0\]: its latents are not finite in vae_dtype=fp32"):
        build(mixed_rows())


def test_a_prompt_whose_embedding_is_not_finite_is_named_and_not_stored(
    build: Build, adapter: PipelineAdapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = adapter.encode_prompts

    def overflowing(bad: str) -> Callable[[list[str]], dict[str, torch.Tensor]]:
        def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
            tensors = original(prompts)
            for tensor in tensors.values():
                tensor[[prompt == bad for prompt in prompts]] = float("nan")
            return tensors

        return encode

    monkeypatch.setattr(TensorCache, "flush_seconds", -1.0)
    monkeypatch.setattr(adapter, "encode_prompts", overflowing("b"))
    with pytest.raises(DataError, match="the prompt 'b': its embedding is not finite"):
        build(mixed_rows())
    monkeypatch.setattr(adapter, "encode_prompts", original)
    fixed = build(mixed_rows())
    assert fixed.example(1, (0, 1))["conditioning"]["prompt_embeds"].isfinite().all()
    empty = {name: torch.full_like(tensor, torch.nan) for name, tensor in adapter.unconditional().items()}
    monkeypatch.setattr(adapter, "unconditional", lambda: empty)
    with pytest.raises(DataError, match="the empty prompt: its embedding is not finite"):
        build(mixed_rows(), folder="elsewhere")


def test_images_that_cannot_be_used_name_the_row(build: Build) -> None:
    rows = mixed_rows()
    rows[2]["images"][1] = rows[2]["images"][1][:-40]
    with pytest.raises(DataError, match=r"the rows, row 2, images\[1\]: the image is damaged"):
        build(rows)
    rows[2]["images"][1] = png(9, 3, 32)
    with pytest.raises(DataError, match=r"the rows, row 2, images\[1\]: 3 x 32 pixels is smaller than one latent cell"):
        build(rows)
    rows[2]["images"][1] = b"GIF89a but no"
    with pytest.raises(DataError, match=r"row 2, images\[1\]: not a readable image"):
        build(rows)


def test_a_resolution_that_does_not_fit_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="resolution: expected a multiple of 16 pixels"):
        build(mixed_rows(), resolution=40)
