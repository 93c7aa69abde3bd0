"""Finding and reading checkpoints."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from reward_models import RewardModelError, load_reward_model
from reward_models.weights import find_file, fingerprint, load_exactly, read_state

STATE = {"weight": torch.eye(2), "bias": torch.zeros(2)}


def test_all_layouts_of_a_file_are_read_alike(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "c.pt")
    torch.save({"model": STATE}, tmp_path / "d.pth")
    for file in tmp_path.iterdir():
        assert {key: value.tolist() for key, value in read_state(file).items()} == {
            "weight": [[1, 0], [0, 1]],
            "bias": [0, 0],
        }
        assert find_file(tmp_path, file.name) == find_file(file, "whatever") == file


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pt")
    torch.save({}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps(print, protocol=2))
    for name in ("no_tensors.pt", "empty.pt", "text.pt", "cut.safetensors", "pickled.pt"):
        with pytest.raises(RewardModelError, match=name):
            read_state(tmp_path / name)
    with pytest.raises(RewardModelError, match=r"has no weights\.pt"):
        find_file(tmp_path, "weights.pt")
    with pytest.raises(RewardModelError, match="Offline"):
        find_file("nobody/nothing", "weights.pt")
    with pytest.raises(RewardModelError, match="neither a file nor a folder"):
        find_file("no such folder/at all/here", "weights.pt")


def test_every_key_and_shape_must_fit():
    module = torch.nn.Linear(2, 2)
    load_exactly(module, STATE, "it")
    with pytest.raises(RewardModelError, match="it: missing keys bias; unexpected keys beta"):
        load_exactly(module, {"weight": torch.eye(2), "beta": torch.zeros(2)}, "it")
    with pytest.raises(RewardModelError, match="misshapen keys weight"):
        load_exactly(module, STATE | {"weight": torch.eye(3)}, "it")


def test_a_fingerprint_changes_with_a_value_and_not_with_the_place():
    one, same, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    same.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    same.weight.data[3, 3] += 1e-3
    assert fingerprint(one) != fingerprint(same)


def test_a_missing_package_and_a_bad_batch_size_are_named(load_scorer):
    class Needy:
        name, identity, requires = "needy", {}, ("no_such_package",)

        def score(self, images, prompts):
            raise AssertionError

    with pytest.raises(RewardModelError, match="no_such_package"):
        load_reward_model(Needy)
    with pytest.raises(RewardModelError, match="at least 1"):
        load_scorer("pickscore", batch_size=0)
